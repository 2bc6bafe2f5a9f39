"""`dualspeed push-metric`: publishes one of this library's metrics as a Space, where `evaluate.load` finds it."""

from __future__ import annotations

from importlib.metadata import version

from huggingface_hub import CommitInfo

from ..hub.source import is_repo_id
from ..hub.upload import push_files
from ..metrics import CLASSES, metric_folder
from ..publishing.cards import merge_card
from ..utils.constants import CARD_NAME
from ..utils.progress import Work
from ..utils.validation import Parser

HERE = "path/to/this/folder"
APP = """import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("{repo_id}"))
"""


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="dualspeed push-metric",
        description="Publishes one of this library's metrics as a Space, where `evaluate.load` finds it.",
        epilog="The token is that of `hf auth login` or of the environment variable HF_TOKEN.",
    )
    parser.add_argument("metric", choices=CLASSES, metavar="metric", help=f"one of {', '.join(CLASSES)}")
    parser.add_argument("repo", help="the Space, user/name; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new Space private")
    parser.add_argument("--commit_message", help="what the Space's history says")
    options = parser.parse_args(argv)
    with Work(f"Pushing {options.metric}"):
        commit = push_metric(options.metric, options.repo, options.private or None, options.commit_message)
    print(f'{commit.commit_url}\n\nTo use it:\n\nimport evaluate\n\nmetric = evaluate.load("{options.repo}")')


def push_metric(name: str, repo_id: str, private: bool | None = None, commit_message: str | None = None) -> CommitInfo:
    """Pushes a metric's module, card and widget. Sections of the card that a person wrote stay.

    Raises:
        ValueError: there is no such metric, `repo_id` is no "user/name" with a name that Python can import, or the card
            on the Hub holds a token or key.
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    # evaluate imports a module with the Space's name.
    if not is_repo_id(repo_id) or not repo_id.split("/")[1].isidentifier():
        raise ValueError(
            f"`repo` must be a Space 'user/name' whose name is one of Python's, without hyphens, got {repo_id!r}."
        )
    contents = {file: text.encode("utf-8") for file, text in space_files(name, repo_id).items()}
    message = commit_message or f"Upload the metric {name}"
    return push_files(contents, repo_id, message, space=True, private=private, renew=merge_card)


def space_files(name: str, repo_id: str) -> dict[str, str]:
    """The files of a metric's Space: the module under the Space's name, its card, and a widget to try it."""
    folder = metric_folder(name)
    card = (folder / CARD_NAME).read_text(encoding="utf-8").replace(HERE, repo_id)
    return {
        f"{repo_id.split('/')[1]}.py": (folder / f"{name}.py").read_text(encoding="utf-8"),
        CARD_NAME: card,
        "app.py": APP.format(repo_id=repo_id),
        "requirements.txt": f"evaluate=={version('evaluate')}\n",
    }
