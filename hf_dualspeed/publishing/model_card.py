"""Renders the README.md of a trained model from its results file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..hub.upload import card_text, published_card
from ..utils.text import markdown_table, percent
from .cards import adopt_card, given_keys, heading, merge_card, split_front_matter

PAPER = "https://arxiv.org/abs/2602.03815"
# Front matter keys and lines that PEFT adds to the Hub's card template beside adapters.
PEFT_KEYS = {"base_model", "library_name", "pipeline_tag", "tags"}
PEFT_LINES = ("### Framework versions", "- PEFT ", "## Training procedure")
QUANTIZED = "The following `bitsandbytes` quantization config was used during training:"
HERE = "path/to/this/folder"
# Keys of `Trainer.evaluate` that measure time, not quality.
EVALUATION_TIMES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


def write_model_card(folder: str | Path, results: dict) -> Path:
    """Writes the model card of a training run, or renews it and keeps the sections that a person wrote.

    Args:
        folder (`str` or `Path`): The folder of the model.
        results (`dict`): The contents of results.json, as [`DualSpeedTrainer.record`] returns them.

    Raises:
        ValueError: the existing card is not UTF-8, or its front matter is not a YAML mapping.
    """
    path = Path(folder) / "README.md"
    earlier, text = read_card(path), model_card(results)
    path.write_bytes(merge_card(without_stale(earlier, text), text).encode("utf-8"))
    return path


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
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(adopted.encode("utf-8"))  # bytes keep line breaks as they are


def model_card(results: dict) -> str:
    """The text of a run's card; values missing from `results` are left out."""
    hub, adapter = results.get("hub", {}), results.get("adapter", False)
    data = ModelCardData(
        base_model=hub.get("base_model"),
        base_model_relation="adapter" if adapter and hub.get("base_model") else None,
        datasets=hub.get("datasets") or None,
        language=results.get("language"),
        library_name="peft" if adapter else "transformers",
        license=results.get("license"),
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(["dualspeed", *results.get("tags", [])])),
        model_name=_name(results),
        eval_results=_eval_results(results),
    )
    return assembled(
        data,
        _introduction(results),
        f"{_loading(results)}\n\n<!-- front matter by dualspeed: {' '.join(data.to_dict())} -->",
        _training(results),
        _speed(results),
        _evaluation(results),
        environment(results),
        _limits(results),
        citation(),
    )


def assembled(data: ModelCardData, *sections: str) -> str:
    """A card of front matter and the sections that are not empty."""
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


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


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table of the rows that have a value; "" if none has."""
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    return markdown_table(head, rows, words=True) if rows else ""


def settings_table(results: dict) -> str:
    """Settings of DualSpeed and of the training, and the seeds if given."""
    parts = (results.get(part, {}) for part in ("settings", "training", "seeds"))
    rows = [(key, _text(value)) for part in parts for key, value in part.items()]
    return table(("setting", "value"), rows)


def environment(results: dict) -> str:
    """The section of versions and hardware."""
    rows = [*results.get("versions", {}).items(), *results.get("machine", {}).items()]
    rows.append(("date (UTC)", results.get("date")))
    shown = table(("what", "which"), rows)
    return f"{heading('Versions and hardware')}\n\n{shown}" if shown else ""


def citation() -> str:
    """The section that names the paper."""
    return f"""{heading("Citation")}

The method is DualSpeed, [arXiv 2602.03815]({PAPER}).

```bibtex
@article{{zhang2026dualspeed,
  title = {{Fast-Slow Efficient Training for Multimodal Large Language Models via Visual Token Pruning}},
  author = {{Zhang, Dingkun and Qi, Shuhan and Wu, Yulin and Xiao, Xinyu and Wang, Xuan and Chen, Long}},
  journal = {{arXiv preprint arXiv:2602.03815}},
  year = {{2026}}
}}
```"""


def _name(results: dict) -> str:
    repo_id = results.get("hub", {}).get("repo_id")
    return repo_id.split("/")[-1] if repo_id else " ".join(results.get("name", "model").split())


def _eval_results(results: dict) -> list[EvalResult] | None:
    """Results for the Hub's widget: those on a data set with a known name."""
    measured = {**_metrics(results), "accuracy": results.get("accuracy")} if results.get("eval_dataset") else {}
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
    ]
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )
        for dataset, split, metric, name, value in rows
        if value is not None and math.isfinite(value)  # the Hub rejects others
    ] or None


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


