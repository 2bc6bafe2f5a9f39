"""The models and batches of `dualspeed bench`, in random weights: the sizes of real models, and small ones like them.

| shape | real model | sizes from | per sample |
| --- | --- | --- | --- |
| llava-1.5 | LLaVA-1.5-7B: Vicuna-7B (6.48 B) behind CLIP ViT-L/14 (302 M) | config.json of llava-hf/llava-1.5-7b-hf | one image of 336 px, 576 tokens |
| llava-next | LLaVA-NeXT-7B: the same two | llava-hf/llava-v1.6-vicuna-7b-hf | 5 tiles, 576 + 48 x (48 + 1) tokens |
| qwen2.5-vl | Qwen2.5-VL-7B (6.53 B) with its tower (630 M) | Qwen/Qwen2.5-VL-7B-Instruct | one image of 896 px, 4096 patches, 1024 tokens |
| smolvlm | SmolVLM-500M: SmolLM2-360M (315 M) behind SigLIP-B/16 (85 M) | HuggingFaceTB/SmolVLM-500M-Instruct | 17 tiles of 512 px, 64 tokens each |

Parameters are those of the layers. Small language models have about 25 M of them, and the real proportions of
feed-forward width, shared keys and vocabulary. The depth of a small tower keeps the real ratio of FLOPs between encoding
a visual token and a token's forward pass in the language model ([`encoder_ratio`], attention included), as closely as
whole layers and 64-wide heads allow: 0.049, 0.045, 0.41 and 4.2 in the real models. The share of attention in the
language model's work cannot be kept at this width: it is 0.20 instead of 0.03 at 776 tokens.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    SmolVLMConfig,
)

from ..data.collators import VisionLanguageCollator
from ..data.media import pattern
from ..models.adapters import add_lora
from ..models.components import freeze_roles

HEAD = 64
PAD, IMAGE_ID, VIDEO_ID, VISION_START, VISION_END, FIRST_WORD = 0, 3, 4, 5, 6, 8
SUPERVISED_TOKENS = 64
WINDOW = 8  # patches along the edge of a window of Qwen2.5-VL's tower: 112 px
# From LLaVA's own LoRA script: https://github.com/haotian-liu/LLaVA, scripts/v1_5/finetune_lora.sh
LORA = {
    "r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "target_modules": r".*(language_model|text_model).*\.(q|k|v|o|gate|up|down)_proj",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a language model and its vision tower."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tower_hidden: int
    tower_layers: int
    tower_intermediate: int
    tower_heads: int

    def resized(self, hidden: int | None, layers: int | None) -> Sizes:
        """Sizes with another width (a multiple of 64) or depth of the language model, and the rest in proportion."""
        wide, deep = (hidden or self.hidden) / self.hidden, (layers or self.layers) / self.layers
        if wide == deep == 1:
            return self
        heads, tower_heads = max(1, round(self.heads * wide)), max(1, round(self.tower_heads * wide))
        tower = self.tower_hidden // self.tower_heads
        return replace(
            self,
            hidden=hidden or self.hidden,
            layers=layers or self.layers,
            intermediate=round(self.intermediate * wide),
            heads=heads,
            kv_heads=max(k for k in range(1, heads + 1) if not heads % k and (k == 1 or k <= self.kv_heads * wide)),
            tower_hidden=tower * tower_heads,
            tower_layers=max(2, round(self.tower_layers * deep)),
            tower_intermediate=round(self.tower_intermediate * tower_heads / self.tower_heads),
            tower_heads=tower_heads,
        )


@dataclass(frozen=True)
class Shape:
    """A kind of model and batch.

    Args:
        name (`str`): Name on the command line.
        kind (`str`): transformers' model type.
        like (`str`): The real model.
        real, small (`Sizes`): Sizes of the real model, and of a small one for a CPU.
        batch (`int`): Samples: enough for parts of a slow step that are as small as a fast step.
        image_size, patch, merge (`int`): Edges of a tile and of a patch in pixels, and of a token in patches.
        tiles (`int`): Tiles of an image. A sample has one image.
    """

    name: str
    kind: str
    like: str
    real: Sizes
    small: Sizes
    batch: int
    image_size: int = 336
    patch: int = 14
    merge: int = 1
    tiles: int = 1

    @property
    def grid(self) -> int:
        """Patches along the edge of a tile."""
        return self.image_size // self.patch

    @property
    def visual_tokens(self) -> int:
        """Placeholders of a sample."""
        if self.kind == "llava_next":  # the whole image, and 2 x 2 tiles with a mark at the end of each row
            return self.grid**2 + 2 * self.grid * (2 * self.grid + 1)
        return self.tiles * (self.grid // self.merge) ** 2

    @property
    def separators(self) -> int:
        """Text tokens between the tiles."""
        return self.tiles - 1 if self.kind == "smolvlm" else 0

    def sizes(self, scale: str, hidden: int | None = None, layers: int | None = None) -> Sizes:
        """The sizes at `scale` "small" or "full", with another width or depth where one is given."""
        return (self.real if scale == "full" else self.small).resized(hidden, layers)


VICUNA = {"hidden": 4096, "layers": 32, "intermediate": 11008, "heads": 32, "kv_heads": 32, "vocabulary": 32064}
CLIP_LARGE = {"tower_hidden": 1024, "tower_layers": 24, "tower_intermediate": 4096, "tower_heads": 16}
SMALL_LLAMA = {"hidden": 512, "layers": 8, "intermediate": 1376, "heads": 8, "kv_heads": 8, "vocabulary": 1024}
SMALL_CLIP = {"tower_hidden": 128, "tower_intermediate": 512, "tower_heads": 2}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            "llava-1.5",
            "llava",
            "LLaVA-1.5-7B",
            Sizes(**VICUNA, **CLIP_LARGE),
            Sizes(**SMALL_LLAMA, **SMALL_CLIP, tower_layers=5),
            batch=8,
        ),
        Shape(
            "llava-next",
            "llava_next",
            "LLaVA-NeXT-7B",
            Sizes(**VICUNA, **CLIP_LARGE),
            Sizes(**SMALL_LLAMA, **SMALL_CLIP, tower_layers=7),
            batch=6,
            tiles=5,
        ),
        Shape(
            "qwen2.5-vl",
            "qwen2_5_vl",
            "Qwen2.5-VL-7B",
            Sizes(3584, 28, 18944, 28, 4, 152064, 1280, 32, 3420, 16),
            Sizes(512, 5, 2706, 8, 1, 3840, 128, 9, 342, 2),
            batch=6,
            image_size=896,
            merge=2,
        ),
        Shape(
            "smolvlm",
            "smolvlm",
            "SmolVLM-500M",
            Sizes(960, 32, 2560, 15, 5, 49280, 768, 12, 3072, 12),
            Sizes(512, 9, 1365, 8, 2, 7296, 256, 7, 1024, 4),
            batch=6,
            image_size=512,
            patch=16,
            merge=4,
            tiles=17,
        ),
    )
}


def encoder_ratio(shape: Shape, sizes: Sizes, text_tokens: int = 200) -> float:
    """FLOPs of encoding a visual token over those of a token's forward pass in the language model's layers."""
    # Language model: 2 FLOPs per weight of queries, output, keys, values and feed-forward, and attention to all tokens.
    tokens, head = shape.visual_tokens + text_tokens, sizes.hidden // sizes.heads
    layer = 2 * sizes.hidden * (sizes.hidden + sizes.kv_heads * head) + 3 * sizes.hidden * sizes.intermediate
    language = sizes.layers * (2 * layer + 4 * tokens * sizes.hidden)
    # Tower: the same per patch, with attention to all patches of a tile, or of a window in most layers of Qwen2.5-VL.
    width, patches = sizes.tower_hidden, shape.tiles * shape.grid**2
    matrices = 3 if shape.kind == "qwen2_5_vl" else 2
    layer = 4 * width**2 + matrices * width * sizes.tower_intermediate
    seen = sizes.tower_layers * shape.grid**2
    if shape.kind == "qwen2_5_vl":
        full = len(full_attention(sizes))
        seen = full * shape.grid**2 + (sizes.tower_layers - full) * min(WINDOW, shape.grid) ** 2
    tower = patches * (2 * sizes.tower_layers * layer + 4 * seen * width)
    return tower / shape.visual_tokens / language


def full_attention(sizes: Sizes) -> list[int]:
    """Layers of Qwen2.5-VL's tower with full attention instead of windows: every eighth, or at least the last."""
    return list(range(7, sizes.tower_layers, 8)) or [sizes.tower_layers - 1]


