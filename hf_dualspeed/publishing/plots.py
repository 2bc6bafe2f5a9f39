"""Plots of a training run."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..utils.text import in_thousands
from ..utils.validation import checked
from ..utils.writing import write_file

CURVE_NAME = "learning_curve.png"
# Colours by Okabe and Ito, for colour-blind readers; markers for black and white.
LINES = {
    "fast_loss": ("fast steps (pruned tokens)", "#0072B2", "o"),
    "slow_loss": ("slow steps (all tokens)", "#D55E00", "s"),
    "distillation_loss": ("distillation", "#009E73", "^"),
    "slow_mode_ratio": ("adaptive schedule", "#CC79A7", "v"),
}
PANELS = {
    "loss": ("fast_loss", "slow_loss"),
    "distillation loss": ("distillation_loss",),
    "share of slow steps": ("slow_mode_ratio",),
}


def figure_of(width: float, height: float, rows: int, columns: int, sharex: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure and its axes `(rows, columns)`, without pyplot: it needs no display and shares no state with the
    caller's figures."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=sharex, squeeze=False)


def describe(figure: Figure, title: str, results: dict, model: str = "") -> None:
    """Titles a figure so that it can be read alone: below the title stand model, hardware and date of its results.

    Args:
        figure (`Figure`): The figure.
        title (`str`): What it shows.
        results (`dict`): What holds `machine` and `date`, as results.json does.
        model (`str`, *optional*): The model in words; by default those of [`model_words`].
    """
    machine = results.get("machine", {})
    facts = [
        model or model_words(results),
        machine.get("accelerator") or machine.get("cpu"),
        str(results.get("date") or "")[:10],
    ]
    figure.suptitle(f"{title}\n{', '.join(filter(None, facts))}".strip(), fontsize=11)


def model_words(results: dict) -> str:
    """The model of a run's results with the number of its parameters; "" where nothing is known."""
    size = results.get("parameters")
    size = f"{in_thousands(sum(size.values()))} parameters" if size else ""
    return ", ".join(filter(None, (results.get("model") or results.get("base_model"), size)))


def save_figure(figure: Figure, path: str | Path, **options) -> Path:
    """Writes a figure as a PNG file; `options` are those of `Figure.savefig`."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", **options)
    return write_file(path, buffer.getvalue())


@checked
def plot_learning_curve(log_history: list[dict], path: str | Path, title: str, results: dict | None = None) -> Path:
    """Plots the losses of fast and slow steps, and below them other logged values of the modes.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): The PNG file to write.
        title (`str`): Title of the picture.
        results (`dict`, *optional*): Those of the run, whose model, hardware and date stand below the title.

    Raises:
        ValueError: nothing was logged.
    """
    panels = {label: [key for key in keys if _points(log_history, key)] for label, keys in PANELS.items()}
    panels = {label: keys for label, keys in panels.items() if keys}
    if not panels:
        raise ValueError(
            "`log_history` holds no losses, so there is nothing to draw. Train for at least `logging_steps` steps."
        )
    figure, axes = figure_of(7.5, 1.2 + 2.6 * len(panels), len(panels), 1, sharex=True)
    axes = axes[:, 0]
    for axis, (label, keys) in zip(axes, panels.items(), strict=True):
        _draw_panel(axis, log_history, keys, label)
    axes[-1].set_xlabel("optimizer step")
    describe(figure, title, results or {})
    return save_figure(figure, path)


def _draw_panel(axis: Axes, log_history: list[dict], keys: list[str], label: str) -> None:
    for key in keys:
        name, colour, marker = LINES[key]
        steps, values = zip(*_points(log_history, key), strict=True)
        # About twenty markers, whatever the length of the run.
        every = max(1, len(steps) // 20)
        axis.plot(steps, values, color=colour, marker=marker, markevery=every, markersize=4, label=name)
    axis.set_ylabel(label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)


def _points(log_history: list[dict], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
