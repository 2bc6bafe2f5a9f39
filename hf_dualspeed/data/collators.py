"""Collators: from conversations with images to batches, whose labels contain no visual tokens.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ProcessorMixin

from ..utils.validation import check_choice, check_range, require
from .conversations import sample_name, to_messages
from .labels import check_texts, place, recorded
from .media import IMAGE_ERRORS, UNREADABLE_IMAGES, open_image, open_video

logger = logging.getLogger(__name__)

PIXEL_INPUTS = ("pixel_values", "image_patches", "input_features", "input_values", "audio_input_ids")

IGNORED = -100


def encode(
    processor: ProcessorMixin,
    texts: list[str],
    images: list[list[Image.Image]],
    videos: list[list[np.ndarray]] | None = None,
    **options: Any,
) -> dict:
    """Calls the processor on rendered conversations; `images` and `videos` hold a list, possibly empty, per text."""
    bos = processor.tokenizer.bos_token
    options |= {"text": texts, "padding": True, "return_tensors": "pt"}
    # Some templates write the BOS themselves; the tokenizer must not add a second one.
    options["add_special_tokens"] = not (bos and texts[0].startswith(bos))
    if videos and any(videos):
        # The frames were chosen already; the processor must not sample from them.
        options |= {"videos": [clip for clips in videos for clip in clips], "do_sample_frames": False}
    if not any(images):
        return processor(images=None, **options)
    try:
        return processor(images=images, **options)
    except ValueError:
        if any(len(row) != 1 for row in images):
            raise
        # Processors for a single image per text, such as GOT-OCR2, take no lists of lists.
        return processor(images=[row[0] for row in images], **options)


def assistant_spans(render: Callable[..., str], messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation and finds the characters that the assistant has to produce.

    A turn starts where the messages before it (with the generation prompt) end, and ends where the messages up to it
    end. This works for every template that renders these as prefixes of the whole conversation.

    Returns:
        The rendered text, and `(start, end)` of each assistant turn, including its end-of-turn token.

    Raises:
        ValueError: the template does not render prefixes.
    """
    text = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Most templates fail on an empty conversation.
        before = render(messages[:index], add_generation_prompt=True) if index else ""
        after = render(messages[: index + 1])
        for what, prefix in (("before it plus the generation prompt", before), ("up to it", after)):
            if not text.startswith(prefix):
                raise ValueError(
                    f"The chat template does not render conversations step by step: the messages {what} "
                    f"(assistant message {index}) render to {prefix[-80:]!r}, which the whole conversation "
                    "does not begin with. Pass a processor whose `chat_template` keeps earlier turns "
                    "unchanged, such as a training template."
                )
        spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return text, spans


