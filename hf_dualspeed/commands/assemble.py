"""`dualspeed assemble`: joins two small pretrained models to a LLaVA."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from ..recipes.assemble import LANGUAGE, VISION, build_llava, given_file, origin, write_card
from ..recipes.wheels import default_cache, fetch
from ..utils.progress import Work
from ..utils.validation import Parser
from ..utils.writing import check_new_folder, new_folder


def main(argv: list[str]) -> None:
    """Runs `dualspeed assemble` on the given words."""
    parser = Parser(prog="dualspeed assemble", description="Joins two small pretrained models to a LLaVA.")
    parser.add_argument("output_dir", help="Folder to write; it must be empty or not exist yet.")
    for source in (VISION, LANGUAGE):
        instead = f"Your own file instead of that of {source.package} {source.version}."
        parser.add_argument(f"--{source.option}", metavar="FILE", help=instead)
    parser.add_argument("--seed", type=int, default=0, help="Seed of the new projector.")
    parser.add_argument("--cache_dir", default=str(default_cache()), help="Where the two files are kept.")
    words = parser.parse_args(argv)
    output, console = Path(words.output_dir), Console(soft_wrap=True, highlight=False, markup=False)
    check_new_folder("output_dir", output)
    check_readers()
    files = []
    for source in (VISION, LANGUAGE):
        own = getattr(words, source.option)
        with Work(f"Fetching {source.package}"):
            files.append(fetch(source, Path(words.cache_dir)) if own is None else given_file(source.option, own))
        console.print(origin(source, own))
    with Work("Joining the parts"), new_folder(output) as folder:
        model, processor = build_llava(*files, seed=words.seed)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_card(folder, [origin(VISION, words.vision_onnx), origin(LANGUAGE, words.language_gguf)])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    console.print(f"{count:.0f} M parameters, {model.config.image_seq_length} visual tokens per image: {output}")


def check_readers() -> None:
    """Raises an `ImportError` where a package for the two file formats is missing."""
    missing = [name for name in ("onnx", "gguf") if find_spec(name) is None]
    if missing:
        raise ImportError(f"Not installed: {', '.join(missing)}. Run `pip install hf-dualspeed[assemble]`.")
