"""Steps on paper: what a training step needs, without weights, memory or an accelerator.

The model's parameters are fake tensors, which have shapes and no data, and so is all that is computed from them. The
trainers' own `training_step` runs on them, forward and backward, and [`Counts`] counts what it makes as it does of a
real one. The batch is real, because shapes follow from it: where placeholders stand, what is supervised, which tokens
are kept. So the pruner is `random`, which keeps as many tokens as any other and reads no features; memory that a
selecting pruner needs while it selects is not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from ..models.components import role_modules
from ..models.interface import unwrap
from ..trainer.schedule import FAST, SLOW
from ..trainer.training_args import DualSpeedTrainingArguments
from .counters import OWN_FORMULAS, LiveMemory
from .measure import SteppedTrainer
from .repeats import repeat_blocks

PLAIN = "plain"
RECOMPUTED = "_recomputed"  # a fast or slow step with `fast_mode_checkpointing`
PRUNER = "random"
aten = torch.ops.aten


class Answers(TorchDispatchMode):
    """Answers the few questions that models ask of the values of tensors without data.

    Masks without data hold everywhere, `any` does not, and numbers are one. Real masks select by their places.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.index.Tensor:
            places = []
            for index in args[1]:
                places += places_of(index) if index is not None and index.dtype == torch.bool else [index]
            return function(args[0], places)
        if args and isinstance(args[0], FakeTensor):
            if function is aten._local_scalar_dense.default:
                return torch.ones((), dtype=args[0].dtype).item()
            if function in (aten.all.default, aten._is_all_true.default, aten.any.default):
                return torch.tensor(function is not aten.any.default)
            if function is aten.aminmax.default:  # a pruner asks whether features are finite
                return torch.zeros(()), torch.zeros(())
            if function is aten.nonzero.default:
                return torch.ones(args[0].shape).nonzero()
        return function(*args, **(kwargs or {}))


def places_of(mask: torch.Tensor) -> list[torch.Tensor]:
    """The places that a mask selects, one tensor for each dimension."""
    real = torch.ones(mask.shape) if isinstance(mask, FakeTensor) else mask
    return list(real.nonzero(as_tuple=True))


FORMULAS = {**flop_registry, **{packet: shape_wrapper(formula) for packet, formula in OWN_FORMULAS.items()}}


class Counts(LiveMemory):
    """Counts operations beside memory, by the formulas of `flops_of`, whose hooks on modules would keep tensors."""

    flops = 0

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__(known)
        self.peaks, self._part = {"encoder": 0, "rest": 0}, "encoder"

    def enter(self, part: str) -> None:
        """Begins a part of the step, "encoder" or "rest", whose peak is kept apart."""
        self.peaks[self._part] = max(self.peaks[self._part], self.peak)
        self._part, self.peak = part, self.live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        formula = FORMULAS.get(function.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class PaperTrainer(SteppedTrainer):
    """A trainer of a model without data, which cannot be moved."""

    def _move_model_to_device(self, model, device):
        pass


class PlainPaperTrainer(Trainer):
    """The same for plain training."""

    def _move_model_to_device(self, model, device):
        pass


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration on the meta device: shapes alone."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def without_data(model: nn.Module) -> nn.Module:
    """Gives the parameters and buffers of a model on the meta device a place on the CPU, though no data.

    Blocks of its vision tower that are frozen are counted once, and then [repeated][repeat_blocks].
    """
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
    unwrap(model).tie_weights()  # each of the names of a shared table got one of its own
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])
    repeat_blocks(model)
    return model


@dataclass(frozen=True)
class Need:
    """What a step needs.

    Args:
        encoder (`int`): bytes of activations and inputs at the peak of encoding, up to the language model.
        rest (`int`): the same for all else, which alone grows with the language model's layers.
        flops (`int`): floating-point operations.
    """

    encoder: int
    rest: int
    flops: int

    @property
    def bytes(self) -> int:
        """Bytes at the step's peak."""
        return max(self.encoder, self.rest)


class Steps:
    """The steps of two trainers on one model and one kind of sample.

    Args:
        model (`nn.Module`): without data, or a real one on the CPU.
        sample (`Mapping`): a collated batch of one sample. Batches repeat it.
        folder (`str`): for the trainers, which write nothing.
        pruning_ratio, checkpointing: those of training.
        autocast (`bool`): whether steps run under bfloat16 autocast, as with `bf16=True`.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: Mapping[str, torch.Tensor],
        folder: str,
        pruning_ratio: float = 0.9,
        checkpointing: bool = True,
        autocast: bool = False,
    ):
        common = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": autocast}
        common |= {"activation_checkpointing": checkpointing, "disable_tqdm": True}
        settings = {"pruner": PRUNER, "pruning_ratio": pruning_ratio, "slow_mode_splits": "auto"}
        self.model, self.sample = model, sample
        with Answers():  # the isolator is drawn by the spread of the embeddings
            self.dual = PaperTrainer(model=model, args=DualSpeedTrainingArguments(**settings, **common))
        self.plain = PlainPaperTrainer(model=model, args=TrainingArguments(**common))
        if autocast:  # wraps `forward`, as training does
            self.plain.accelerator.prepare_model(model, device_placement=False)
        if checkpointing:
            model.activation_checkpointing_enable()
        for trainer in (self.plain, self.dual):
            trainer.current_gradient_accumulation_steps = 1
            trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        self.length = sample["input_ids"].shape[1]
        self.fast_length = 0  # tokens of a sample in a fast step, known after the first
        self.visual = {"full": 0, "kept": 0}  # its visual tokens before and after pruning, without the isolator's

    def batch(self, rows: int) -> dict[str, torch.Tensor]:
        """`rows` samples. Processors put images one after another along the first dimension, as samples."""
        return {key: value.repeat(rows, *[1] * (value.dim() - 1)) for key, value in self.sample.items()}

    def need(self, name: str, rows: int) -> Need:
        """What a step needs: "plain", "fast" or "slow", the last two with [`RECOMPUTED`] or not; "fast" comes first."""
        batch = self.batch(rows)
        items = (batch["labels"] != -100).sum()
        trainer, clock, mode = (
            self.plain if name == PLAIN else self.dual,
            self.dual.clock,
            name.removesuffix(RECOMPUTED),
        )
        self.dual.mode, self.dual.selective_checkpointing.always = mode, mode != name
        # The size of a fast step decides on the parts of a slow one.
        clock.fast_tokens, clock.visual_tokens = rows * self.fast_length if mode == SLOW else 0, {"full": 0, "kept": 0}
        # Gradients exist beforehand, as in gradient accumulation.
        known = [*self.model.parameters(), *self.model.buffers(), *batch.values(), items]
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                known.append(parameter.grad)
        with Answers(), Counts(known) as counts, self.parts(counts):
            trainer.training_step(self.model, batch, items)
        counts.enter("rest")
        self.model.zero_grad()
        if name == FAST:
            self.fast_length = clock.fast_tokens // rows
            self.visual = {key: count // rows for key, count in clock.visual_tokens.items()}
        given = sum(value.nbytes for value in batch.values())
        return Need(counts.peaks["encoder"] + given, counts.peaks["rest"] + given, counts.flops)

    @contextmanager
    def parts(self, counts: Counts) -> Iterator[None]:
        """Tells the counts where encoding begins, and where the language model does."""
        inner = unwrap(self.model)
        starts = [(tower, "encoder") for tower in role_modules(inner)["vision_tower"]] + [(inner.get_decoder(), "rest")]
        hooks = [
            module.register_forward_pre_hook(lambda *_, part=part: counts.enter(part), prepend=True)
            for module, part in starts
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
