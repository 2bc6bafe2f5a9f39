"""Renders the README.md of a trained model from its results file."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..hub.source import Source
from ..hub.upload import card_text, published_card
from ..utils.constants import CARD_NAME
from ..utils.text import in_thousands
from ..utils.validation import checked
from ..utils.writing import write_file
from .cards import TEMPLATES, Markdown, adopt_card, code, given_keys, merge_card, plain, render, split_front_matter
from .results import is_hub_id

logger = logging.getLogger(__name__)

TEMPLATE = TEMPLATES / "model_card.md.jinja"
# What a card says only where the results do.
OPTIONAL = (
    "accuracy",
    "adapter",
    "base_model",
    "datasets",
    "eval_dataset",
    "eval_part",
    "kept_tokens",
    "learning_curve",
)
OPTIONAL += ("learning_curve", "majority_accuracy", "model", "peak_memory", "progress", "pruned_in_language_model")
OPTIONAL += ("data_wait", "speedup", "steps")
# Front matter keys and lines that PEFT adds to the Hub's card template beside adapters.
PEFT_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}
PEFT_LINES = ("### Framework versions", "- PEFT ", "## Training procedure")
QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"
LICENSE = ("license", "license_name", "license_link")
# Keys of `Trainer.evaluate` that measure time, not quality.
EVALUATION_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


@checked
def write_model_card(folder: str | Path, results: dict) -> Path:
    """Writes the model card of a training run, or renews it and keeps the sections that a person wrote.

    Args:
        folder (`str` or `Path`): The folder of the model.
        results (`dict`): The contents of results.json, as [`DualSpeedTrainer.record`] returns them.

    Raises:
        ValueError: the existing card is not UTF-8, or its front matter is not a YAML mapping.
    """
    path = Path(folder) / "README.md"
    earlier = read_card(path)
    if "license" in split_front_matter(earlier)[0].keys() - given_keys(earlier):  # a person's, not the base model's
        results = {**results, "hub": {k: v for k, v in results.get("hub", {}).items() if k not in LICENSE}}
    text = model_card(results)
    return write_file(path, merge_card(without_stale(earlier, text), text))


def license_of(model: str | None, token: str | bool | None = None) -> dict[str, str]:
    """The licence in the front matter of a model's own card, in a folder or on the Hub, with its name and link.

    {} where it is not known, the Hub cannot be reached, or the card cannot be read.
    """
    local = model is not None and Path(model).is_dir()
    if not local and not is_hub_id(model):
        return {}
    source = Source(model, local, token=token, hurried=True)
    try:
        head, _ = split_front_matter(card_text(source.fetch(CARD_NAME), f"{CARD_NAME} of {source}"))
    except (OSError, ValueError) as error:  # errors of the Hub among them
        logger.debug("The licence of %s is not known: %s", model, error)
        return {}
    return {key: head[key] for key in LICENSE if isinstance(head.get(key), str)} if "license" in head else {}


def without_stale(earlier: str, generated: str) -> str:
    """The earlier card without front matter that an earlier run generated and this one does not."""
    given, (head, body), (new, rest) = given_keys(earlier), split_front_matter(earlier), split_front_matter(generated)
    if given.issuperset(head) and head.get("tags") == new.get("tags"):  # all of it is generated
        return generated.removesuffix(rest) + body
    left = {key: value for key, value in head.items() if key in new or key not in given}
    return earlier if left == head else f"---\n{yaml.safe_dump(left, sort_keys=False, allow_unicode=True)}---\n{body}"


def adopt_published_card(
    folder: str | Path, repo_id: str, revision: str | None = None, token: str | bool | None = None
) -> None:
    """Copies what a person wrote into the card on the Hub to the local README.md, so a push does not undo it.

    [`adopt_card`] says which values win. Without a card on the Hub, only the local one is checked.

    Raises:
        ValueError: either card is not UTF-8, or its front matter is not a YAML mapping.
        HfHubHTTPError, ConnectionError: the Hub refuses, fails or cannot be reached.
    """
    path = Path(folder) / "README.md"
    local, published = read_card(path), published_card(repo_id, revision, token)
    adopted = adopt_card(local, "" if is_empty_form(published) else published)
    if adopted != local:
        write_file(path, adopted)


def with_latest_words(published: str, local: str) -> str:
    """A card that is ready to be pushed, with what a person wrote into the published one meanwhile."""
    return adopt_card(local, "" if is_empty_form(published) else published, generated=False)


@checked
def model_card(results: dict) -> str:
    """The text of a run's card; values that are missing from `results`, or None there, are left out."""
    results = without_none(results)
    hub, adapter = results.get("hub", {}), results.get("adapter", False)
    data = ModelCardData(
        base_model=hub.get("base_model"),
        base_model_relation="adapter" if adapter and hub.get("base_model") else None,
        datasets=hub.get("datasets") or None,
        language=results.get("language"),
        library_name="peft" if adapter else "transformers",
        **({"license": results["license"]} if results.get("license") else {k: hub.get(k) for k in LICENSE}),
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(["dualspeed", *results.get("tags", [])])),
        model_name=_name(results),
        eval_results=_eval_results(results),
    )
    settings, seen = results.get("settings", {}), results.get("visual_tokens")
    steps, seconds = results.get("steps", {}), results.get("seconds", {})
    eval_data = code(results["eval_dataset"]) if results.get("eval_dataset") else ""
    if eval_data and "eval_split" in results:
        eval_data = Markdown(f"{eval_data} ({plain(results['eval_split'])})")
    values = {
        "front_matter": data.to_yaml(),
        "given": " ".join(data.to_dict()),
        "name": data.model_name,
        "repo_id": hub.get("repo_id"),
        "processor": results.get("processor", True),
        "pruned": pruning_words(settings["pruner"], settings.get("min_pruning_ratio")) if "pruner" in settings else "",
        "chosen": settings_rows(results),
        "modes": known((mode, steps.get(mode), _formatted(seconds.get(mode), ".1f")) for mode in ("fast", "slow")),
        "seconds": seconds,
        "size": size_words(results.get("parameters")),
        "visual_tokens": seen if seen and seen["full"] else None,
        "processes": results.get("training", {}).get("processes", 1),
        "eval_data": eval_data,
        "metrics": [(key, f"{value:.4g}") for key, value in _metrics(results).items()],
        "evaluations": [
            (
                one["dataset"],
                one.get("split"),
                one["metric"],
                _seen(one),
                f"{one['value']:.4f}",
                one.get("part", one["n"]),
            )
            for one in results.get("evaluations", [])
        ],
        "environment": environment_rows(results),
    }
    return render(TEMPLATE, {**dict.fromkeys(OPTIONAL), **results, **values})