def build_model(
    shape: Shape, sizes: Sizes, text_tokens: int, dtype: torch.dtype, device: torch.device, seed: int, lora: bool
) -> PreTrainedModel:
    """A model in random weights on `device`, with a frozen tower. With `lora`, it trains adapters and the projector."""
    config = build_config(shape, sizes, shape.visual_tokens + text_tokens)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        return prepared(model, lora)


def prepared(model: PreTrainedModel, lora: bool) -> PreTrainedModel:
    """Freezes the tower, and adds adapters with `lora`."""
    outer = model
    if lora:
        outer = add_lora(model, LORA).to(model.dtype)
        for name, parameter in model.named_parameters():
            if "projector" in name or "connector" in name or "merger" in name:
                parameter.requires_grad_(True)
    freeze_roles(model, train_vision_tower=False, train_projector=True, train_language_model=True)
    return outer


def build_config(shape: Shape, sizes: Sizes, length: int) -> PreTrainedConfig:
    """The configuration of a shape, for sequences of `length` tokens."""
    text = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "max_position_embeddings": length,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tower = {
        "hidden_size": sizes.tower_hidden,
        "intermediate_size": sizes.tower_intermediate,
        "num_hidden_layers": sizes.tower_layers,
        "num_attention_heads": sizes.tower_heads,
        "image_size": shape.image_size,
        "patch_size": shape.patch,
    }
    if shape.kind == "qwen2_5_vl":
        return qwen_config(shape, sizes, text)
    if shape.kind == "smolvlm":
        text = LlamaConfig(**text)
        return SmolVLMConfig(vision_config=tower, text_config=text, image_token_id=IMAGE_ID, scale_factor=shape.merge)
    parts = {"vision_config": CLIPVisionConfig(**tower), "text_config": LlamaConfig(**text)}
    common = {**parts, "image_token_index": IMAGE_ID, "image_seq_length": shape.visual_tokens}
    if shape.kind == "llava":
        return LlavaConfig(**common)
    return LlavaNextConfig(**common, image_grid_pinpoints=[[2 * shape.image_size] * 2])


