"""The model's forward in fast or slow mode, by hooks on the model that the trainer receives.

The hooks sit on the outermost model, so encoding, pruning and the teacher run inside the call that DDP, FSDP2 and
DeepSpeed wrap. Shapes: B batch, S sequence (shortened in fast passes), M supervised positions, V vocabulary, D hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.profiler import record_function
from transformers.utils import ModelOutput

from ..models.adapters import active_adapters
from ..models.components import language_parts
from ..models.interface import ModelInterface, modalities_in
from ..pruners import Pruner
from ..pruning.decoder import LayerPass
from ..pruning.encoding import VisualEncoding, encode
from ..pruning.inputs import check_inputs, check_pruner, shorten_inputs, whole_inputs
from ..pruning.isolator import ModeIsolator
from ..pruning.proportional_attention import KeySizes, key_sizes_of
from ..pruning.repeats import Repeats
from ..pruning.sample_rows import check_padding_free
from .batch_splitting import BatchParts
from .fused_loss import FusedHead
from .losses import supervised_cross_entropy
from .schedule import FAST, SLOW

NAME = "dualspeed"
# Where the model inside PEFT's wrapper keeps it, which stays when adapters are merged, or made.
LATEST = "_latest_dualspeed"
# The plain model on all tokens, with its head at supervised positions only.
EVALUATION = "evaluation"


@dataclass
class DualSpeedOutput(ModelOutput):
    """The model's output in a mode.

    Args:
        loss (`torch.Tensor` of no dimensions): that of the trainer in this mode, with all that belongs to it, and in
            evaluation the mean cross-entropy. Without a trainer, a zero that depends on trainable parameters that the
            logits do not depend on, and None in evaluation.
        logits (`torch.Tensor` of shape `(M, V)`): at the supervised positions; hidden states `(M, D)` if the fused head
            returns them. [`DualForward.cross_entropy`] takes either.
        targets (`torch.LongTensor` of shape `(M,)`): their labels.
        teacher_logits (`torch.Tensor` of shape `(M, V)`, *optional*): those of the pruned view, in slow mode with
            distillation; in training mode, with dropout, as in the paper.
        auxiliary_loss (`torch.Tensor` of no dimensions, *optional*): what a learned pruner adds in fast mode.
        router_loss (`torch.Tensor` of no dimensions, *optional*): the model's own loss that balances its experts, with
            its own weight (`router_aux_loss_coef`), if its config asks for router logits; a share of each part.
        hidden (`bool`): whether `logits` are hidden states, which the fused head has still to multiply.
        part (`int`): number of this part of the batch, from 0.
        again (`bool`): whether the model was called for this batch before, by a loss that calls it several times.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    hidden: bool | None = None
    part: int | None = None
    again: bool | None = None


@dataclass
class PassState:
    """A micro-batch in a mode: what was requested, and the results of its calls so far.

    Args:
        mode (`str`): "fast", "slow" or "evaluation".
        distil (`bool`): whether the pruned view teaches.
        generator (`torch.Generator`, *optional*): for pruners that sample.
        parts (`int`): number of parts of the batch; each call runs one.
        progress (`float`): fraction of the training that is done, for a pruning ratio that changes.
        served (`Callable`, *optional*): images are encoded inside `served(tower)`.
        repeats (`Repeats`, *optional*): images that are the same, which are encoded once.
        tokens (`int`): tokens of the language model's last call, padding included.
        visual_tokens (`tuple[int, int]`): of a fast pass, before and after pruning; counted without waiting for the
            device.
        lengths (`dict[str, list[int]]`): tokens of each unit by modality, where they were encoded here.
        reached (`bool`): whether backward has come through the `loss` of a call.
    """

    mode: str
    distil: bool = False
    generator: torch.Generator | None = None
    parts: int = 1
    progress: float = 1.0
    served: Callable[[nn.Module], AbstractContextManager] | None = None
    repeats: Repeats | None = None
    tokens: int = 0
    visual_tokens: tuple[int, int] = (0, 0)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    reached: bool = False
    # State of the batch, over all its parts.
    batch: BatchParts | None = None
    part: int = -1
    # State of the current call, for the hook after it and for layers that backward recomputes.
    modalities: set[str] = field(default_factory=set)
    supervised: torch.Tensor | None = None  # (B, S), True if the next token has a label
    targets: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None
    auxiliary_loss: torch.Tensor | None = None
    zero: torch.Tensor | None = None  # depends on parameters that the pass may not use; made early under DeepSpeed
    layers: LayerPass | None = None
    key_sizes: KeySizes | None = None
    model: weakref.ref | None = None  # a plain reference would make the model its own submodule


