"""Fine-tunes a model with LoRA on your own questions.

python examples/lora.py Qwen/Qwen2.5-VL-3B-Instruct train.jsonl runs/mine      (a row of each layout: docs/data.md)
dualspeed merge runs/mine merged                                               (makes an ordinary checkpoint of it)
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.data import VisionLanguageCollator, load_examples

name, data, output, *options = sys.argv[1:]

processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="bfloat16")
model = get_peft_model(model, LoraConfig(r=16, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"))

args = DualSpeedTrainingArguments(
    output,
    per_device_train_batch_size=8,
    learning_rate=2e-4,
    warmup_steps=0.03,
    bf16="--cpu" not in options,
    use_cpu="--cpu" in options,
    activation_checkpointing=True,
    slow_mode_splits="auto",
    save_strategy="no",
    report_to="none",
    logging_steps=1,
)
collator = VisionLanguageCollator(processor)
trainer = DualSpeedTrainer(model, args, collator, load_examples(data), processing_class=processor)
trainer.train()
trainer.save_model()
trainer.create_model_card()
