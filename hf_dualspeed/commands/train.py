"""`dualspeed train`: trains from a recipe."""

from __future__ import annotations

from ..recipes.arguments import parse_recipe


def main(argv: list[str]) -> None:
    """Reads the recipe and trains.

    Args:
        argv (`list[str]`): The words after `dualspeed train`.
    """
    arguments = parse_recipe(argv, prog="dualspeed train")
    from ..recipes.run import run_recipe  # imported late: a wrong option is reported at once

    run_recipe(*arguments)
