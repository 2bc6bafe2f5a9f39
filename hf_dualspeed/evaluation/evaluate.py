"""Answers a data set's questions from all and from pruned visual tokens, and scores the answers."""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import save
from transformers import PreTrainedModel, ProcessorMixin

from ..metrics import load_metric, needs_options
from ..pruners import Pruner
from ..pruners.card import is_custom
from ..publishing.cards import split_front_matter
from ..publishing.model_card import read_card
from ..publishing.push import render
from ..publishing.results import merged_evaluations, read_results, write_results
from ..utils.constants import CARD_NAME, RESULTS_NAME
from ..utils.progress import Work
from ..utils.text import one_line, parse_json, without_paths
from ..utils.writing import alone_in, write_json
from .checkpoint import Checkpoint, find_checkpoint
from .fingerprint import hash_of, processor_parts, pruner_code
from .generation import answers_in_batches, prompts, question, without_thoughts
from .predictions import Predictions, set_others_aside
from .pruned_prompts import PrunedPrompts, prompt_pruner
from .questions import Questions, check_options, load_questions

logger = logging.getLogger(__name__)

FULL = "full"
SUMMARY = "evaluation.json"


@dataclass(frozen=True)
class View:
    """The visual tokens that the model sees: all, or those that a pruner keeps."""

    name: str
    pruner: Pruner | None = None


@dataclass(frozen=True)
class Evaluation:
    """One call of the command: questions, model and views.

    `source` is what all answers of the model depend on, by content: the files of checkpoint, base model and processor.
    """

    options: argparse.Namespace
    checkpoint: Checkpoint
    processor: ProcessorMixin
    source: dict[str, dict[str, str]]
    questions: Questions
    views: list[View]
    folder: Path


def prepare(options: argparse.Namespace) -> Evaluation:
    """Checks checkpoint, pruners and data. Errors that need no model are raised here."""
    pruned = bool(options.pruner or options.pruning_ratio)
    checkpoint = find_checkpoint(options.checkpoint, options.dtype, options.trust_remote_code, pruned)
    if checkpoint.run is not None:
        # Scores are written into results and card, so both must be readable.
        read_results(checkpoint.run)
        split_front_matter(read_card(checkpoint.run / CARD_NAME))
    views = [View(FULL), *(pruned_views(options, checkpoint) if pruned else [])]
    if pruned and not checkpoint.settings() and checkpoint.is_of_run():
        logger.warning(
            "Nothing beside %s says with which positions and attention its fast steps ran, so pruned tokens get those "
            "of the defaults. If the run had others, evaluate its output folder, which has a %s.",
            checkpoint.name,
            RESULTS_NAME,
        )
    processor = checkpoint.processor()
    where = {"image_folder": options.image_folder, "image_column": options.image_column}
    questions = load_questions(options.dataset, options.split, limit=options.limit, processor=processor, **where)
    for metric in options.metric:
        if needs_options(metric):
            check_options(questions, metric)
        try:  # with empty answers, for references and options that cannot be used
            score(metric, questions.table, [""] * len(questions.table))
        except ValueError as error:
            raise ValueError(f"{questions.name!r} cannot be scored by {metric!r}: {error}") from error
    place = "-".join(filter(None, (questions.name, questions.split)))
    folder = output_folder(options) / re.sub(r"[^\w.-]+", "--", place)
    earlier_scores(folder)
    source = {**checkpoint.files(), "processor": processor_parts(processor)}
    return Evaluation(options, checkpoint, processor, source, questions, views, folder)


def pruned_views(options: argparse.Namespace, checkpoint: Checkpoint) -> list[View]:
    """One view per pruner and ratio."""
    views = []
    for name in options.pruner or [None]:
        for ratio in options.pruning_ratio or [None]:
            pruner = prompt_pruner(name, checkpoint, ratio)
            views.append(View(f"{pruner.config.pruner_type}-{pruner.config.pruning_ratio:g}", pruner))
    names = [view.name for view in views]
    if len(set(names)) < len(names):
        raise ValueError(f"`pruner` and `pruning_ratio` must differ from each other, got {', '.join(names)}.")
    return views


def output_folder(options: argparse.Namespace) -> Path:
    if options.output is not None:
        return Path(options.output)
    if Path(options.checkpoint).is_dir():
        return Path(options.checkpoint) / "evaluations"
    return Path("runs") / "evaluations" / options.checkpoint.replace("/", "--")


def identity(evaluation: Evaluation, view: View) -> dict[str, Any]:
    """All settings that a view's answers depend on."""
    options, questions = evaluation.options, evaluation.questions
    names = ("batch_size", "max_new_tokens", "dtype")
    found = {**evaluation.source, **questions.asked, "n": len(questions.table)}
    found |= {name: getattr(options, name) for name in names} | evaluation.checkpoint.search()
    if view.pruner is not None:
        learned = {key: tensor.cpu().contiguous() for key, tensor in view.pruner.state_dict().items()}
        found |= {"pruner": view.pruner.config.to_dict(), "no_isolator": options.no_isolator, "seed": options.seed}
        found |= {"pruner's weights": hash_of(save(learned)) if learned else None}
        found |= {"pruner's code": pruner_code(view.pruner)} if is_custom(view.pruner) else {}
        found |= {"isolator": None if options.no_isolator else evaluation.checkpoint.isolator_hash()}
        found |= evaluation.checkpoint.settings()
    return found


def stem(evaluation: Evaluation, view: View) -> str:
    """The name of a view's files: answers to a part of the questions never lie in place of those to all."""
    return "-".join([view.name, *(evaluation.questions.part or "").split()])


