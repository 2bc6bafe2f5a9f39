"""The LLaVA built from scratch: it trains, it saves, and transformers alone loads it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from PIL import Image

from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

TEXTS = ["what is the red shape?", "a circle", "Two of them."]
SMALL = {"image_size": 16, "vision_hidden_size": 16, "hidden_size": 32, "layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def tiny():
    return build_tiny_llava(TEXTS, **SMALL)


def conversation(answer: str = "a circle") -> dict:
    return {
        "messages": [
            {"role": "user", "content": "<image> what is the red shape?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "<image><image>Two of them."},
            {"role": "assistant", "content": "circle"},
        ],
        "images": [Image.new("RGB", (30, 20), color) for color in ("red", "green", "blue")],
    }


def test_chat_template(tiny):
    _, processor = tiny
    part = {"type": "image"}
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": [part, part, {"type": "text", "text": "what?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a circle"}]},
        {"role": "user", "content": "the shape"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert text == ("SYSTEM: a USER: <image>\n<image>\nwhat? ASSISTANT: a circle</s>USER: the shape ASSISTANT:")


def test_several_turns_and_images_train_every_weight(tiny):
    model, processor = tiny
    batch = VisionLanguageCollator(processor)([conversation(), {"messages": conversation()["messages"][1:2]}])
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [48, 0]
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == "a circle </s> circle </s>"
    model.zero_grad()
    model(**batch).loss.backward()
    unused = [name for name, weight in model.named_parameters() if weight.grad is None]
    # CLIP normalises only its pooled output with this layer; LLaVA never uses it.
    assert all("post_layernorm" in name for name in unused)


def test_words_and_special_tokens(tiny):
    model, processor = tiny
    tokenizer = processor.tokenizer
    ids = tokenizer("what is Two? unheard")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "what", "is", "Two", "?", "<unk>"]
    text_config = model.config.text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        wanted = getattr(tokenizer, name)
        assert wanted is not None
        assert getattr(text_config, name) == getattr(model.generation_config, name) == wanted
    assert text_config.vocab_size == len(tokenizer) == model.lm_head.weight.shape[0]
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first, _ = build_tiny_llava(TEXTS, seed=3, **SMALL)
    assert torch.equal(torch.rand(1), expected)
    second, _ = build_tiny_llava(reversed(TEXTS), seed=3, **SMALL)
    other, _ = build_tiny_llava(TEXTS, seed=4, **SMALL)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


LOAD_ALONE = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = sys.argv[1]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": "what is the red shape?"}]
messages = [{"role": "user", "content": content}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.new("RGB", (30, 20), "red"), text=text, return_tensors="pt")
with torch.no_grad():
    torch.save(model(**inputs).logits, folder + "/logits.pt")
model.generate(**inputs, max_new_tokens=2)
assert "hf_dualspeed" not in sys.modules
"""


def test_transformers_alone_loads_what_was_saved(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", LOAD_ALONE, str(tmp_path)], check=True, cwd=tmp_path, timeout=900)
    content = [{"type": "image"}, {"type": "text", "text": "what is the red shape?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.new("RGB", (30, 20), "red"), text=text, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"image_size": 18}, "`image_size` must be a positive multiple of `patch_size`, got image_size=18"),
        ({"vision_hidden_size": 15}, "`vision_hidden_size` must be a positive multiple of `heads`"),
        ({"hidden_size": 30}, r"`hidden_size` must be a positive multiple of `2 \* heads`.* Use 32"),
        ({"layers": 0}, r"`layers` must be in \[1, inf\), got 0"),
        ({"vision_layers": 0}, r"`vision_layers` must be in \[1, inf\), got 0"),
    ],
)
def test_impossible_sizes(option, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_llava(TEXTS, **(SMALL | option))
