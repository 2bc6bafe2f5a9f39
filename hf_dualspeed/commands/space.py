"""`dualspeed demo` and `dualspeed space`: run the Space locally, and publish it on the Hub.

Its files are a separate app: `spaces_demo/` in the repository, `hf_dualspeed/space_files` in an installation.
"""

from __future__ import annotations

import importlib
import json
import socket
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import yaml

from ..hub.source import is_repo_id
from ..hub.upload import push_files
from ..publishing.cards import merge_card, split_front_matter
from ..publishing.results import read_results
from ..utils.progress import Work
from ..utils.validation import Parser, check_range
from ..utils.writing import copy_file, write_file, write_json

# The files of an installation, and those of the checkout.
PACKAGE = Path(__file__).parent.parent
PLACES = (PACKAGE / "space_files", PACKAGE.parent / "spaces_demo")
FILES = ("README.md", "requirements.txt", "style.css")
FILES += ("app.py", "inference.py", "limits.py", "overlay.py", "slots.py", "views.py")
# The default run of each role, as in spaces_demo/slots.py. Its results name the repo that it was pushed to.
RUNS = {"baseline": "runs/quickstart_full", "dualspeed": "runs/quickstart", "pruned": "runs/quickstart_pruned"}
COMPARE = "docs/results/compare.md"
EQUAL_TIME = "ablation_equal_time.png"  # beside the table
CHECKPOINTS = "checkpoints.json"
# Of the card's front matter: what the app needs to run, and tags, which are united.
SETTINGS = ("sdk", "sdk_version", "python_version", "app_file", "models", "tags")


def demo_command(argv: list[str]) -> None:
    """Runs the Space on this machine until it is stopped.

    Args:
        argv (`list[str]`): The words after `dualspeed demo`.

    Raises:
        ImportError: gradio is not installed.
    """
    parser = Parser(
        prog="dualspeed demo", description="Asks up to three checkpoints the same question, in the browser."
    )
    for key, run in RUNS.items():
        parser.add_argument(f"--{key}", metavar="NAME", help=f"folder or Hub id of a checkpoint (default: {run})")
    parser.add_argument("--webcam", action="store_true", help="let visitors use their webcam")
    parser.add_argument("--port", type=int, help="the port (default: 7860, or the next that is free)")
    options = parser.parse_args(argv)
    if options.port is not None:
        check_port(options.port)
    if find_spec("gradio") is None:
        raise ImportError('The demo needs gradio. Run `pip install "hf-dualspeed[demo]"`.')
    sys.path.insert(0, str(source_folder()))  # app.py imports its parts by plain names, as on a Space
    names = {key: getattr(options, key) for key in RUNS}
    importlib.import_module("app").main(names, options.webcam, options.port)


def check_port(port: int) -> None:
    """Raises a `ValueError` unless this machine can serve at `port`."""
    check_range("port", port, 1, 65535, off="Leave it out for 7860, or the next that is free.")
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"`port` {port} cannot be used: {error.strerror}. Choose another, or leave it out."
            ) from None


def space_command(argv: list[str]) -> None:
    """Publishes the Space.

    Args:
        argv (`list[str]`): The words after `dualspeed space`.
    """
    parser = Parser(
        prog="dualspeed space",
        description="Publishes the demo as a Space on the Hub, with published checkpoints.",
        epilog="The token is that of `hf auth login` or of the environment variable HF_TOKEN.",
    )
    parser.add_argument("--push", metavar="REPO", required=True, help="the Space, user/name; made if need be")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    for key, run in RUNS.items():
        parser.add_argument(f"--{key}", metavar="REPO", help=f"Hub id of a model (default: where {run} was pushed to)")
    parser.add_argument(
        "--compare", metavar="FILE", help=f"a table in Markdown, with a .png beside it (default: {COMPARE})"
    )
    options = parser.parse_args(argv)
    names = published_names({key: getattr(options, key) for key in RUNS})
    with Work("Pushing the Space"):
        address = push_space(options.push, names, options.private or None, compare_file(options.compare))
    print(address)
    if not names:
        print(
            "The Space has no model yet. Push one by `dualspeed push runs/quickstart user/model`, then run this again "
            "with --dualspeed user/model, or set the variable DEMO_DUALSPEED in the Space's settings.",
            file=sys.stderr,
        )