def evaluate(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Answers the questions that have no answer yet, and scores all answers."""
    options, folder = evaluation.options, evaluation.folder
    stems = [stem(evaluation, view) for view in evaluation.views]
    set_others_aside(folder, stems, evaluation.source)
    stores = [
        Predictions(folder, name, identity(evaluation, view), options.batch_size, options.overwrite)
        for name, view in zip(stems, evaluation.views, strict=True)
    ]
    if not all(store.finished for store in stores):
        answer(evaluation, stores)
    for store in stores:
        store.refer_to(evaluation.questions.table)
    return [
        entry(evaluation, view, store, metric)
        for view, store in zip(evaluation.views, stores, strict=True)
        for metric in options.metric
    ]


def answer(evaluation: Evaluation, stores: list[Predictions]) -> None:
    """Loads the model and generates the missing answers."""
    with Work("Loading the model"):
        processor, model = evaluation.processor, evaluation.checkpoint.model()
    prepares = [prompts_of(evaluation, view, model) for view in evaluation.views]
    dataset, options = evaluation.questions.dataset, evaluation.options
    sample = next((row for row in dataset if question(row)[0]["images"]), dataset[0])
    for prune in filter(None, prepares):  # a pruner may need what the model lacks: fails before hours of answers
        replace(prune)(prompts(model, processor, [sample]))
    for view, store, prune in zip(evaluation.views, stores, prepares, strict=True):
        if store.finished:
            continue
        done = len(store.rows)
        if prune is not None:
            prune.batch = done // options.batch_size
        batches = answers_in_batches(
            model,
            processor,
            dataset,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            prepare=prune,
            start=done,
            description=f"{view.name}, {done} of {len(dataset)} answered before" if done else view.name,
        )
        keep(store, evaluation.questions.table, batches)


def prompts_of(evaluation: Evaluation, view: View, model: PreTrainedModel) -> PrunedPrompts | None:
    if view.pruner is None:
        return None
    isolator = None if evaluation.options.no_isolator else evaluation.checkpoint.isolator(model)
    settings = evaluation.checkpoint.settings()
    return PrunedPrompts(model, view.pruner.to(model.device), isolator, seed=evaluation.options.seed, **settings)


def keep(store: Predictions, table: list[dict[str, Any]], batches: Generator[list[str], None, None]) -> None:
    """Stores each batch of answers as it comes, with the seconds per answer."""
    began = time.perf_counter()
    with closing(batches):  # the progress bar's threads end here, whatever fails
        for texts in batches:
            seconds = round((time.perf_counter() - began) / len(texts), 6)
            asked = table[len(store.rows) : len(store.rows) + len(texts)]
            rows = [{**one, "prediction": text, "seconds": seconds} for one, text in zip(asked, texts, strict=True)]
            store.append(rows)
            began = time.perf_counter()
    with Work("Writing the answers"):
        store.finish()


def score(metric: str, table: list[dict[str, Any]], predictions: list[str]) -> float:
    """The score of all answers by a metric, without what a model has thought."""
    columns = {"references": [row["references"] for row in table]}
    if needs_options(metric):
        columns["options"] = [row["options"] for row in table]
    return load_metric(metric).compute(predictions=list(map(without_thoughts, predictions)), **columns)[metric]


def entry(evaluation: Evaluation, view: View, store: Predictions, metric: str) -> dict[str, Any]:
    """A score as an entry of results.json, with hashes of the model, questions and answers that it belongs to."""
    config = view.pruner and view.pruner.config
    isolated = config and not evaluation.options.no_isolator
    found = {
        "dataset": evaluation.questions.name,
        "split": evaluation.questions.split,
        "part": evaluation.questions.part,
        "metric": metric,
        "view": view.name,
        "pruner": config and config.pruner_type,
        "pruning_ratio": config and config.pruning_ratio,
        "isolator_length": evaluation.checkpoint.isolator_length() if isolated else None,
        "value": score(metric, store.rows, [row["prediction"] for row in store.rows]),
        "n": len(store.rows),
        "seconds": round(sum(row["seconds"] for row in store.rows), 3),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "model_hash": hash_of(evaluation.source),
        "questions_hash": evaluation.questions.fingerprint,
        "answers_hash": hash_of(store.identity),
    }
    return {key: value for key, value in found.items() if value is not None}


def earlier_scores(folder: Path) -> list[dict[str, Any]]:
    """The scores beside the answers. Raises a `ValueError` where their file is damaged."""
    path = folder / SUMMARY
    try:
        found = parse_json(path.read_bytes())["evaluations"] if path.is_file() else []
        return [dict(one) for one in found]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(path)!r} holds no scores: {one_line(error)}. Remove it.") from None


def record(evaluation: Evaluation, entries: list[dict[str, Any]]) -> None:
    """Writes the scores beside the answers. A run's folder also gets them in its results and card."""
    path = evaluation.folder / SUMMARY
    with alone_in(evaluation.folder):
        summary = {"evaluations": _merged(path, earlier_scores(evaluation.folder), entries)}
        write_json(path, without_paths(summary))
    run = evaluation.checkpoint.run
    if run is not None:
        with alone_in(run):  # another evaluation may end now, too
            results = read_results(run)
            results["evaluations"] = _merged(run / RESULTS_NAME, results.get("evaluations", []), entries)
            write_results(run, results)
            render(run)


def _merged(path: Path, earlier: list[dict[str, Any]], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged, stale = merged_evaluations(earlier, entries)
    for one in stale:
        logger.warning(
            "%s: the score of %s is left out: model, questions or settings have changed since.",
            path,
            ", ".join(one[key] for key in ("dataset", "split", "part", "view", "metric", "date") if one.get(key)),
        )
    return merged
