"""README's picture: the average step of both trainers at 7 B parameters on a GPU. `python -m benchmarks.front_page`"""

from __future__ import annotations

import json
from pathlib import Path

from hf_dualspeed.publishing.plots import figure_of, save_figure

RESULTS = Path("docs/results")
NAMES = ("bench_h100_llava_1_5", "bench_h100_llava_next", "bench_h100_llava_next_off")
PICTURE = Path("docs/images/h100.png")
SHAPES = {"llava-1.5": "LLaVA-1.5, 576 visual tokens", "llava-next": "LLaVA-NeXT, 2,928 visual tokens"}
TRAINER, OURS, MARK = "#999999", "#0072B2", "#D55E00"


def rows_of(found: list[dict]) -> list[dict]:
    """A row per run: what it is, milliseconds per sample of both trainers, the speed-up and its FLOP limit."""
    rows = []
    for run in (run for results in found for run in results["runs"]):
        plain = 1000 * run["seconds"]["plain"]["median"] / run["batch"]
        speed_up = run["ratios"]["expected_speedup"]["median"]
        said = f"{SHAPES[run['shape']]}\nactivation checkpointing {run['checkpointing']}"
        limit = run["flop_ratios"]["expected_speedup"]
        rows.append({"name": said, "plain": plain, "ours": plain / speed_up, "speed_up": speed_up, "limit": limit})
    return rows


def draw(found: list[dict], path: Path) -> Path:
    """Draws the rows; results are those of `dualspeed bench` on one card with the same settings."""
    rows, (first, *rest) = rows_of(found), found
    for other in rest:
        if (other["settings"]["slow_ratio"], other["machine"]) != (first["settings"]["slow_ratio"], first["machine"]):
            raise ValueError("The results differ in their machine or slow ratio, so they do not go into one picture.")
    figure, ((axis,),) = figure_of(9, 0.9 + 0.85 * len(rows), 1, 1)
    for place, row in enumerate(rows):
        axis.barh(place - 0.19, row["plain"], 0.34, color=TRAINER, label="transformers' Trainer" if not place else None)
        axis.barh(place + 0.19, row["ours"], 0.34, color=OURS, label="DualSpeedTrainer" if not place else None)
        axis.annotate(
            f"{row['plain']:.0f}", (row["plain"], place - 0.19), (5, -3), textcoords="offset points", fontsize=9
        )
        said = f"{row['ours']:.0f}:  {row['speed_up']:.2f}x as fast"
        end = max(row["ours"], row["plain"] / row["limit"])
        axis.annotate(said, (end, place + 0.19), (7, -3), textcoords="offset points", fontsize=10, weight="bold")
        style = {"marker": "|", "markersize": 13, "markeredgewidth": 2, "linestyle": "none", "color": MARK}
        label = "if time went with FLOPs" if not place else None
        axis.plot([row["plain"] / row["limit"]], [place + 0.19], label=label, **style)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(row["plain"] for row in rows))
    axis.set_xlabel("milliseconds per sample, average step (forward and backward)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    settings, card = first["settings"], first["machine"]["accelerator"]
    figure.suptitle(
        f"7 B parameters in bfloat16 on {card}, {first['date'][:10]}\n{settings['pruning_ratio']:.0%} of the visual "
        f"tokens pruned, {settings['slow_ratio']:.0%} slow steps on all of them",
        fontsize=10,
    )
    return save_figure(figure, path)


if __name__ == "__main__":
    print(draw([json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES], PICTURE))
