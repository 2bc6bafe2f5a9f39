"""Counts the tokens of each sample, and the visual ones among them, without decoding images.

For grouping only: text that a processor adds around images (tiles, marks) is not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import datasets
import torch

from ..pruners import budget
from ..utils.progress import track
from .conversations import sample_name, to_messages
from .loading import undecoded
from .media import IMAGE_ERRORS, image_size
from .rendering import render

logger = logging.getLogger(__name__)

LENGTH, VISUAL = "length", "visual_length"
REMEDY = (
    "Give the data set a column {column!r} with the number of tokens of each sample, visual ones included, and a "
    "column {visual!r} with the list of its visual tokens by image; or set train_sampling_strategy='random'."
)


class SampleLengths:
    """Numbers of tokens of the N samples of a data set.

    Args:
        full (`Sequence[int]`): all tokens of each sample, visual ones included.
        visual (`Sequence[Sequence[int]]`, *optional*): visual tokens of each of its images and clips; None if unknown.
    """

    def __init__(self, full: Sequence[int], visual: Sequence[Sequence[int]] | None):
        self.full = torch.tensor(full, dtype=torch.long)
        self.visual = visual

    def __len__(self) -> int:
        return len(self.full)

    def pruned(self, pruning_ratio: float, isolator_length: int) -> torch.Tensor:
        """Lengths in fast steps, `(N,)`: an image counts its budget and an isolator. Full ones if `visual` is None."""
        if self.visual is None:
            return self.full
        saved = [sum(n - budget(n, pruning_ratio) - isolator_length for n in units if n) for units in self.visual]
        return self.full - torch.tensor(saved, dtype=torch.long)


class TokenCounter:
    """Counts the tokens that a collator will make of an example.

    Text is rendered and tokenized. Visual tokens follow from the image size in the file header, by the processor's own
    rule; without a rule, every image counts as many as the first one. Clips are collated.

    Args:
        collator (`Callable`): the data collator; its `processor`, `chat_template`, `max_length`, `image_folder` and
            `unreadable_images` are used if it has them.
        processor (`ProcessorMixin`, *optional*): used if the collator holds none.
        visual_token_ids (`list[int]`): ids of the placeholders.

    Raises:
        ValueError: there is no processor.
    """

    def __init__(self, collator: Callable, processor, visual_token_ids: list[int]):
        self.collator = collator
        self.processor = getattr(collator, "processor", None) or processor
        self.visual_token_ids = frozenset(visual_token_ids)
        self.per_image: int | None = None
        if not hasattr(self.processor, "apply_chat_template") or not hasattr(self.processor, "tokenizer"):
            raise ValueError(
                f"`processing_class` is {type(self.processor).__name__}, which has no tokenizer and chat template."
            )

    def __call__(self, example: Mapping) -> dict[str, Any]:
        """`{"length": tokens, "visual_length": [visual tokens of each image]}`."""
        if "input_ids" in example:  # tokenized already
            visual = sum(token in self.visual_token_ids for token in example["input_ids"])
            return {LENGTH: len(example["input_ids"]), VISUAL: [visual] if visual else []}
        sample = to_messages(example)
        if sample["videos"]:
            return self._collated(example, len(sample["images"]) + len(sample["videos"]))
        text = self._text_tokens(sample)
        visual = self._visual_tokens(example, sample["images"])
        length, longest = text + sum(visual), getattr(self.collator, "max_length", None)
        return {LENGTH: min(length, longest or length), VISUAL: visual}

    def _text_tokens(self, sample: dict[str, Any]) -> int:
        template = getattr(self.collator, "chat_template", None)
        text = render(self.processor, sample["messages"], sample["tools"], template)
        tokenizer = self.processor.tokenizer
        own_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not own_bos)["input_ids"]
        return sum(token not in self.visual_token_ids for token in ids)

    def _visual_tokens(self, example: Mapping, images: list) -> list[int]:
        if not images:
            return []
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            if self.per_image is None:
                self.per_image = self._collated(example, len(images))[VISUAL][0]
                logger.info(
                    "%s tells no image's tokens: each counts %d.", type(self.processor).__name__, self.per_image
                )
            return [self.per_image] * len(images)
        try:
            sizes = [image_size(image, getattr(self.collator, "image_folder", None)) for image in images]
            # A processor may refuse a picture, such as a very long one.
            return list(self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens)
        except IMAGE_ERRORS as error:
            if getattr(self.collator, "unreadable_images", "raise") == "skip":
                return []
            raise ValueError(f"an image cannot be read ({sample_name(example)}): {error}") from error

    def _collated(self, example: Mapping, units: int) -> dict[str, Any]:
        """Counts by collating the example; shares its visual tokens evenly among `units` images and clips."""
        ids = self.collator([dict(example)])["input_ids"][0].tolist()
        visual = sum(token in self.visual_token_ids for token in ids)
        return {LENGTH: len(ids), VISUAL: [visual // units + (unit < visual % units) for unit in range(units)]}


def given_lengths(dataset, column: str) -> SampleLengths | None:
    """Lengths from the data set's own columns, or None if it has no such columns.

    Raises:
        ValueError: the columns hold no lengths.
    """
    visual_column = visual_name(column)
    if isinstance(dataset, datasets.Dataset):
        plain = dataset.with_format(None)
        names, values = plain.column_names, lambda name: plain[name]
    else:
        first = dataset[0] if len(dataset) else None
        names = list(first) if isinstance(first, Mapping) else []
        values = lambda name: [dataset[index].get(name) for index in range(len(dataset))]  # noqa: E731
    if column not in names:
        return None
    full = checked(column, values(column), is_count, "a whole number of tokens")
    if visual_column not in names:
        logger.warning(
            "The data set has a column %r but no %r: fast steps, too, are grouped by the full length.",
            column,
            visual_column,
        )
        return SampleLengths(full, None)
    visual = checked(visual_column, values(visual_column), is_counts, "a list of whole numbers, one for each image")
    for index, (length, units) in enumerate(zip(full, visual, strict=True)):
        if sum(units) > length:
            raise ValueError(
                f"`{visual_column}` of sample {index} is {units}, more than the {length} tokens of `{column}`, which "
                "counts visual tokens too."
            )
    return SampleLengths(full, visual)


def visual_name(column: str) -> str:
    """The column of visual tokens that goes with a column of lengths."""
    return f"visual_{column}"


def checked(column: str, values: Iterable, right: Callable[[Any], bool], what: str) -> list:
    """The entries of a column; a `ValueError` names the first one that is not `right`."""
    values = list(values)
    for index, value in enumerate(values):
        if not right(value):
            raise ValueError(
                f"`{column}` of sample {index} must be {what}, got {value!r}. Correct the column, or leave it out to "
                "have lengths measured."
            )
    return values


def is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


def is_counts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(map(is_count, value))


def measured_lengths(dataset, counter: TokenCounter, processes: int | None = None) -> SampleLengths:
    """Counts every sample. `datasets.Dataset.map` is used if possible: it shows progress and caches results on disk.

    Args:
        dataset: `datasets.Dataset`, or anything with a length whose items are examples.
        counter (`TokenCounter`): counts one sample.
        processes (`int`, *optional*): `num_proc` of the map.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        rows = [counter(dataset[index]) for index in track(range(len(dataset)), "Counting tokens")]
        return SampleLengths([row[LENGTH] for row in rows], [row[VISUAL] for row in rows])
    features = datasets.Features({LENGTH: datasets.Value("int32"), VISUAL: datasets.List(datasets.Value("int32"))})
    plain = undecoded(dataset.with_format(None))
    rows = plain.map(
        counter,
        remove_columns=plain.column_names,
        features=features,
        num_proc=min(processes, len(plain)) if processes else None,
        desc="Counting tokens",
    )
    return SampleLengths(rows[LENGTH][:], rows[VISUAL][:])
