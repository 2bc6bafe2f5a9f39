"""Measures what steps hold, by running a few before the first one. Nothing that is trained changes by it.

The steps are the trainer's own, fast and slow, forward and backward, on the longest of some samples, collated as in
training. Gradients exist beforehand, as in gradient accumulation; the optimizer's state is counted, not made.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager

import datasets
import torch
from accelerate.utils import convert_outputs_to_fp32
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from ...models.interface import ModelInterface
from ...utils.memory import GIB, bytes_of, peak_memory
from ..batch_splitting import can_be_split, parts_of
from ..schedule import FAST, SLOW
from ..setup import steps_in_backward
from ..speedup import untouched
from .choice import USABLE, line

# Samples, evenly spread over the data set, among which the longest is looked for.
LOOKED_AT = 32
NO_CARD = (
    "there is no GPU whose memory could be filled. Set `memory_gib`, the GiB that weights, gradients, optimizer and "
    "activations may take"
)
# More tokens than any batch has: all parts of a slow batch are small beside them.
MANY = 2**60


def why_not_measured(trainer) -> str | None:
    """Why a micro-batch of so many samples cannot be measured before training; None if it can."""
    args, state = trainer.args, trainer.accelerator
    data = trainer.train_dataset
    if trainer.is_sharded or trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size() > 1:
        return "training is sharded, by FSDP, DeepSpeed or another parallelism, and passes of one rank cannot be run"
    if state.dispatch_batches or state.split_batches:
        name = "dispatch_batches" if state.dispatch_batches else "split_batches"
        return f"with `{name}` a batch is made for all ranks and cut into theirs"
    if data is not None and (isinstance(data, torch.utils.data.IterableDataset) or not isinstance(data, Sized)):
        return "the data set is streamed, so that it cannot be looked at ahead"
    if not type(trainer).get_train_dataloader.__module__.startswith(("hf_dualspeed.", "transformers.", "trl.")):
        return f"{type(trainer).__name__}.get_train_dataloader makes batches of its own"
    if trainer.is_model_parallel or trainer.is_distributed_loading_by_transformers:
        return "the model lies on several devices"
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    if hooked or steps_in_backward(args):  # which sets its hooks where it is made
        return f"hooks on the parameters, such as those of optim={str(args.optim)!r}, act in backward"
    if budget_of(trainer) is None:
        return NO_CARD
    return None


def budget_of(trainer) -> int | None:
    """The bytes that a step may hold on this device, weights included; None if nothing says so."""
    gib, device = trainer.args.memory_gib, trainer.args.device
    if device.type != "cuda":
        return None if gib is None else int(gib * GIB)
    free, _ = torch.cuda.mem_get_info(device)
    usable = int(USABLE * (free + torch.cuda.memory_reserved(device)))
    return usable if gib is None else min(int(gib * GIB), usable)


class Probe:
    """Steps of a trainer on batches of any size. Use it inside [`probing`].

    Args:
        trainer (`DualSpeedMixin`): before its first step.
        samples (`dict`): the sample that is repeated, by mode.
        collator (`Callable`): that of training.
        before (`int`): bytes that the device holds before gradients are made.
        optimizer (`int`): bytes of the optimizer's state.
    """

    def __init__(self, trainer, samples: dict[str, object], collator: Callable, before: int, optimizer: int):
        self.trainer, self.model, self.device = trainer, trainer.model, trainer.args.device
        self.samples, self.collator = samples, collator
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        gradients = bytes_of(self.trained)
        self.fixed = {"weights": before, "gradients": gradients, "optimizer": optimizer}
        if trainer.accelerator.num_processes > 1:
            self.fixed["buckets"] = gradients  # in which DDP exchanges them
        self.measured: dict[tuple, int | None] = {}
        config = trainer._pruner.config
        self.progress = 0.0 if config.ratio_at(0.0) == config.lowest_ratio else 1.0  # where most tokens are kept
        two = self.batch(SLOW, 2)
        self.length = two["input_ids"].shape[1]  # of the longest sample
        self.whole = len(two["input_ids"]) < 2 or trainer.args.plain_path
        self.whole = self.whole or not can_be_split(trainer.dual_forward.interface, two)
        self.fast_tokens = 0  # of a sample in a fast step
        self._peak(FAST, 1)  # warms up, and shows the head's and the pruned sample's size

    def batch(self, mode: str, rows: int) -> dict:
        """So many times the mode's longest sample, collated."""
        return self.collator([copy.copy(self.samples[mode]) for _ in range(rows)])

    def held(self, mode: str, rows: int, splits: int | str = 1) -> int | None:
        """Measures a step: bytes at its peak with weights, gradients and optimizer; None where memory runs out."""
        return self._held(mode, rows, splits if mode == SLOW else 1, rows * self.fast_tokens)

    def on_lines(self, mode: str, rows: int, splits: int | str = 1) -> int | None:
        """The same by lines through steps of one and two samples."""
        if mode == FAST:
            one, two = (self._held(FAST, size, 1, 0) for size in (1, 2))
            return None if one is None or two is None else round(line(1, one, 2, two, rows))
        parts, small = parts_of(rows, self.length, rows * self.fast_tokens, splits, self.whole)
        small = small and self.trainer.selective_checkpointing.skips
        # One sample; two, in two parts, if they can be split; two in one part.
        tokens, whole = (MANY, "auto") if small else (0, 1)
        one, both = self._held(SLOW, 1, whole, tokens), self._held(SLOW, 2, whole, tokens)
        apart = both if self.whole else self._held(SLOW, 2, 2, tokens)
        if one is None or both is None or apart is None:
            return None
        largest_part = rows if self.whole else math.ceil(rows / parts)
        return one + (apart - one) * (rows - 1) + (both - apart) * (largest_part - 1)

    def _held(self, mode: str, rows: int, splits: int | str, fast_tokens: int) -> int | None:
        key = (mode, rows, splits, fast_tokens)
        if key not in self.measured:
            self.trainer.args.slow_mode_splits, self.trainer.clock.fast_tokens = splits, fast_tokens
            peak = self._peak(mode, rows)
            self.measured[key] = None if peak is None else sum(self.fixed.values()) + peak
        return self.measured[key]

    def _peak(self, mode: str, rows: int) -> int | None:
        """Bytes of the inputs and at the peak of a step; None where memory runs out."""
        try:
            inputs = self.trainer._prepare_inputs(dict(self.batch(mode, rows)))
            tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
            for parameter in self.trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            known = [*self.model.parameters(), *self.model.buffers(), *(p.grad for p in self.trained), *tensors]
            return bytes_of(tensors) + peak_memory(lambda: self._run(mode, inputs), known)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
        # Outside of `except`, because the error keeps the failed attempt's tensors alive.
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        return None

    def _run(self, mode: str, inputs: dict) -> None:
        trainer = self.trainer
        inputs = trainer._prepare_inputs(dict(inputs))
        items = (inputs["labels"] != -100).sum()
        _, done = trainer.step_in_mode(mode, self.model, inputs, items, progress=self.progress)
        if not self.fast_tokens:
            self.fast_tokens = done.tokens


