"""Batches of samples of similar length: the length after pruning in fast steps, the full length in slow steps.

After pruning, a sample is mostly text, whose lengths vary far more than those of whole samples. So padding takes a
large share of a random batch. Shapes: N samples of the data set, n_i samples of step i.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from accelerate.utils import broadcast_object_list
from torch.utils.data import Sampler, SequentialSampler
from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from ..data.lengths import REMEDY, SampleLengths, TokenCounter, given_lengths, measured_lengths, visual_name
from ..utils.devices import others_wait
from .schedule import FAST, SLOW

MEGABATCH = 50  # steps, as in transformers' grouping; at most a fourth of an epoch, so that the order stays random


class ModeLengthSampler(Sampler[int]):
    """Gives each optimizer step samples of about the same length in that step's mode.

    Samples are permuted at random and divided into blocks of about 50 steps. In a block, slow steps get a random subset
    and fast steps the rest. Each is sorted by the length in its mode and split into batches, which go to random steps
    of that mode. Each sample comes once per epoch. Within a step, samples are sorted from long to short: the rows of a
    micro-batch, and the micro-batches that ranks run at the same time, are of similar length. When training begins, the
    longest batch of each mode comes first, so memory runs out early if it does.

    The order is a function of the seed and of the step at which an epoch begins: the same on every rank, and after
    resuming.

    Args:
        lengths (`dict[str, torch.LongTensor]`): the lengths `(N,)` by mode, "fast" and "slow".
        step_size (`int`): samples of an optimizer step, over all micro-batches and ranks.
        mode_at (`Callable[[int], str]`): the mode of an optimizer step, counted from 0 over all epochs.
        used (`int`, *optional*): samples that an epoch trains on, N by default; the others, drawn again in each epoch,
            come last, to be dropped.
        first_step (`Callable[[], int]`, *optional*): the step at which the epoch begins, asked at that time.
        seed (`int`): of the permutations.
    """

    def __init__(
        self,
        lengths: dict[str, torch.Tensor],
        step_size: int,
        mode_at: Callable[[int], str],
        used: int | None = None,
        first_step: Callable[[], int] = lambda: 0,
        seed: int = 0,
    ):
        self.lengths = lengths
        self.step_size = step_size
        self.mode_at = mode_at
        self.used = len(self) if used is None else used
        self.first_step = first_step
        self.seed = seed

    def __len__(self) -> int:
        return len(self.lengths[FAST])

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, an incomplete last one included."""
        return -(-self.used // self.step_size)

    def __iter__(self) -> Iterator[int]:
        # Batches in order, then the samples to be dropped.
        batches, left = self.plan(self.first_step())
        return iter([index for batch in [*batches, left] for index in batch])

    def plan(self, first: int) -> tuple[list[list[int]], list[int]]:
        """The samples of each step of the epoch that begins with step `first`, and those left out."""
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed}:{first}").getrandbits(63))
        # Random order of all samples, (N,), in chunks of one step, and the mode of each step.
        order = torch.randperm(len(self), generator=generator)
        chunks = order[: self.used].split(self.step_size) if self.used else ()
        modes = [self.mode_at(first + step) for step in range(len(chunks))]
        # Group by length within blocks of steps.
        together = max(1, min(MEGABATCH, len(chunks) // 4))
        batches = []
        for begin in range(0, len(chunks), together):
            taken = slice(begin, begin + together)
            batches += grouped(chunks[taken], modes[taken], self.lengths, generator)
        if first == 0:
            self._longest_first(batches, modes)
        return batches, order[self.used :].tolist()

    def _longest_first(self, batches: list[list[int]], modes: list[str]) -> None:
        for mode, lengths in self.lengths.items():
            # Swap the first complete batch of the mode with its longest one; each batch begins with its longest sample.
            whole = [s for s, batch in enumerate(batches) if modes[s] == mode and len(batch) == self.step_size]
            if whole:
                longest = max(whole, key=lambda step: lengths[batches[step][0]].item())
                batches[whole[0]], batches[longest] = batches[longest], batches[whole[0]]


def grouped(
    chunks: tuple[torch.Tensor, ...], modes: list[str], lengths: dict[str, torch.Tensor], generator: torch.Generator
) -> list[list[int]]:
    """The samples of some steps, grouped by their length in the mode of each step.

    Args:
        chunks (`tuple[torch.LongTensor]`): samples in random order, `(n_i,)` for step i.
        modes (`list[str]`): the mode of each step.
        lengths (`dict[str, torch.LongTensor]`): the lengths `(N,)` of all samples by mode.
        generator (`torch.Generator`): draws which step gets which batch.

    Returns:
        The samples of each step, n_i of them, longest first.
    """
    batches: list[list[int]] = [[] for _ in chunks]
    for mode in (SLOW, FAST):
        steps = [step for step in range(len(chunks)) if modes[step] == mode]
        if not steps:
            continue
        # The samples of all steps of a mode, (sum n_i,), longest first.
        pool = torch.cat([chunks[step] for step in steps])
        pool = pool[lengths[mode][pool].argsort(descending=True, stable=True)]
        # Consecutive samples form a batch, which goes to a random step of the mode.
        steps = [steps[i] for i in torch.randperm(len(steps), generator=generator)]
        for step, batch in zip(steps, pool.split([len(chunks[step]) for step in steps]), strict=True):
            batches[step] = batch.tolist()
    return batches


class EpochBegin(TrainerCallback):
    """Records the optimizer step at which the running epoch's order of samples begins."""

    def __init__(self):
        self._step, self._resumed = 0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self._resumed = not args.ignore_data_skip
        self._step = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # The first epoch may continue an earlier one: the Trainer then skips the samples that were trained on.
        self._resumed = self._resumed and self._step is None
        self._step = state.global_step

    def step(self, steps_per_epoch: int) -> int:
        """The step, for epochs of `steps_per_epoch` steps."""
        step = self._step or 0
        return step - step % steps_per_epoch if self._resumed and steps_per_epoch else step


class LengthGroupingMixin:
    """`train_sampling_strategy="group_by_length"` of a DualSpeed trainer, by [`ModeLengthSampler`].

    Lengths come from two columns of the data set: `args.length_column_name` (all tokens, visual ones included) and the
    same name with the prefix `visual_` (a list of the visual tokens of each image). Without them, they are counted when
    training starts. If the pruning ratio changes over training, the final one is used. Evaluation goes through its data
    in order.
    """

    def _begin_length_grouping(self) -> None:
        self._epoch_begin = EpochBegin()
        self._lengths: tuple[object, SampleLengths] | None = None

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        dataset = self.train_dataset  # it has all columns; `train_dataset` may have lost some
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        # Samples of a micro-batch over all ranks.
        together = self.samples_of_step // self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = ModeLengthSampler(
            self._lengths_by_mode(self._sample_lengths(dataset)),
            self.samples_of_step,
            self.mode_at,
            len(dataset) - (len(dataset) % together if self.args.dataloader_drop_last else 0),
            lambda: self._epoch_begin.step(sampler.steps_per_epoch),
            seed,
        )
        return sampler

    def _get_eval_sampler(self, eval_dataset) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _check_images(self, lengths: SampleLengths) -> None:
        """Raises a `ValueError` if parameters are sharded and grouping would put samples without images together."""
        without = 0 if lengths.visual is None else sum(not any(units) for units in lengths.visual)
        if self.parameters_are_sharded and 0 < without < len(lengths):
            raise ValueError(
                f"`train_sampling_strategy` is 'group_by_length', which puts the {without} samples without an image "
                "together, but under FSDP and ZeRO-3 each micro-batch needs one, since all ranks gather the vision "
                "tower together. Leave these samples out, or set train_sampling_strategy='random'."
            )

    def _lengths_by_mode(self, lengths: SampleLengths) -> dict[str, torch.Tensor]:
        # A pruner inside the language model does not shorten its input.
        ratio = 0.0 if self._pruner.in_language_model else self._pruner.config.pruning_ratio
        return {FAST: lengths.pruned(ratio, self.args.isolator_length), SLOW: lengths.full}

    def _sample_lengths(self, dataset) -> SampleLengths:
        """The lengths of a data set, counted once.

        Raises:
            ValueError: the columns hold no lengths, or there are none and counting fails.
        """
        if self._lengths is not None and self._lengths[0] is dataset:
            return self._lengths[1]
        column = self.args.length_column_name
        lengths = given_lengths(dataset, column)
        if lengths is None:
            lengths = self._counted_once(dataset)
        if isinstance(lengths, Exception):
            remedy = REMEDY.format(column=column, visual=visual_name(column))
            raise ValueError(
                "`train_sampling_strategy` is 'group_by_length', but the lengths of the samples cannot be counted: "
                f"{lengths} {remedy}"
            ) from lengths
        self._check_images(lengths)
        self._lengths = (dataset, lengths)
        return lengths

    def _counted_once(self, dataset) -> SampleLengths | Exception:
        """Counts the lengths in the first process and sends them, or the error, to all processes."""
        found: list[SampleLengths | Exception | None] = [None]
        # Only the first process reads the data.
        with others_wait():
            if self.args.process_index == 0:
                try:
                    found = [self._count_lengths(dataset)]
                except (ValueError, TypeError) as error:
                    found = [error]
        return broadcast_object_list(found)[0]

    def _count_lengths(self, dataset) -> SampleLengths:
        processor = getattr(self, "processing_class", None)
        counter = TokenCounter(self.given_collator, processor, self.dual_forward.interface.visual_token_ids)
        return measured_lengths(dataset, counter, self.args.dataloader_num_workers or None)
