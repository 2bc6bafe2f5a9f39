"""Looks at a data set before training: what is missing, too long, or teaches nothing shows in the first seconds."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import datasets
from torch.utils.data import DataLoader, Subset

from ..utils.constants import CHECKED_SAMPLES
from ..utils.progress import Work
from ..utils.validation import checked
from .collators import IGNORED, REMEDIES, SampleError, VisionLanguageCollator
from .conversations import sample_name, to_messages
from .labels import check_texts
from .lengths import visual_name
from .loading import undecoded
from .media import image_size
from .rendering import rendered

logger = logging.getLogger(__name__)

# Fewer samples for each process are not worth its start.
SHARE = 500
# A length is estimated from the text and the pictures' sizes. Beyond what collated samples had more than that, each
# picture, and the text around them, may add so many tokens.
MARGIN = 8
SHOWN = 3
# Formats of `datasets` whose items are dicts, in which pictures need not be decoded. In others a training would fail.
ROW_FORMATS = (None, "numpy", "torch", "jax", "tensorflow")


@dataclass
class Finding:
    """What was found about a sample.

    Args:
        index (`int`): The sample's row.
        kind (`str`): `"wrong"`, `"unreadable"` (its pictures), `"long"`, `"truncated"` or `"unsupervised"`.
        message (`str`): Names the sample and the remedy.
    """

    index: int
    kind: str
    message: str


@dataclass
class DataReport:
    """What [`check_samples`] found.

    Args:
        name (`str`): The data set's name.
        total (`int`): Its samples.
        checked (`int`): The samples that were looked at.
        longest (`int`): The most tokens of one of them, visual ones included; estimated where far below `max_length`.
        findings (`list[Finding]`): In the order of the rows.
        counted (`dict[int, tuple[int, list[int]]]`): By row, about how many tokens it has, and the visual ones of each
            picture; without rows about which the processor says nothing ahead of time.
    """

    name: str
    total: int
    checked: int = 0
    longest: int = 0
    findings: list[Finding] = field(default_factory=list)
    counted: dict[int, tuple[int, list[int]]] = field(default_factory=dict)

    @classmethod
    def joined(cls, reports: list[DataReport]) -> DataReport:
        """The report of all processes, which looked at a share each."""
        findings = sorted((finding for report in reports for finding in report.findings), key=lambda f: f.index)
        checked, longest = sum(report.checked for report in reports), max(report.longest for report in reports)
        counted = {row: count for report in reports for row, count in report.counted.items()}
        return cls(reports[0].name, reports[0].total, checked, longest, findings, counted)

    def of(self, *kinds: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind in kinds]

    def settle(self, collator: VisionLanguageCollator, show: bool = True) -> list[int]:
        """Shows what was found.

        Args:
            collator ([`VisionLanguageCollator`]): Says which samples are skipped.
            show (`bool`, *optional*, defaults to `True`): Whether to log what is no error; one process does.

        Returns:
            `list[int]`: The rows to leave out.

        Raises:
            ValueError: some samples cannot be used and are not to be skipped, or there is nothing to learn.
        """
        policies = {"wrong": "raise", "unreadable": collator.unreadable_images, "long": collator.long_samples}
        wrong = self.of(*(kind for kind, policy in policies.items() if policy == "raise"))
        if wrong:
            raise ValueError(self._text("cannot be used", wrong))
        left_out = self.of(*(kind for kind, policy in policies.items() if policy == "skip"))
        if left_out and len(left_out) == self.checked:
            raise ValueError(self._text("would be left out, so nothing remains", left_out))
        truncated, unsupervised = self.of("truncated"), self.of("unsupervised")
        if unsupervised and len(unsupervised) == self.checked - len(left_out):
            raise ValueError(self._text("have no token to learn", unsupervised))
        shown = {
            "are left out": left_out,
            f"lose their end, the longest of {self.longest} tokens": truncated,
            "have no token to learn": unsupervised,
        }
        for what, findings in shown.items():
            if findings and show:
                logger.warning(self._text(what, findings))
        return [finding.index for finding in left_out]

    def _text(self, what: str, findings: list[Finding]) -> str:
        lines = [f"\n- {finding.message}" for finding in findings[:SHOWN]]
        more = f"\n- and {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
        of = f"{self.checked:,}" if self.checked == self.total else f"{self.checked:,} checked ones, of {self.total:,},"
        return f"{self.name!r}: {len(findings):,} of {of} samples {what}:{''.join(lines)}{more}"


@checked
def check_samples(
    dataset: Any,
    collator: VisionLanguageCollator,
    *,
    name: str = "the data set",
    limit: int | None = CHECKED_SAMPLES,
    processes: int | None = None,
    share: tuple[int, int] = (0, 1),
    learns: bool = True,
    silent: bool = False,
) -> DataReport:
    """Looks at samples as a training would, without decoding most pictures.

    Text is rendered and tokenized, and pictures are looked up and their headers read. A sample about which that leaves
    a doubt, also one whose length comes near `max_length`, is collated, and so is the first one.

    Args:
        dataset: `datasets.Dataset`, or anything with a length whose items are samples.
        collator ([`VisionLanguageCollator`]): The collator of the training.
        name (`str`, *optional*): What messages call the data set.
        limit (`int`, *optional*): Look at so many samples at most, evenly spread; None: at all.
        processes (`int`, *optional*): Processes that look; default: one for every 500 samples, up to the cores' number
            and 16.
        share (`tuple[int, int]`, *optional*): `(rank, ranks)`: look at this rank's share of the samples only.
        learns (`bool`, *optional*, defaults to `True`): Whether a model learns from the samples. If not, they need no
            answer, and none is too long.
        silent (`bool`, *optional*, defaults to `False`): Show no progress.

    Returns:
        [`DataReport`], whose `settle` raises errors, shows warnings and returns the rows to leave out.

    Raises:
        ValueError: the data set is a stream.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"{name!r}, of type {type(dataset).__name__}, has no length: a stream cannot be looked at before it is "
            "trained on. Pass some of its samples, for example list(dataset.take(1000))."
        )
    total = len(dataset)
    count = total if limit is None else min(limit, total)
    rank, ranks = share
    rows = [index * total // count for index in range(count)][rank::ranks]
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] in ROW_FORMATS:
        columns = dataset.format["columns"]
        dataset = undecoded(dataset.with_format(None)).select_columns(columns)
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))), len(rows) // SHARE)
    loader = DataLoader(
        rows,
        batch_size=32,
        collate_fn=SampleChecker(dataset, collator, name, learns),
        num_workers=processes if processes > 1 else 0,
        worker_init_fn=_one_thread,
    )
    report = DataReport(name, total)
    numbers = iter(rows)
    with Work(f"Checking {name}", len(rows), silent or rank > 0) as work:
        for found in loader:
            for length, finding, visual in found:
                report.checked += 1
                report.longest = max(report.longest, length)
                report.findings += finding
                row = next(numbers)
                if visual is not None and all(visual):
                    report.counted[row] = (length, visual)
            work.advance(len(found))
    return report


