"""The checkpoint of an evaluation: checked before it is loaded, with the files that a run left beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME, PROCESSOR_NAME

from ..hub.errors import explained
from ..hub.source import is_repo_id
from ..models.adapters import load_adapters
from ..pruning.isolator import ModeIsolator, saved_length
from ..publishing.files import check_finished
from ..publishing.results import read_results
from ..trainer.callbacks import saved_by_clock
from ..utils.constants import (
    ISOLATOR_WEIGHTS_NAME,
    PRUNER_CONFIG_NAME,
    PRUNER_WEIGHTS_NAME,
    RESULTS_NAME,
    VIEW_SETTINGS,
)
from ..utils.text import parse_json
from ..utils.validation import check_tensors, checked, loading, surprises_named
from .fingerprint import hash_of_file, model_files

# Files that a run leaves beside its model. With them, a model answers from pruned tokens as in fast steps.
BESIDE = (ISOLATOR_WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME, RESULTS_NAME)


@dataclass(frozen=True)
class Checkpoint:
    """A model that answers.

    Args:
        name (`str`): A folder or a Hub repo.
        dtype (`str`): Type of the loaded weights, or "auto".
        trust_remote_code (`bool`): Run the checkpoint's own code.
        base (`str`, *optional*): The base model, where the checkpoint is a PEFT adapter.
        commit, base_commit (`str`, *optional*): The commits of Hub repos.
        beside (`Path`, *optional*): The folder of the run's isolator, pruner and results, where there are any.
    """

    name: str
    dtype: str
    trust_remote_code: bool
    base: str | None
    commit: str | None
    base_commit: str | None
    beside: Path | None

    @property
    def run(self) -> Path | None:
        """The folder of the run that trained it, where it is local and has results."""
        folder = Path(self.name)
        return folder if (folder / RESULTS_NAME).is_file() else None

    def is_of_run(self) -> bool:
        """Whether a pruner or an isolator lies beside it, which a training with DualSpeed leaves there."""
        names = (ISOLATOR_WEIGHTS_NAME, PRUNER_CONFIG_NAME)
        return self.beside is not None and any((self.beside / name).is_file() for name in names)

    def files(self) -> dict[str, dict[str, str]]:
        """What the model is loaded from: the checkpoint's and the base model's files by hash, or the Hub's commits."""
        found = {"checkpoint": _contents(self.name, self.commit)}
        return found if self.base is None else {**found, "base model": _contents(self.base, self.base_commit)}

    def search(self) -> dict[str, int]:
        """What answers have in place of beams, where a local generation config asks for these, as earlier ones did."""
        path = Path(self.base or self.name) / GENERATION_CONFIG_NAME
        asked = parse_json(path.read_bytes()).get("num_beams") if path.is_file() else None
        return {"num_beams": 1} if asked not in (None, 1) else {}

    def processor(self) -> ProcessorMixin:
        """Loads the processor, that of the base model where an adapter has none.

        Raises:
            ValueError: there is none, or it has no chat template.
        """
        name, revision = self.name, self.commit
        if self.base is not None and _file(name, PROCESSOR_NAME, revision) is None:
            name, revision = self.base, self.base_commit
        with loading(name):
            processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=self.trust_remote_code)
        if not isinstance(processor, ProcessorMixin):
            kind = type(processor).__name__
            raise ValueError(
                f"{name!r} has no processor of images and texts, only a {kind}. Save one beside the model."
            )
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise ValueError(f"The processor of {name!r} has no chat template. Set `chat_template` and save it again.")
        return processor

    def model(self) -> PreTrainedModel:
        """Loads the model, on the accelerator where there is one."""
        model = self.without_adapter()
        if self.base is not None:
            model = self.adapted(model)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        return model.to(device).eval()

    def without_adapter(self) -> PreTrainedModel:
        """Loads the whole model, which is the base model of an adapter, on the CPU."""
        options = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        options |= {"revision": self.base_commit if self.base else self.commit}
        name = self.base or self.name
        with loading(name):
            model, info = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **options)
        check_tensors(name, info["missing_keys"])
        return model

    def adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        """The base model with the checkpoint's adapter around it.

        Raises:
            ValueError: the adapter cannot be read, lacks tensors, or is one of another model.
        """
        from peft import PeftModel

        with loading(self.name):
            adapted = PeftModel.from_pretrained(model, self.name, revision=self.commit)
            # PEFT only warns of tensors that are missing, and leaves them as they begin.
            load_adapters(adapted, _file(self.name, ADAPTER_CONFIG_NAME, self.commit).parent)
        return adapted

    def isolator_length(self) -> int | None:
        """The number of tokens of the run's isolator, or None where there is none."""
        return None if self.beside is None else saved_length(self.beside) or None

    def isolator_hash(self) -> str | None:
        """A hash of the run's isolator, or None where there is none."""
        return None if self.isolator_length() is None else hash_of_file(self.beside / ISOLATOR_WEIGHTS_NAME)

    def isolator(self, model: PreTrainedModel) -> ModeIsolator | None:
        """Loads the run's isolator, where it has one."""
        length = self.isolator_length()
        if length is None:
            return None
        isolator = ModeIsolator(length, model.config.get_text_config().hidden_size)
        isolator.load_pretrained(self.beside)
        return isolator.to(model.device, model.dtype)

    def settings(self) -> dict[str, str | bool]:
        """The run's settings of positions, video budget and attention, as far as they lie beside the model."""
        return {} if self.beside is None else view_settings(self.beside)


