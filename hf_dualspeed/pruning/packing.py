"""Batches without padding: several samples in a row, separated by position ids that restart.

Such a batch comes from the data collator, or is made of a padded one while it is shortened (`padding_free`).

transformers detects such a batch by its rule: no attention mask, and a new sample wherever the position does not grow
by one. Kept tokens with their original positions leave gaps, which the rule would take for boundaries. So boundaries
are found before shortening and passed on.

Shapes: B batch, S sequence, S' shortened sequence, C samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.masking_utils import create_causal_mask

from ..models.interface import ModelInterface
from .sample_rows import SEPARABLE, SampleRows, layer_kinds
from .shortening import Shortening

# Kinds of layers that see the tokens nearby alone, and the option that says how far.
LOCAL = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class Packing:
    """The sample of each token of a packed batch.

    Args:
        interface (`ModelInterface`): of the model.
        sample (`torch.LongTensor` of shape `(B, S)`): 0, 1, ... in each row.
        samples (`int`, *optional*): C, if the batch gives it.
    """

    interface: ModelInterface
    sample: torch.Tensor
    samples: int | None

    @classmethod
    def of(cls, interface: ModelInterface, inputs: Mapping) -> Packing | None:
        """The packing of a batch; None if the batch has a mask, or no position ids of its own."""
        if not is_packed(inputs):
            return None
        positions = inputs["position_ids"]
        # Text positions, (B, S), which M-RoPE has before its axes. A sample begins where they do not grow by one.
        positions = positions[0] if positions.dim() == 3 else positions
        restarts = torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1
        # Number of samples, if the batch gives boundaries; sample of each token, (B, S).
        boundaries = inputs.get("cu_seq_lens_q")
        samples = None if boundaries is None else boundaries.numel() - 1
        return cls(interface, restarts.long().cumsum(-1), samples)

    @classmethod
    def of_rows(cls, interface: ModelInterface, ids: torch.Tensor) -> Packing:
        """The packing of a padded batch `(B, S)` whose rows are laid end to end."""
        sample = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
        return cls(interface, sample, len(ids))

    def begins(self, plan: Shortening) -> torch.Tensor:
        """Whether a token is the first of its sample in the shortened batch, `(B, S')`."""
        # Sample of each kept token, (B, S'), -1 on padding.
        sample = plan.apply(self.sample, -1)
        return torch.diff(sample, dim=1, prepend=sample[:, :1] - 1) != 0

    def restarted(self, plan: Shortening) -> torch.Tensor:
        """Positions `(B, S')` that restart in each sample and have no gaps."""
        # Distance to the last position where the sample changed.
        begins = self.begins(plan)
        index = torch.arange(begins.shape[1], device=begins.device).expand_as(begins)
        return index - torch.where(begins, index, 0).cummax(1).values

    def shortened(self, plan: Shortening, scheme: str, inputs: Mapping) -> dict:
        """Arguments that keep the samples of the shortened batch separate: lengths for FlashAttention, a mask for
        others.

        Raises:
            ValueError: the model's attention cannot separate the samples.
        """
        config = self.interface.text_config
        flash = is_flash(config)
        self._check_attention(inputs, flash)
        # FlashAttention needs boundaries only.
        packed = {"attention_mask": None}
        if flash or "cu_seq_lens_q" in inputs:
            packed |= self.varlen(plan)
        if flash:
            return packed
        # Causal mask that separates samples by restarting positions, (B, 1, S', S'), for layers that see all of them.
        reach = shortest_reach(config, plan.source.shape[1])
        if reach is None:
            packed["attention_mask"] = create_causal_mask(
                config=config,
                inputs_embeds=torch.empty(
                    *plan.source.shape, 1, dtype=self.interface.outer.dtype, device=plan.source.device
                ),
                attention_mask=None,
                past_key_values=None,
                position_ids=self.restarted(plan),
            )
        elif scheme == "original":
            raise ValueError(
                f"Packed samples and layers that see {reach} tokens ({' or '.join(LOCAL.values())}) need "
                "position_ids='compact': with 'original' no mask can say both. Set position_ids='compact', or pad the "
                "batch (padding_free=False)."
            )
        else:  # transformers finds the boundaries in restarting positions, but not while it fills a cache
            packed["use_cache"] = False
        return packed

    def varlen(self, plan: Shortening) -> dict:
        """FlashAttention's boundaries of a row. One host synchronisation if the batch has no boundaries of its own."""
        if len(plan.source) != 1:
            raise ValueError(
                f"FlashAttention takes packed samples in one row, got {len(self.sample)} rows with restarting "
                "`position_ids` and no attention mask. Flatten the batch into one row."
            )
        # Sample of each kept token, (S',), in ascending order.
        sample = plan.apply(self.sample, -1)[0]
        samples = int(self.sample.amax()) + 1 if self.samples is None else self.samples
        # Number of tokens of earlier samples, (C + 1,).
        ends = torch.searchsorted(sample, torch.arange(samples + 1, device=sample.device)).int()
        return varlen(ends, plan.longest)

    def _check_attention(self, inputs: Mapping, flash: bool) -> None:
        """Refuses what mixes packed samples in transformers itself."""
        foreign = layer_kinds(self.interface.text_config) - SEPARABLE - set(LOCAL)
        kinds = [f"layers of kind {kind!r}" for kind in sorted(foreign)]
        # Types of tokens say which images see themselves, except where they only number positions (M-RoPE).
        types = ("token_type_ids", *(() if self.interface.positions_owner is not None else ("mm_token_type_ids",)))
        read = [name for name in types if inputs.get(name) is not None and name in self.interface.forward.names]
        if not flash:  # which is causal whatever the types say
            kinds += [f"attention that depends on `{name}`" for name in read]
        if kinds:
            raise ValueError(
                f"Packed samples and {', '.join(kinds)} do not go together: transformers itself lets such samples see "
                "each other. Pad the batch instead of packing it (padding_free=False)."
            )


