"""Runs a model's own vision encoder and describes the visual tokens it gives.

The seam is transformers' protocol: `get_image_features` encodes, `forward(mm_encoder_outputs=...)` takes the result
in place of pixels. What a family needs beyond it stands here and in `layout.py`, with the reason. Shapes: U images,
N visual tokens of an image (padded), D hidden.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .attention_capture import AttentionCapture, capture_attention, class_row, column_mean, has_class_token
from .layout import TokenLayout, token_layout
from .pruners import Pruner, VisualTokens

# modality -> (its encoder method, its placeholder id in the config, the names of its pixels)
MODALITIES = {
    "image": (
        "get_image_features",
        ("image_token_id", "image_token_index"),
        ("pixel_values", "pixel_values_images"),
    ),
    "video": ("get_video_features", ("video_token_id", "video_token_index"), ("pixel_values_videos",)),
}
# What a pruner may ask for beside the features, of what `VisualTokens` can carry.
SUPPLIED = frozenset({"grid", "attention"})
PIXEL_KEYS = tuple(key for _, _, keys in MODALITIES.values() for key in keys)


@dataclass
class VisualEncoding:
    """The encoder's answer for one modality of a batch.

    Args:
        modality (`str`): "image" or "video".
        token_id (`int`): the placeholder in `input_ids`.
        output: what the encoder returned, to be handed to `forward`.
        units (`list[torch.Tensor]`): visual tokens of each image, `(n_i, D)`.
        consumed (`set[str]`): inputs that only the encoder reads.
        grids (`list[torch.Tensor]`, *optional*): (t, row, column) of each token, `(n_i, 3)`, on the CPU.
        attention (`list[torch.Tensor]`, *optional*): attention each token receives in the tower, `(n_i,)`.
    """

    modality: str
    token_id: int
    output: object
    units: list[torch.Tensor]
    consumed: set[str]
    grids: list[torch.Tensor] | None = None
    attention: list[torch.Tensor] | None = None
    lengths: list[int] = field(init=False)

    def __post_init__(self):
        self.lengths = [unit.shape[0] for unit in self.units]

    def with_features(self, features: torch.Tensor) -> object:
        """A copy of the encoder's output that holds `features` `(sum K, D)` in the container it came in."""
        output = copy.copy(self.output)
        old = self.output.pooler_output
        output.pooler_output = features[None] if isinstance(old, torch.Tensor) else type(old)([features])
        return output

    def detached(self) -> VisualEncoding:
        """The same without gradients."""
        return replace(self, units=[unit.detach() for unit in self.units])

    def tokens(self, generator: torch.Generator | None = None) -> VisualTokens:
        """The pruner's view: all images padded to one length."""
        device = self.units[0].device
        valid = None
        if min(self.lengths) != max(self.lengths):
            counts = torch.tensor(self.lengths).to(device, non_blocking=True)
            valid = torch.arange(max(self.lengths), device=device) < counts[:, None]
        return VisualTokens(
            features=nn.utils.rnn.pad_sequence(self.units, batch_first=True),
            valid=valid,
            grid=pad(self.grids, device),
            attention=pad(self.attention, device),
            generator=generator,
            lengths=self.lengths,
        )


def pad(rows: list[torch.Tensor] | None, device: torch.device) -> torch.Tensor | None:
    """Pads rows of unequal length with zeros and moves them to `device`."""
    return None if rows is None else nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device, non_blocking=True)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT's and the distributed wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
            model = model.module if hasattr(model, "module") else model._orig_mod
        else:
            return model


def encoder_owner(model: nn.Module, method: str) -> nn.Module | None:
    """The module that owns `method`: the inner model first, for some outer classes hide its arguments."""
    outer = unwrap(model)
    return next((m for m in (getattr(outer, "model", None), outer) if hasattr(m, method)), None)


def check_protocol(model: nn.Module) -> None:
    """Raises a `ValueError` that says what is missing unless `model` speaks the `mm_encoder_outputs` protocol."""
    outer = unwrap(model)
    missing = []
    if "mm_encoder_outputs" not in inspect.signature(outer.forward).parameters:
        missing.append("its forward takes no `mm_encoder_outputs`")
    if encoder_owner(model, "get_image_features") is None:
        missing.append("it has no `get_image_features`")
    if placeholder_id(outer.config, "image") is None:
        missing.append("its config has no `image_token_id`")
    if missing:
        raise ValueError(
            f"{type(outer).__name__} cannot be pruned: {' and '.join(missing)}. Use a vision-language model of "
            "transformers that takes pre-encoded images (a ...ForConditionalGeneration such as LLaVA or Qwen2.5-VL)."
        )


def check_needs(pruner: Pruner) -> None:
    """Raises a `ValueError` where `pruner` needs what the fast pass does not supply."""
    unknown = sorted(pruner.needs - SUPPLIED)
    if unknown:
        raise ValueError(
            f"The pruner {pruner.config.pruner_type!r} needs {unknown}, but the fast pass supplies {sorted(SUPPLIED)} "
            "only. Call the pruner on VisualTokens of your own, or choose another."
        )