@contextmanager
def probing(trainer, given: tuple[dict, Callable] | None = None) -> Iterator[Probe]:
    """Steps before the first one, after which the trainer is as it was: weights, buffers, random states and all.

    Args:
        given (`tuple`, *optional*): a sample for each mode, and the collator, in place of those of the training data.
    """
    model, args, clock, selective = trainer.model, trainer.args, trainer.clock, trainer.selective_checkpointing
    kept = [(args, "slow_mode_splits"), (clock, "fast_tokens"), (selective, "always"), (selective, "_checkpointed")]
    kept += [(trainer, name) for name in ("_micro", "_items", "is_in_train", "current_gradient_accumulation_steps")]
    kept.append((trainer.dual_forward, "trained"))
    head = trainer.dual_forward.fused_head
    kept += [(head, name) for name in ("applies", "fuses")] if head is not None else []
    before = [(owner, name, vars(owner)[name]) for owner, name in kept if name in vars(owner)]
    ratio, optimizer = trainer._pruner.config.pruning_ratio, optimizer_bytes(trainer)
    try:
        with untouched(trainer), in_precision(trainer), torch.compiler.set_stance(stance_of(model, args.device)):
            model.zero_grad()
            gc.collect()
            parts = [*model.parameters(), *model.buffers()]
            held = torch.cuda.memory_allocated(args.device) if args.device.type == "cuda" else bytes_of(parts)
            if args.min_pruning_ratio is not None and args.mode_schedule == "adaptive":
                trainer._pruner.reconfigure(pruning_ratio=args.min_pruning_ratio)
            # Not the first micro-batch of its step: one that runs out of memory is not tried again.
            trainer._micro, trainer.is_in_train, trainer.current_gradient_accumulation_steps = (0, 1), False, 1
            selective.on_train_begin(args, trainer.state, trainer.control, model=model)
            yield Probe(trainer, *(given or samples_of(trainer)), held, optimizer)
    finally:
        trainer._pruner.reconfigure(pruning_ratio=ratio)
        for owner, name, value in before:
            setattr(owner, name, value)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def stance_of(model: nn.Module, device: torch.device) -> str:
    """How compiled code runs while steps are measured: eagerly, so that no size is compiled.

    FlexAttention on a GPU stays compiled, and layers with it: eagerly, it would hold the scores of all pairs of tokens.
    """
    kernels = (getattr(getattr(part, "config", None), "_attn_implementation", None) for part in model.modules())
    return "default" if device.type == "cuda" and any("flex" in (kernel or "") for kernel in kernels) else "force_eager"