def size_words(parameters: dict[str, int] | None) -> str | None:
    """Parameters by what training did with them, in words; None where they are unknown."""
    if not parameters:
        return None
    whole, trained = sum(parameters.values()), parameters.get("trained", 0)
    return f"{in_thousands(whole)} parameters; training moved {'all' if trained == whole else in_thousands(trained)}"


def without_none(value: object) -> object:
    """The value without the keys of mappings that hold None, as a number that is not finite is stored."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def read_card(path: Path) -> str:
    """The card of a model; "" if there is none, or only the empty form that PEFT writes beside adapters.

    Raises:
        ValueError: the card is not UTF-8.
    """
    card = card_text(path, repr(str(path))) if path.is_file() else ""
    return "" if is_empty_form(card) else card


def is_empty_form(card: str) -> bool:
    """Whether a card is the Hub's template with nothing filled in by a person, as PEFT writes it.

    PEFT's lines about a quantized model do not count as filled in.
    """
    try:
        head, body = split_front_matter(card)
    except ValueError:
        return False
    form = {line.rstrip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}
    lines = [line.rstrip() for line in body.splitlines()]
    if QUANTIZED in lines:
        start = lines.index(QUANTIZED)
        end = next((n for n in range(start + 1, len(lines)) if not lines[n].startswith("- ")), len(lines))
        lines[start:end] = []
    own = [line for line in lines if line not in form and not line.startswith(PEFT_LINES)]
    return bool(body.strip()) and not own and set(head) <= PEFT_KEYS


def known(rows: Iterable[tuple]) -> list[tuple]:
    """The rows of a table that have a value behind their first cell."""
    return [row for row in rows if any(cell is not None for cell in row[1:])]


def settings_rows(results: dict) -> list[tuple]:
    """Settings of DualSpeed and of the training, and the seeds if given."""
    parts = (results.get(part, {}) for part in ("settings", "training", "seeds"))
    return known((key, _text(value)) for part in parts for key, value in part.items())


def environment_rows(results: dict) -> list[tuple]:
    """Versions, hardware and date."""
    rows = [*results.get("versions", {}).items(), *results.get("machine", {}).items()]
    return known([*rows, ("date (UTC)", results.get("date"))])


def _name(results: dict) -> str:
    repo_id = results.get("hub", {}).get("repo_id")
    return repo_id.split("/")[-1] if repo_id else " ".join(results.get("name", "").split()) or "model"


def _eval_results(results: dict) -> list[EvalResult] | None:
    """Results for the Hub's widget: those on a data set with a known name."""
    measured = _metrics(results) if results.get("eval_dataset") else {}
    if results.get("eval_dataset") and results.get("accuracy") is not None and not results.get("eval_part"):
        measured["accuracy"] = results["accuracy"]
    names = {"accuracy": "Accuracy with all visual tokens"}
    rows = [
        (
            results["eval_dataset"],
            results.get("eval_split"),
            key,
            names.get(key, f"{key} with all visual tokens"),
            value,
        )
        for key, value in measured.items()
    ]
    rows += [
        (one["dataset"], one.get("split"), one["metric"], f"{one['metric']} with {_seen(one)}", one["value"])
        for one in results.get("evaluations", [])
        if not one.get("part")  # as above: the Hub would show it as a score of the whole data set
    ]
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=dataset if is_hub_id(dataset) else dataset_slug(dataset),
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for dataset, split, metric, name, value in rows
        if value is not None and math.isfinite(value)  # the Hub rejects others
    ] or None