def _introduction(results: dict) -> str:
    base, datasets, steps = results.get("base_model"), results.get("datasets", []), results.get("steps", {})
    how = "trained from scratch" if str(results.get("model")).endswith("from scratch") else "trained"
    kind, merged = f"A vision-language model {f'fine-tuned from `{base}`' if base else how}", ""
    if results.get("adapter"):
        kind = f"An adapter for {f'`{base}`' if base else 'a vision-language model'}, trained"
        merged = ", once merged into its base model,"
    data = f" on {', '.join(f'`{d}`' for d in datasets)}" if datasets else ""
    share = f"{steps.get('fast', 0):,} of {sum(steps.values()):,} optimizer steps trained on pruned visual tokens"
    return (
        f"{heading(_name(results), level=1)}\n\n{kind}{data} with DualSpeed ([arXiv 2602.03815]({PAPER}))"
        f"{f': {share}' if steps else ''}. At inference it is{merged} a plain model of transformers that sees all "
        "visual tokens."
    )


def _loading(results: dict) -> str:
    place, base = results.get("hub", {}).get("repo_id") or HERE, results.get("base_model") or "path/to/the/base/model"
    lines = ["from transformers import AutoModelForImageTextToText, AutoProcessor"]
    if results.get("adapter"):
        lines = ["from peft import PeftModel", *lines]
        lines.append(f'model = AutoModelForImageTextToText.from_pretrained("{base}")')
        lines.append(f'model = PeftModel.from_pretrained(model, "{place}").merge_and_unload()')
    else:
        lines.append(f'model = AutoModelForImageTextToText.from_pretrained("{place}")')
    lines.append(f'processor = AutoProcessor.from_pretrained("{place if results.get("processor", True) else base}")')
    return "\n".join([heading("How to load it"), "", "```python", *lines, "```"])


def _training(results: dict) -> str:
    settings, progress = results.get("settings", {}), results.get("progress")
    parts = [heading("How it was trained")]
    if "pruner" in settings:
        where = " inside the language model" if results.get("pruned_in_language_model") else ""
        words = pruning_words(settings["pruner"])
        parts.append(f"Fast steps trained on what the pruner {words}{where}; slow steps on all.")
    if progress:
        parts.append(f"This card was written after {progress['step']} of at most {progress['of']} optimizer steps.")
    parts.append(settings_table(results))
    steps, seconds = results.get("steps", {}), results.get("seconds", {})
    rows = [(mode, steps.get(mode), _rounded(seconds.get(mode))) for mode in ("fast", "slow")]
    parts.append(table(("mode", "optimizer steps", "seconds in steps"), rows))
    if "total" in seconds:
        parts.append(f"Training took {seconds['total']:.0f} seconds in all.")
    if "learning_curve" in results:
        parts.append(f"![Loss of fast and slow steps]({results['learning_curve']})")
    if "kept_tokens" in results:
        parts.append(f"![Images, and below them the tokens that fast steps keep of them]({results['kept_tokens']})")
    return "\n\n".join(filter(None, parts))


def pruning_words(pruner: dict) -> str:
    """A pruner's name and ratio in words, as a verb phrase; the ratio may change over training."""
    name, end, schedule = pruner["pruner_type"], pruner["pruning_ratio"], pruner.get("pruning_schedule", "constant")
    if schedule == "constant":
        return f"`{name}` leaves of the visual tokens, {end:.4g} of them removed"
    start = pruner["initial_pruning_ratio"]
    shares = f"at first {start:.4g} and in the end {end:.4g} of them removed ({schedule})"
    return f"`{name}` leaves of the visual tokens, {shares}"


