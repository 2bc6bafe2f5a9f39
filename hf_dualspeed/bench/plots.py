"""Styles of the plots of `dualspeed bench`. Okabe and Ito's colours: colour-blind readers can tell them apart."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Hatches distinguish the parts in black and white.
PART_STYLE = {
    "encoder": ("#0072B2", "//"),
    "selection": ("#D55E00", ""),
    "shortening": ("#009E73", ""),
    "rest": ("#56B4E9", ""),
}
FULL_STEP, MARK = "#999999", "#CC79A7"
ARMS = {"random": ("#999999", "", "batches at random"), "grouped": ("#0072B2", "//", "batches of like length")}
LINES = {"plain": ("#999999", "s"), "fast": ("#56B4E9", "o"), "mix": ("#0072B2", "^"), "slow": ("#D55E00", "v")}


def figure_of(width: float, height: float, rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    """A figure without pyplot: it needs no display and shares no state with the caller's figures."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