class DualForward(nn.Module):
    """The trainable parts of the fast view, and the hooks that run a call of the model in a mode.

    It is registered as `model.dualspeed`, so optimizer, gradient clipping and sharding see its parameters.
    `save_pretrained` leaves them out of the checkpoint. Inside [`in_mode`] the model returns a [`DualSpeedOutput`];
    outside it runs as usual.
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
        padding_free: bool = False,
        length_multiple: int = 1,
    ):
        super().__init__()
        self.pruner = pruner
        self.isolator = isolator
        self.position_ids = position_ids
        self.video_budget = video_budget
        self.supervised_logits_only = supervised_logits_only
        self.plain = plain  # `DualSpeedArguments.plain_path`
        if plain:
            pruner.plain_path = True
        self.proportional_attention = proportional_attention
        self.padding_free = padding_free
        self.length_multiple = length_multiple
        self.trained = False  # in fast passes, here or in the one whose weights it has
        self.offloads = False  # whether each call runs inside TRL's offloading of activations, until its backward
        self._handles: list = []
        self._adapters: dict[str, list[str]] = {}
        self._in_order = False
        self._pass: PassState | None = None
        self.run_as_trained(nullcontext, None)

    def run_as_trained(
        self,
        autocast: Callable[[], AbstractContextManager],
        fused_head: FusedHead | None,
        sharded: bool = True,
        loss_of: Callable[[DualSpeedOutput], torch.Tensor] | None = None,
    ) -> None:
        """Sets what is known once the accelerator exists.

        Args:
            autocast (`Callable`): the precision of training.
            fused_head (`FusedHead`, *optional*): the head of training.
            sharded (`bool`): whether ranks exchange gradients of shards, or it is not known. Then each trainable
                parameter gets one in each pass, of zeros where a batch does not reach it.
            loss_of (`Callable`, *optional*): the trainer's loss of an output.
        """
        self.autocast, self.fused_head, self.sharded, self.loss_of = autocast, fused_head, sharded, loss_of

    def tower_runs(self, inputs: Mapping) -> list[int]:
        """How often a pass over a batch runs each tower: once for each modality."""
        present = modalities_in(inputs)
        return [len(modalities & present) for modalities in self._sharing]

    @property
    def mode(self) -> str | None:
        """The mode of the current pass, or None."""
        return None if self._pass is None else self._pass.mode

    def __getstate__(self) -> dict:
        """The state of copies and pickles, which are not in the middle of a pass and belong to no trainer."""
        left_out = ("autocast", "fused_head", "sharded", "loss_of", "_pass")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._pass = None
        self.run_as_trained(nullcontext, None)

    # --- attach to a model ----------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> None:
        """Attaches this to `model`, in place of an earlier one."""
        self.interface = ModelInterface(model)
        check_pruner(self.interface, self.pruner)
        if self.padding_free:
            check_padding_free(self.interface, self.pruner)
        earlier = earlier_fast_view(model)
        if earlier is not None:
            earlier.detach()
            earlier.release_adapters(model)
            for module in (model, self.interface.outer):  # it may have been wrapped in PEFT since
                module._modules.pop(NAME, None)
        model.add_module(NAME, self)
        self.interface.outer.__dict__[LATEST] = self  # no submodule
        # Checkpoints of the model leave out these weights.
        ours = {f"{NAME}.{key}" for key in self.state_dict()}
        model._keys_to_ignore_on_save = {*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *ours}
        # A mask of positions on the inputs' device cannot choose from hidden states on another one.
        apart = lies_apart(self.interface.outer)
        self.slices_logits = self.supervised_logits_only and self.interface.slices_logits and not apart
        # Modalities that share a tower.
        tower_of = {name: id(tower) for name, tower in self.interface.towers().items()}
        distinct = dict.fromkeys(tower_of.values())  # in one order on all ranks
        self._sharing = [{name for name, tower in tower_of.items() if tower == own} for own in distinct]
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def release_adapters(self, model: nn.Module) -> None:
        """Makes those that were reserved for the fast view active again, if PEFT calls them so."""
        if self._adapters and hasattr(model, "peft_config"):
            self._adapters[FAST] = active_adapters(model)
            self._activate(model, FAST)

    def enter_last(self, model: nn.Module) -> None:
        """Runs the hook before the forward behind DeepSpeed's, which were added later and begin a pass of ZeRO-3.

        From then on ZeRO-3 gathers the fast view's parameters for the whole pass. ZeRO-1 and 2 add up the gradients of
        all ranks in the order in which they come, so it becomes the same whatever a rank's batch holds.
        """
        self._in_order = True
        self._handles[0].remove()
        self._handles[0] = model.register_forward_pre_hook(self._before, with_kwargs=True)
        partitioned = [parameter for parameter in self.parameters() if hasattr(parameter, "ds_id")]
        if partitioned:
            from deepspeed import zero

            for parameter in partitioned:
                zero.register_external_parameter(model, parameter)

    def reserve_adapters(self, model: nn.Module, fast_only: set[str]) -> None:
        """Reserves PEFT adapters for the fast view if all of their trainable parameters are in `fast_only`.

        Raises:
            ValueError: such an adapter would not be trained as a whole, or not be saved.
        """
        if not hasattr(model, "peft_config"):
            return
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        active = active_adapters(model)
        # Trainable parameters of each adapter; one whose parameters are all fast-only is reserved.
        owned = {a: [name for name in trainable if f".{a}." in f"{name}."] for a in active}
        reserved = {a for a, names in owned.items() if names and fast_only.issuperset(names)}
        if reserved:
            self._check_reserved(model, {name: a for a in sorted(reserved) for name in owned[a]})
            self._adapters = {FAST: active, SLOW: [a for a in active if a not in reserved]}
            self._activate(model, SLOW)

    def _check_reserved(self, model: nn.Module, owners: dict[str, str]) -> None:
        """Raises a `ValueError` if the fast view alone cannot use the adapters that own parameters, by their names."""
        visual = {id(p) for p in visual_parameters(self.interface.outer)}
        for name, adapter in owners.items():
            reason = None
            if id(model.get_parameter(name)) in visual:
                reason = (
                    f"holds {name}, and images are encoded without it, for both views at once. Keep it to the language "
                    "model (target_modules, exclude_modules)"
                )
            elif not hasattr(model, "get_base_model"):
                reason = (
                    "was made by transformers' `add_adapter`. It saves one adapter alone, so that checkpoints would "
                    "lack this one. Make adapters by PEFT's get_peft_model and add_adapter"
                )
            if reason is not None:
                raise ValueError(
                    f"By `fast_only_parameters`, the adapter {adapter!r} is for the fast view alone, but it {reason}, "
                    "or let both modes update it."
                )

    def _activate(self, model: nn.Module, mode: str) -> None:
        # PEFT's set_adapter would also change requires_grad, which the optimizer and DDP assume to be constant.
        for module in model.modules() if self._adapters else ():
            if isinstance(getattr(module, "_active_adapter", None), (str, list)):
                # Wrappers of `modules_to_save` know some of them, and use one.
                known = getattr(module, "_adapters", self._adapters[mode])
                module._active_adapter = [name for name in self._adapters[mode] if name in known]

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
        repeats: Repeats | None = None,
    ) -> Iterator[PassState]:
        """Calls of the model inside run in `mode`; yields the [`PassState`], whose fields the arguments are.

        Run backward inside, too, because it may recompute layers.
        """
        if not self._handles:
            raise ValueError(
                "This trainer's pruner and isolator are no longer on its model: another DualSpeedTrainer has been made "
                "for it since. Go on with that one, or make a new trainer."
            )
        self._pass = PassState(mode, distil and mode == SLOW, generator, parts, progress, served, repeats)
        try:
            yield self._pass
        finally:
            state, self._pass = self._pass, None
            self._end(state)

    def _end(self, state: PassState) -> None:
        """Restores the plain model."""
        self._close_layers(state)
        if state.key_sizes is not None:
            state.key_sizes.release(self)
        if self.fused_head is not None:
            self.fused_head.close()
        if state.model is not None:
            self._activate(state.model(), SLOW)
        # Keep the counts, free the memory.
        state.batch = state.key_sizes = state.supervised = None
        state.targets = state.teacher_logits = state.auxiliary_loss = None
        state.zero = None

    def _before(self, model: nn.Module, args: tuple, kwargs: dict):
        """The hook before the model's forward: replaces its inputs by those of the pass."""
        state = self._pass
        if state is None:
            return None
        # Encode and shorten, then take out the labels (B, S): targets (M,) at supervised positions.
        inputs = dict(kwargs) if state.mode == EVALUATION else self._inputs_in_mode(model, kwargs, state)
        inputs, state.supervised, shifted = self._supervised(inputs)
        state.targets, state.tokens = shifted[state.supervised], shifted.numel()
        # Logits are needed if a teacher's are compared with them.
        if self.fused_head is not None:
            self.fused_head.open(not state.distil)
        return (), inputs

    def _inputs_in_mode(self, model: nn.Module, kwargs: dict, state: PassState) -> dict:
        """Inputs of a training pass, encoded and shortened for its mode. Also computes the teacher's logits."""
        check_inputs(kwargs)
        if kwargs.get("labels") is None:
            raise ValueError(
                "The model was called without `labels`: the data collator returns none, or a `compute_loss` of your "
                "own takes them out. The logits of a pass are those of its supervised positions alone, so leave them "
                "in, and take the loss from super().compute_loss(...) or from the output."
            )
        state.model, state.modalities = weakref.ref(model), modalities_in(kwargs)
        state.part += 1
        if state.part >= state.parts > 1:
            raise ValueError(
                f"The model was called again for a batch whose {state.parts} parts it has run: a `compute_loss` of "
                "your own calls it more than once. Set slow_mode_splits=1, or call it once."
            )
        # Forget what the call for the previous part left.
        self._close_layers(state)
        self._sizes_of_keys(state).set(None)
        # ZeRO: before all else, so that backward comes to these last. Until then it holds back other gradients.
        if self._in_order:
            state.zero = self._zero(model, state)
        # A slow pass that does not need the encoded tokens leaves encoding to the model's own forward.
        once = state.served is not None or state.repeats is not None
        encoded_here = state.mode == FAST or state.distil or state.parts > 1 or once
        inputs, encodings = self._encoded(kwargs, state) if encoded_here else (kwargs, [])

        self._activate(model, FAST)
        # Fast: shorten. Slow: run the teacher on the shortened batch, then give the student all tokens.
        if state.mode == FAST:
            inputs = self._shortened(inputs, encodings, state)
        elif encoded_here:
            if state.distil:
                with record_function("dualspeed.teach"):
                    state.teacher_logits = self.teach(model, inputs, encodings, state)
            if not self.plain:  # the student reuses the encoding of the teacher, with gradients
                with self.autocast():
                    inputs = whole_inputs(self.interface, inputs, encodings)
        self._activate(model, state.mode)
        return inputs

    def _encoded(self, inputs: dict, state: PassState) -> tuple[dict, list[VisualEncoding]]:
        """The batch, or its next part, and its encoded tokens. All parts are encoded together, before the first."""
        if state.batch is None:
            needs = self.pruner.needs if state.mode == FAST or state.distil else frozenset()
            # What the encoder saves for backward is read with the last part. Offloading, which begins anew with each
            # part, would have forgotten it.
            kept = self.offloads and state.parts > 1
            saved = saved_tensors_hooks(unchanged, unchanged) if kept else nullcontext()
            with self.autocast(), saved, record_function("dualspeed.encode"):
                told = (state.served, self.plain, state.repeats)
                encodings = encode(self.interface, inputs, needs, self.video_budget, *told)
            state.lengths = {e.modality: e.lengths for e in encodings}
            # In parts: each call takes the next part of the encoded batch.
            if state.parts == 1:
                return inputs, encodings
            state.batch = BatchParts(self.interface, inputs, encodings, state.parts)
        return state.batch[state.part]

    def _shortened(self, inputs: dict, encodings: list[VisualEncoding], state: PassState) -> dict:
        """Inputs of the pruned view. A pruner inside the language model drops tokens until its layers are closed."""
        if self.pruner.in_language_model:
            state.layers = LayerPass(self.interface, self.pruner, self.proportional_attention, state.progress)
        with record_function("dualspeed.shorten"):
            short = shorten_inputs(
                self.interface,
                inputs,
                encodings,
                self.pruner,
                self.isolator,
                self.position_ids,
                state.generator,
                state.layers,
                state.progress,
                self.length_multiple,
                self.padding_free,
            )
        if state.mode == FAST:  # the teacher's tokens are not counted
            self.trained |= torch.is_grad_enabled()
            state.visual_tokens, state.auxiliary_loss = short.visual_tokens, short.auxiliary_loss
        # Layers add log(s) of each token, (B, S), to their attention logits, and keep the samples of a row apart.
        if self.proportional_attention or short.rows is not None:
            log_sizes = short.log_sizes if self.proportional_attention else None
            self._sizes_of_keys(state).set(log_sizes, rows=short.rows)
        if state.layers is not None:
            state.layers.open()
        return short.inputs

    def _sizes_of_keys(self, state: PassState) -> KeySizes:
        """The key sizes of the language model's layers, which this pass owns until its end."""
        if state.key_sizes is None:
            sizes = key_sizes_of(self.interface)
            sizes.take(self)  # or an error: they are another thread's
            state.key_sizes = sizes
        return state.key_sizes

    def _close_layers(self, state: PassState) -> None:
        if state.layers is not None:
            state.layers.close()
        state.layers = None

    @torch.no_grad()
    def teach(self, model: nn.Module, inputs: dict, encodings: list[VisualEncoding], state: PassState) -> torch.Tensor:
        """Logits `(M, V)` of the pruned view. Calls `model.forward`, not `model`, because hooks must not run again."""
        # The teacher runs on detached tokens and gives logits at the same M positions as the student.
        inputs = self._shortened(inputs, [e.detached() for e in encodings], state)
        inputs, supervised, _ = self._supervised(inputs)
        if self.interface.takes_router_logits:
            inputs["output_router_logits"] = False
        logits = model.forward(**inputs).logits
        self._close_layers(state)
        if state.key_sizes is not None:
            state.key_sizes.check_used()
            state.key_sizes.set(None)
        return logits if self.slices_logits else logits[supervised]

    def _supervised(self, inputs: dict) -> tuple[dict, torch.Tensor, torch.Tensor]:
        """Takes out the labels, so that the head runs at supervised positions only.

        Returns:
            `tuple[dict, torch.Tensor, torch.Tensor]`: inputs, a mask `(B, S)` of positions with a labelled next token,
            and the labels shifted by one `(B, S)`.
        """
        inputs = dict(inputs)
        # Position i predicts token i + 1: labels[i + 1], (B, S); -100 at the end, and where i is padding.
        shifted, mask = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100), inputs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # not a mask by query, nor a block mask
            shifted = shifted.masked_fill(mask == 0, -100)
        supervised = shifted != -100
        if self.slices_logits:
            inputs["logits_to_keep"] = supervised
        # A cache costs memory, and with it transformers ignores boundaries of packed samples.
        if self.interface.forward.takes_cache:
            inputs["use_cache"] = False
        return inputs, supervised, shifted

    def _after(self, model: nn.Module, args: tuple, kwargs: dict, output) -> DualSpeedOutput | None:
        """The hook after the model's forward: returns its logits with everything else that the loss needs."""
        state = self._pass
        if state is None:
            return None
        if state.key_sizes is not None:
            state.key_sizes.check_used()
        # Logits at supervised positions, (M, V), or hidden states (M, D) of a fused head.
        logits = output.logits
        if self.fused_head is not None:
            self.fused_head.after(logits)
        if not self.slices_logits:
            logits = logits[state.supervised]
        # From here on the output alone holds these, so that they are gone as soon as the loss is.
        targets, teacher, auxiliary = state.targets, state.teacher_logits, state.auxiliary_loss
        state.targets = state.teacher_logits = state.auxiliary_loss = state.supervised = None
        hidden = self.fused_head is not None and self.fused_head.fuses
        if state.mode == EVALUATION:
            return self._with_loss(DualSpeedOutput(logits=logits, targets=targets, hidden=hidden), state)
        zero = logits.new_zeros(())
        # What balances the experts is a mean over the tokens of a call: the parts' mean is the batch's.
        balance = output.get("aux_loss") if self.interface.takes_router_logits else None
        if balance is not None:
            balance = self.interface.router_weight * balance.to(logits.device) / state.parts
        # A zero that connects trainable parameters outside of the logits' graph to the loss.
        if state.batch is not None:  # the last part connects to the encoder, even without an image of its own
            zero = sum((end.flatten()[:0].sum() for end in state.batch.ends), zero)
        zero = self._zero(model, state, zero) if state.zero is None else zero + state.zero
        state.zero, again = None, state.part >= state.parts
        output = DualSpeedOutput(zero, logits, targets, teacher, auxiliary, balance, hidden, state.part, again)
        return self._with_loss(output, state)

    def _with_loss(self, output: DualSpeedOutput, state: PassState) -> DualSpeedOutput:
        """The output with the trainer's loss, in its place as the first value; notes whether backward comes to it."""
        if self.loss_of is not None:
            output = replace(output, loss=self.loss_of(output))

        def note(gradient: torch.Tensor | None) -> None:
            state.reached |= gradient is not None

        if output.loss is not None and output.loss.requires_grad:
            output.loss.register_hook(note)
        return output

    def cross_entropy(
        self, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0, hidden: bool = False
    ) -> torch.Tensor:
        """Summed cross-entropy of logits `(M, V)`, or `hidden` states `(M, D)`, against `targets` `(M,)`."""
        if not hidden:
            return supervised_cross_entropy(logits, targets, 1, label_smoothing, sliced=not self.plain)
        with self.autocast():  # the head runs outside the model's call
            return self.fused_head.cross_entropy(logits, targets, label_smoothing)

    def _zero(self, model: nn.Module, state: PassState, zero: torch.Tensor | float = 0.0) -> torch.Tensor | float:
        """`zero`, connected to the trainable parameters that this pass does not use."""
        touched, unused = list(self._touched(model, state)), list(self._unused(state))
        if self.sharded:
            touched += unused
        elif unused:
            zero = Unused.apply(zero, *unused)
        # Sums of no elements: the sum of a parameter could overflow in half precision, and inf * 0 is NaN.
        return sum((p.flatten()[:0].sum() for p in touched), zero)

    def _touched(self, model: nn.Module, state: PassState) -> Iterator[torch.Tensor]:
        """The trainable parameters of the fast view in a slow pass.

        They get a gradient of zeros, so that DDP need not ask whether any rank used them. The trainer drops it.
        """
        if state.mode == SLOW:
            yield from self._of_fast_view()
        # Adapters that only the fast view uses. Shards are not gathered here.
        if self._adapters and state.mode == SLOW:
            reserved = set(self._adapters[FAST]) - set(self._adapters[SLOW])
            names = tuple(f".{adapter}." for adapter in reserved)
            reserved = (p for n, p in model.named_parameters() if p.requires_grad and any(a in n for a in names))
            yield from (p for p in reserved if not is_shard(p))

    def _unused(self, state: PassState) -> Iterator[torch.Tensor]:
        """Trainable parameters that this batch does not reach."""
        if state.mode == FAST:  # a batch may have no images
            yield from self._of_fast_view()
        # Vision parameters, if the batch has no input for some tower. Shards are not gathered here.
        if self._in_order or any(not modalities & state.modalities for modalities in self._sharing):
            yield from (p for p in visual_parameters(self.interface.outer) if not is_shard(p))

    def drop_gradients(self) -> None:
        """Sets `.grad` of all that only images and other media reach to None."""
        for parameter in (*visual_parameters(self.interface.outer), *self.parameters()):
            parameter.grad = None

    def _of_fast_view(self) -> Iterator[torch.Tensor]:
        """The trainable parameters of isolator and pruner."""
        if self.isolator is not None:
            yield self.isolator()  # a call, because it gathers shards
        yield from (p for p in self.pruner.parameters() if p.requires_grad)


