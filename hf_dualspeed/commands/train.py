"""`dualspeed train`: a training from a recipe."""

from __future__ import annotations

from ..recipes.arguments import parse_recipe


def main(argv: list[str]) -> None:
    """Parses the recipe and trains."""
    arguments = parse_recipe(argv, prog="dualspeed train")
    from ..recipes.run import run_recipe  # late, so that a wrong option is told at once

    run_recipe(*arguments)