def _speed(results: dict) -> str:
    parts = [_speedup(results.get("speedup")), _visual_tokens(results.get("visual_tokens"))]
    memory = results.get("peak_memory")
    if memory:
        when, whose = "", "resident memory of the process since its start"
        if memory["of"] == "accelerator":
            when, whose = " in training", "what PyTorch held on the device"
        several = ", in the process that held most" if results.get("training", {}).get("processes", 1) > 1 else ""
        parts.append(f"Peak memory{when}: {memory['bytes'] / 2**30:.2f} GiB ({whose}{several}).")
    return "\n\n".join([heading("Speed and memory"), *filter(None, parts)]) if any(parts) else ""


def _speedup(measured: dict | None) -> str:
    if not measured:
        return ""
    names = {"plain": "plain, all tokens, as `transformers.Trainer` runs it", "fast": "fast", "slow": "slow"}
    rows = [(name, _seconds(measured.get(f"{key}_seconds"))) for key, name in names.items()]
    return (
        f"Measured speed-up: {measured['speedup']:.2f}x over plain steps on all tokens, with the "
        f"{measured['slow_share']:.1%} of slow steps that were run. It compares passes over a micro-batch of "
        f"{measured['samples']} samples of the training data, forward and backward, no optimizer; median of "
        f"{measured['rounds']} interleaved rounds after training.\n\n" + table(("pass", "seconds"), rows)
    )


def _visual_tokens(counted: dict | None) -> str:
    if not counted or not counted["full"]:
        return ""
    saved = 1 - counted["kept"] / counted["full"]
    return (
        f"Fast steps kept {counted['kept']:,} of {counted['full']:,} visual tokens: {saved:.1%} saved there. Slow "
        "steps and inference use all."
    )


def _evaluation(results: dict) -> str:
    parts, data = [], ""
    if results.get("eval_dataset"):
        data = f"`{results['eval_dataset']}`" + (f" ({results['eval_split']})" if "eval_split" in results else "")
    if results.get("accuracy") is not None:
        rows = [("this model, all visual tokens", percent(results["accuracy"]))]
        majority = percent(results.get("majority_accuracy"))
        rows.append(("most frequent answer to each question, without the image", majority))
        parts.append(
            f"Accuracy on {results['n']} questions{data and f' of {data}'}:\n\n"
            + table(("answers of", "accuracy"), rows)
        )
    shown = table(("metric", "value"), [(key, f"{value:.4g}") for key, value in _metrics(results).items()])
    if shown:
        parts.append(f"Evaluation by the Trainer{data and f' on {data}'}, with all visual tokens:\n\n{shown}")
    rows = [
        (one["dataset"], one.get("split"), one["metric"], _seen(one), f"{one['value']:.4f}", one["n"])
        for one in results.get("evaluations", [])
    ]
    if rows:
        head = ("data set", "split", "metric", "seen at inference", "value", "questions")
        parts.append(f"Evaluation by `dualspeed evaluate`, greedy:\n\n{table(head, rows)}")
    return "\n\n".join([heading("Results"), *parts]) if parts else ""


def _limits(results: dict) -> str:
    measured = "Its quality has not been measured."
    if results.get("accuracy") is not None:
        where = f"`{results['eval_dataset']}`" if results.get("eval_dataset") else "these questions"
        measured = f"Its accuracy was measured on {where} only, in a single run."
    elif _metrics(results) or results.get("evaluations"):
        measured = "Of its quality, no more was measured than the results above, in a single run."
    return (
        f"{heading('Limits')}\n\n{measured} It may answer wrongly and with confidence, and it inherits the biases of "
        "its data and of the model it started from. The licences of both apply."
    )


def _rounded(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f}"


def _seconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.3g}"


def _text(value: object) -> str | None:
    """A setting in words; a pruner is a mapping of its name and options."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items() if inner is not None)
    return None if value is None else str(value)


@contextmanager
def kept_card(folder: Path) -> Iterator[None]:
    """Moves README.md in `folder` aside while PEFT saves, because PEFT would replace its tags by its own.

    It never raises because of the card's contents, so a broken card cannot keep a model from being saved.
    """
    path, aside = folder / "README.md", folder / "_README.md.kept"
    # After an interruption, README.md may be PEFT's empty form; the card set aside then stays the one to restore.
    if path.is_file() and not (aside.is_file() and is_empty_form(path.read_bytes().decode(errors="replace"))):
        path.replace(aside)
    try:
        yield
    finally:
        if aside.is_file():
            aside.replace(path)
