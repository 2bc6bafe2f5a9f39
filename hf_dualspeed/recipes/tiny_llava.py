"""A LLaVA small enough to train from scratch on a CPU, from classes of transformers and without a download."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ..utils.validation import check_range, checked

UNK, PAD, BOS, EOS, IMAGE = SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() + ': ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@checked
def build_tiny_llava(
    texts: Iterable[str],
    *,
    image_size: int = 64,
    patch_size: int = 4,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
    hidden_size: int = 192,
    layers: int = 4,
    heads: int = 4,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Builds a small LLaVA and its processor from scratch.

    Both are plain classes of transformers. After `save_pretrained`, `AutoModelForImageTextToText` and `AutoProcessor`
    load them without this library.

    Args:
        texts (`Iterable[str]`): Their words become the tokenizer's vocabulary. Other words become `<unk>`.
        image_size (`int`, *optional*, defaults to 64): Edge of the square that images are cropped to.
        patch_size (`int`, *optional*, defaults to 4): Makes `(image_size / patch_size)^2` visual tokens.
        vision_hidden_size (`int`, *optional*, defaults to 64): Width of the vision tower.
        vision_layers (`int`, *optional*, defaults to 2): Layers of the vision tower.
        hidden_size (`int`, *optional*, defaults to 192): Width of the language model.
        layers (`int`, *optional*, defaults to 4): Layers of the language model.
        heads (`int`, *optional*, defaults to 4): Attention heads of both. Divides both widths.
        seed (`int`, *optional*, defaults to 0): Seed of the weights. The global generator is left alone.

    Returns:
        `tuple[LlavaForConditionalGeneration, LlavaProcessor]`
    """
    _check_divisible("image_size", image_size, "patch_size", patch_size)
    _check_divisible("vision_hidden_size", vision_hidden_size, "heads", heads)
    # Rotary embeddings need an even width per head.
    _check_divisible("hidden_size", hidden_size, "2 * heads", 2 * heads)
    check_range("vision_layers", vision_layers, 1)
    check_range("layers", layers, 1)
    tokenizer = word_tokenizer(texts)
    vision = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=vision_hidden_size,
        intermediate_size=4 * vision_hidden_size,
        num_hidden_layers=vision_layers,
        num_attention_heads=heads,
    )
    visual_tokens = (image_size // patch_size) ** 2
    language = language_config(tokenizer, hidden_size, layers, heads, visual_tokens)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=visual_tokens,
        # LLaVA's default, the last layer but one, would waste one of the few layers.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return random_model(config, seed), _processor(tokenizer, image_size, patch_size)


def random_model(config: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
    )
    return model


def language_config(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, heads: int, visual_tokens: int
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        # Room for several images and a conversation.
        max_position_embeddings=max(1024, 8 * visual_tokens),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words and punctuation marks of `texts` and of the chat template."""
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {word for text in (*texts, "SYSTEM USER ASSISTANT :") for word, _ in split.pre_tokenize_str(text)}
    vocab = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *sorted(words - {*SPECIAL_TOKENS})])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token=UNK))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="right",
    )


def _processor(tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int) -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        # CLIP's class token, which the strategy "default" drops.
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _check_divisible(name: str, value: int, divisor_name: str, divisor: int) -> None:
    if value <= 0 or divisor <= 0 or value % divisor:
        usable = max(divisor, 1) * max(1, round(value / max(divisor, 1)))
        raise ValueError(
            f"`{name}` must be a positive multiple of `{divisor_name}`, got {name}={value} and "
            f"{divisor_name}={divisor}. Use {usable}, for example."
        )
