"""`dualspeed train`: trains from a recipe."""

from __future__ import annotations

from ..recipes.arguments import parse_recipe
from ..utils.progress import Work
from ..utils.quiet import is_first_process


def main(argv: list[str]) -> None:
    """Reads the recipe and trains.

    Args:
        argv (`list[str]`): The words after `dualspeed train`.
    """
    arguments = parse_recipe(argv, prog="dualspeed train")
    silent = arguments[1].disable_tqdm or not is_first_process()
    with Work("Loading the libraries", disable=silent):  # late: a wrong option is reported at once
        from accelerate import PartialState

        from ..recipes.run import run_recipe

    try:
        run_recipe(*arguments)
    except KeyboardInterrupt as stop:
        remedy = "--resume_from_checkpoint last goes on from the last checkpoint, if one was saved."
        raise KeyboardInterrupt(remedy) from stop
    PartialState().destroy_process_group()  # whose threads may abort a process that ends with them
