"""The README.md of a trained model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_dualspeed.results import percent

PAPER = "https://arxiv.org/abs/2602.03815"


def write_model_card(output_dir: str | Path, results: dict, base_model: str | None, datasets: list[str]) -> Path:
    """Writes the model card of a training run; what `results` does not hold is left out.

    Args:
        output_dir (`str` or `Path`): The folder of the model; its name is the model's.
        results (`dict`): What [`run_recipe`] writes to results.json.
        base_model (`str`, *optional*): The model that was fine-tuned, or None if it was trained from scratch.
        datasets (`list[str]`): The data sets it was trained on.
    """
    folder = Path(output_dir)
    adapter = (folder / "adapter_config.json").is_file()
    data = ModelCardData(
        base_model=base_model if _is_hub_id(base_model) else None,
        base_model_relation="adapter" if adapter and _is_hub_id(base_model) else None,
        datasets=[name for name in datasets if _is_hub_id(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["dualspeed"],
        model_name=folder.resolve().name,
        eval_results=_eval_results(results),
    )
    sections = (
        _introduction(folder.resolve().name, base_model, datasets, adapter),
        _loading(base_model, adapter),
        _training(results, has_curve=(folder / "learning_curve.png").is_file()),
        _evaluation(results),
        _environment(results),
        _limits(results),
        _citation(),
    )
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n").save(path)
    return path


def is_written(path: Path) -> bool:
    """Whether there is a model card other than the empty form that PEFT leaves beside adapters."""
    return path.is_file() and "[More Information Needed]" not in path.read_text(encoding="utf-8")


def _is_hub_id(name: str | None) -> bool:
    return name is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def _eval_results(results: dict) -> list[EvalResult] | None:
    if results.get("accuracy") is None:
        return None
    return [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type=results["eval_dataset"],
            dataset_name=results["eval_dataset"],
            dataset_split=results.get("eval_split"),
            metric_type="accuracy",
            metric_name="Accuracy with all visual tokens",
            metric_value=results["accuracy"],
        )
    ]


def _introduction(name: str, base_model: str | None, datasets: list[str], adapter: bool) -> str:
    origin = f"fine-tuned from `{base_model}`" if base_model else "trained from scratch"
    kind, merged = f"A vision-language model {origin}", ""
    if adapter:
        kind = f"An adapter for {f'`{base_model}`' if base_model else 'a vision-language model'}, trained"
        merged = ", once merged into its base model,"
    data = f" on {', '.join(f'`{d}`' for d in datasets)}" if datasets else ""
    return (
        f"# {name}\n\n{kind}{data} with "
        f"DualSpeed ([arXiv 2602.03815]({PAPER})): most steps trained on pruned visual tokens. At inference "
        f"it is{merged} a plain model of transformers that sees all visual tokens."
    )


def _loading(base_model: str | None, adapter: bool) -> str:
    if adapter:
        return f"""## How to load it

```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("{base_model or "path/to/the/base/model"}")
model = PeftModel.from_pretrained(model, "path/to/this/folder").merge_and_unload()
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```"""
    return """## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("path/to/this/folder")
processor = AutoProcessor.from_pretrained("path/to/this/folder")
```"""


def _training(results: dict, has_curve: bool) -> str:
    settings = {
        key: inner for part in ("settings", "training", "seeds") for key, inner in results.get(part, {}).items()
    }
    described = [(key, _text(value)) for key, value in settings.items()]
    parts = ["## How it was trained", _table(("setting", "value"), described)]
    steps, seconds = results.get("steps", {}), results.get("seconds", {})
    rows = [(mode, steps.get(mode), _rounded(seconds.get(mode))) for mode in ("fast", "slow")]
    parts.append(_table(("mode", "optimizer steps", "seconds in steps"), rows))
    if "total" in seconds:
        parts.append(f"Training took {seconds['total']:.0f} seconds in all.")
    if has_curve:
        parts.append("![Loss of fast and slow steps](learning_curve.png)")
    return "\n\n".join(filter(None, parts))


def _evaluation(results: dict) -> str:
    if results.get("accuracy") is None:
        return ""
    rows = [("this model, all visual tokens", percent(results["accuracy"]))]
    majority = percent(results.get("majority_accuracy"))
    rows.append(("most frequent answer to each question, without the image", majority))
    where = f"{results['n']} questions of `{results['eval_dataset']}` ({results['eval_split']})"
    return f"## Results\n\nAccuracy on {where}:\n\n" + _table(("answers of", "accuracy"), rows)


def _environment(results: dict) -> str:
    rows = [*results.get("versions", {}).items(), *results.get("machine", {}).items()]
    rows.append(("date (UTC)", results.get("date")))
    table = _table(("what", "which"), rows)
    return f"## Versions and hardware\n\n{table}" if table else ""


def _limits(results: dict) -> str:
    measured = (
        f"Its accuracy was measured on `{results['eval_dataset']}` only, in a single run."
        if results.get("accuracy") is not None
        else "Its quality has not been measured."
    )
    return (
        f"## Limits\n\n{measured} It may answer wrongly and with confidence, and it inherits the biases of "
        "its data and of the model it started from. The licences of both apply."
    )


def _citation() -> str:
    return f"""## Citation

The method is DualSpeed, [arXiv 2602.03815]({PAPER}).

```bibtex
@article{{zhang2026dualspeed,
  title = {{Fast-Slow Efficient Training for Multimodal Large Language Models via Visual Token Pruning}},
  author = {{Zhang, Dingkun and Qi, Shuhan and Wu, Yulin and Xiao, Xinyu and Wang, Xuan and Chen, Long}},
  journal = {{arXiv preprint arXiv:2602.03815}},
  year = {{2026}}
}}
```"""


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    """A Markdown table of the rows that have a value, or nothing where none has."""
    rows = [row for row in rows if any(cell is not None for cell in row[1:])]
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |" for line in lines)


def _rounded(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f}"


def _text(value: object) -> str | None:
    """A setting in words; a pruner is a mapping with a name and its options."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner}" for key, inner in value.items())
    return None if value is None else str(value)


@contextmanager
def kept_card(folder: Path) -> Iterator[None]:
    """Keeps a finished README.md in `folder` as it is; PEFT's saving would take its tags out and add its own."""
    path = folder / "README.md"
    before = path.read_bytes() if is_written(path) else None
    yield
    if before is not None:
        path.write_bytes(before)