@contextmanager
def in_precision(trainer) -> Iterator[None]:
    """The model's forward in the precision of training, as accelerate wraps it once training begins."""
    model, accelerator = trainer.model, trainer.accelerator
    if not accelerator.native_amp or "_original_forward" in vars(model):
        yield
        return
    own = vars(model).get("forward")
    model.forward = convert_outputs_to_fp32(accelerator.autocast()(model.forward))
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def samples_of(trainer):
    """The longest sample by mode, and the collator of training.

    Where the lengths of all samples are known, those of the data set; else of some that are evenly spread over it.
    """
    dataset, collator = trainer.train_dataset, trainer.data_collator
    if trainer.args.train_sampling_strategy == "group_by_length":
        lengths = trainer._lengths_by_mode(trainer._sample_lengths(dataset))
        places = {mode: lengths[mode].argmax().item() for mode in (FAST, SLOW)}
    if isinstance(dataset, datasets.Dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collator = trainer._get_collator_with_removed_columns(collator, description="training")
    if trainer.args.train_sampling_strategy == "group_by_length":
        return {mode: dataset[place] for mode, place in places.items()}, collator
    count = min(LOOKED_AT, len(dataset))
    found = [dataset[len(dataset) * number // count] for number in range(count)]
    sizes = [tokens_of(collator([copy.copy(sample)]), trainer) for sample in found]
    return {mode: found[max(range(count), key=lambda place: sizes[place][mode])] for mode in (FAST, SLOW)}, collator


def tokens_of(batch: Mapping, trainer) -> dict[str, float]:
    """About how many tokens a collated sample has in a step of each mode."""
    interface: ModelInterface = trainer.dual_forward.interface
    # Ids (1, S), and the placeholders among them.
    ids = batch["input_ids"]
    visual = torch.isin(ids, torch.tensor(sorted(interface.visual_token_ids), device=ids.device)).sum().item()
    return {FAST: ids.numel() - trainer._pruner.config.lowest_ratio * visual, SLOW: ids.numel()}


def optimizer_bytes(trainer) -> int:
    """The bytes of the optimizer's state that is still to be made, from a step on parameters without data; AdamW's two
    moments if there can be none."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    made = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate's stands around it
    if made is not None and made.state:  # an earlier call of `train`
        state = [leaf for leaf in tree_leaves(list(made.state.values())) if isinstance(leaf, torch.Tensor)]
        return 0 if trainer.args.device.type == "cuda" else bytes_of(state)  # the allocator has counted it
    try:
        if made is not None:
            kind, options = type(made), made.defaults
        else:
            given = trainer.optimizer_cls_and_kwargs
            kind, options = given or Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
            options = {key: value for key, value in options.items() if key not in ("params", "model", "optimizer_dict")}
        return state_bytes(kind, options, trained)
    except Exception:  # kernels that take no tensors without data, or options that are made for these parameters
        return 2 * bytes_of(trained)


def state_bytes(kind: type[torch.optim.Optimizer], options: dict, trained: list[nn.Parameter]) -> int:
    """The bytes of an optimizer's state after a step."""
    with FakeTensorMode():
        parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in trained]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = kind(parameters, **options)
        optimizer.step()
        states = tree_leaves([list(state.values()) for state in optimizer.state.values()])
        return bytes_of(leaf for leaf in states if isinstance(leaf, torch.Tensor))
