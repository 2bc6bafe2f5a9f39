"""Runs a recipe: trains a model and writes it with its results, learning curve and model card."""

from __future__ import annotations

import inspect
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path

from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    EarlyStoppingCallback,
    PreTrainedModel,
    ProcessorMixin,
    set_seed,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..data.checking import DataReport, check_samples, with_lengths, without_rows
from ..data.collators import VisionLanguageCollator
from ..data.conversations import to_messages
from ..data.easy_vqa import DATASETS as EASY_VQA
from ..data.easy_vqa import majority_accuracy
from ..data.loading import load_examples
from ..evaluation.generation import answer_accuracy, first_rows, question_and_answers
from ..evaluation.pruned_prompts import prompts_of
from ..evaluation.questions import label
from ..evaluation.visualize import PICTURE_NAME, draw_images, first_images
from ..models.adapters import add_lora, four_bit
from ..models.components import freeze_roles, parameter_counts
from ..pruners import PrunerConfig, available_pruners
from ..publishing.display import is_silent
from ..publishing.results import read_results
from ..trainer.checkpoints import last_whole_checkpoint
from ..trainer.trainer import DualSpeedTrainer
from ..trainer.training_args import DualSpeedTrainingArguments
from ..utils.constants import CHECKED_SAMPLES
from ..utils.devices import others_wait
from ..utils.progress import Work
from ..utils.quiet import hide_bars
from ..utils.text import one_line
from ..utils.validation import check_keys, checked, loading
from .arguments import RecipeArguments, check_evaluation
from .tiny_llava import build_tiny_llava

logger = logging.getLogger(__name__)


@checked
def run_recipe(recipe: RecipeArguments, training_args: DualSpeedTrainingArguments) -> dict:
    """Trains a model and writes it, its results, its learning curve and its model card to the output folder.

    Args:
        recipe ([`RecipeArguments`]): Model, data and evaluation.
        training_args ([`DualSpeedTrainingArguments`]): The training.

    Returns:
        `dict`: The content of results.json in the main process, empty in the others.
    """
    check_evaluation(recipe, training_args)
    set_seed(training_args.seed)
    silent = is_silent(training_args)
    if silent:
        hide_bars()
    with training_args.main_process_first(desc="loading the data"), Work("Reading the data", disable=silent):
        check_pruner(training_args, recipe.trust_remote_code)
        train = load_examples(recipe.dataset, recipe.dataset_split, recipe.image_folder, recipe.image_column)
        test = None
        if recipe.eval_dataset is not None:
            test = load_examples(recipe.eval_dataset, recipe.eval_split, recipe.image_folder, recipe.eval_columns)
    # The data are looked at before weights are loaded, which takes long. A small LLaVA is made at once.
    if recipe.tiny_llava is None:
        with Work("Loading the processor", disable=silent):
            model, processor = None, load_processor(recipe)
    else:
        with Work("Making a small LLaVA", disable=silent):
            model, processor = load_model(recipe, train, training_args.seed)
    collator = collator_of(recipe, processor)
    train = check_data(train, recipe.dataset, collator, recipe, training_args)
    if test is not None:
        whole, learns = len(test), training_args.eval_strategy != "no"
        first = None if learns else recipe.eval_limit
        test = check_data(test, recipe.eval_dataset, collator, recipe, training_args, learns, first)
        check_answers(test, recipe, learns)
    if model is None:
        with Work("Loading the model", disable=silent):
            model = load_weights(recipe)
    stopping = recipe.early_stopping_patience
    trainer = DualSpeedTrainer(
        model=prepare_model(model, recipe),
        args=training_args,
        train_dataset=train,
        eval_dataset=None if training_args.eval_strategy == "no" else test,
        processing_class=processor,
        data_collator=collator,
        callbacks=stopping and [EarlyStoppingCallback(stopping)],
    )
    trainer.facts |= _facts(recipe)
    trainer.display.shows_end = False  # the table has more in it once the answers are scored
    trainer.train(resume_from_checkpoint=_checkpoint(training_args))
    with Work("Saving the model", disable=silent):
        trainer.save_model(_internal_call=True)  # pushed below, with results and card
    results = {}
    with others_wait():
        if trainer.is_world_process_zero():
            if test is not None:
                trainer.facts |= _accuracy(recipe, trainer, train, test, whole)
            if recipe.card_images:
                with Work("Drawing kept tokens", disable=silent):
                    trainer.facts |= _picture(recipe, trainer, train if test is None else test)
            with Work("Writing results and card", disable=silent):
                trainer.create_model_card()
            results = read_results(training_args.output_dir)
            if not silent:
                trainer.print_end(results)
    trainer.accelerator.wait_for_everyone()
    if training_args.push_to_hub:
        with Work("Pushing", disable=silent):
            trainer.push_to_hub()
    return results


def check_pruner(args: DualSpeedTrainingArguments, trust_remote_code: bool) -> None:
    """Checks that the pruner exists before a model is loaded, and registers its own code."""
    if args.pruner not in available_pruners():
        hub = {"revision": args.pruner_revision, "token": args.hub_token}
        PrunerConfig.from_pretrained(args.pruner, trust_remote_code=trust_remote_code, **hub)


