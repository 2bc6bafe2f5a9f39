"""Metrics of short answers, each an `evaluate.Metric` in a folder that evaluate loads and the Hub takes as it is."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.validation import check_choice

if TYPE_CHECKING:
    from evaluate import Metric

# Each folder's module imports nothing of this library, for on the Hub it stands alone.
CLASSES = {
    "exact_match": "ExactMatch",
    "vqa_accuracy": "VQAAccuracy",
    "relaxed_accuracy": "RelaxedAccuracy",
    "anls": "ANLS",
    "multiple_choice": "MultipleChoice",
}


def load_metric(name: str) -> Metric:
    """One of this library's metrics, which works in memory and without a network.

    Args:
        name (`str`): `"exact_match"`, `"vqa_accuracy"`, `"relaxed_accuracy"`, `"anls"` or `"multiple_choice"`.

    Raises:
        ValueError: there is no such metric.
    """
    check_choice("metric", name, tuple(CLASSES))
    return getattr(import_module(f"{__name__}.{name}.{name}"), CLASSES[name])(keep_in_memory=True)


def metric_folder(name: str) -> Path:
    """The folder of a metric: `evaluate.load` takes it."""
    check_choice("metric", name, tuple(CLASSES))
    return Path(__file__).parent / name


def needs_options(name: str) -> bool:
    """Whether a metric takes the `options` of each question besides."""
    return name == "multiple_choice"
