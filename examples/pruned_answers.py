"""Answers a question about one picture from all visual tokens, and from what each pruner keeps of them.

python examples/pruned_answers.py llava-hf/llava-1.5-7b-hf photo.jpg "What is on the table?"
"""

import sys
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_dualspeed import AutoPruner, prune_inputs

name, picture, question = sys.argv[1:]

device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()
turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
inputs = processor(images=[Image.open(picture).convert("RGB")], text=prompt, return_tensors="pt").to(
    device, model.dtype
)

model.generate(**inputs, max_new_tokens=1)  # the first answer takes longer, because it sets things up
for pruner in (None, "divprune", "grid", "random", "tome"):
    start = time.perf_counter()
    # `inputs` stay as they are; what is generated from is a shorter copy.
    short = inputs if pruner is None else prune_inputs(model, inputs, AutoPruner.from_name(pruner, pruning_ratio=0.9))
    length = short["attention_mask"].shape[1]
    answer = model.generate(**short, max_new_tokens=16, do_sample=False)[0]
    # Behind ids, the answer follows the prompt; behind embeddings, which Llama 4 is given, it stands alone.
    answer = answer if short.get("input_ids") is None else answer[length:]
    seconds = time.perf_counter() - start
    said = processor.decode(answer, skip_special_tokens=True)
    print(f"{pruner or 'all':>9}: {length:5} tokens, {seconds:.2f} s: {said}")