class VisionLanguageCollator:
    """Makes a batch with labels from conversations in any layout that [`to_messages`] reads.

    Labels hold every assistant turn with its end-of-turn token; everything else is -100. Samples with several images,
    one or none may share a batch. The examples stay unchanged. Works with any processor that passes each conversation
    to a fast tokenizer as a whole; it raises if a label's place is not certain.

    Args:
        processor (`ProcessorMixin`): A processor of transformers with a chat template and a fast tokenizer.
        max_length (`int`, *optional*): Longer samples lose their end, but never visual tokens.
        unreadable_images (`str`, *optional*, defaults to `"raise"`): What to do with a broken image: `"raise"` a
            `ValueError`, or `"skip"` the sample, log it and count it in `skipped` (per data loader worker).
        image_folder (`str`, *optional*): Folder that relative image paths start from.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        max_length: int | None = None,
        unreadable_images: str = "raise",
        image_folder: str | None = None,
    ):
        check_choice("unreadable_images", unreadable_images, UNREADABLE_IMAGES)
        if max_length is not None:
            check_range("max_length", max_length, 1, off="Use None to keep samples whole.")
        if not processor.tokenizer.is_fast:
            raise ValueError(
                f"`processor` must have a fast tokenizer, got {type(processor.tokenizer).__name__}: labels "
                "need the characters of each token. Load it with AutoProcessor.from_pretrained(...)."
            )
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise ValueError("`processor` has no chat template. Set `processor.chat_template`, a Jinja string.")
        self.processor = processor
        self.max_length = max_length
        self.unreadable_images = unreadable_images
        self.image_folder = image_folder
        self.skipped = 0
        self._warned = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates examples.

        Returns:
            `dict` with `input_ids`, `attention_mask` and `labels`, each `(B, S)`, and the processor's other outputs,
            such as `pixel_values`.

        Raises:
            TypeError: an image or a video is given as something else.
            ValueError: a sample or an image cannot be read, a text holds a placeholder, the template rewrites earlier
                turns, the processor hides where the text went, or `max_length` would cut into an image.
        """
        samples = [sample for index, example in enumerate(examples) if (sample := self._read(index, example))]
        if not samples:
            raise ValueError(
                f"All {len(examples)} samples of the batch were left out because of unreadable images. "
                "Repair the images, or make the batch larger."
            )
        rendered = [assistant_spans(self._render, sample["messages"]) for sample in samples]
        texts = [text for text, _ in rendered]
        self._warn_without_end(rendered)
        batch, tokenized = recorded(self.processor, lambda processor: self._encode(processor, texts, samples))
        # Masks (B, S): tokens of assistant turns, and tokens in place of placeholders.
        supervised, inserted = place(self.processor, batch, tokenized, rendered)
        self._add_token_types(batch, supervised)
        batch["labels"] = batch["input_ids"].masked_fill(~supervised, IGNORED)
        if self.max_length is not None:
            self._truncate(batch, inserted, [sample["name"] for sample in samples])
        return dict(batch)

    def _encode(self, processor: ProcessorMixin, texts: list[str], samples: list[dict]) -> dict:
        images, videos = ([sample[kind] for sample in samples] for kind in ("images", "videos"))
        if any(videos) and getattr(processor, "video_processor", None) is None:
            raise ValueError(
                f"The batch has videos, but `processor` ({type(processor).__name__}) has no video processor. Video "
                "processors of transformers need the package torchvision; where the family has none, pass the frames "
                "as `images`."
            )
        return encode(processor, texts, images, videos)

    def _add_token_types(self, batch: dict, supervised: torch.Tensor) -> None:
        """Adds token types if the model needs them and the processor leaves them out."""
        if "labels" in batch and "token_type_ids" in batch:
            # A processor that makes labels itself (-100 where the type is 0) serves a prefix language model. Prefix
            # tokens see each other, so the prefix must end at the first answer, (B, S): a later question of type 0
            # would show that answer to the tokens that predict it.
            suffix = supervised.cumsum(1) > 0
            batch["token_type_ids"] = (suffix & batch["attention_mask"].bool()).to(batch["token_type_ids"].dtype)
        if any(key.endswith("grid_thw") for key in batch) and "mm_token_type_ids" not in batch:
            types = self.processor.create_mm_token_type_ids(batch["input_ids"].tolist())
            batch["mm_token_type_ids"] = torch.tensor(types)

    def _read(self, index: int, example: dict[str, Any]) -> dict[str, Any] | None:
        """The example as messages and opened images, or None if it is skipped."""
        name = f"sample {index} of the batch, {sample_name(example)}"
        sample = to_messages(example, name)
        check_texts(self.processor, sample["messages"], name)
        try:
            images = [open_image(image, self.image_folder) for image in sample["images"]]
            videos = [open_video(video, self.image_folder) for video in sample["videos"]]
        except TypeError as error:
            raise TypeError(f"An image or a video cannot be read ({name}): {error}") from error
        except IMAGE_ERRORS as error:
            if self.unreadable_images == "raise":
                raise ValueError(
                    f"An image or a video cannot be read ({name}): {error}. Repair or remove the sample, or pass "
                    "unreadable_images='skip'."
                ) from error
            self.skipped += 1
            logger.warning("Left out %s: an image or a video cannot be read: %s", name, error)
            return None
        return {"messages": sample["messages"], "images": images, "videos": videos, "name": name}

    def _render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _warn_without_end(self, rendered: list[tuple[str, list[tuple[int, int]]]]) -> None:
        ends = tuple(self.processor.tokenizer.get_added_vocab())
        if not self._warned and any(not text[a:b].endswith(ends) for text, spans in rendered for a, b in spans):
            self._warned = True
            logger.warning(
                "The chat template writes no end-of-turn token after the assistant's answer, so the model "
                "does not learn to stop. Add one to `processor.chat_template`, such as eos_token."
            )

    def _truncate(self, batch: dict, inserted: torch.Tensor, names: list[str]) -> None:
        """Cuts every row to `max_length` tokens, on either side of padding, but no `inserted` `(B, S)` ones."""
        shape = batch["input_ids"].shape
        lengths = batch["attention_mask"].sum(1)
        over = (lengths - self.max_length).clamp(min=0)
        if not over.any():
            return
        before = inserted.sum(1)
        # Look at the mask: a processor may pad on another side than its tokenizer says.
        left = bool(batch["attention_mask"][:, -1].all())
        # Everything with a value per token, (B, S, ...).
        tensors = {
            key: value
            for key, value in batch.items()
            if isinstance(value, torch.Tensor) and value.shape[:2] == shape and not key.startswith(PIXEL_INPUTS)
        }
        for key, value in (tensors | {"inserted": inserted}).items():
            # Padded on the left, a row is rolled: its surplus end moves to the front, which is cut off.
            rows = torch.stack([row.roll(int(extra), 0) for row, extra in zip(value, over, strict=True)])
            cut = rows[:, -self.max_length :] if left else value[:, : self.max_length]
            if key == "inserted":
                inserted = cut
            else:
                batch[key] = cut
        lost = before - inserted.sum(1)
        for name, length, missing in zip(names, lengths.tolist(), lost.tolist(), strict=True):
            if missing:
                raise ValueError(
                    f"`max_length`={self.max_length} would cut {missing} visual tokens off a sample of "
                    f"{length} tokens ({name}). Use a `max_length` of at least {length}, smaller images, or "
                    "leave the sample out."
                )


