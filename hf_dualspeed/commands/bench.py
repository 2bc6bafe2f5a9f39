"""`dualspeed bench`: what a fast step costs beside a full one, in time, in floating-point operations and in memory."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from ..bench.measure import PART, write
from ..bench.options import parse_arguments
from ..utils.progress import Work
from ..utils.text import parse_json, without_paths
from ..utils.validation import surprises_named


def main(argv: list[str]) -> None:
    """Measures and writes JSON, or reads an earlier JSON file; writes Markdown and plot.

    Args:
        argv (`list[str]`): The words after `dualspeed bench`.
    """
    options = parse_arguments(argv)
    kind = import_module(
        "hf_dualspeed.bench.measure" if options.kind == "steps" else f"hf_dualspeed.bench.{options.kind}"
    )
    path = Path(options.output)
    if options.render_only:
        if not path.is_file():
            raise FileNotFoundError(
                f"`output` is {options.output!r}, but there is no such file to render. Measure first."
            )
        with surprises_named(f"`output` {options.output!r} holds no results of `dualspeed bench`"):
            kind.report(parse_json(path.read_bytes()), path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with Work("Measuring"):  # building models and counting what they do take long, too
        results = without_paths(kind.measure(options))
    write(results, path)
    path.with_suffix(PART).unlink(missing_ok=True)
    kind.report(results, path)
