"""Collators: from conversations with images to batches, whose labels contain no visual tokens.

Shapes: B batch, S sequence.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import ProcessorMixin

from ..models.interface import RAW_KEYS, check_media
from ..utils.constants import LONG_SAMPLES, UNREADABLE_IMAGES
from ..utils.validation import check_choice, check_range, checked, require
from .conversations import sample_name, to_messages
from .labels import check_texts, place, recorded
from .media import IMAGE_ERRORS, open_video
from .pictures import Pictures, ProcessedOnce, Shrunk, draft_edge
from .rendering import ignored_keys, rendered

logger = logging.getLogger(__name__)

PIXEL_INPUTS = ("pixel_values", "image_patches", "input_features", "input_values", "audio_input_ids")

IGNORED = -100

REMEDIES = {
    "wrong": "Repair or remove the sample",
    "unreadable": "Repair or remove the sample, or pass unreadable_images='skip'",
    "long": "Use a larger `max_length` or smaller images, or pass long_samples='skip' or 'truncate'",
}
# So many samples that are skipped or teach nothing, and no other one, are no accident ...
PATIENCE = 8
# ... but where samples are cut and batches grouped by length, the longest come first, all perhaps without an answer.
PATIENCE_WHERE_CUT = 64
NOTHING_LEARNED = (
    "Answers have the role 'assistant' and a weight other than 0, and must begin before `max_length` cuts the sample"
)


class SampleError(ValueError):
    """A sample that cannot be trained on.

    Args:
        message (`str`): Names sample, key, value and remedy.
        kind (`str`): `"unreadable"` (its pictures), `"long"`, `"unsupervised"` or `"wrong"`.
    """

    def __init__(self, message: str, kind: str = "wrong"):
        super().__init__(message)
        self.kind = kind


class SampleTypeError(SampleError, TypeError):
    """A picture or clip that is given as something else."""


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
        warn_of_times(type(processor))
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


@cache
def warn_of_times(processor: type[ProcessorMixin]) -> None:
    """Says once that the times of frames are made up, in a class of processors that writes them or places frames by
    them."""
    if (getattr(processor, "videos_kwargs", None) or {}).get("return_metadata"):
        logger.warning(
            "Clips are given as frames, without their times: %s takes them at transformers' default rate, mostly 24 a "
            "second, for the times that it writes into the text or by which the model places frames. Where these "
            "matter, pass the processor `video_metadata` in a collator of your own, which returns `labels`.",
            processor.__name__,
        )


class VisionLanguageCollator:
    """Makes a batch with labels from conversations in any layout that [`to_messages`] reads.

    Labels hold every assistant turn with its end-of-turn token; everything else is -100. Samples with several images,
    one or none may share a batch. The examples stay unchanged. Works with any processor that passes each conversation
    to a fast tokenizer as a whole; it raises if a label's place is not certain.

    Args:
        processor (`ProcessorMixin`): A processor of transformers with a chat template and a fast tokenizer.
        max_length (`int`, *optional*): The most tokens of a sample, visual ones included.
        long_samples (`str`, *optional*, defaults to `"truncate"`): What to do with a longer sample: `"truncate"` its
            end, but never visual tokens; `"raise"` a `ValueError`; or `"skip"` it.
        unreadable_images (`str`, *optional*, defaults to `"raise"`): What to do with a picture or clip that cannot be
            read or that the processor refuses: `"raise"` a `ValueError`, or `"skip"` the sample. Skipped samples are
            logged and counted in `skipped` (per data loader worker); a batch without any other is one blank picture,
            of which nothing is learned.
        image_folder (`str`, *optional*): Folder that relative image paths start from.
        image_cache_mib (`float`, *optional*, defaults to 64): The most MiB of decoded pictures that each data loader
            worker keeps for later batches. Within a batch, each picture is read, decoded and processed once, whatever
            this says.
        jpeg_draft (`bool`, *optional*, defaults to `False`): Decode large JPEGs at a half, a quarter or an eighth of
            their size, as long as they stay twice as large as the processor makes them. It is faster and changes
            pixels a little. Only for processors that bring all pictures to one size.
    """

    @checked
    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        max_length: int | None = None,
        long_samples: str = "truncate",
        unreadable_images: str = "raise",
        image_folder: str | None = None,
        image_cache_mib: float = 64,
        jpeg_draft: bool = False,
    ):
        check_choice("unreadable_images", unreadable_images, UNREADABLE_IMAGES)
        check_choice("long_samples", long_samples, LONG_SAMPLES)
        if max_length is None and long_samples != "truncate":
            raise ValueError(f"`long_samples` is {long_samples!r}, but no sample is too long without a `max_length`.")
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
        self.long_samples = long_samples
        self.unreadable_images = unreadable_images
        self.image_folder = image_folder
        check_range("image_cache_mib", image_cache_mib, 0, off="Use 0 to keep no pictures beyond a batch.")
        edge = draft_edge(processor) if jpeg_draft else None
        if jpeg_draft and edge is None:
            raise ValueError(
                f"`jpeg_draft` is True, but {type(processor).__name__} makes of a picture what its own size asks for, "
                "so that a smaller one would have other tokens. Leave it out."
            )
        self.pictures, self.processed_once = Pictures(image_cache_mib, edge, Shrunk(processor)), ProcessedOnce()
        self.skipped = self.unsupervised = self.seen = 0
        self._warned: set[str] = set()
        self._ends = tuple(processor.tokenizer.get_added_vocab())

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collates examples.

        Returns:
            `dict` with `input_ids`, `attention_mask` and `labels`, each `(B, S)`, and the processor's other outputs,
            such as `pixel_values`.

        Raises:
            SampleTypeError: an image or a video is given as something else.
            ValueError: a sample or an image cannot be read, a text holds a placeholder, the template fails or rewrites
                earlier turns, the processor hides where the text went, `max_length` would cut into an image, or all
                of the first samples have nothing to learn. The message names the sample.
        """
        self.pictures.begin_batch()
        read = [
            self._read(example, f"sample {index} of the batch, {sample_name(example)}")
            for index, example in enumerate(examples)
        ]
        samples, batch = self._batch([sample for sample in read if sample is not None])
        if samples:
            self._count_unsupervised(batch["labels"], samples)
        elif not self.seen and self.skipped >= PATIENCE_WHERE_CUT:
            raise SampleError(
                f"The first {self.skipped} samples were all left out, as the log tells. Repair the data, or correct "
                "`image_folder` or `max_length`."
            )
        return batch

    def collated(self, example: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
        """The batch of one sample, which errors call `name`; it is not counted among the unsupervised ones."""
        self.pictures.begin_batch()
        sample = self._read(example, name)
        return self._batch([] if sample is None else [sample])[1]

    def _batch(self, samples: list[dict]) -> tuple[list[dict], dict[str, torch.Tensor]]:
        """The samples that are not skipped, and their batch."""
        if not samples:
            return [], self._stand_in()
        try:
            batch, tokenized = recorded(self.processor, lambda processor: self._encode(processor, samples))
        # Processors raise anything on what they cannot take.
        except Exception as error:
            return self._batch(self._without_bad(samples, error))
        # Masks (B, S): tokens of assistant turns, and tokens in place of placeholders.
        supervised, inserted = place(self.processor, batch, tokenized, samples)
        lengths = batch["attention_mask"].sum(1).tolist()
        if self.max_length is not None and self.long_samples != "truncate":
            kept = [sample for sample, length in zip(samples, lengths, strict=True) if self._fits(sample, length)]
            if len(kept) < len(samples):
                return self._batch(kept)
        self._add_token_types(batch, supervised)
        batch["labels"] = batch["input_ids"].masked_fill(~supervised, IGNORED)
        if self.max_length is not None:
            self._truncate(batch, inserted, [sample["name"] for sample in samples])
        return samples, dict(batch)

    def _stand_in(self) -> dict[str, torch.Tensor]:
        """A batch of a blank picture without labels, for one that lost all samples.

        A batch must hold something, and under FSDP a picture: ranks gather the vision tower together.
        """
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": "."}]}
        blank = {"messages": [question, answer], "images": [Image.new("RGB", (64, 64), "white")]}
        strict = copy.copy(self)
        strict.max_length, strict.unreadable_images = None, "raise"
        batch = strict.collated(blank, "a blank picture for a batch of which all samples were left out")
        return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}

    def _without_bad(self, samples: list[dict], error: Exception) -> list[dict]:
        """The samples that the processor takes alone, after it failed with `error` on all.

        Raises:
            Exception: `error`, if it takes each of them; or that of a sample that is not to be skipped.
        """
        if len(samples) == 1:
            (sample,) = samples
            kind = "unreadable" if sample["images"] or sample["videos"] else "wrong"
            what = f"{type(self.processor).__name__} cannot read the sample ({sample['name']}): {error}"
            self._leave_out(kind, sample["name"], what, error)
            return []
        good = []
        for sample in samples:
            try:
                self._encode(self.processor, [sample])
                good.append(sample)
            except Exception as own:
                good += self._without_bad([sample], own)
        if len(good) == len(samples):
            raise error
        return good

    def _leave_out(self, kind: str, name: str, message: str, cause: Exception | None = None) -> None:
        """Logs and counts a sample that is skipped; raises a [`SampleError`] if samples of its kind are not."""
        policies = {"unreadable": self.unreadable_images, "long": self.long_samples}
        if policies.get(kind) != "skip":
            error = SampleTypeError if isinstance(cause, TypeError) else SampleError
            raise error(f"{message}. {REMEDIES[kind]}.", kind) from cause
        self.skipped += 1
        logger.warning("Left out %s (%d so far): %s", name, self.skipped, cause or message)

    def _fits(self, sample: dict, length: int) -> bool:
        """Whether a sample of `length` tokens is no longer than `max_length`; one that is longer is left out."""
        if length > self.max_length:
            name = sample["name"]
            what = f"The sample ({name}) has {length} tokens, more than `max_length`={self.max_length}"
            self._leave_out("long", name, what)
        return length <= self.max_length

    def _count_unsupervised(self, labels: torch.Tensor, samples: list[dict]) -> None:
        """Counts rows of labels (B, S) that teach nothing. The first column is no target.

        Raises:
            SampleError: none of the samples so far teaches anything.
        """
        taught = (labels[:, 1:] != IGNORED).any(1).tolist()
        nothing = [sample["name"] for sample, learns in zip(samples, taught, strict=True) if not learns]
        before = self.unsupervised
        self.unsupervised += len(nothing)
        self.seen += len(samples)
        if not nothing:
            return
        if self.unsupervised == self.seen >= (PATIENCE if self.max_length is None else PATIENCE_WHERE_CUT):
            raise SampleError(
                f"None of the first {self.seen} samples has a token to learn; the last one is {nothing[-1]}. "
                f"{NOTHING_LEARNED}.",
                "unsupervised",
            )
        # The first one, then each time that the number gains a digit.
        if not before or len(str(self.unsupervised)) > len(str(before)):
            logger.warning(
                "%d of %d samples so far had no token to learn; here it is %s. %s.",
                self.unsupervised,
                self.seen,
                nothing[0],
                NOTHING_LEARNED,
            )

    def _encode(self, processor: ProcessorMixin, samples: list[dict]) -> dict:
        images, videos = ([sample[kind] for sample in samples] for kind in ("images", "videos"))
        processor = self.processed_once.around(processor, images)
        return encode(processor, [sample["text"] for sample in samples], images, videos)

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

    def _read(self, example: dict[str, Any], name: str) -> dict[str, Any] | None:
        """The example as text, spans to learn and opened images, or None if it is skipped."""
        sample = to_messages(example, name)
        check_texts(self.processor, [sample["messages"], sample["tools"]], name)
        try:
            text, spans = rendered(self.processor, sample)
        except ValueError as error:
            raise SampleError(f"The sample ({name}) cannot be rendered: {error}") from error
        images: list[Image.Image] = []
        videos: list[np.ndarray] = []
        try:
            images += (self.pictures.open(image, self.image_folder) for image in sample["images"])
            videos += (open_video(video, self.image_folder) for video in sample["videos"])
        except (TypeError, *IMAGE_ERRORS) as error:
            kind, number = ("videos", len(videos)) if len(images) == len(sample["images"]) else ("images", len(images))
            which = f"number {number + 1} of {len(sample[kind])}: " if len(sample[kind]) > 1 else ""
            self._leave_out("unreadable", name, f"An image or a video cannot be read ({name}): {which}{error}", error)
            return None
        if sample["videos"] and getattr(self.processor, "video_processor", None) is None:
            raise ValueError(
                f"The batch has videos ({name}), but `processor` ({type(self.processor).__name__}) has no video "
                "processor. Video processors of transformers need the package torchvision; where the family has none, "
                "pass the frames as `images`."
            )
        self._warn_of_template(sample, text, spans)
        return {"text": text, "spans": spans, "images": images, "videos": videos, "name": name}

    def _warn_of_template(self, sample: dict, text: str, spans: list[tuple[int, int]]) -> None:
        """Warns once of an answer without an end, and of each key that the template leaves out."""
        if "end" not in self._warned and any(not text[a:b].endswith(self._ends) for a, b in spans):
            self._warned.add("end")
            logger.warning(
                "The chat template writes no end-of-turn token after the assistant's answer, so the model "
                "does not learn to stop. Add one to `processor.chat_template`, such as eos_token."
            )
        for key in ignored_keys(self.processor, sample):
            if key not in self._warned:
                self._warned.add(key)
                calls = ": the model learns to end its turn where it should call" if key == "tool_calls" else ""
                logger.warning(
                    "The chat template never mentions %r, so it is left out of training%s. Set a `chat_template` that "
                    "writes it, or remove it from the data.",
                    key,
                    calls,
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
                raise SampleError(
                    f"`max_length`={self.max_length} would cut {missing} visual tokens off a sample of "
                    f"{length} tokens ({name}). Use a `max_length` of at least {length}, smaller images, or "
                    "leave the sample out, as long_samples='skip' does.",
                    "long",
                )


class MaskVisualLabels:
    """Wraps any collator, removes visual and first tokens and padding from its labels and checks that it has images.

    Args:
        collator (`Callable`): Makes a batch with `input_ids` `(B, S)` and `labels` `(B, S)` from a list of examples.
        visual_token_ids (`list[int]`): Ids of the placeholders for visual tokens.
        asks (`str`, *optional*): The pruner's name if it needs the instruction, which labels may hide.
        media (`dict[int, tuple[str, ...]]`, *optional*): For each placeholder, the inputs of which a batch with it
            holds one: [`ModelInterface.media`]. By default any input of images, videos or audio.
    """

    # Class attributes: one warning per process, however many trainers wrap their collators.
    _warned = False
    _warned_of_instructions = False

    @checked
    def __init__(
        self,
        collator: Callable[[list], dict[str, Any]],
        visual_token_ids: list[int],
        asks: str | None = None,
        media: dict[int, tuple[str, ...]] | None = None,
    ):
        self.collator = collator
        self.visual_token_ids = list(visual_token_ids)
        self.media = dict.fromkeys(self.visual_token_ids, RAW_KEYS) if media is None else media
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
        check_media(batch["input_ids"], batch, self.media)
        if batch.get("labels") is None:  # prediction needs none
            return batch
        wrong = visual & (batch["labels"] != IGNORED)
        if wrong.any():
            self._warn(int(wrong.sum()))
            batch["labels"] = batch["labels"].masked_fill(wrong, IGNORED)
        # The first token of each sample is no label: nothing predicts it, but left padding would. Nor is padding, which
        # shortening drops: it would count among the items by which the loss is divided.
        mask = batch.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            mask = mask.bool()
            batch["labels"] = batch["labels"].masked_fill(~mask | (mask.cumsum(1) == 1), IGNORED)
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


def mask_labels(loader: object, masking: Callable[[Callable], MaskVisualLabels]) -> None:
    """Wraps the collator of a data loader by `masking`, unless its labels are masked already."""
    loader = getattr(loader, "base_dataloader", loader)  # accelerate's stands around it
    collator = inner = getattr(loader, "collate_fn", None)
    while inner is not None and not isinstance(inner, MaskVisualLabels):
        inner = getattr(inner, "collator", None) or getattr(inner, "data_collator", None)
    if collator is not None and inner is None:
        loader.collate_fn = masking(collator)
