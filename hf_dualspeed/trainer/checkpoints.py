"""Saves isolator and pruner beside a model, and reads checkpoints back."""

from __future__ import annotations

import json
import logging
import re
import shutil
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, reduce
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.trainer import FSDP_MODEL_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..models.adapters import load_adapters
from ..pruning.isolator import save_isolator, saved_length
from ..publishing.files import WHOLE_MODEL, check_checkpoint, known_files, read_mapping
from ..publishing.model_card import kept_card
from ..utils.constants import CARD_NAME, ISOLATOR_WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME, SAVING_NAME
from ..utils.constants import UNFINISHED_NAME as UNFINISHED
from ..utils.devices import gathered
from ..utils.text import one_line
from ..utils.validation import as_type, check_tensors
from ..utils.writing import sync_files, sync_folder, take_place, write_file
from .dual_forward import NAME

logger = logging.getLogger(__name__)

# Files of an earlier run that a save without such files makes stale: those of the fast view, where one is saved, and
# where a whole model is, its weights and adapters, which would be loaded in its place.
FAST_VIEW = "|".join(map(re.escape, (ISOLATOR_WEIGHTS_NAME, PRUNER_WEIGHTS_NAME)))

# Files of sharded training of which each rank writes one: start, rank, end.
RANKED = re.compile(r"((?:\w+_)?zero_pp_rank_|\w+_rank)(\d+)(_mp_rank_00_(?:model|optim)_states\.pt|\.bin)")