def dataset_slug(name: str) -> str:
    """A data set's name as the Hub takes it for a type: no folder, and no other signs than `-`, `_` and `.`."""
    return re.sub(r"[^\w.-]+", "-", name.rstrip("/").rpartition("/")[2], flags=re.ASCII).strip("-") or "data"


def _seen(evaluation: dict) -> str:
    """Which visual tokens the model saw in an evaluation, in words."""
    if evaluation.get("pruner") is None:
        return "all visual tokens"
    behind = ", behind the isolator" if evaluation.get("isolator_length") else ""
    return f"{evaluation.get('pruning_ratio', 0):.4g} of the visual tokens removed by {evaluation['pruner']}{behind}"


def _metrics(results: dict) -> dict[str, float]:
    """The metrics of the Trainer's own evaluation, without times."""
    found = {key.removeprefix("eval_"): value for key, value in results.get("evaluation", {}).items()}
    return {k: value for k, value in found.items() if not k.endswith(EVALUATION_TIMES) and math.isfinite(value)}


def pruning_words(pruner: dict, least: float | None = None) -> Markdown:
    """A pruner's name and ratio in words, as a verb phrase; the ratio may change over training: by a schedule of its
    own, or down to `least` with the losses."""
    name, end, schedule = pruner["pruner_type"], pruner["pruning_ratio"], pruner.get("pruning_schedule", "constant")
    removed = f"{end:.4g} of them removed"
    if least is not None:
        removed = f"{least:.4g} to {removed} (adaptive)"
    elif schedule != "constant":
        removed = f"at first {pruner['initial_pruning_ratio']:.4g} and in the end {removed} ({plain(schedule)})"
    return Markdown(f"{code(name)} leaves of the visual tokens, {removed}")


def _formatted(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _text(value: object) -> str | None:
    """A setting in words; a pruner is a mapping of its name and options."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items() if inner is not None)
    return None if value is None else str(value)


@contextmanager
def kept_card(folder: Path, model: object) -> Iterator[None]:
    """Keeps PEFT from writing into README.md in `folder` while it saves: an empty form, and tags of its own.

    It never looks at the card's contents, so a broken card cannot keep a model from being saved.
    """
    # Earlier versions moved the card aside for as long, so a kill could leave it there.
    path, aside = folder / "README.md", folder / "_README.md.kept"
    if aside.is_file() and (not path.is_file() or is_empty_form(path.read_bytes().decode(errors="replace"))):
        aside.replace(path)
    if not hasattr(model, "create_or_update_model_card"):
        yield
        return
    model.create_or_update_model_card = lambda output_dir: None
    try:
        yield
    finally:
        del model.create_or_update_model_card
