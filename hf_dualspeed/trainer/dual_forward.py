"""One training pass in fast or slow mode, by hooks on the model that the trainer is given.

The hooks sit on the outermost model, so that encoding, pruning and the teacher run inside the call that DDP, FSDP2
and DeepSpeed wrap. Shapes: B batch, S sequence, M supervised positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from ..models.components import language_parts
from ..models.families import family_of
from ..models.interface import modalities_in, towers, unwrap
from ..pruners import PrunedTokens, Pruner
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


class ModePass(nn.Module):
    """The trainable parts of the fast view, and the hooks that run a pass in the mode set by `begin`.

    It hangs on the model as `model.dualspeed`, so that optimizer, gradient clipping and sharding see its parameters;
    `save_pretrained` leaves them out of the checkpoint. With no mode set, the model runs as it always does.

    After a call in a mode, `targets` `(M,)` holds the labels of the returned logits `(M, V)` (hidden states `(M, D)`
    where `fused_head` leaves them so; `cross_entropy` takes either), `teacher_logits` `(M, V)` those of the pruned view
    (slow mode with distillation; in training mode, dropout included, as the paper's), `auxiliary_loss` what a learnt
    pruner adds in fast mode, `visual_tokens` how many there were before and after pruning (fast mode; no wait for the
    device), and the output's `loss` a zero that touches the trainable parameters that this pass did not use, so that
    DDP finds each of them in every step.
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
        self.last_mode: str | None = None
        self.visual_tokens = (0, 0)
        self.tokens = 0  # that the language model ran on in the last pass, padding included
        self._handles: list = []
        self._adapters: dict[str, list[str]] = {}
        self._forget()

    def _forget(self) -> None:
        """No mode, nothing kept of a pass."""
        self.autocast: Callable[[], AbstractContextManager] = nullcontext
        self.fused_head: FusedHead | None = None
        self.mode: str | None = None
        self.distil = False
        self.generator: torch.Generator | None = None
        self.served: Callable[[nn.Module], AbstractContextManager] | None = None
        self.targets: torch.Tensor | None = None
        self.teacher_logits: torch.Tensor | None = None
        self.auxiliary_loss: torch.Tensor | None = None
        self._keep: torch.Tensor | None = None
        self._layers: LayerPass | None = None
        self._key_sizes: KeySizes | None = None
        self._parts, self._part, self._batch = 1, 0, None
        self._seen: set[str] = set()
        self._model: weakref.ref | None = None  # a plain reference would make the model its own submodule

    def __getstate__(self) -> dict:
        """For copies and pickles, which are not in the middle of a pass."""
        passing = ("autocast", "mode", "distil", "generator", "served", "targets", "teacher_logits", "auxiliary_loss")
        passing += ("fused_head", "_keep", "_layers", "_key_sizes", "_batch", "_seen", "_model")
        return {key: value for key, value in self.__dict__.items() if key not in passing}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    # --- on and off a model ---------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Hangs this on `model`, in place of an earlier one."""
        check_pruner(model, self.pruner)
        earlier = getattr(model, NAME, None)
        if isinstance(earlier, ModePass):
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
            self.pruner.register_forward_hook(self._count),
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

    def begin(
        self,
        mode: str,
        distil: bool,
        generator: torch.Generator | None,
        parts: int = 1,
        served: Callable[[nn.Module], AbstractContextManager] | None = None,
    ) -> None:
        """The next calls of the model run in `mode`; with several `parts`, each call runs the next part of a batch.
        Images are encoded inside `served(tower)`."""
        self.mode = mode
        if mode != EVALUATION:
            self.last_mode = mode
        self._parts, self._part, self._batch = parts, 0, None
        self.visual_tokens = (0, 0)
        self.distil, self.generator, self.served = distil and mode == SLOW, generator, served

    @property
    def first_part(self) -> bool:
        """Whether the last call ran a whole batch, or the first part of one."""
        return self._part <= 1

    def end(self) -> None:
        """The next calls of the model run as if this were not there. Only after backward, which may recompute."""
        self.mode = self.generator = self.served = self._batch = self._keep = None
        self.targets = self.teacher_logits = self.auxiliary_loss = None
        self.pruner.auxiliary_loss = None  # and the graph behind it
        self._close_layers()
        if self._key_sizes is not None:
            self._key_sizes.set(None)
            self._key_sizes.taken_by = self._key_sizes = None
        if self.fused_head is not None:
            self.fused_head.close()
        if self._model is not None:
            self._activate(self._model(), SLOW)

    def _before(self, model: nn.Module, args: tuple, kwargs: dict):
        if self.mode is None:
            return None
        inputs = dict(kwargs) if self.mode == EVALUATION else self._inputs_in_mode(model, kwargs)
        inputs, shifted = self._supervise(inputs)
        self.targets, self.tokens = shifted[self._keep], shifted.numel()
        if self.fused_head is not None:
            self.fused_head.open(not self.distil)
        return (), inputs

    def _inputs_in_mode(self, model: nn.Module, kwargs: dict) -> dict:
        """The inputs of a training pass, encoded and shortened as its mode asks for; sets `teacher_logits`."""
        check_inputs(kwargs)
        require(kwargs, "labels")
        self._model, self.teacher_logits = weakref.ref(model), None
        self.auxiliary_loss = None
        self._close_layers()
        self._seen = modalities_in(kwargs)
        self._take_key_sizes(model).set(None)
        inputs = kwargs
        apart = self.distil or self._parts > 1 or self.served is not None  # slow, and yet encoded here
        if self.mode == FAST or apart:
            inputs, encodings = self._encode(model, kwargs)
        self._activate(model, FAST)
        if self.mode == FAST:
            inputs = self._shorten(model, inputs, encodings)
        elif apart:
            if self.distil:
                with record_function("dualspeed.teach"):
                    self.teacher_logits = self._teach(model, inputs, encodings)
            if not self.plain:  # the student takes the images as they were encoded for the teacher, with gradients
                with self.autocast():
                    inputs = whole_inputs(model, inputs, encodings)
        self._activate(model, self.mode)
        return inputs

    def _encode(self, model: nn.Module, inputs: dict) -> tuple[dict, list[VisualEncoding]]:
        """A batch, or its next part, and what was encoded of it: for all parts at once, in front of the first."""
        if self._batch is None:
            needs = self.pruner.needs if self.mode == FAST or self.distil else frozenset()
            with self.autocast(), record_function("dualspeed.encode"):
                encodings = encode(model, inputs, needs, self.video_budget, self.served, self.plain)
            if self._parts == 1:
                return inputs, encodings
            self._batch = BatchParts(model, inputs, encodings, self._parts)
        self._part += 1
        return self._batch[self._part - 1]

    def _count(self, pruner: nn.Module, args: tuple, pruned: PrunedTokens) -> None:
        """Adds up what the fast pass prunes of each modality, from lengths that lie on the host, and what a learnt
        pruner loses by it; what the teacher sees is not saved."""
        if self.mode == FAST:
            full, kept = self.visual_tokens
            self.visual_tokens = (full + sum(args[0].lengths), kept + sum(pruned.lengths))
            losses = [loss for loss in (self.auxiliary_loss, pruner.auxiliary_loss) if loss is not None]
            self.auxiliary_loss = sum(losses) if losses else None

    def _shorten(self, model: nn.Module, inputs: dict, encodings: list) -> dict:
        """Inputs of the pruned view. A pruner inside the language model then drops tokens until its layers close."""
        layers = None
        if self.pruner.in_language_model:
            layers = self._layers = LayerPass(model, self.pruner, self.proportional_attention)
        with record_function("dualspeed.shorten"):
            short, log_sizes = shorten_inputs(
                model, inputs, encodings, self.pruner, self.isolator, self.position_ids, self.generator, layers
            )
        if self.proportional_attention:
            self._take_key_sizes(model).set(log_sizes)
        if layers is not None:
            layers.open()
        return short

    def _take_key_sizes(self, model: nn.Module) -> KeySizes:
        """The sizes that the language model's layers see, which this pass decides on until its end."""
        if self._key_sizes is None:
            self._key_sizes = key_sizes_of(model)
            self._key_sizes.take(self)
        return self._key_sizes

    def _close_layers(self) -> None:
        if self._layers is not None:
            self._layers.close()
        self._layers = None

    @torch.no_grad()
    def _teach(self, model: nn.Module, inputs: dict, encodings: list) -> torch.Tensor:
        """Logits `(M, V)` of the pruned view. `model.forward` rather than `model`: no hook fires twice."""
        inputs = self._shorten(model, inputs, [e.detached() for e in encodings])
        inputs, _ = self._supervise(inputs)
        logits = model.forward(**inputs).logits
        self._close_layers()
        if self._key_sizes is not None:
            check_used(model, self._key_sizes)
            self._key_sizes.set(None)
        return logits if self.slices_logits else logits[self._keep]

    def _supervise(self, inputs: dict) -> tuple[dict, torch.Tensor]:
        """Takes the labels out, so that the head runs at supervised positions only: inputs, shifted labels `(B, S)`."""
        inputs = dict(inputs)
        shifted = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
        self._keep = shifted != -100
        if self.slices_logits:
            inputs["logits_to_keep"] = self._keep
        if self._caches:  # a cache costs memory, and hides the boundaries of packed samples from transformers
            inputs["use_cache"] = False
        return inputs, shifted

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output):
        if self.mode is None:
            return None
        if self._key_sizes is not None:
            check_used(model, self._key_sizes)
        if self.fused_head is not None:
            self.fused_head.after(output.logits)
        if not self.slices_logits:
            output["logits"] = output.logits[self._keep]
        if self.mode == EVALUATION:
            return output
        zero = output.logits.new_zeros(())
        if self._batch is not None:  # the last part goes on to the encoder, be there an image in it or not
            zero = sum((end.flatten()[:0].sum() for end in self._batch.ends), zero)
        # Of no elements: the sum of a whole parameter could overflow in half precision, and inf * 0 is NaN.
        output["loss"] = sum((p.flatten()[:0].sum() for p in self._untouched(model)), zero)
        return output

    def cross_entropy(self, logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Summed cross-entropy of what the last call returned as logits, `(M, V)` or `(M, D)`."""
        if self.fused_head is None or not self.fused_head.fuses:
            return supervised_cross_entropy(logits, self.targets, 1, label_smoothing, sliced=not self.plain)
        with self.autocast():  # which the model's own call has left
            return self.fused_head.cross_entropy(logits, self.targets, label_smoothing)

    def _untouched(self, model: nn.Module) -> Iterator[torch.Tensor]:
        """Trainable parameters that a pass in this mode, on this batch, leaves out of the graph."""
        if self.isolator is not None:
            yield self.isolator()  # by its call, which gathers shards
        yield from (p for p in self.pruner.parameters() if p.requires_grad)
        if self.fused_head is not None and self.fused_head.fuses:
            yield from self.fused_head.parameters()
        if self._adapters and self.mode == SLOW:
            reserved = set(self._adapters[FAST]) - set(self._adapters[SLOW])
            names = tuple(f".{adapter}." for adapter in reserved)
            yield from (p for n, p in model.named_parameters() if p.requires_grad and any(a in n for a in names))
        if any(not modalities & self._seen for modalities in self._sharing):  # of some tower, none was in the batch
            outer = unwrap(model)
            language = {id(p) for part in language_parts(outer) for p in part.parameters()}
            visual = (p for p in outer.parameters() if p.requires_grad and id(p) not in language)
            yield from (p for p in visual if not isinstance(p, DTensor))  # shards of FSDP are not whole here