class MaskVisualLabels:
    """Wraps any collator, removes visual tokens from its labels and checks that the batch has images.

    Args:
        collator (`Callable`): Makes a batch with `input_ids` `(B, S)` and `labels` `(B, S)` from a list of examples.
        visual_token_ids (`list[int]`): Ids of the placeholders for visual tokens.
        asks (`str`, *optional*): The pruner's name if it needs the instruction, which labels may hide.
    """

    # Class attributes: one warning per process, however many trainers wrap their collators.
    _warned = False
    _warned_of_instructions = False

    def __init__(
        self, collator: Callable[[list], dict[str, Any]], visual_token_ids: list[int], asks: str | None = None
    ):
        self.collator = collator
        self.visual_token_ids = list(visual_token_ids)
        self.asks = asks

    def __getattr__(self, name: str) -> Any:
        """The collator's own attributes: the Trainer saves its `tokenizer`, for one."""
        if name == "collator":  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = dict(self.collator(examples))
        require(batch, "input_ids")
        self._check_shifted(batch)
        # visual (B, S): placeholders of visual tokens.
        visual = torch.isin(batch["input_ids"], torch.tensor(self.visual_token_ids, device=batch["input_ids"].device))
        if visual.any() and not any(key.startswith(PIXEL_INPUTS) for key in batch):
            raise ValueError(
                f"The batch has {int(visual.sum())} visual tokens in `input_ids` but no images: none of its "
                f"keys {sorted(batch)} begins with {', '.join(PIXEL_INPUTS)}. Return all that the processor "
                "makes, and set remove_unused_columns=False."
            )
        if "labels" not in batch:  # prediction needs none
            return batch
        wrong = visual & (batch["labels"] != IGNORED)
        if wrong.any():
            self._warn(int(wrong.sum()))
            batch["labels"] = batch["labels"].masked_fill(wrong, IGNORED)
        if self.asks is not None:
            self._look_for_instructions(batch, visual)
        return batch

    def _check_shifted(self, batch: dict[str, Any]) -> None:
        """Removes `shift_labels` `(B, S)`, and raises a `ValueError` if they are not the labels shifted by one."""
        given, labels = batch.pop("shift_labels", None), batch.get("labels")
        if given is None:
            return
        if labels is None or not torch.equal(given, F.pad(labels[:, 1:], (0, 1), value=IGNORED)):
            raise ValueError(
                "The data collator's batch has `shift_labels` that are not its `labels` shifted by one. DualSpeed "
                "shifts `labels` itself, in step with the tokens that a pass keeps. Return `labels` alone."
            )

    def _look_for_instructions(self, batch: dict[str, Any], visual: torch.Tensor) -> None:
        """Warns once if a row with images supervises all of its text."""
        # text (B, S): instruction tokens, neither supervised nor visual nor padding.
        text = (batch["labels"] == IGNORED) & ~visual
        if batch.get("attention_mask") is not None:
            text = text & batch["attention_mask"].bool()
        if not MaskVisualLabels._warned_of_instructions and (visual.any(1) & ~text.any(1)).any():
            MaskVisualLabels._warned_of_instructions = True
            logger.warning(
                "`labels` supervise all text of some samples, so the pruner %r finds no instruction in them and falls "
                "back on what it does without one. Supervise the answers alone (with TRL: prompt-completion data, or "
                "assistant_only_loss=True), or choose a pruner that needs no instruction, such as 'divprune'.",
                self.asks,
            )

    @classmethod
    def _warn(cls, count: int) -> None:
        if not MaskVisualLabels._warned:
            MaskVisualLabels._warned = True
            logger.warning(
                "The data collator's `labels` held %d visual tokens, which no model can predict; they are "
                "set to %d, here and in every later batch.",
                count,
                IGNORED,
            )
