"""Styles of the plots of `dualspeed bench`. Okabe and Ito's colours: colour-blind readers can tell them apart."""

from __future__ import annotations

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


def model_size(results: dict) -> str:
    """The parameters of the models of a benchmark, in words."""
    sizes = sorted(sum(run["parameters"].values()) for run in results["runs"])
    low, high = (f"{size / 1e9:.1f} B" if size >= 1e9 else f"{size / 1e6:.0f} M" for size in (sizes[0], sizes[-1]))
    return f"{low if low == high else f'{low} to {high}'} parameters in {results['dtype']}"