@checked
def find_checkpoint(
    name: str, dtype: str = "auto", trust_remote_code: bool = False, pruned: bool = False, base: str | None = None
) -> Checkpoint:
    """Checks a checkpoint without loading it. With `pruned`, finds the files that a run left beside it.

    `base` takes the place of the base model that an adapter names.

    Raises:
        ValueError: the checkpoint is no vision-language model.
        OSError: there is no such checkpoint, or the Hub refuses, fails or cannot be reached.
    """
    folder = Path(name) if Path(name).is_dir() else None
    if folder is None and not is_repo_id(name):
        raise FileNotFoundError(f"`checkpoint` is {name!r}, which is neither a folder nor a Hub repo 'user/name'.")
    if folder is not None:
        check_finished(folder)
    found, given, base, base_commit = _file(name, CONFIG_NAME), base, None, None
    try:
        adapter = _file(name, ADAPTER_CONFIG_NAME)
    except ConnectionError:  # without the Hub, it is not known that a model in the cache is no adapter
        if found is None:
            raise
        adapter = None
    if adapter is not None:  # where both are there, transformers too loads the adapter's base model
        with surprises_named(f"{ADAPTER_CONFIG_NAME} of {name!r} is none of an adapter"):
            config = parse_json(adapter.read_bytes())
            base = given or str(config["base_model_name_or_path"])
            revision = None if given else config.get("revision")
        found = adapter
        base_commit = None if Path(base).is_dir() else _base_commit(name, base, revision)
    if found is None:
        raise ValueError(f"{name!r} holds no checkpoint: neither {CONFIG_NAME} nor {ADAPTER_CONFIG_NAME} is there.")
    commit = None if folder is not None else found.parent.name  # the Hub's cache has a folder per commit
    _check_kind(name, base or name, base_commit if base else commit, trust_remote_code)
    beside = folder
    if folder is None and pruned:
        paths = [path for path in (_file(name, file, commit) for file in BESIDE) if path is not None]
        beside = paths[0].parent if paths else None
    return Checkpoint(name, dtype, trust_remote_code, base, commit, base_commit, beside)


def view_settings(folder: Path) -> dict[str, str | bool]:
    """The settings of a run's pruned view, out of its results, or out of a checkpoint's state, which has no results.

    Raises:
        ValueError: one of the two files is damaged.
    """
    known, state = read_results(folder).get("settings"), folder / TRAINER_STATE_NAME
    if known is None and state.is_file():
        with surprises_named(f"{str(state)!r} is no state of a training"):
            known = dict(saved_by_clock(json.loads(state.read_bytes())).get("view") or {})
    return {key: known[key] for key in VIEW_SETTINGS if key in (known or {})}


def _base_commit(name: str, base: str, revision: str | None) -> str:
    found = _file(base, CONFIG_NAME, revision) if is_repo_id(base) else None
    if found is None:
        raise ValueError(
            f"{name!r} is an adapter of {base!r}, which is neither a folder nor a Hub repo 'user/name' of a model. "
            f"Correct `base_model_name_or_path` in its {ADAPTER_CONFIG_NAME}."
        )
    return found.parent.name


def _contents(name: str, commit: str | None) -> dict[str, str]:
    return model_files(Path(name)) if commit is None else {"commit": f"{name}@{commit}"}


def _check_kind(name: str, model: str, revision: str | None, trust_remote_code: bool) -> None:
    with loading(model):
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and "AutoModelForImageTextToText" not in (getattr(config, "auto_map", None) or {}):
        raise ValueError(
            f"`checkpoint` {name!r} is no vision-language model: transformers has no model of images and texts for "
            f"its type, {config.model_type!r}. Name one that AutoModelForImageTextToText loads."
        )


def _file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a folder or Hub repo, or None where there is none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        with explained("read", f"the Hub repo {name!r}", file):
            return Path(hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:
        return None