def load_model(recipe: RecipeArguments, train: Dataset, seed: int) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The recipe's model and processor, or a small LLaVA whose tokens are the words of the training data."""
    if recipe.tiny_llava is not None:
        check_keys("tiny_llava", recipe.tiny_llava, list(inspect.signature(build_tiny_llava).parameters)[1:])
        return build_tiny_llava(_texts(train), **{"seed": seed, **recipe.tiny_llava})
    return load_weights(recipe), load_processor(recipe)


def load_weights(recipe: RecipeArguments, folder: str | None = None) -> PreTrainedModel:
    """The recipe's model, or a trained one of a folder, loaded in the same way."""
    name = folder or recipe.model_name_or_path
    with loading(name):
        return AutoModelForImageTextToText.from_pretrained(
            name,
            dtype=recipe.dtype,
            attn_implementation=recipe.attn_implementation,
            trust_remote_code=recipe.trust_remote_code,
            **(four_bit(recipe.dtype, recipe.lora) if recipe.load_in_4bit else {}),
        )


def load_processor(recipe: RecipeArguments) -> ProcessorMixin:
    """The model's processor with the recipe's options; one that its image processor does not know is an error."""
    # Without torchvision, transformers uses its PIL image processors.
    name, options = recipe.model_name_or_path, recipe.processor_options or {}
    with loading(name):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=recipe.trust_remote_code, **options)
    if options:  # which transformers drops without a word where they are unknown
        check_keys("processor_options", options, sorted(processor.image_processor.valid_kwargs.__annotations__))
    return processor


def collator_of(recipe: RecipeArguments, processor: ProcessorMixin) -> VisionLanguageCollator:
    """The collator with the recipe's options."""
    return VisionLanguageCollator(
        processor,
        max_length=recipe.max_length,
        long_samples=recipe.long_samples,
        unreadable_images=recipe.unreadable_images,
        image_cache_mib=recipe.image_cache_mib,
        jpeg_draft=recipe.jpeg_draft,
    )


def check_data(
    dataset: Dataset,
    name: str,
    collator: VisionLanguageCollator,
    recipe: RecipeArguments,
    args: DualSpeedTrainingArguments,
    learns: bool = True,
    first: int | None = None,
) -> Dataset:
    """The data set without the samples that are to be skipped. Each process looks at a share of its `first` rows.

    Raises:
        ValueError: samples cannot be used; see [`check_samples`].
    """
    if recipe.check_data is False:
        return dataset
    limit = None if recipe.check_data else CHECKED_SAMPLES
    # Asking for the device starts the processes' group.
    share = (args.process_index, args.world_size) if args.device else (0, 1)
    name = Path(name).name if Path(name).exists() else name
    looked_at = dataset if first is None else dataset.select(range(min(first, len(dataset))))
    report = check_samples(
        looked_at, collator, name=name, limit=limit, share=share, learns=learns, silent=is_silent(args)
    )
    report = DataReport.joined(gather_object([report]))
    left_out = report.settle(collator, show=args.process_index == 0)
    if learns and args.train_sampling_strategy == "group_by_length":
        dataset = with_lengths(dataset, report, left_out, args.length_column_name, collator.max_length)
    return without_rows(dataset, left_out)


def has_answers(dataset: Dataset) -> bool:
    return bool({"answer", "answers"} & set(dataset.column_names))


def check_answers(test: Dataset, recipe: RecipeArguments, learns: bool) -> None:
    """Raises a `ValueError` where a question whose answer will be scored says nothing of what is right.

    Where nothing can be scored, data with `learns` serve the loss alone, which is warned of.
    """
    if not has_answers(test):
        lacking = f"{recipe.eval_dataset!r} has no column `answer` or `answers`, only {test.column_names}"
        if not learns:
            raise ValueError(
                f"`eval_dataset` {lacking}: no accuracy can be measured on it. Rename the column of answers, leave "
                "`eval_dataset` out, or set `eval_strategy` to measure the loss on it."
            )
        logger.warning("The accuracy is not measured: %s.", lacking)
        return
    if recipe.check_data is False:
        return
    for index, row in enumerate(first_rows(test, recipe.eval_limit)):
        try:
            question_and_answers(row)
        except ValueError as error:
            raise ValueError(f"Row {index} of {recipe.eval_dataset!r} cannot be scored: {error}") from error


def prepare_model(model: PreTrainedModel, recipe: RecipeArguments):
    """Adds the recipe's LoRA adapters and freezes the roles that it does not train."""
    prepared = model if recipe.lora is None else add_lora(model, recipe.lora)
    freeze_roles(
        model,
        train_vision_tower=recipe.train_vision_tower,
        train_projector=recipe.train_projector,
        train_language_model=recipe.train_language_model,
    )
    for role, counts in parameter_counts(model, nn.Module()).items() if recipe.lora is not None else ():
        if getattr(recipe, f"train_{role}", False) and not counts["trained"]:
            logger.warning(
                "`train_%s` is True, but nothing of it is trained: `lora` freezes all weights, and has no adapters "
                "there. Name its modules in the `target_modules` of `lora`, or in `modules_to_save` to train them as a "
                "whole; or set train_%s=False.",
                role,
                role,
            )
    return prepared