def with_lengths(
    dataset: datasets.Dataset, report: DataReport, left_out: list[int], column: str, longest: int | None
) -> datasets.Dataset:
    """The data set with the lengths that the look at it found, so that they are not counted once more to group by them.

    As it is, if it has such columns, or some rows were not looked at or not counted.

    Args:
        left_out (`list[int]`): Rows that will be left out, so that their length does not matter.
        column (`str`): The column of all tokens; that of visual ones goes with it.
        longest (`int`, *optional*): What is longer is cut to so many tokens.
    """
    names = (column, visual_name(column))
    counted = dict.fromkeys(left_out, (0, [])) | report.counted
    if set(names) & set(dataset.column_names) or len(counted) < len(dataset):
        return dataset
    counts = [counted[row] for row in range(len(dataset))]
    lengths = [min(length, longest or length) for length, _ in counts]
    numbers = datasets.List(datasets.Value("int32"))
    dataset = dataset.add_column(names[0], lengths, feature=datasets.Value("int32"))
    return dataset.add_column(names[1], [visual for _, visual in counts], feature=numbers)


def without_rows(dataset: Any, rows: Iterable[int]) -> Any:
    """The data set without these rows."""
    left_out = set(rows)
    if not left_out:
        return dataset
    kept = [index for index in range(len(dataset)) if index not in left_out]
    return dataset.select(kept) if isinstance(dataset, datasets.Dataset) else Subset(dataset, kept)


def _one_thread(worker: int) -> None:
    # Processes share the cores, and a tokenizer warns when it is forked otherwise.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


