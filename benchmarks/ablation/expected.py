"""`python -m benchmarks.ablation.expected`: what to expect at which ratio, for docs/ablation.md, from result files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hf_dualspeed.utils.text import markdown_table

from ..common import cell
from .plan import ORIGINAL, TODAYS

FOLDER = Path(__file__).parents[2] / "docs/results"
UNKNOWN = "unknown"
HEADER = ("task", "visual tokens", "model", "pruned", "slow steps", "retention", "speed-up", "measured in")


@dataclass(frozen=True)
class Row:
    """A variant of a results file: its `key` there, what the model is asked, and what it reads and is."""

    task: str
    tokens: str
    model: str
    pruned: str
    file: str | None = None
    key: str = ""

    def cells(self, folder: Path) -> tuple[str, ...]:
        """The row of the table; unknown is what nobody has measured."""
        words = (self.task, self.tokens, self.model, self.pruned)
        path = folder / f"{self.file}.json"
        if self.file is None or not path.is_file():
            return (*words, UNKNOWN, UNKNOWN, UNKNOWN, "")
        results = json.loads(path.read_text(encoding="utf-8"))
        own = results["summary"][self.key]
        slow = own["steps"]["slow"] / sum(own["steps"].values())
        speed_up = cell(own["speed_up"], "{:.2f}", "x") if results.get("timed", True) else UNKNOWN
        retention = cell(own["retention"], "{:.1%}")
        return (*words, f"{slow:.0%}", retention, speed_up, f"[{self.file}](results/{self.file}.json)")


TINY, DEEP, DEEP_TOKENS = "3 layers of 128", "12 layers of 128", "576"
GRIDS, OBJECTS = "2 x 2 items of clothing", "2 x 2 drawn objects and animals"
READING = "words, numbers and a chart on a page"
ROWS = (
    *(Row(GRIDS, "144", TINY, f"{ratio:.0%}", "ablation_pruning", f"pruning-{ratio}") for ratio in (0.5, 0.75, 0.95)),
    Row(GRIDS, "144", TINY, "90%", "ablation_equal_time", "dualspeed"),
    Row("colour of a shape, trained from scratch", "256", "4 layers of 192", "90%", "compare", "dualspeed"),
    Row(GRIDS, DEEP_TOKENS, DEEP, "90%", "ablation_deeper", "dualspeed"),
    Row(GRIDS, DEEP_TOKENS, DEEP, "90%", "ablation_deeper-positions", TODAYS.key),
    Row(OBJECTS, "576", TINY, "90%", "ablation_objects-shallow", TODAYS.key),
    Row(OBJECTS, DEEP_TOKENS, DEEP, "75%", "ablation_objects", f"pruning-0.75{ORIGINAL}"),
    Row(OBJECTS, DEEP_TOKENS, DEEP, "90%", "ablation_objects", TODAYS.key),
    Row(OBJECTS, DEEP_TOKENS, DEEP, "90%, by `fastv`, k = 2", "ablation_first-layers", f"fastv-2{ORIGINAL}"),
    *(
        Row(READING, "576", TINY, f"{ratio:.0%}", "ablation_reading", f"pruning-{ratio}{ORIGINAL}")
        for ratio in (0.5, 0.75, 0.9)
    ),
    Row("photographs, charts and documents", "576 to 2,928", "7 B parameters", "90%"),
)


def table(folder: Path = FOLDER) -> str:
    """The Markdown table of all rows."""
    return markdown_table(HEADER, [row.cells(folder) for row in ROWS])


if __name__ == "__main__":
    print(table())
