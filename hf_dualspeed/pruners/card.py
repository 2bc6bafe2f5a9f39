"""Card and upload of a published pruner."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo

from ..hub.source import is_repo_id, lies_in_module
from ..hub.upload import push_files
from ..publishing.cards import code, merge_card, render
from ..utils.constants import CARD_NAME, PRUNER_WEIGHTS_NAME
from ..utils.validation import checked
from ..utils.writing import write_file
from .config import budget

if TYPE_CHECKING:
    from .base import Pruner

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).parent / "templates" / "pruner_card.md.jinja"
TAGS = ["dualspeed", "dualspeed-pruner"]
DUALSPEED = "2602.03815"
IMAGES = {256: "256", 576: "576 (LLaVA-1.5)", 2880: "2880 (LLaVA-NeXT, five views)"}


def push_pruner(
    pruner: Pruner,
    repo_id: str,
    results: dict | list[dict] | None = None,
    commit_message: str | None = None,
    *,
    own_card: str = "",
    **hub,
) -> CommitInfo:
    """Implements [`Pruner.push_to_hub`]; `own_card` is a hand-written card, used if the repo has none yet."""
    if not is_repo_id(repo_id):
        raise ValueError(f"`repo_id` must be a Hub repo 'user/name', got {repo_id!r}.")
    cls = type(pruner)
    if is_custom(pruner) and not lies_in_module(cls):
        raise ValueError(
            f"The pruner {cls.__name__} is defined in {cls.__module__!r} ({cls.__qualname__}), whose code cannot be "
            "pushed with it, and without it nobody can load the pruner. Move the class to the top of a file of its "
            f"own, such as {pruner.config.pruner_type}_pruner.py, import it from there, and push again."
        )
    generated = pruner_card(pruner, repo_id, results)

    def renewed(published: str, card: str) -> str:
        if not published:
            return card
        if own_card and own_card != published:
            logger.warning("%s has a card already: it is renewed, and the local %s left out.", repo_id, CARD_NAME)
        return merge_card(published, generated)

    with tempfile.TemporaryDirectory() as folder:
        pruner.save_pretrained(folder)
        write_file(Path(folder) / CARD_NAME, merge_card(own_card, generated))
        contents = {path.name: path for path in Path(folder).iterdir()}
        message = commit_message or f"Upload pruner {pruner.config.pruner_type}"
        hub |= {"stale": lambda name: name == PRUNER_WEIGHTS_NAME, "renew": renewed}
        return push_files(contents, repo_id, message, **hub)


@checked
def pruner_card(pruner: Pruner, repo_id: str, results: dict | list[dict] | None = None) -> str:
    """The README.md of a published pruner: rule, use, budget, needs, settings, results, licence and citation."""
    config, rule, rows = pruner.config, inspect.cleandoc(type(pruner).__doc__ or ""), result_rows(results)
    ratios = [config.pruning_ratio]
    if config.pruning_schedule != "constant":
        ratios.insert(0, config.ratio_at(0.0))
    papers = re.findall(r"\b\d{4}\.\d{5}\b", f"{rule} {sys.modules[type(pruner).__module__].__doc__ or ''}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = {
        "tags": TAGS,
        "repo_id": repo_id,
        "config": config,
        "learned": bool(pruner.state_dict()),
        "usage": usage(pruner, repo_id),
        "custom": is_custom(pruner),
        # Markdown without HTML. An unescaped heading would be taken for a section that a user wrote.
        "rule": re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", re.sub(r"^#", r"\\#", rule, flags=re.MULTILINE)),
        "needs": pruner.needs,
        "in_language_model": pruner.in_language_model,
        "first_ratio": ratios[0],
        "budget": [(name, *(budget(count, ratio) for ratio in ratios)) for count, name in IMAGES.items()],
        "settings": [(code(key), code(json.dumps(value))) for key, value in config.to_dict().items()],
        "columns": columns,
        "results": [[row.get(column) for column in columns] for row in rows],
        "papers": [paper for paper in dict.fromkeys(papers) if paper != DUALSPEED],
    }
    return render(TEMPLATE, values)


def usage(pruner: Pruner, repo_id: str, revision: str | None = None) -> str:
    """Three lines that load the published pruner and run a model on pruned tokens."""
    options = f', revision="{revision}"' if revision else ""
    options += ", trust_remote_code=True" if is_custom(pruner) else ""
    device = ".to(model.device)" if pruner.state_dict() else ""
    function, line = "prune_inputs", "answer = model.generate(**prune_inputs(model, inputs, pruner))"
    if pruner.in_language_model:
        function, line = "prune_visual_tokens", "with prune_visual_tokens(model, pruner): loss = model(**inputs).loss"
    return f"""from hf_dualspeed import AutoPruner, {function}
pruner = AutoPruner.from_pretrained("{repo_id}"{options}){device}
{line}"""


def is_custom(pruner: Pruner) -> bool:
    """Whether the pruner's class comes from outside this library."""
    return type(pruner).__module__.partition(".")[0] != __name__.partition(".")[0]


def result_rows(results: dict | list[dict] | None) -> list[dict]:
    """The rows of the table of results.

    Raises:
        ValueError: `results` is neither a mapping of names to plain values nor a list of such mappings.
    """
    if isinstance(results, dict):
        results = [{"measured": key, "value": value} for key, value in results.items()]
    rows = results or []
    plain = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(value, (str, int, float, type(None))) for value in row.values())
        for row in rows
    )
    if not plain:
        raise ValueError(
            "`results` must be a mapping of names to numbers or words, or a list of such mappings (rows), got "
            f"{str(rows)[:200]!r}."
        )
    return rows