class SampleChecker:
    """Looks at rows of a data set: the length of each in tokens, a list with a [`Finding`], or an empty one, and the
    visual tokens of each picture, or None where the processor does not tell."""

    def __init__(self, dataset: Any, collator: VisionLanguageCollator, name: str, learns: bool = True):
        self.dataset, self.name, self.learns = dataset, name, learns
        self.max_length = collator.max_length if learns else None
        self.truncates = collator.long_samples == "truncate"
        # Two copies that skip nothing: one that cuts off what is too long, and one that does not.
        self.cutting = copy.copy(collator)
        self.cutting.unreadable_images, self.cutting.long_samples = "raise", "truncate"
        self.whole = copy.copy(self.cutting)
        self.whole.max_length = None
        self.visual_tokens: dict[tuple[int, int], int] = {}
        # By how many tokens for each part estimates were too small, of samples without pictures and with them.
        self.extra: dict[bool, float] = {}

    def __call__(self, rows: list[int]) -> list[tuple[int, list[Finding], list[int] | None]]:
        return [self.check(index) for index in rows]

    def check(self, index: int) -> tuple[int, list[Finding], list[int] | None]:
        name = f"row {index} of {self.name!r}"
        try:
            example = self.dataset[index]
            name = f"{name}, {sample_name(example)}"
            estimate = self._estimate(example, name)
            estimated, visual = estimate or (0, None)
            parts = len(visual or ()) + 1
            if estimate is not None and self._is_short(estimated, parts):
                return estimated, [], visual
            length, found = self._collated(index, example, name)
            if estimate is not None:
                self.extra[parts > 1] = max((length - estimated) / parts, self.extra.get(parts > 1, 0))
            return length, found, visual
        # Whatever a sample raises here, it would raise in training.
        except Exception as error:
            message = str(error) if name in str(error) else f"{name}: {type(error).__name__}: {error}"
            return 0, [Finding(index, getattr(error, "kind", "wrong"), message)], None

    def _is_short(self, length: int, parts: int) -> bool:
        """Whether a sample of an estimated length is certainly no longer than `max_length`.

        The first sample with pictures, and the first without, are collated in any case: they show whether the processor
        works at all, and by how much estimates are wrong.
        """
        if (parts > 1) not in self.extra:
            return False
        return self.max_length is None or length + parts * (self.extra[parts > 1] + MARGIN) <= self.max_length

    def _estimate(self, example: Any, name: str) -> tuple[int, list[int] | None] | None:
        """About how many tokens a sample has, and the visual ones of each picture; None where there is a doubt."""
        processor = self.whole.processor
        try:
            sample = to_messages(example, name)
            check_texts(processor, [sample["messages"], sample["tools"]], name)
            text, spans = rendered(processor, sample)
            sizes = [image_size(image, self.whole.image_folder) for image in sample["images"]]
            if sizes and not hasattr(processor, "_get_num_multimodal_tokens") and self.max_length is not None:
                return None
            visual = list(map(self._visual_tokens, sizes))
        except Exception:
            return None
        taught = not self.learns or any(start < end for start, end in spans)
        if not taught or sample["videos"]:
            return None
        return len(processor.tokenizer(text)["input_ids"]) + sum(visual), visual

    def _visual_tokens(self, size: tuple[int, int]) -> int:
        """Visual tokens of a picture of `size` (height, width), as the processor tells; 0 where it does not."""
        if size not in self.visual_tokens:
            count = getattr(self.whole.processor, "_get_num_multimodal_tokens", None)
            self.visual_tokens[size] = sum(count(image_sizes=[size]).num_image_tokens) if count else 0
        return self.visual_tokens[size]

    def _collated(self, index: int, example: Any, name: str) -> tuple[int, list[Finding]]:
        """The exact length of a sample, and what is wrong with it, as its collator says."""
        batch = self.whole.collated(example, name)
        length = int(batch["attention_mask"].sum())
        found = []
        if self.max_length is not None and length > self.max_length:
            message = f"{name}: {length} tokens, more than `max_length`={self.max_length}"
            if not self.truncates:
                return length, [Finding(index, "long", f"{message}. {REMEDIES['long']}")]
            found.append(Finding(index, "truncated", message))
            try:
                batch = self.cutting.collated(example, name)
            except SampleError as error:  # it would cut into a picture
                return length, [Finding(index, "wrong", str(error))]
        if self.learns and (batch["labels"][:, 1:] == IGNORED).all():
            message = f"{name}: no answer of the role 'assistant' with a weight other than 0"
            if found:
                message = f"{name}: `max_length`={self.max_length} cuts off all answers of its {length} tokens"
            found.append(Finding(index, "unsupervised", message))
        return length, found