def earlier_fast_view(model: nn.Module) -> DualForward | None:
    """What was attached last to a model, whether or not it was wrapped in PEFT then or is now; None without any."""
    found = vars(ModelInterface(model).outer).get(LATEST)
    return found if isinstance(found, DualForward) else None


def lies_apart(outer: nn.Module) -> bool:
    """Whether `device_map` has spread a model's layers over several accelerators."""
    return len({*(getattr(outer, "hf_device_map", None) or {}).values()} - {"cpu", "disk"}) > 1


def visual_parameters(outer: nn.Module) -> Iterator[nn.Parameter]:
    """The trainable parameters outside of the language model: those of towers and projectors."""
    language = {id(p) for part in language_parts(outer) for p in part.parameters()}
    return (p for p in outer.parameters() if p.requires_grad and id(p) not in language)


def is_shard(parameter: nn.Parameter) -> bool:
    """Whether this process may hold no more than a shard of the parameter: under FSDP2 or ZeRO-3."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")


def unchanged(tensor: torch.Tensor) -> torch.Tensor:
    """Leaves a tensor that is saved for backward as it is."""
    return tensor


class Unused(torch.autograd.Function):
    """A zero that depends on parameters and gives them no gradient, so that `.grad` stays what it is, mostly None.

    A gradient of zeros would let weight decay and momentum move them. Backward reaches them, so that there is something
    to differentiate, and DDP, which has to find parameters that no rank used, counts them as unused.
    """

    @staticmethod
    def forward(ctx, zero: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return zero.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor):
        return upstream, *(None for _ in ctx.needs_input_grad[1:])
