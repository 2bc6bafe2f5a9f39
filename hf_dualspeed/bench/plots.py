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