def placeholder_id(config, modality: str) -> int | None:
    """The placeholder token id of `modality`, or None."""
    ids = (getattr(config, name, None) for name in MODALITIES[modality][1])
    return next((i for i in ids if i is not None), None)


def visual_token_ids(config) -> list[int]:
    """Every placeholder id of the model."""
    return [i for i in (placeholder_id(config, modality) for modality in MODALITIES) if i is not None]


def encode(model: nn.Module, inputs: Mapping, needs: frozenset[str] = frozenset()) -> list[VisualEncoding]:
    """Encodes each modality whose pixels are in `inputs`; an empty list for a text-only batch.

    `needs` names what the pruner wants beside the features ("grid", "attention").
    """
    outer = unwrap(model)
    present = [m for m, (_, _, pixels) in MODALITIES.items() if any(inputs.get(key) is not None for key in pixels)]
    return [encode_modality(outer, inputs, modality, needs) for modality in present]


def encode_modality(outer: nn.Module, inputs: Mapping, modality: str, needs: frozenset[str]) -> VisualEncoding:
    method, _, _ = MODALITIES[modality]
    owner = encoder_owner(outer, method)
    token_id = placeholder_id(outer.config, modality)
    if owner is None or token_id is None:
        raise ValueError(f"{type(outer).__name__} was given {modality} pixels but has no `{method}` or placeholder id.")
    names = inspect.signature(getattr(owner, method)).parameters
    arguments = {key: inputs[key] for key in names if key in inputs}
    tower = outer.get_encoder(modality=modality)
    with capture_attention(tower) if "attention" in needs else nullcontext() as capture:
        output = getattr(owner, method)(**arguments, return_dict=True)
    units = split_units(output, type(outer).__name__)
    encoding = VisualEncoding(modality, token_id, output, units, set(arguments))
    if needs:
        layout = token_layout(owner, inputs, modality, encoding.lengths)
        encoding.grids = layout.grids
        if capture is not None:
            encoding.attention = received_attention(capture, tower, encoding, inputs, layout)
    return encoding


def split_units(output, name: str) -> list[torch.Tensor]:
    """Visual tokens of each image from `pooler_output`: a list of `(n_i, D)` or a tensor `(U, N, D)`."""
    features = output.pooler_output
    if isinstance(features, torch.Tensor) and features.dim() == 3:
        return list(features)
    if isinstance(features, (list, tuple)) and all(f.dim() == 2 for f in features):
        return list(features)
    raise ValueError(
        f"{name} returned image features as {type(features).__name__}, which is none of the known forms: a list of "
        "(n, D) tensors or one (U, N, D) tensor. This family is not supported yet."
    )


# --- attention that each token receives ---------------------------------------------------------------------------


def received_attention(
    capture: AttentionCapture,
    tower: nn.Module,
    encoding: VisualEncoding,
    inputs: Mapping,
    layout: TokenLayout,
) -> list[torch.Tensor]:
    """Attention per visual token of each image, `(n_i,)`; -inf for rows that no patch made, so they go last.

    Raises:
        ValueError: the tower gives another number of tokens than the model's features have.
    """
    query, key = capture.heads()
    grid_thw = inputs.get(f"{encoding.modality}_grid_thw")
    if grid_thw is not None and query.dim() == 3:
        return merged_attention(query, key, tower, grid_thw, encoding.lengths)
    scores = (class_row(query, key) if has_class_token(tower) else column_mean(query, key)).flatten()
    if layout.total != scores.numel():
        raise ValueError(
            f"The vision tower attends over {scores.numel()} tokens, the model uses {layout.total}: their attention "
            "cannot be matched. Choose a pruner that needs no attention, such as 'divprune'."
        )
    scores = torch.cat([scores, scores.new_full((1,), float("-inf"))])  # index -1 reads the last entry
    return [scores[patches.to(scores.device, non_blocking=True)] for patches in layout.patches]


def merged_attention(
    query: torch.Tensor, key: torch.Tensor, tower: nn.Module, grid_thw: torch.Tensor, lengths: list[int]
) -> list[torch.Tensor]:
    """Qwen-VL: all patches in one `(N, H, d)` row, merged in groups; with windows, in window order."""
    group = tower.spatial_merge_size**2
    patches = [n * group for n in lengths]
    received = torch.cat(
        [
            column_mean(q[None], k[None])[0].view(-1, group).mean(1)
            for q, k in zip(query.split(patches), key.split(patches), strict=True)
        ]
    )
    if getattr(tower, "window_size", None):
        from transformers.vision_utils import get_vision_window_index

        window_index, _ = get_vision_window_index(
            grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        received = torch.empty_like(received).index_copy_(0, window_index.to(received.device), received)
    return list(received.split(lengths))