def source_folder() -> Path:
    """The folder of the Space's files.

    Raises:
        FileNotFoundError: the files are neither installed nor in the checkout.
    """
    found = next((place for place in PLACES if (place / "app.py").is_file()), None)
    if found is None:
        raise FileNotFoundError("The Space's files are missing from this installation. Install hf-dualspeed anew.")
    return found


def published_names(given: dict[str, str | None]) -> dict[str, str]:
    """The Hub id of each role: the given one, else the repo that the role's run was pushed to.

    Raises:
        ValueError: a name is no Hub id. A Space cannot read this machine's folders.
    """
    names = {}
    for key, run in RUNS.items():
        name = given.get(key) or read_results(run).get("hub", {}).get("repo_id")
        if name is None:
            continue
        if not is_repo_id(name) or Path(name).is_dir():
            raise ValueError(
                f"`{key}` must be a model on the Hub, 'user/name', got {name!r}, which a Space cannot see. Push it "
                f"first: dualspeed push {name} user/name"
            )
        names[key] = name
    return names


def compare_file(given: str | None) -> Path | None:
    """The table of `python -m benchmarks.compare` to show, or None where there is none.

    Raises:
        FileNotFoundError: the given file does not exist.
    """
    path = Path(given or COMPARE)
    if given is not None and not path.is_file():
        raise FileNotFoundError(f"`compare` is {given!r}, but there is no such file.")
    return path if path.is_file() else None


def push_space(repo_id: str, names: dict[str, str], private: bool | None = None, compare: Path | None = None) -> str:
    """Publishes the Space's files in one commit. Returns the Space's address.

    Title, colours and the like, and sections of the card that a person wrote on the Hub, stay.

    Args:
        repo_id (`str`): "user/name". The Space is made where it does not exist.
        names (`dict[str, str]`): Hub ids of checkpoints by role: "baseline", "dualspeed", "pruned".
        private (`bool`, *optional*): whether a new Space is private.
        compare (`Path`, *optional*): a table in Markdown, shown with the plots beside it.

    Raises:
        ValueError: `repo_id` is no "user/name", or a token or key stands in a file.
        OSError: the table or its plot is a link.
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"`push` must be a Space 'user/name', got {repo_id!r}.")
    with tempfile.TemporaryDirectory() as folder:
        write_space(Path(folder), names, compare)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        contents = {path.relative_to(folder).as_posix(): path for path in files}
        options = {"space": True, "private": private, "renew": _renewed}
        return str(push_files(contents, repo_id, "Upload the DualSpeed demo", **options).repo_url)


def _renewed(published: str, card: str) -> str:
    """The Space's card with what a person wrote into the published one; the app's own settings win."""
    (ours, body), (theirs, _) = split_front_matter(card), split_front_matter(published)
    head = ours | {key: value for key, value in theirs.items() if key not in SETTINGS}
    return merge_card(published, f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n{body}")


def library_files() -> list[Path]:
    """The library's files, relative to its folder: code, templates and cards of metrics, without the Space's files."""
    paths = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    kinds = (".py", ".jinja", ".md", ".json", ".typed")
    hidden = ("__pycache__", "space_files")
    return sorted(path for path in paths if path.suffix in kinds and not set(hidden) & set(path.parts))


def write_space(folder: Path, names: dict[str, str], compare: Path | None = None) -> None:
    """Writes all files of the Space into an empty folder, the library's own source too: PyPI need not have it."""
    for name in FILES:
        write_file(folder / name, (source_folder() / name).read_bytes())
    for path in library_files():
        write_file(folder / PACKAGE.name / path, (PACKAGE / path).read_bytes())
    card = folder / "README.md"
    models = json.dumps(sorted(set(names.values())))  # valid YAML too
    write_file(card, card.read_text(encoding="utf-8").replace("models: []", f"models: {models}"))
    write_json(folder / CHECKPOINTS, names)
    if compare is not None:
        for path in (compare, compare.with_suffix(".png")):
            if path.exists():
                copy_file(path, folder / f"compare{path.suffix}")
        in_time = compare.with_name(EQUAL_TIME)
        if in_time.exists():
            copy_file(in_time, folder / "equal_time.png")
