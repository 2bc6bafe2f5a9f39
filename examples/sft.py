"""The same with TRL: its SFTTrainer, its data formats, and DualSpeed's steps.

python examples/sft.py HuggingFaceTB/SmolVLM-256M-Instruct trl-lib/llava-instruct-mix runs/sft
"""

import sys

from datasets import Image, List
from peft import LoraConfig

from hf_dualspeed import DualSpeedSFTConfig, DualSpeedSFTTrainer
from hf_dualspeed.data import load_examples

name, data, output, *options = sys.argv[1:]

args = DualSpeedSFTConfig(
    output,
    max_length=None,  # pictures are many tokens, and none may be cut off
    per_device_train_batch_size=4,
    pruning_ratio=0.9,
    slow_mode_ratio=0.05,
    bf16="--cpu" not in options,
    use_cpu="--cpu" in options,
    save_strategy="no",
    report_to="none",
)
peft_config = LoraConfig(r=16, target_modules=r".*(text_model|language_model).*\.(q|k|v|o)_proj")
dataset = load_examples(data).cast_column("images", List(Image()))  # decoded, as TRL's collator takes them
trainer = DualSpeedSFTTrainer(name, args, train_dataset=dataset, peft_config=peft_config)
trainer.train()
trainer.save_model()
