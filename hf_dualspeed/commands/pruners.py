"""`dualspeed pruners`: lists the registered pruners."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..pruners import available_pruners
from ..pruners.registry import kind_of, pruner_class
from ..utils.validation import Parser


def main(argv: list[str]) -> None:
    """Prints the table."""
    parser = Parser(prog="dualspeed pruners", description="Lists the registered pruners.")
    parser.parse_args(argv)
    table = Table("pruner", "needs", "kind", "what it does")
    for name in available_pruners():
        cls = pruner_class(name)
        needs = ", ".join(sorted(cls.needs - {"grid"}))  # every model gives the grid
        table.add_row(name, needs, kind_of(cls), (cls.__doc__ or "").strip().partition("\n")[0])
    Console().print(table)
