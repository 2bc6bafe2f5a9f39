"""The model's forward in fast or slow mode, by hooks on the model that the trainer is given.

The hooks sit on the outermost model, so that encoding, pruning and the teacher run inside the call that DDP, FSDP2
and DeepSpeed wrap. Shapes: B batch, S sequence, M supervised positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from transformers.utils import ModelOutput

from ..models.components import language_parts
from ..models.families import family_of
from ..models.interface import modalities_in, towers, unwrap
from ..pruners import Pruner
from ..pruning.decoder import LayerPass
from ..pruning.encoding import VisualEncoding, encode
from ..pruning.inputs import check_inputs, check_pruner, shorten_inputs, whole_inputs
from ..pruning.isolator import ModeIsolator
from ..pruning.proportional_attention import KeySizes, check_used, key_sizes_of
from ..utils.validation import require
from .batch_splitting import BatchParts
from .fused_loss import FusedHead
from .losses import supervised_cross_entropy
from .schedule import FAST, SLOW

NAME = "dualspeed"
# The model as it is, on all tokens, but for its head at supervised positions alone.
EVALUATION = "evaluation"


@dataclass
class DualSpeedOutput(ModelOutput):
    """What the model returns in a mode.

    Args:
        loss (`torch.Tensor` of no dimensions): a zero that touches the trainable parameters that this pass did not use,
            so that DDP finds each of them in every step. None in evaluation.
        logits (`torch.Tensor` of shape `(M, V)`): those of the supervised positions; hidden states `(M, D)` where the
            fused head leaves them so. [`DualForward.cross_entropy`] takes either.
        targets (`torch.LongTensor` of shape `(M,)`): their labels.
        teacher_logits (`torch.Tensor` of shape `(M, V)`, *optional*): those of the pruned view, in slow mode with
            distillation; in training mode, dropout included, as the paper's.
        auxiliary_loss (`torch.Tensor` of no dimensions, *optional*): what a learned pruner adds in fast mode.
        part (`int`): which part of its batch this is, from 0.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    part: int | None = None


@dataclass
class PassState:
    """A micro-batch in a mode: what was asked for, and what its calls have left so far.

    Args:
        mode (`str`): "fast", "slow" or "evaluation".
        distil (`bool`): whether the pruned view teaches.
        generator (`torch.Generator`, *optional*): for pruners that draw.
        parts (`int`): each call runs one of so many parts of the batch.
        progress (`float`): fraction of the training that is done, for a pruning ratio that changes.
        served (`Callable`, *optional*): images are encoded inside `served(tower)`.
        tokens (`int`): that the language model ran on in the last call, padding included.
        visual_tokens (`tuple[int, int]`): of a fast pass, before and after pruning; counted without waiting for the
            device.
    """

    mode: str
    distil: bool = False
    generator: torch.Generator | None = None
    parts: int = 1
    progress: float = 1.0
    served: Callable[[nn.Module], AbstractContextManager] | None = None
    tokens: int = 0
    visual_tokens: tuple[int, int] = (0, 0)
    # Of the batch, for all its parts.
    batch: BatchParts | None = None
    part: int = -1
    # Of the call that is running, for the hook behind it and for layers that are computed again in backward.
    modalities: set[str] = field(default_factory=set)
    supervised: torch.Tensor | None = None  # (B, S), where the next token has a label
    targets: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    layers: LayerPass | None = None
    key_sizes: KeySizes | None = None
    model: weakref.ref | None = None  # a plain reference would make the model its own submodule