def _checkpoint(args: DualSpeedTrainingArguments) -> str | None:
    """The checkpoint to resume from. With "last", None where there is no checkpoint yet."""
    if str(args.resume_from_checkpoint).lower() not in ("last", "true"):
        return args.resume_from_checkpoint
    last = last_whole_checkpoint(args.output_dir)
    if last is None:
        logger.warning("There is no checkpoint in %s yet; training starts from the beginning.", args.output_dir)
    return last


def _facts(recipe: RecipeArguments) -> dict:
    """The recipe's model and data for the card. The trainer does not know them."""
    _, split = label(recipe.dataset, recipe.dataset_split)
    names = {"dataset": recipe.dataset, "dataset_split": split, "datasets": [recipe.dataset]}
    if recipe.eval_dataset is not None:
        names |= zip(("eval_dataset", "eval_split"), label(recipe.eval_dataset, recipe.eval_split), strict=True)
    model = recipe.model_name_or_path or "tiny LLaVA, from scratch"
    return {"model": model, "base_model": recipe.model_name_or_path, **names}


def _accuracy(recipe: RecipeArguments, trainer: DualSpeedTrainer, train: Dataset, test: Dataset, whole: int) -> dict:
    """The accuracy; nothing but a warning if it cannot be measured."""
    if not has_answers(test):
        return {}  # said before training
    try:
        return _evaluate(recipe, trainer, train, test, whole)
    except Exception as error:  # must not cost the card and the push of what is trained and saved
        logger.warning(
            "The accuracy is not measured: %s: %s. The model is saved. Measure it with: %s",
            type(error).__name__,
            one_line(error),
            _evaluate_later(recipe, trainer.args.output_dir),
        )
        return {}


def _evaluate_later(recipe: RecipeArguments, folder: str) -> str:
    """The command that asks a saved model what the recipe would have."""
    words = ["dualspeed", "evaluate", folder, "--dataset", recipe.eval_dataset, "--split", recipe.eval_split]
    words += [] if recipe.image_folder is None else ["--image_folder", recipe.image_folder]
    words += [] if recipe.eval_columns is None else ["--image_column", *recipe.eval_columns]
    words += [] if recipe.eval_limit is None else ["--limit", str(recipe.eval_limit)]
    return shlex.join([*words, "--max_new_tokens", str(recipe.max_new_tokens)])


def _evaluate(recipe: RecipeArguments, trainer: DualSpeedTrainer, train: Dataset, test: Dataset, whole: int) -> dict:
    answers = answer_accuracy(
        _whole_model(trainer, recipe),
        trainer.processing_class,
        test,
        batch_size=recipe.eval_batch_size,
        max_new_tokens=recipe.max_new_tokens,
        limit=recipe.eval_limit,
        description="accuracy with all visual tokens",
        silent=is_silent(trainer.args),
    )
    found = {"accuracy": answers["accuracy"], "n": answers["n"]}
    count = found["n"]
    if count < len(test):
        found["eval_part"] = f"first {count}" if len(test) == whole else f"first {count} readable"
    elif count < whole:
        found["eval_part"] = f"readable {count} of {whole}"
    if recipe.dataset == recipe.eval_dataset and recipe.dataset in EASY_VQA:
        found["majority_accuracy"] = majority_accuracy(train, test.select(range(found["n"])))
    return found


def _picture(recipe: RecipeArguments, trainer: DualSpeedTrainer, data: Dataset) -> dict:
    """Draws the kept tokens of the data's first different images."""
    dual_forward = trainer.dual_forward
    if dual_forward.pruner.in_language_model or trainer.is_sharded:
        why = "the model is sharded" if trainer.is_sharded else "the pruner works inside the language model"
        logger.warning("`card_images` is %s, but kept tokens are not drawn: %s.", recipe.card_images, why)
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    prepare = prompts_of(dual_forward, model)
    path = Path(trainer.args.output_dir) / PICTURE_NAME
    rows = first_images(data, recipe.card_images)
    return {"kept_tokens": draw_images(prepare, trainer.processing_class, rows, path, trainer.record())}


def _whole_model(trainer: DualSpeedTrainer, recipe: RecipeArguments):
    """The trained model, with all parameters in this process."""
    if not trainer.is_sharded:
        return trainer.accelerator.unwrap_model(trainer.model)
    # One process holds only shards, so the saved model is loaded; under ZeRO-3 it would be partitioned over all.
    unset_hf_deepspeed_config()
    return load_weights(recipe, trainer.args.output_dir).to(trainer.args.device)


def _texts(dataset: Dataset) -> Iterator[str]:
    """All texts of the conversations."""
    for example in dataset:
        for message in to_messages(example)["messages"]:
            yield from (part["text"] for part in message["content"] if part.get("text"))