class CheckpointMixin:
    """Ordinary checkpoints with isolator and pruner in separate files, from which a run resumes exactly."""

    _marked: Path | None = None  # the checkpoint that is being written, and is marked as unfinished as long

    def _save(self, output_dir=None, state_dict=None):
        # Sharded training passes the gathered weights, which include the isolator's.
        whole = {k.removeprefix(f"{NAME}."): v for k, v in (state_dict or {}).items() if k.startswith(f"{NAME}.")}
        if state_dict is None and getattr(self.model, "peft_config", None):
            state_dict = self.model.state_dict()
        if state_dict is not None:  # PEFT selects weights by pattern and would save a learned pruner's biases
            state_dict = {key: value for key, value in state_dict.items() if not key.startswith(f"{NAME}.")}
        folder = Path(as_type("output_dir", output_dir, str | None) or self.args.output_dir)
        model, saves = self.accelerator.unwrap_model(self.model), self.args.should_save
        with interrupts_deferred(), kept_card(folder, model), self._place_of(folder) as place:
            super()._save(str(place), state_dict)
            with gathered(self.dual_forward.parameters()):  # ZeRO-3 may pass no weights
                if saves:
                    self._save_fast_view(place, whole or self.dual_forward.state_dict())
        if saves and self.state.global_step and not folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            self.write_record(folder)

    @contextmanager
    def _place_of(self, folder: Path) -> Iterator[Path]:
        """Where to write what belongs into `folder`. Only when all is written, it replaces what lies there."""
        if folder == self._marked:
            yield folder
            return
        aside = folder / SAVING_NAME
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        try:
            yield aside
            if self.args.should_save:
                parts = ((PRUNER_CONFIG_NAME, FAST_VIEW), (CONFIG_NAME, WHOLE_MODEL))
                take_place(aside, folder, "|".join(stale for name, stale in parts if (aside / name).is_file()))
        except BaseException:
            if not (folder / UNFINISHED).exists():  # otherwise some of it has taken its place
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _save_fast_view(self, folder, parts: dict[str, torch.Tensor]) -> None:
        """Saves isolator and pruner, whose weights are `parts`."""
        prefix = "pruner."
        learned = {k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}
        with self.as_configured():
            self._pruner.save_pretrained(folder, learned)
        prompt = parts.get("isolator.prompt")
        if prompt is not None:
            save_isolator(prompt, folder)
        # Delete files of an earlier run with other settings.
        for name, belongs in ((PRUNER_WEIGHTS_NAME, learned), (ISOLATOR_WEIGHTS_NAME, prompt is not None)):
            if not belongs:
                (Path(folder) / name).unlink(missing_ok=True)

    def save_model(self, output_dir=None, _internal_call=False):
        """[`~transformers.Trainer.save_model`], which writes no model where FSDP's checkpoints are shards: there, too,
        an ordinary one is written, except into checkpoints."""
        shards = self.is_fsdp_enabled and in_shards(self.accelerator.state.fsdp_plugin)
        if shards and (output_dir is None or Path(output_dir) != self._marked):
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        resume_from_checkpoint = as_type("resume_from_checkpoint", resume_from_checkpoint, str | bool | None)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint` is True, but {self.args.output_dir!r} holds no whole checkpoint. Leave "
                    "it out to start from the beginning."
                )
        elif resume_from_checkpoint or resume_from_checkpoint == "":
            reason = fault_of(Path(resume_from_checkpoint)) if resume_from_checkpoint else "the name is empty"
            if reason is not None:
                raise ValueError(
                    f"`resume_from_checkpoint` is {str(resume_from_checkpoint)!r}, which is no whole checkpoint: "
                    f"{reason}. Name another one, or resume_from_checkpoint=True for the last whole one."
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial):
        begun = super()._init_training_state(max_steps, steps_per_epoch, epochs, resume_from_checkpoint, trial)
        if 0 < max_steps <= self.state.global_step:  # the Trainer would look at the limit only after another step
            logger.warning(
                "%s has trained %d of %d steps: nothing is left. Raise max_steps or num_train_epochs to go on.",
                resume_from_checkpoint,
                self.state.global_step,
                max_steps,
            )
            # The run may have been killed between its last save and the deletion of older ones.
            own, last = Path(self.args.output_dir), Path(resume_from_checkpoint)
            if self.args.should_save and last.parent == own:
                self._remove_broken(last)
                if Path(sort_checkpoints(str(own))[-1]) == last:
                    rotate_checkpoints(str(own), self.args.save_total_limit, self.state.best_model_checkpoint)
            return epochs, 0
        return begun

    def _save_checkpoint(self, model, trial):
        self.add_up()
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            write_file(folder / UNFINISHED, "")
            # Of an earlier run, another kind of model or an optimizer would be taken for this one's.
            for name in {*known_files(folder, resumable=True)} - {CARD_NAME}:
                (folder / name).unlink()
            # The Trainer writes its state last. Then it pushes, and removes older checkpoints.
            self.state.save_to_json = partial(self._finish_checkpoint, folder)
        self.accelerator.wait_for_everyone()
        self._marked = folder
        try:
            with interrupts_deferred():
                super()._save_checkpoint(model, trial)
        finally:
            self._marked = None
            vars(self.state).pop("save_to_json", None)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # each process has written its files before the checkpoint is called whole

    def _finish_checkpoint(self, folder: Path, path: str) -> None:
        """Writes the Trainer's state, and calls the checkpoint whole once all of it is on the disk."""
        type(self.state).save_to_json(self.state, path)
        sync_files(folder)
        (folder / UNFINISHED).unlink()
        sync_folder(folder)
        self._remove_broken(folder)

    def _remove_broken(self, folder: Path) -> None:
        """Where checkpoints are limited, deletes those beside `folder` that are not whole and would take up room."""
        best = self.state.best_model_checkpoint
        for other in map(Path, sort_checkpoints(str(folder.parent)) if self.args.save_total_limit else ()):
            if other not in (folder, Path(best or folder)) and fault_of(other, not self.args.save_only_model):
                shutil.rmtree(other, ignore_errors=True)

    def _tune_save_checkpoint(self, checkpoint_dir):
        """A checkpoint for Ray Tune, from which the Trainer leaves out random states and those of callbacks."""
        self.add_up()
        own = filter(None, (self.clock, self.adaptive_schedule))
        self.state.stateful_callbacks |= {type(callback).__name__: callback.state() for callback in own}
        super()._tune_save_checkpoint(checkpoint_dir)
        self._save_rng_state(str(Path(checkpoint_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")))

    def _save_optimizer_and_scheduler(self, output_dir):
        with filled_states(self.optimizer) if self.is_fsdp_enabled else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_isolator(resume_from_checkpoint, self.args.isolator_length)
        check_same_pruner(Path(resume_from_checkpoint), self._pruner.config.pruner_type)
        if not (self._load_plain(resume_from_checkpoint) or self._load_adapters(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_fast_view(resume_from_checkpoint)

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        if not (self._load_plain(best) or self._load_adapters(best)):
            super()._load_best_model()  # which warns on a machine that did not save the checkpoint
        if (Path(best) / PRUNER_CONFIG_NAME).is_file():
            self._load_fast_view(best)

    def _load_plain(self, folder) -> bool:
        """Loads a full checkpoint that `save_pretrained` wrote; False for adapters, FSDP and DeepSpeed.

        `save_pretrained` writes the published names of the weights, which differ from module names in most
        vision-language models. The Trainer of transformers 5.23 reads them by module name with `strict=False`, so it
        loads nothing. `from_pretrained` knows both.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.is_sharded or not isinstance(model, PreTrainedModel) or not (Path(folder) / CONFIG_NAME).is_file():
            return False
        # All tensors are read in one type, which must be no narrower than that of any, such as a projector in float32
        # in a model in bfloat16.
        own = [tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{NAME}.")]
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in own if tensor.is_floating_point()})
        saved, info = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)
        check_tensors(folder, info["missing_keys"], info["unexpected_keys"])
        model.load_state_dict(saved.state_dict(), strict=False)
        return True

    def _load_adapters(self, folder) -> bool:
        """Loads the PEFT adapters of a checkpoint; False for whole models, FSDP and DeepSpeed."""
        return not self.is_sharded and load_adapters(self.accelerator.unwrap_model(self.model), folder, (f"{NAME}.",))

    def _load_fast_view(self, folder) -> None:
        # Sharded checkpoints hold isolator and pruner among the model's own weights.
        if self.is_sharded:
            return
        if self.dual_forward.isolator is not None:
            self.dual_forward.isolator.load_pretrained(folder)
        self._pruner.load_weights(folder)


def in_shards(plugin) -> bool:
    """Whether FSDP's checkpoints are shards, from which no model of transformers is read."""
    return "FULL_STATE_DICT" not in str(plugin.state_dict_type)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The checkpoint in `folder` of the highest step that can be resumed, or None; warns of those that are skipped."""
    for path in reversed(sort_checkpoints(str(folder))):
        if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", Path(path).name):
            reason = fault_of(Path(path))
            if reason is None:
                return path
            logger.warning("%s is skipped, because it is no whole checkpoint: %s.", path, reason)
    return None


def fault_of(folder: Path, resumable: bool = True) -> str | None:
    """Why `folder` is no whole checkpoint, or None; with `resumable`, it also holds all that training goes on from."""
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / UNFINISHED).exists():
        return "its saving was cut off"
    try:
        step = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"]
    except OSError:
        return f"{TRAINER_STATE_NAME} is missing"
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{TRAINER_STATE_NAME} is damaged"
    if type(step) is not int or step < 0:
        return f"`global_step` in {TRAINER_STATE_NAME} is {str(step)[:100]!r}, not a number of steps"
    deepspeed = (folder / "latest").is_file()
    sharded = deepspeed or next(folder.glob(f"{FSDP_MODEL_NAME}*"), None) is not None
    adapters = [path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG_NAME}")]  # all named ones lie in subfolders
    for part in [] if sharded else adapters or [folder]:
        try:
            check_checkpoint(part, links=True)
        except ValueError as error:
            return one_line(error)
    states = sorted(path.name for path in folder.glob("rng_state*.pth"))
    ranks = {int(re.sub(r"\D", "", name) or 0) for name in states}
    fault = fault_of_shards(folder, ranks) if sharded else None
    if fault or not resumable:
        return fault
    if sharded and not deepspeed and next(folder.glob(f"{Path(OPTIMIZER_NAME).stem}*"), None) is None:
        return "the optimizer is missing"
    names = [] if deepspeed else [SCHEDULER_NAME]
    names += [] if sharded else [OPTIMIZER_NAME]
    for name in (*names, *(states or ["rng_state.pth"])):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(folder / name):
            return f"{name} is damaged"
    return None


def fault_of_shards(folder: Path, ranks: set[int]) -> str | None:
    """Which file of FSDP or DeepSpeed is missing or cut off, as far as names and ends of files tell; or None.

    Args:
        folder (`Path`): The checkpoint.
        ranks (`set[int]`): The processes that have saved their random state.
    """
    places = [path for name in (FSDP_MODEL_NAME, Path(OPTIMIZER_NAME).stem) for path in folder.glob(f"{name}*")]
    if (folder / "latest").is_file():
        places = [folder / (folder / "latest").read_text(encoding="utf-8", errors="replace").strip()[:100]]
        if all(path.name.startswith("layer_") for path in places[0].glob("*_model_states.pt")):  # those are experts
            return f"there are no weights in {places[0].name}"
    files = [path for path in places if path.is_file()]
    for part in filter(Path.is_dir, places):
        files += part.glob("*.pt")
        if part.name.startswith((FSDP_MODEL_NAME, Path(OPTIMIZER_NAME).stem)):
            index = part / ".metadata"
            if not index.is_file():
                return f"{part.name}/{index.name} is missing"
            # It is a pickle, which is not loaded: the names of its files stand in it as they are.
            names = {match.decode() for match in re.findall(rb"__\d+_\d+\.distcp", index.read_bytes())}
            files += [part / name for name in names]
    # Kinds of files of which each rank writes one. Under tensor parallelism, several ranks share a number.
    found = list(filter(None, (RANKED.fullmatch(path.name) for path in files)))
    alone = not any("mp_rank_01" in path.name for path in files)
    for start, end in {(match[1], match[3]) for match in found}:
        there = {int(match[2]) for match in found if (match[1], match[3]) == (start, end)}
        missing = (ranks if ranks and alone else set(range(max(there)))) - there
        if missing:
            return f"{start}{min(missing)}{end} is missing"
    for path in sorted(files):
        if not path.is_file():
            return f"{path.relative_to(folder)} is missing"
        with path.open("rb") as file:
            begins, size = file.read(2), file.seek(0, 2)
            file.seek(max(0, size - 22))  # the end of a zip file, as `torch.save` writes it
            if not size or (begins == b"PK" and not file.read().startswith(b"PK\x05\x06")):
                return f"{path.relative_to(folder)} is damaged"
    return None


@contextmanager
def filled_states(optimizer) -> Iterator[None]:
    """Gives parameters that no step has updated yet, such as the isolator before the first fast step, a state of zeros.

    torch cannot resume a sharded optimizer without, and does the same where it loads one. A step at a learning rate of
    0 makes the state; it is gone afterwards, because some optimizers treat a first step in a special way.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    trained = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
    missing = [p for p in trained if not inner.state.get(p)]
    if missing:
        gradients, rates = [p.grad for p in trained], [group["lr"] for group in inner.param_groups]
        for parameter in trained:
            parameter.grad = None
        for parameter in missing:
            parameter.grad = torch.zeros_like(parameter)
        for group in inner.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        type(inner).step(inner)
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter.grad = gradient
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
        for parameter in missing:
            for value in inner.state[parameter].values():
                if isinstance(value, torch.Tensor):
                    value.zero_()
    try:
        yield
    finally:
        for parameter in missing:
            inner.state.pop(parameter, None)


def check_isolator(folder: str | Path, length: int) -> None:
    """Raises a `ValueError` if the isolator in `folder` has another length than `length`, or is missing."""
    saved = saved_length(folder)
    if saved is None and not (Path(folder) / PRUNER_CONFIG_NAME).is_file():
        return  # a sharded checkpoint, or none at all, for which the Trainer raises
    if (saved or 0) != length:
        raise ValueError(
            f"`isolator_length` is {length}, but the checkpoint {str(folder)!r} was trained with {saved or 0}. "
            f"Set isolator_length={saved or 0} to resume it."
        )


def check_same_pruner(folder: Path, pruner_type: str) -> None:
    """Raises a `ValueError` if the checkpoint in `folder` was trained with another pruner than `pruner_type`."""
    path = folder / PRUNER_CONFIG_NAME
    saved = read_mapping(path).get("pruner_type") if path.is_file() else pruner_type
    if saved != pruner_type:
        raise ValueError(
            f"`pruner` is {pruner_type!r}, but the checkpoint {str(folder)!r} was trained with {str(saved)[:100]!r}. "
            f"Set pruner={str(saved)[:100]!r} to resume it."
        )


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Defers Ctrl-C until the body is done, so no checkpoint is left half-written."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or getattr(before, "defers", False):
        yield
        return
    caught = []

    def hold(*event):
        caught.append(event)

    hold.defers = True
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        raise KeyboardInterrupt
