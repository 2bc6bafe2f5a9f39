"""Positions of models that number tokens on several axes (M-RoPE): in time, height and width.

The models number them token by token on the host and read ids, masks and grids off the device for it. The data
collator numbers them on the CPU, so that a training step does not wait.

Shapes: B batch, S sequence, A axes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..models.interface import ModelInterface, argument_names, modalities_in
from ..utils.text import one_line

logger = logging.getLogger(__name__)

POSITIONS = "multi_axis_positions"  # key in the batch; the trainer makes `position_ids` of it
KEPT = (bool, int, float, str, list, tuple, dict)  # what methods that number tokens read of a model, besides its config


def numbered(owner: nn.Module, inputs: Mapping, mask: torch.Tensor) -> torch.Tensor | None:
    """The positions `(A, B, S)` that `owner` gives a batch with a `mask` `(B, S)`; None for a batch without media.

    Nothing of the call stays on the model.
    """
    # The model numbers images by the type of each token, and some models take a missing type for text.
    rope = getattr(owner, "get_rope_index", None)
    asks = rope is not None and "mm_token_type_ids" in argument_names(rope)
    if asks and inputs.get("mm_token_type_ids") is None and modalities_in(inputs):
        raise ValueError(
            "`inputs` lacks `mm_token_type_ids`, without which the model numbers image tokens as text. Let the "
            "collator pass on all that the processor returns, or make them: "
            "torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))."
        )
    arguments = {key: inputs.get(key) for key in argument_names(owner.compute_3d_position_ids)}
    if inputs.get("feature_attention_mask") is not None:  # `forward` counts mel frames this way, too
        arguments["audio_feature_lengths"] = inputs["feature_attention_mask"].sum(1)
    before = getattr(owner, "rope_deltas", None)  # the call overwrites them
    positions = owner.compute_3d_position_ids(**{**arguments, "attention_mask": mask, "past_key_values": None})
    owner.rope_deltas = before
    return positions


def remember(owner: nn.Module | None, prompt: Mapping) -> None:
    """Stores how far the positions of a `prompt` are from a count of its tokens, `(B, 1)`, for a turn that follows.

    Models store it when they number a prompt, and add it to the count of all later tokens. A prompt that brings its own
    positions would leave that of an earlier one.
    """
    positions, mask = prompt.get("position_ids"), prompt.get("attention_mask")
    if owner is None or positions is None or positions.dim() != 3 or mask is None:
        return
    # The last position of each sample, on any axis, (A, B, S) -> (B, 1).
    last = positions.amax(0).masked_fill(~mask.bool(), -1).amax(1, keepdim=True)
    owner.rope_deltas = last + 1 - mask.long().sum(1, keepdim=True)


def without_weights(owner: nn.Module) -> nn.Module:
    """A module of `owner`'s class with its config and plain values, and nothing else, for a data loader's worker."""
    bare = object.__new__(type(owner))
    nn.Module.__init__(bare)
    own = set(vars(bare))
    kept = {k: v for k, v in vars(owner).items() if k not in own and (v is None or isinstance(v, KEPT))}
    bare.__dict__.update(kept, config=owner.config, rope_deltas=None)
    return bare


class WithPositions:
    """Wraps a collator and adds the positions that the model gives the batch, `(B, A, S)`, unless it brings its own.

    Args:
        collator (`Callable`): makes a batch.
        interface (`ModelInterface`): of a model that numbers tokens on several axes.

    Raises:
        ValueError: a batch has other placeholders than its images have tokens.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], interface: ModelInterface):
        self.collator, self.owner = collator, without_weights(interface.positions_owner)

    def __call__(self, examples: list) -> dict[str, Any]:
        batch = self.collator(examples)
        # Without a mask, positions of its own tell a packed batch.
        mask = batch.get("attention_mask")
        if self.owner is None or mask is None or batch.get("position_ids") is not None:
            return batch
        try:
            positions = numbered(self.owner, batch, mask)
        except AttributeError as error:  # code of a model that reads more of it
            logger.info("Positions are numbered in each step, not ahead of it (%s).", one_line(error))
            self.owner = None
            return batch
        # Placeholders and grids of images differ. A StopIteration would end the epoch without a word.
        except (LookupError, RuntimeError, StopIteration) as error:
            raise ValueError(
                f"The model cannot number the tokens of a batch ({one_line(error)}). Give the processor as many images "
                "(or videos, or audios) as placeholders, and do not truncate them (raise max_length)."
            ) from error
        return batch if positions is None else {**batch, POSITIONS: positions.transpose(0, 1).contiguous()}


def taken(inputs: Mapping) -> tuple[dict, dict[str, torch.Tensor]]:
    """The batch without what [`WithPositions`] has added, and that as the model's argument, `(A, B, S)`, if it has."""
    rest = {key: value for key, value in inputs.items() if key != POSITIONS}
    return rest, {"position_ids": inputs[POSITIONS].transpose(0, 1)} if POSITIONS in inputs else {}
