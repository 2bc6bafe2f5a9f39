"""Checkpoints and their answers, from all visual tokens or from those that a pruner keeps. No gradio here."""

from __future__ import annotations

import copy
import os
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from hf_dualspeed import AutoPruner, ModeIsolator, Pruner, available_pruners, prune_inputs
from hf_dualspeed.data.collators import encode
from hf_dualspeed.data.labels import mark_in
from hf_dualspeed.data.media import IMAGE_ERRORS, open_image, opened
from hf_dualspeed.data.rendering import render
from hf_dualspeed.evaluation.checkpoint import view_settings
from hf_dualspeed.evaluation.visualize import View, view_of, watch_calls
from hf_dualspeed.hub.errors import explained
from hf_dualspeed.hub.source import is_repo_id
from hf_dualspeed.models.interface import visual_token_ids
from hf_dualspeed.pruners.config import MERGE
from hf_dualspeed.pruners.registry import kind_of, pruner_class
from hf_dualspeed.pruning.isolator import saved_length
from hf_dualspeed.publishing.results import read_results
from hf_dualspeed.utils.constants import PRUNER_CONFIG_NAME

MAX_PIXELS = 40_000_000
MAX_EDGE = 2048  # pixels; larger images are scaled down first
MAX_QUESTION = 300
MAX_NEW_TOKENS = 32
MAX_RATIO = 0.95
TIMED = max(0, int(os.environ.get("DEMO_TIMED", "3")))  # answers after the first, of which the latency is the median
PATIENCE = 0.5  # seconds of a first answer beyond which it is not repeated: visitors wait
# Files that are downloaded of a model: no code, and no pickled weights.
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "learning_curve.png")
LOAD_ERRORS = (OSError, ValueError, ImportError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError)
# Pruning hooks into the running model, so two answers at once would mix.
LOCK = threading.Lock()


class InputError(ValueError):
    """An error that the visitor can correct. The message says how."""


@dataclass
class Answer:
    """An answer of a model.

    Args:
        text (`str`): The greedy answer.
        seconds (`float`): From the preprocessed input to the last token: encoding, pruning and generation. The median
            of `timed` answers after a first one, or of that one where it took longer than `PATIENCE`.
        probability (`float`): Probability of exactly this answer with its end, which one of `MAX_NEW_TOKENS` tokens may
            lack: the product over its tokens.
        used, total (`int`): Visual tokens that the language model gets, and those of the whole image.
        isolator (`int`): Learned tokens in front of them.
        view (`View`, *optional*): Places of the used tokens. None where all are used or the places are unknown.
        timed (`int`): Answers that the latency is the median of. 0: it is that of the first one.
        merged (`bool`): Whether used tokens are means that stand for others too.
    """

    text: str
    seconds: float
    probability: float
    used: int
    total: int
    isolator: int = 0
    view: View | None = None
    timed: int = 0
    merged: bool = False


# --- what visitors give -------------------------------------------------------------------------------------------


def check_upload(path: object, folder: str) -> str:
    """The resolved path of an upload.

    Raises:
        InputError: it is no regular file in `folder`, or leads out of it by a link.
    """
    try:
        found = Path(os.path.realpath(path))
        if found.is_relative_to(os.path.realpath(folder)) and found.is_file():  # a device or a pipe could wait for ever
            return str(found)
    except (OSError, TypeError, ValueError):  # too long, no text, with a null character
        pass
    raise InputError("The image is no upload of this page. Please upload it first.")


