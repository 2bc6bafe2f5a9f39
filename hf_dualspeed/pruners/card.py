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

import yaml
from huggingface_hub import CommitInfo

from ..hub.source import is_repo_id
from ..hub.upload import published_card, push_folder
from ..publishing.cards import heading, merge_card
from ..utils.constants import CARD_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME
from ..utils.text import markdown_table
from .config import budget

if TYPE_CHECKING:
    from .base import Pruner

logger = logging.getLogger(__name__)

TAGS = ["dualspeed", "dualspeed-pruner"]
DUALSPEED = "2602.03815"
IMAGES = {256: "256", 576: "576 (LLaVA-1.5)", 2880: "2880 (LLaVA-NeXT, five views)"}
NEEDS = {
    "grid": "the row and column of each token, where the model tells them",
    "attention": "the attention that each token receives in the vision tower",
    "keys": "the attention keys of the vision tower",
    "text": "the instruction; never the answer",
}


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
    existing = published_card(repo_id, hub.get("revision"), hub.get("token"))
    if existing and own_card and own_card != existing:
        logger.warning("%s has a card already: it is renewed, and the local %s left out.", repo_id, CARD_NAME)
    card = merge_card(existing or own_card, pruner_card(pruner, repo_id, results))
    with tempfile.TemporaryDirectory() as folder:
        pruner.save_pretrained(folder)
        (Path(folder) / CARD_NAME).write_bytes(card.encode("utf-8"))
        if is_custom(pruner) and "auto_map" not in json.loads((Path(folder) / PRUNER_CONFIG_NAME).read_text("utf-8")):
            logger.warning(
                "The code of %s lies in no module of its own and is not pushed: whoever loads it must register it.",
                type(pruner).__name__,
            )
        stale = None if (Path(folder) / PRUNER_WEIGHTS_NAME).is_file() else [PRUNER_WEIGHTS_NAME]
        message = commit_message or f"Upload pruner {pruner.config.pruner_type}"
        return push_folder(Path(folder), repo_id, commit_message=message, delete=stale, **hub)


def pruner_card(pruner: Pruner, repo_id: str, results: dict | list[dict] | None = None) -> str:
    """The README.md of a published pruner: rule, use, budget, needs, settings, results, licence and citation."""
    parts = [_introduction(pruner, repo_id), _use(pruner, repo_id), _rule(pruner), _budget(pruner), _settings(pruner)]
    parts += [_results(results), _licence(pruner), _citation(pruner)]
    front = yaml.safe_dump({"library_name": "hf_dualspeed", "tags": TAGS}, sort_keys=False)
    return f"---\n{front}---\n\n" + "\n\n".join(filter(None, parts)) + "\n"


def usage(pruner: Pruner, repo_id: str, revision: str | None = None) -> str:
    """Three lines that load the published pruner and run a model on pruned tokens."""
    options = f', revision="{revision}"' if revision else ""
    options += ", trust_remote_code=True" if is_custom(pruner) else ""
    function, line = "prune_inputs", "answer = model.generate(**prune_inputs(model, inputs, pruner))"
    if pruner.in_language_model:
        function, line = "prune_visual_tokens", "with prune_visual_tokens(model, pruner): loss = model(**inputs).loss"
    return f"""from hf_dualspeed import AutoPruner, {function}
pruner = AutoPruner.from_pretrained("{repo_id}"{options})
{line}"""


def is_custom(pruner: Pruner) -> bool:
    """Whether the pruner's class comes from outside this library."""
    return type(pruner).__module__.partition(".")[0] != __name__.partition(".")[0]


def _document(pruner: Pruner) -> str:
    return inspect.cleandoc(type(pruner).__doc__ or "")


def _introduction(pruner: Pruner, repo_id: str) -> str:
    learned = " It is learned: its weights are in `pruner.safetensors`." if pruner.state_dict() else ""
    return (
        f"{heading(repo_id.split('/')[-1], 1)}\n\nThe visual token pruner `{pruner.config.pruner_type}`, for training "
        f"and running vision-language models on fewer visual tokens with DualSpeed.{learned}"
    )


