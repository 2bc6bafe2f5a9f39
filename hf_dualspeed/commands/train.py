"""`dualspeed train`: trains from a recipe."""

from __future__ import annotations

from ..recipes.arguments import parse_recipe


def main(argv: list[str]) -> None:
    """Reads the recipe and trains.

    Args:
        argv (`list[str]`): The words after `dualspeed train`.
    """
    arguments = parse_recipe(argv, prog="dualspeed train")
    from accelerate import PartialState  # imported late: a wrong option is reported at once

    from ..recipes.run import run_recipe

    run_recipe(*arguments)
    PartialState().destroy_process_group()  # whose threads may abort a process that ends with them