class DualForward(nn.Module):
    """The trainable parts of the fast view, and the hooks that run a call of the model in a mode.

    It hangs on the model as `model.dualspeed`, so that optimizer, gradient clipping and sharding see its parameters;
    `save_pretrained` leaves them out of the checkpoint. Inside [`in_mode`] the model returns a [`DualSpeedOutput`];
    outside it runs as it always does.
    """

    def __init__(
        self,
        pruner: Pruner,
        isolator: ModeIsolator | None,
        position_ids: str,
        video_budget: str = "clip",
        supervised_logits_only: bool = True,
        plain: bool = False,
        proportional_attention: bool = True,
    ):
        super().__init__()
        self.pruner = pruner
        self.isolator = isolator
        self.position_ids = position_ids
        self.video_budget = video_budget
        self.supervised_logits_only = supervised_logits_only
        self.plain = plain  # as `DualSpeedArguments.plain_path` says
        self.proportional_attention = proportional_attention
        self._handles: list = []
        self._adapters: dict[str, list[str]] = {}
        self._pass: PassState | None = None
        self.run_as_trained(nullcontext, None)

    def run_as_trained(self, autocast: Callable[[], AbstractContextManager], fused_head: FusedHead | None) -> None:
        """Gives passes the precision and the head of training, known once the accelerator is."""
        self.autocast, self.fused_head = autocast, fused_head

    @property
    def mode(self) -> str | None:
        """The mode of the calls now, or None."""
        return None if self._pass is None else self._pass.mode

    def __getstate__(self) -> dict:
        """For copies and pickles, which are not in the middle of a pass and belong to no trainer."""
        return {key: value for key, value in self.__dict__.items() if key not in ("autocast", "fused_head", "_pass")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._pass = None
        self.run_as_trained(nullcontext, None)

    # --- on and off a model ---------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Hangs this on `model`, in place of an earlier one."""
        check_pruner(model, self.pruner)
        earlier = getattr(model, NAME, None)
        if isinstance(earlier, DualForward):
            earlier.detach()
        model.add_module(NAME, self)
        ours = {f"{NAME}.{key}" for key in self.state_dict()}
        model._keys_to_ignore_on_save = {*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *ours}
        outer = unwrap(model)
        parameters = inspect.signature(outer.forward).parameters
        slices_logits = "logits_to_keep" in parameters and family_of(outer.config).slices_logits
        self.slices_logits = slices_logits and self.supervised_logits_only
        tower_of = {name: id(tower) for name, tower in towers(outer).items()}
        self._sharing = [{n for n, tower in tower_of.items() if tower == own} for own in set(tower_of.values())]
        self._caches = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()

    def reserve_adapters(self, model: nn.Module, fast_only: set[str]) -> None:
        """PEFT adapters all of whose trainable parameters are in `fast_only` take part in the fast view alone."""
        if not hasattr(model, "peft_config"):
            return
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        active = model.active_adapters  # a method where transformers' own `add_adapter` made them
        active = list(active() if callable(active) else active)
        owned = {a: [name for name in trainable if f".{a}." in f"{name}."] for a in active}
        reserved = {a for a, names in owned.items() if names and fast_only.issuperset(names)}
        if reserved:
            self._adapters = {FAST: active, SLOW: [a for a in active if a not in reserved]}
            self._activate(model, SLOW)

    def _activate(self, model: nn.Module, mode: str) -> None:
        # PEFT's set_adapter would also switch requires_grad, which the optimizer and DDP take as fixed.
        for module in model.modules() if self._adapters else ():
            if isinstance(getattr(module, "_active_adapter", None), list):
                module._active_adapter = self._adapters[mode]

    # --- a pass ---------------------------------------------------------------------------------------------------

    @contextmanager
    def in_mode(
        self,
        mode: str,
        *,
        distil: bool = False,
        generator: torch.Generator | None = None,
        parts: int = 1,
        progress: float = 1.0,
        served: Callable[[nn.Module], AbstractContextManager] | None = None,
    ) -> Iterator[PassState]:
        """Calls of the model inside run in `mode`; the arguments are [`PassState`]'s, which it yields.

        Backward belongs inside, too: it may compute layers again.
        """
        self._pass = PassState(mode, distil and mode == SLOW, generator, parts, progress, served)
        try:
            yield self._pass
        finally:
            self._end(self._pass)
            self._pass = None

    def _end(self, state: PassState) -> None:
        """The model runs as it always does again."""
        if state.layers is not None:
            state.layers.close()
        if state.key_sizes is not None:
            state.key_sizes.set(None)
            state.key_sizes.taken_by = None
        if self.fused_head is not None:
            self.fused_head.close()
        if state.model is not None:
            self._activate(state.model(), SLOW)
        # The counts stay; what holds memory goes.
        state.batch = state.layers = state.key_sizes = state.supervised = None
        state.targets = state.teacher_logits = state.auxiliary_loss = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict):
        """In front of the model's forward: its inputs in the mode of the pass."""
        state = self._pass
        if state is None:
            return None
        inputs = dict(kwargs) if state.mode == EVALUATION else self._inputs_in_mode(model, kwargs, state)
        inputs, state.supervised, shifted = self._supervised(inputs)
        state.targets, state.tokens = shifted[state.supervised], shifted.numel()
        if self.fused_head is not None:
            self.fused_head.open(not state.distil)
        return (), inputs

    def _inputs_in_mode(self, model: nn.Module, kwargs: dict, state: PassState) -> dict:
        """The inputs of a training pass, encoded and shortened as its mode asks for; the teacher's logits, too."""
        check_inputs(kwargs)
        require(kwargs, "labels")
        state.model, state.modalities = weakref.ref(model), modalities_in(kwargs)
        state.teacher_logits = state.auxiliary_loss = None
        self._close_layers(state)
        self._sizes_of_keys(model, state).set(None)
        # A slow pass that needs no encoded tokens leaves encoding to the model's own forward.
        encoded_here = state.mode == FAST or state.distil or state.parts > 1 or state.served is not None
        inputs, encodings = self._encoded(model, kwargs, state) if encoded_here else (kwargs, [])

        self._activate(model, FAST)
        if state.mode == FAST:
            inputs = self._shortened(model, inputs, encodings, state)
        elif encoded_here:
            if state.distil:
                with record_function("dualspeed.teach"):
                    state.teacher_logits = self.teach(model, inputs, encodings, state)
            if not self.plain:  # the student takes the images as they were encoded for the teacher, with gradients
                with self.autocast():
                    inputs = whole_inputs(model, inputs, encodings)
        self._activate(model, state.mode)
        return inputs

    def _encoded(self, model: nn.Module, inputs: dict, state: PassState) -> tuple[dict, list[VisualEncoding]]:
        """A batch, or its next part, and what was encoded of it: for all parts at once, in front of the first."""
        state.part += 1
        if state.batch is None:
            needs = self.pruner.needs if state.mode == FAST or state.distil else frozenset()
            with self.autocast(), record_function("dualspeed.encode"):
                encodings = encode(model, inputs, needs, self.video_budget, state.served, self.plain)
            if state.parts == 1:
                return inputs, encodings
            state.batch = BatchParts(model, inputs, encodings, state.parts)
        return state.batch[state.part]

    def _shortened(self, model: nn.Module, inputs: dict, encodings: list[VisualEncoding], state: PassState) -> dict:
        """Inputs of the pruned view. A pruner inside the language model then drops tokens until its layers close."""
        if self.pruner.in_language_model:
            state.layers = LayerPass(model, self.pruner, self.proportional_attention, state.progress)
        with record_function("dualspeed.shorten"):
            short = shorten_inputs(
                model,
                inputs,
                encodings,
                self.pruner,
                self.isolator,
                self.position_ids,
                state.generator,
                state.layers,
                state.progress,
            )
        if state.mode == FAST:  # what the teacher sees is not saved
            state.visual_tokens, state.auxiliary_loss = short.visual_tokens, short.auxiliary_loss
        if self.proportional_attention:
            self._sizes_of_keys(model, state).set(short.log_sizes)
        if state.layers is not None:
            state.layers.open()
        return short.inputs

    def _sizes_of_keys(self, model: nn.Module, state: PassState) -> KeySizes:
        """The sizes that the language model's layers see, which this pass decides on until its end."""
        if state.key_sizes is None:
            state.key_sizes = key_sizes_of(model)
            state.key_sizes.take(self)
        return state.key_sizes

    def _close_layers(self, state: PassState) -> None:
        if state.layers is not None:
            state.layers.close()
        state.layers = None

    @torch.no_grad()
    def teach(self, model: nn.Module, inputs: dict, encodings: list[VisualEncoding], state: PassState) -> torch.Tensor:
        """Logits `(M, V)` of the pruned view. `model.forward` rather than `model`: no hook fires twice."""
        inputs = self._shortened(model, inputs, [e.detached() for e in encodings], state)
        inputs, supervised, _ = self._supervised(inputs)
        logits = model.forward(**inputs).logits
        self._close_layers(state)
        if state.key_sizes is not None:
            check_used(model, state.key_sizes)
            state.key_sizes.set(None)
        return logits if self.slices_logits else logits[supervised]

    def _supervised(self, inputs: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Takes the labels out, so that the head runs at supervised positions only.

        Returns:
            `tuple[dict, torch.Tensor, torch.Tensor]`: inputs, where the next token has a label `(B, S)`, and the labels
            shifted by one `(B, S)`.
        """
        inputs = dict(inputs)
        shifted = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
        supervised = shifted != -100
        if self.slices_logits:
            inputs["logits_to_keep"] = supervised
        if self._caches:  # a cache costs memory, and hides the boundaries of packed samples from transformers
            inputs["use_cache"] = False
        return inputs, supervised, shifted

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output) -> DualSpeedOutput | None:
        """Behind the model's forward: its logits beside all that the loss is made of."""
        state = self._pass
        if state is None:
            return None
        if state.key_sizes is not None:
            check_used(model, state.key_sizes)
        logits = output.logits
        if self.fused_head is not None:
            self.fused_head.after(logits)
        if not self.slices_logits:
            logits = logits[state.supervised]
        if state.mode == EVALUATION:
            return DualSpeedOutput(logits=logits, targets=state.targets)
        zero = logits.new_zeros(())
        if state.batch is not None:  # the last part goes on to the encoder, be there an image in it or not
            zero = sum((end.flatten()[:0].sum() for end in state.batch.ends), zero)
        # Of no elements: the sum of a whole parameter could overflow in half precision, and inf * 0 is NaN.
        touched = sum((p.flatten()[:0].sum() for p in self._untouched(model, state)), zero)
        return DualSpeedOutput(
            touched, logits, state.targets, state.teacher_logits, state.auxiliary_loss, max(state.part, 0)
        )

    def cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Summed cross-entropy of what the last call returned as logits, `(M, V)` or `(M, D)`."""
        if self.fused_head is None or not self.fused_head.fuses:
            return supervised_cross_entropy(logits, targets, 1, label_smoothing, sliced=not self.plain)
        with self.autocast():  # which the model's own call has left
            return self.fused_head.cross_entropy(logits, targets, label_smoothing)

    def _untouched(self, model: nn.Module, state: PassState) -> Iterator[torch.Tensor]:
        """Trainable parameters that a pass in this mode, on this batch, leaves out of the graph."""
        if self.isolator is not None:
            yield self.isolator()  # by its call, which gathers shards
        yield from (p for p in self.pruner.parameters() if p.requires_grad)
        if self.fused_head is not None and self.fused_head.fuses:
            yield from self.fused_head.parameters()
        if self._adapters and state.mode == SLOW:
            reserved = set(self._adapters[FAST]) - set(self._adapters[SLOW])
            names = tuple(f".{adapter}." for adapter in reserved)
            yield from (p for n, p in model.named_parameters() if p.requires_grad and any(a in n for a in names))
        if any(not modalities & state.modalities for modalities in self._sharing):  # of some tower, none was there
            outer = unwrap(model)
            language = {id(p) for part in language_parts(outer) for p in part.parameters()}
            visual = (p for p in outer.parameters() if p.requires_grad and id(p) not in language)
            yield from (p for p in visual if not isinstance(p, DTensor))  # shards of FSDP are not whole here