def qwen_config(shape: Shape, sizes: Sizes, text: dict) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL with the real proportions of its M-RoPE sections, 16 : 24 : 24, and windows of 112 px."""
    half = sizes.hidden // sizes.heads // 2
    time = half // 4
    sections = [time, (half - time) // 2, half - time - (half - time) // 2]
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": sizes.tower_layers,
            "hidden_size": sizes.tower_hidden,
            "intermediate_size": sizes.tower_intermediate,
            "num_heads": sizes.tower_heads,
            "patch_size": shape.patch,
            "spatial_merge_size": shape.merge,
            "window_size": WINDOW * shape.patch,
            "fullatt_block_indexes": full_attention(sizes),
            "out_hidden_size": sizes.hidden,
        },
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def build_batch(shape: Shape, sizes: Sizes, rows: int, text_tokens: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch without padding, on the CPU: two text tokens, the image, the other text tokens, the last supervised."""
    generator = torch.Generator().manual_seed(seed)
    # Ids (rows, visual + text tokens); separators of tiles are among the text tokens.
    words = torch.randint(FIRST_WORD, sizes.vocabulary, (rows, text_tokens), generator=generator)
    ids = torch.cat([words[:, :2], placed(shape, words), words[:, 2 + shape.separators :]], dim=1)
    if shape.kind == "qwen2_5_vl":
        ids[:, 1], ids[:, 2 + shape.visual_tokens] = VISION_START, VISION_END
    labels = ids.clone()
    labels[:, : -supervised_tokens(text_tokens - shape.separators)] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {**batch, **pixels(shape, rows, ids, generator)}


def supervised_tokens(text_tokens: int) -> int:
    """Supervised positions per sample."""
    return min(SUPERVISED_TOKENS, text_tokens // 2)


def placed(shape: Shape, words: torch.Tensor) -> torch.Tensor:
    """Placeholders `(rows, visual_tokens + separators)`, with a word between tiles where the model has separators."""
    image = words.new_full((len(words), shape.visual_tokens), IMAGE_ID)
    if not shape.separators:
        return image
    # Append one word to each of the tiles (rows, tiles, tokens), and drop the last.
    tiles = image.view(len(words), shape.tiles, -1)
    marks = torch.nn.functional.pad(words[:, 2 : 2 + shape.separators], (0, 1))
    return torch.cat([tiles, marks[..., None]], dim=2).flatten(1)[:, :-1]


def pixels(shape: Shape, rows: int, ids: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Noise in the format of the model's processor."""
    size = shape.image_size
    if shape.kind == "qwen2_5_vl":
        values = 3 * 2 * shape.patch**2  # two frames: a still image is repeated
        return {
            "pixel_values": torch.randn(rows * shape.grid**2, values, generator=generator),
            "image_grid_thw": torch.tensor([[1, shape.grid, shape.grid]] * rows),
            "mm_token_type_ids": (ids == IMAGE_ID).long(),
        }
    if shape.kind == "llava":
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=generator)}
    found = {"pixel_values": torch.randn(rows, shape.tiles, 3, size, size, generator=generator)}
    return found if shape.kind == "smolvlm" else {**found, "image_sizes": torch.tensor([[2 * size, 2 * size]] * rows)}


def given_model(
    name: str, dtype: torch.dtype, device: torch.device, lora: bool
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor from a folder or the Hub."""
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device)
    return prepared(model, lora), AutoProcessor.from_pretrained(name)


def given_batch(
    processor: ProcessorMixin, rows: int, text_tokens: int, width: int, height: int | None = None
) -> dict[str, torch.Tensor]:
    """A batch of drawn images, square without a height, each with a question and an answer, together about
    `text_tokens` tokens."""
    words = " ".join(f"{number} and" for number in range(text_tokens))
    ids = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    supervised = supervised_tokens(text_tokens)
    answer = processor.tokenizer.decode(ids[:supervised])
    question = processor.tokenizer.decode(ids[supervised:text_tokens])
    said = [{"type": "image"}, {"type": "text", "text": question}]
    turns = [
        {"role": "user", "content": said},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    image = pattern(width, height or width)
    return dict(VisionLanguageCollator(processor)([{"messages": turns, "images": [image]}] * rows))