def read_image(path: str | None) -> Image.Image:
    """An upload as an upright RGB image of at most `MAX_EDGE` pixels a side.

    Raises:
        InputError: there is no upload, it is too large, or it is no image. The message is for the visitor.
    """
    if not path:
        raise InputError("Please choose an image first: upload one, paste one, or take one of the examples.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = opened(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(too_large()) from None
    except IMAGE_ERRORS:
        raise InputError(unreadable()) from None
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(too_large(f"{image.width} x {image.height} pixels"))
        try:
            image.draft("RGB", (MAX_EDGE, MAX_EDGE))  # decodes JPEGs at a reduced size
            image = open_image(image)  # as in training
            image.thumbnail((MAX_EDGE, MAX_EDGE))
            return image
        except (*IMAGE_ERRORS, MemoryError):
            raise InputError(unreadable()) from None


def too_large(size: str = "more pixels than this demo reads") -> str:
    return f"The image has {size}. Please use one of at most {MAX_PIXELS // 1_000_000} megapixels."


def unreadable() -> str:
    return "The file is damaged, or no image. Please upload a JPEG, PNG or WebP."


def check_question(question: str | None) -> str:
    """The question without outer spaces.

    Raises:
        InputError: the question is empty or too long.
    """
    question = (question or "").strip()
    if not question:
        raise InputError("Please type a question about the image.")
    if len(question) > MAX_QUESTION:
        raise InputError(f"The question has {len(question)} characters. Please ask in at most {MAX_QUESTION}.")
    return question


# --- checkpoints --------------------------------------------------------------------------------------------------


class Checkpoint:
    """A model, its processor, and its training's isolator, pruner and settings of the fast view.

    Args:
        name (`str`): A folder, or a Hub id.

    Raises:
        Exception: one of `LOAD_ERRORS`, where the model cannot be loaded or does not answer.
    """

    def __init__(self, name: str):
        self.name = name
        self.folder = local_folder(name)
        self.on_hub = not Path(name).is_dir()
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype="auto")
        self.model: PreTrainedModel = model.to(device).eval()
        self.processor: ProcessorMixin = AutoProcessor.from_pretrained(self.folder)
        self.results = read_results(self.folder)
        self.fast_view = view_settings(self.folder)
        self.isolator = self._isolator()
        self.own_pruner = self._pruner()
        self._warm_up()

    def _isolator(self) -> ModeIsolator | None:
        length = saved_length(self.folder)
        if not length:
            return None
        isolator = ModeIsolator(length, self.model.config.get_text_config().hidden_size)
        isolator.load_pretrained(self.folder)
        return isolator.to(self.model.device, self.model.dtype)

    def _pruner(self) -> Pruner | None:
        """The pruner of its training. None where there is none, or where the pruner is remote code."""
        if not (self.folder / PRUNER_CONFIG_NAME).is_file():
            return None
        try:
            return AutoPruner.from_pretrained(self.folder).to(self.model.device)
        except ValueError:
            return None

    def _warm_up(self) -> None:
        """Answers once in each way, because a first answer includes set-up time."""
        blank = Image.new("RGB", (64, 64), "white")
        self.answer(blank, "what?")
        self.answer(blank, "what?", self.pruner("grid", 0.5))

    def pruner(self, name: str, ratio: float) -> Pruner:
        """The named pruner, which removes the fraction `ratio` of the tokens: the checkpoint's own if it has that name.

        Raises:
            InputError: the pruner is learned, and this checkpoint was not trained with it.
        """
        own = self.own_pruner
        if own is not None and own.config.pruner_type == name:
            pruner = copy.deepcopy(own)
            pruner.reconfigure(pruning_ratio=ratio, pruning_schedule="constant", initial_pruning_ratio=None)
            return pruner
        if is_learned(name):
            raise InputError(f"This model was not trained with the learned pruner {name}. Choose another pruner.")
        return AutoPruner.from_name(name, pruning_ratio=ratio)

    def answer(self, image: Image.Image, question: str, pruner: Pruner | None = None) -> Answer:
        """Answers from all visual tokens, or from the isolator and those that `pruner` keeps.

        Raises:
            InputError: the question contains a placeholder of the model's for pictures or clips.
            ValueError: the pruner does not work with this model.
        """
        inputs = self._inputs(image, question)
        ids = torch.tensor(visual_token_ids(self.model.config), device=self.model.device)
        total = int(torch.isin(inputs["input_ids"], ids).sum())
        if pruner is None:
            text, probability, first = self._generate(inputs)
            seconds, timed = self._latency(first, inputs)
            return Answer(text, seconds, probability, total, total, timed=timed)
        calls, end = watch_calls(pruner)
        text, probability, first = self._generate(inputs, pruner)
        end()
        seconds, timed = self._latency(first, inputs, pruner)
        used = sum(sum(pruned.lengths) for _, pruned in calls)
        isolator = self.isolator.length if self.isolator else 0
        view = view_of(calls, inputs, image, self.processor)
        merged = pruner.config.dropped_tokens == MERGE
        return Answer(text, seconds, probability, used, total, isolator, view, timed, merged)

    def _inputs(self, image: Image.Image, question: str) -> dict:
        mark = mark_in(self.processor, question)
        if mark is not None:
            raise InputError(f"The question may not contain {mark}, which stands for a picture or a clip.")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = render(self.processor, [{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = encode(self.processor, [text], [[image]], padding_side="left")
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _latency(self, first: float, inputs: dict, pruner: Pruner | None = None) -> tuple[float, int]:
        """Median seconds of answering again, and how often: the first answer was the warm-up."""
        if first > PATIENCE or not TIMED:
            return first, 0
        return median(self._generate(inputs, pruner)[2] for _ in range(TIMED)), TIMED

    @torch.inference_mode()
    def _generate(self, inputs: dict, pruner: Pruner | None = None) -> tuple[str, float, float]:
        """The greedy answer, its probability, and its seconds."""
        with LOCK:
            started = time.perf_counter()
            if pruner is not None:
                inputs = prune_inputs(self.model, inputs, pruner, self.isolator, **self.fast_view)
            output = self.model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
                output_logits=True,
            )
            new = output.sequences[:, -len(output.logits) :]
            text = self.processor.batch_decode(new, skip_special_tokens=True)[0]  # waits for the device
            seconds = time.perf_counter() - started
        # The answer's log-probability: the sum of those of its T tokens, from logits (1, T, V).
        logs = torch.stack(output.logits, dim=1).float().log_softmax(-1)
        return text.strip(), logs.gather(-1, new[..., None]).sum().exp().item(), seconds


def local_folder(name: str) -> Path:
    """The folder of a checkpoint. Of a Hub repo, only `FILES` are downloaded."""
    if Path(name).is_dir():
        return Path(name)
    if not is_repo_id(name):
        raise ValueError(f"{name!r} is neither a folder nor a Hub id 'user/name'.")
    with explained("load", f"the Hub repo {name!r}"):
        return Path(snapshot_download(name, allow_patterns=list(FILES)))


# --- pruners ------------------------------------------------------------------------------------------------------


def is_learned(name: str) -> bool:
    return "learned" in kind_of(pruner_class(name))


def explained_pruners(names: list[str]) -> dict[str, str]:
    """The first line of each pruner's documentation, by name."""
    return {name: " ".join((pruner_class(name).__doc__ or "").strip().partition("\n\n")[0].split()) for name in names}


def pruner_names(checkpoints: list[Checkpoint]) -> list[str]:
    """Pruners that shorten prompts: those in front of the language model. Learned ones need a checkpoint's weights."""
    own = {c.own_pruner.config.pruner_type for c in checkpoints if c.own_pruner is not None}
    front = [name for name in available_pruners() if not pruner_class(name).in_language_model]
    return [name for name in front if name in own or not is_learned(name)]
