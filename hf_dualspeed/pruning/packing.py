"""Batches without padding: several samples in a row, told apart by position ids that restart.

transformers reads such a batch by its rule: no attention mask, and a new sample wherever the position does not grow
by one. Kept tokens that keep their own positions leave gaps, which that rule would take for boundaries, so the
boundaries are found before shortening and handed on. Shapes: B batch, S sequence, S' shortened sequence, C samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask

from ..models.interface import unwrap
from .shortening import Shortening

# Kinds of layers that run over the whole row, whatever a mask says.
RUNNING = ("conv", "linear", "linear_attention", "mamba", "recurrent")
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


@dataclass
class Packing:
    """Which sample each token of a packed batch belongs to.

    Args:
        config: the language model's.
        dtype (`torch.dtype`): that of its hidden states.
        sample (`torch.LongTensor` of shape `(B, S)`): 0, 1, ... in each row.
        samples (`int`, *optional*): C, where the batch says it.
    """

    config: object
    dtype: torch.dtype
    sample: torch.Tensor
    samples: int | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping) -> Packing | None:
        """The packing of a batch; None for a batch that has a mask, or no position ids of its own."""
        positions = inputs.get("position_ids")
        if positions is None or inputs.get("attention_mask") is not None:
            return None
        if positions.dim() == 3:  # M-RoPE: text positions in front of the three axes, or no packing
            if len(positions) != 4:
                return None
            positions = positions[0]
        restarts = torch.diff(positions, dim=-1, prepend=positions[:, :1] - 1) != 1
        outer, boundaries = unwrap(model), inputs.get("cu_seq_lens_q")
        samples = None if boundaries is None else boundaries.numel() - 1
        return cls(outer.config.get_text_config(), outer.dtype, restarts.long().cumsum(-1), samples)

    def restarted(self, plan: Shortening) -> torch.Tensor:
        """Positions `(B, S')` that restart in each sample and have no gaps."""
        sample = plan.apply(self.sample, -1)
        index = torch.arange(sample.shape[1], device=sample.device).expand_as(sample)
        begins = torch.diff(sample, dim=1, prepend=sample[:, :1] - 1) != 0
        return index - torch.where(begins, index, 0).cummax(1).values

    def shortened(self, plan: Shortening, scheme: str, inputs: Mapping) -> dict:
        """What `forward` needs to keep the samples of the shortened batch apart: their lengths for FlashAttention, a
        mask for the others.

        Raises:
            ValueError: the model's attention cannot be told the boundaries.
        """
        flash = is_flash(self.config)
        packed = {"attention_mask": None}
        if flash or "cu_seq_lens_q" in inputs:
            packed |= self.varlen(plan)
        if flash:
            return packed
        self._check_attention(inputs)
        window = self._window(plan.source.shape[1])
        if not window:
            packed["attention_mask"] = create_causal_mask(
                config=self.config,
                inputs_embeds=torch.empty(*plan.source.shape, 1, dtype=self.dtype, device=plan.source.device),
                attention_mask=None,
                past_key_values=None,
                position_ids=self.restarted(plan),
            )
        elif scheme == "original":
            raise ValueError(
                f"Packed samples and a sliding window of {window} tokens need position_ids='compact': with 'original' "
                "no mask can say both. Set position_ids='compact', or pad the batch instead of packing it."
            )
        else:  # transformers finds the boundaries in restarting positions, but not where it fills a cache
            packed["use_cache"] = False
        return packed

    def varlen(self, plan: Shortening) -> dict:
        """FlashAttention's boundaries of a row; one host synchronisation where the batch did not bring its own."""
        if len(self.sample) != 1:
            raise ValueError(
                f"FlashAttention takes packed samples in one row, got {len(self.sample)} rows with restarting "
                "`position_ids` and no attention mask. Flatten the batch into one row."
            )
        sample = plan.apply(self.sample, -1)[0]
        samples = int(self.sample.amax()) + 1 if self.samples is None else self.samples
        # searchsorted counts the tokens of earlier samples.
        ends = torch.searchsorted(sample, torch.arange(samples + 1, device=sample.device)).int()
        return varlen(ends, len(sample))

    def _check_attention(self, inputs: Mapping) -> None:
        """Refuses what lets packed samples see each other in transformers itself."""
        layers = getattr(self.config, "layer_types", None) or getattr(self.config, "layers_block_type", None) or ()
        running = sorted({f"layers of kind {kind!r}" for kind in layers if kind in RUNNING})
        kinds = ["attention that depends on `token_type_ids`"] if inputs.get("token_type_ids") is not None else []
        if running or kinds:
            raise ValueError(
                f"Packed samples and {', '.join([*kinds, *running])} do not go together: transformers itself lets "
                "such samples see each other. Pad the batch instead of packing it."
            )

    def _window(self, length: int) -> int | None:
        """The sliding window of some layers, where it is shorter than the batch."""
        window = getattr(self.config, "sliding_window", None)
        local = "sliding_attention" in (getattr(self.config, "layer_types", None) or ())
        return window if local and window and window < length else None


def one_sample(model: nn.Module, plan: Shortening) -> dict:
    """Says that a batch of one row is one sample, where FlashAttention would look at its position ids: it takes each
    isolator token at the start of a sequence, all of the first position, for a sample of its own."""
    if len(plan.source) != 1 or not is_flash(unwrap(model).config.get_text_config()):
        return {}
    length = plan.source.shape[1]
    return varlen(torch.tensor([0, length], dtype=torch.int32).to(plan.source.device, non_blocking=True), length)


def is_flash(config) -> bool:
    """Whether the language model runs FlashAttention, of any version or kernel."""
    return "flash" in (config._attn_implementation or "")


def varlen(ends: torch.Tensor, length: int) -> dict:
    """The arguments of FlashAttention for samples that end at `ends` `(C + 1,)`, none longer than `length`."""
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
