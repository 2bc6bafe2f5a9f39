"""Table, caption, plot and card of `python -m benchmarks.compare`, from the results file alone."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from huggingface_hub import EvalResult, ModelCardData

from hf_dualspeed.publishing.cards import merge_card, render
from hf_dualspeed.publishing.model_card import environment_rows, pruning_words, settings_rows
from hf_dualspeed.publishing.plots import describe, figure_of, save_figure
from hf_dualspeed.utils.text import in_thousands, markdown_table
from hf_dualspeed.utils.writing import write_file

from ..common import cell, print_table

CARD = Path(__file__).with_name("card.md.jinja")
MAJORITY = "guessing from the question alone"
BASELINE = "full-tokens"
OURS, OTHERS = "#0072B2", "#999999"


def write_report(results: dict, path: Path) -> None:
    """Writes table and plot beside the results file `path`, and prints the table."""
    write_file(path.with_suffix(".md"), f"{caption(results)}\n\n{readme_table(results)}\n")
    plot(results, path.with_suffix(".png"))
    header, *rows = table_rows(results)
    print_table(header, rows)


def write_card(results: dict, source: Path, folder: Path) -> None:
    """Writes the model card of the DualSpeed runs into `folder`, and copies results and plot there."""
    path, picture = folder / "README.md", source.with_suffix(".png")
    for file in (source, picture):
        write_file(folder / file.name, file.read_bytes())
    earlier = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_file(path, merge_card(earlier, card(results, picture.name)))


def card(results: dict, picture: str) -> str:
    """The model card of a comparison's DualSpeed runs, over all seeds."""
    own = results["summary"]["dualspeed"]
    accuracy = EvalResult(
        task_type="image-text-to-text",
        dataset_type=results["eval_dataset"],
        dataset_name=results["eval_dataset"],
        dataset_split=results["eval_split"],
        metric_type="accuracy",
        metric_name=f"Accuracy with all visual tokens, mean over {len(results['seeds'])} seeds",
        metric_value=own["accuracy_full"]["mean"],
    )
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["dualspeed"],
        model_name="compare",
        eval_results=[accuracy],
    )
    values = {
        "front_matter": data.to_yaml(),
        "model": model_words(results),
        "pruned": pruning_words(results["settings"]["pruner"]),
        "mean_steps": own["steps"],
        "chosen": settings_rows({part: results[part] for part in ("settings", "training")}),
        "deviation": own["accuracy_full"]["sd"],
        "comparison": readme_table(results),
        "picture": picture,
        "environment": environment_rows(results),
    }
    return render(CARD, {**results, **values})


def caption(results: dict) -> str:
    """Describes the numbers of the table."""
    here, used, installed = results["machine"], results["settings"], results["versions"]
    baseline = next(iter(results["summary"].values()))
    return (
        f"{results['steps']} optimizer steps on {results['dataset']} ({results['dataset_split']}); accuracy "
        f"on {results['n']} questions of {results['eval_dataset']} ({results['eval_split']}). Mean over "
        f"{len(results['seeds'])} seed(s), in brackets the smallest and the largest value. Baseline: "
        f"`transformers.Trainer` with {baseline['name']}; retention (of accuracy with all tokens) and speed-up "
        "compare with its run of the same seed. Seconds are those of training, without evaluation. Pruned: "
        f"{used['pruning_ratio']:.0%} of the visual tokens removed by {used['pruner']['pruner_type']}. "
        f"Machine: {here['accelerator'] or here['cpu']}, {here['threads']} CPU thread(s); torch "
        f"{installed['torch']}, transformers {installed['transformers']}; {results['date'][:10]}. "
        f"Command: `{results['command']}`"
    )


def table_rows(results: dict) -> list[list[str]]:
    """Header and rows of the table."""
    shares = ("accuracy_full", "accuracy_pruned", "retention")
    header = ["trained with", "accuracy, all tokens", "accuracy, pruned tokens", "retention"]
    rows = [[*header, "speed-up", "seconds", "steps/s"]]
    for own in results["summary"].values():
        times = (("speed_up", "{:.2f}x"), ("train_seconds", "{:.1f}"), ("steps_per_second", "{:.2f}"))
        forms = [*((key, "{:.1%}") for key in shares), *times]
        rows.append([own["name"], *(cell(own[key], form) for key, form in forms)])
    if "majority_accuracy" in results:
        rows.append([MAJORITY, f"{results['majority_accuracy']:.1%}", *["n/a"] * 5])
    return rows


def readme_table(results: dict) -> str:
    """The Markdown table of a comparison's results."""
    header, *rows = table_rows(results)
    return markdown_table(header, rows)


def plot(results: dict, path: Path) -> None:
    """Draws the time of each way's training, the mean with a mark for each seed, and writes its accuracy beside it."""
    figure, ((axis,),) = figure_of(9, 1.6 + 0.6 * len(results["summary"]), 1, 1)
    for place, (variant, own) in enumerate(results["summary"].items()):
        seconds = [run["seconds"]["total"] for run in results["runs"] if run["way"] == variant]
        axis.barh(place, mean(seconds), 0.55, color=OURS if variant == "dualspeed" else OTHERS)
        axis.plot(seconds, [place] * len(seconds), "|", color="black", markersize=11)
        said = f"{mean(seconds):.0f} s" if variant == BASELINE else f"{own['speed_up']['mean']:.2f}x as fast"
        said += f", {own['accuracy_full']['mean']:.1%} of the answers right"
        axis.annotate(said, (max(seconds), place), (8, 0), textcoords="offset points", va="center", fontsize=10)
    axis.set_yticks(range(len(results["summary"])), [own["name"] for own in results["summary"].values()])
    axis.invert_yaxis()
    axis.set_xlim(0, 1.65 * max(run["seconds"]["total"] for run in results["runs"]))
    axis.set_xlabel("seconds of the whole training (bars: mean, marks: each seed)")
    axis.spines[["top", "right"]].set_visible(False)
    title = f"{results['steps']} steps on {results['dataset']}, {len(results['seeds'])} seeds, {results['n']:,} answers"
    describe(figure, title, results, model_words(results))
    save_figure(figure, path)


def model_words(results: dict) -> str:
    """The compared model in words, with its size where the results have it."""
    name = results["model"] if isinstance(results["model"], str) else "a small LLaVA, from scratch"
    size = results.get("parameters")
    return f"{name}, {in_thousands(sum(size.values()))} parameters" if size else name