def shortest_reach(config, length: int) -> int | None:
    """How many tokens the layers of a language model see that see the fewest, if a row of `length` tokens is longer."""
    kinds = layer_kinds(config) or set(LOCAL)  # without kinds, all layers follow the option
    reaches = [getattr(config, option, None) for kind, option in LOCAL.items() if kind in kinds]
    return min((reach for reach in reaches if reach and reach < length), default=None)


def is_packed(inputs: Mapping) -> bool:
    """Whether rows hold several samples: the batch has position ids of its own, and no mask.

    M-RoPE then has text positions before its three axes.
    """
    positions = inputs.get("position_ids")
    if positions is None or inputs.get("attention_mask") is not None:
        return False
    # (B, S), or (4, B, S): text positions and the axes of M-RoPE.
    return positions.dim() != 3 or len(positions) == 4


def one_sample(interface: ModelInterface, tokens: torch.Tensor) -> dict:
    """Declares `tokens` `(B, S, ...)` of one row as one sample for FlashAttention.

    From position ids alone, FlashAttention would take each isolator token at the start of a sequence for a sample,
    because all of them have the first position, and begin another one at each gap between original positions.
    """
    if len(tokens) != 1 or not is_flash(interface.text_config):
        return {}
    length = tokens.shape[1]
    return varlen(torch.tensor([0, length], dtype=torch.int32).to(tokens.device, non_blocking=True), length)


def separate_rows(interface: ModelInterface, plan: Shortening) -> SampleRows | None:
    """The rows in which attention sees the samples of one row; None where the kernel keeps them apart by itself."""
    kernel = interface.text_config._attn_implementation or ""
    if is_flash(interface.text_config) or "flex" in kernel:
        return None
    return SampleRows.of(plan.lengths, plan.longest, plan.source.shape[1])


def is_flash(config) -> bool:
    """Whether the language model runs FlashAttention, of any version or kernel."""
    return "flash" in (config._attn_implementation or "")


def varlen(ends: torch.Tensor, length: int) -> dict:
    """The arguments of FlashAttention for samples with boundaries `ends` `(C + 1,)`, none longer than `length`."""
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