def _use(pruner: Pruner, repo_id: str) -> str:
    note = ""
    if is_custom(pruner):
        note = "\n\nIt brings Python code along, which runs on your machine. Read it, and pin it by `revision`."
    return f"""{heading("How to use it")}

```python
{usage(pruner, repo_id)}
```

To train with it: `DualSpeedTrainingArguments(..., pruner="{repo_id}")`, or `pruner: {repo_id}` in a recipe.{note}"""


def _rule(pruner: Pruner) -> str:
    needs = "".join(f"\n- {NEEDS[need]}" for need in sorted(pruner.needs))
    reads = f"\n\nBeside the features of the tokens it reads:\n{needs}" if needs else ""
    # An unescaped heading would be taken for a section that a user wrote.
    described = re.sub(r"^#", r"\\#", _document(pruner), flags=re.MULTILINE)
    return f"{heading('The rule')}\n\n{described or 'Its author has not described it.'}{reads}"


def _budget(pruner: Pruner) -> str:
    config = pruner.config
    rows = [(name, budget(count, config.pruning_ratio)) for count, name in IMAGES.items()]
    text = f"It removes {config.pruning_ratio:.1%} of the visual tokens of each image"
    text += ", all told behind the last layer at which it does.\n\n" if pruner.in_language_model else ".\n\n"
    if config.pruning_schedule != "constant":
        first = config.ratio_at(0.0)
        rows = [(name, budget(count, first), kept) for (name, kept), count in zip(rows, IMAGES, strict=True)]
        text = (
            f"In training, the removed fraction goes from {first:.1%} to {config.pruning_ratio:.1%} "
            f"({config.pruning_schedule}); outside of training it is {config.pruning_ratio:.1%}.\n\n"
        )
    kept = ("kept",) if len(rows[0]) == 2 else ("kept at first", "kept in the end")
    return f"{heading('Budget')}\n\n{text}{markdown_table(('visual tokens', *kept), rows, words=True)}"


def _settings(pruner: Pruner) -> str:
    rows = [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in pruner.config.to_dict().items()]
    return f"{heading('Settings')}\n\n{markdown_table(('setting', 'value'), rows, words=True)}"


def _results(results: dict | list[dict] | None) -> str:
    if not results:
        return ""
    if isinstance(results, dict):
        results = [{"measured": key, "value": value} for key, value in results.items()]
    check_results(results)
    columns = list(dict.fromkeys(key for row in results for key in row))
    rows = [[row.get(column) for column in columns] for row in results]
    return f"{heading('Results')}\n\n{markdown_table(columns, rows, words=True)}"


def check_results(rows: object) -> None:
    """Raises a `ValueError` unless `rows` is a list of mappings of plain values."""
    plain = isinstance(rows, list) and all(
        isinstance(row, dict) and all(isinstance(value, (str, int, float, type(None))) for value in row.values())
        for row in rows
    )
    if not plain:
        raise ValueError(
            "`results` must be a mapping of names to numbers or words, or a list of such mappings (rows), got "
            f"{str(rows)[:200]!r}."
        )


def _licence(pruner: Pruner) -> str:
    words = ["The pruner itself is part of hf_dualspeed, which is under Apache-2.0."]
    if is_custom(pruner):
        words = ["The code beside this card is its author's, who may add a licence here."]
    if pruner.state_dict():
        words.append("The licences of the model and the data that it learned from apply to its weights.")
    return f"{heading('Licence')}\n\n{' '.join(words)}"


def _citation(pruner: Pruner) -> str:
    described = f"{_document(pruner)} {sys.modules[type(pruner).__module__].__doc__ or ''}"
    papers = [paper for paper in re.findall(r"\b\d{4}\.\d{5}\b", described) if paper != DUALSPEED]
    rule = ", ".join(arxiv(paper) for paper in dict.fromkeys(papers))
    lines = ([f"- the rule: {rule}"] if rule else []) + [f"- DualSpeed, which trains with it: {arxiv(DUALSPEED)}"]
    return f"{heading('Citation')}\n\n" + "\n".join(lines)


def arxiv(paper: str) -> str:
    return f"[arXiv {paper}](https://arxiv.org/abs/{paper})"
