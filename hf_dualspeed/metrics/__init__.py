"""Metrics for short answers. Each is an `evaluate.Metric` in a folder that `evaluate.load` and the Hub accept."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.validation import check_choice

if TYPE_CHECKING:
    from evaluate import Metric

# A metric's module imports nothing of this library, because it stands alone on the Hub.
CLASSES = {
    "exact_match": "ExactMatch",
    "vqa_accuracy": "VQAAccuracy",
    "relaxed_accuracy": "RelaxedAccuracy",
    "anls": "ANLS",
    "multiple_choice": "MultipleChoice",
}


def load_metric(name: str) -> Metric:
    """Loads one of this library's metrics; it works in memory and without a network.

    Args:
        name (`str`): `"exact_match"`, `"vqa_accuracy"`, `"relaxed_accuracy"`, `"anls"` or `"multiple_choice"`.

    Raises:
        ValueError: there is no such metric.
    """
    check_choice("metric", name, tuple(CLASSES))
    return getattr(import_module(f"{__name__}.{name}.{name}"), CLASSES[name])(keep_in_memory=True)


def metric_folder(name: str) -> Path:
    """The folder of a metric, for `evaluate.load`."""
    check_choice("metric", name, tuple(CLASSES))
    return Path(__file__).parent / name


def needs_options(name: str) -> bool:
    """Whether a metric also takes the `options` of each question."""
    return name == "multiple_choice"
