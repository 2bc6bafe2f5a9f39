"""Runs a model's own encoders and describes the tokens they return.

transformers' protocol: `get_image_features` and similar methods encode, `forward(mm_encoder_outputs=...)` takes the
result in place of pixels. `models/families.py` describes single families that need more, `models/token_layout.py` where
tokens lie in their image.

Shapes: U units (images, tiles, frames, clips), n_i tokens of unit i, N the most of any unit (padded), T tokens of the
batch, P patches of the tower, L tokens of an instruction (padded), D hidden, D' and Dk other widths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.attention import REMEDY, capture_attention
from ..models.containers import Container, flat_rows, part_lengths, refill
from ..models.families import Family
from ..models.interface import Encoder, Modality, ModelInterface, modalities_in
from ..models.token_layout import TokenLayout, clips, masked_parts, placeholder_runs, token_layout, units_by_runs
from ..pruners import VisualTokens
from ..pruners.ops import kept_mask
from .instructions import instructions
from .repeats import Repeats, reads_more
from .shortening import check_count

# Inputs of pruners that are captured from the vision tower's attention while it runs.
IN_TOWER = frozenset({"attention", "keys"})
CONFIGURED = ("vision_feature_layer", "vision_feature_select_strategy")
# Fields of an encoder's output, beside the tokens, with one row per token that `forward` reads.
COMPANIONS = ("deepstack_features",)


@dataclass
class VisualEncoding:
    """The encoded tokens of one modality of a batch.

    Args:
        modality (`str`): "image", "video" or "audio".
        token_id (`int`): the placeholder in `input_ids`.
        output: what the encoder returned.
        family (`Family`): how the model's `forward` reads it.
        features (`torch.Tensor` of shape `(T, D)`): the tokens, in the order of their placeholders.
        lengths (`list[int]`): tokens of each unit: image, tile, frame or clip.
        consumed (`set[str]`): inputs that only the encoder reads.
        grids (`list[torch.Tensor]`, *optional*): (t, row, column) of each token, `(n_i, 3)`, on the CPU.
        attention (`list[torch.Tensor]`, *optional*): attention that each token receives in the tower, `(n_i,)`.
        keys (`list[torch.Tensor]`, *optional*): its attention key in the tower, `(n_i, Dk)`.
        text (`torch.Tensor` of shape `(U, L, D)`, *optional*): embeddings of each unit's instruction.
        text_valid (`torch.BoolTensor` of shape `(U, L)`, *optional*): False on their padding.
        companions (`dict[str, list[torch.Tensor]]`): other features of the same tokens, by level, `(T, D')`.
    """

    modality: str
    token_id: int
    output: object
    family: Family
    features: torch.Tensor
    lengths: list[int]
    consumed: set[str]
    grids: list[torch.Tensor] | None = None
    attention: list[torch.Tensor] | None = None
    keys: list[torch.Tensor] | None = None
    text: torch.Tensor | None = None
    text_valid: torch.Tensor | None = None
    companions: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def units(self) -> list[torch.Tensor]:
        """Tokens of each unit, `(n_i, D)`."""
        return list(self.features.split(self.lengths))

    @property
    def embedded(self) -> bool:
        """Whether the tokens go in as input embeddings, because `forward` takes no encoded ones."""
        return self.modality == "audio" or self.family.project is not None

    def with_features(
        self, features: torch.Tensor, companions: dict[str, list[torch.Tensor]], lengths: list[int]
    ) -> object:
        """A copy of the encoder's output with `features` `(sum K_i, D)` in units of `lengths`, in the same
        containers."""
        output, name = copy.copy(self.output), self.family.field
        old = getattr(output, name)
        # A list of (layer, tokens): one level is the features, the others are companions.
        if self.family.layered:
            levels = list(companions[name])
            levels.insert(lowest(old), features)
            levels = zip(old, levels, strict=True)
            setattr(output, name, [(layer, refill(was, rows, lengths)) for (layer, was), rows in levels])
            return output
        # Tokens and companions are separate fields: (sum K_i, D) into their containers.
        setattr(output, name, refill(old, features, lengths))
        for name, levels in companions.items():
            old = getattr(output, name)
            setattr(output, name, [refill(was, rows, lengths) for was, rows in zip(old, levels, strict=True)])
        return output

    def detached(self) -> VisualEncoding:
        """The same without gradients."""
        beside = {name: [rows.detach() for rows in levels] for name, levels in self.companions.items()}
        return replace(self, features=self.features.detach(), companions=beside)

    def repeated(self, places: list[int]) -> VisualEncoding:
        """The encoding with unit `places[i]` of this one in place i."""

        def again(rows: torch.Tensor) -> torch.Tensor:
            units = rows.split(self.lengths)
            return torch.cat([units[place] for place in places])

        companions = {name: [again(level) for level in levels] for name, levels in self.companions.items()}
        found = replace(self, features=again(self.features), companions=companions)
        for name in ("lengths", "grids", "attention", "keys"):
            values = getattr(self, name)
            setattr(found, name, None if values is None else [values[place] for place in places])
        return replace(found, output=found.with_features(found.features, found.companions, found.lengths))

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Pads `(T, D)` to `(U, N, D)`."""
        # Units of equal length need no padding.
        if min(self.lengths) == max(self.lengths):
            return rows.view(len(self.lengths), self.lengths[0], rows.shape[-1])
        return nn.utils.rnn.pad_sequence(rows.split(self.lengths), batch_first=True)

    def tokens(self, generator: torch.Generator | None = None) -> VisualTokens:
        """The pruner's view: all units padded to one length."""
        device = self.features.device
        valid = kept_mask(self.lengths, device)
        return VisualTokens(
            features=self.padded(self.features),
            valid=valid,
            grid=pad(self.grids, device),
            attention=pad(self.attention, device),
            keys=pad(self.keys, device),
            text=self.text,
            text_valid=self.text_valid,
            generator=generator,
            lengths=self.lengths,
            defer_checks=True,  # `plan_shortening` checks
        )


def pad(rows: list[torch.Tensor] | None, device: torch.device) -> torch.Tensor | None:
    """Pads rows of unequal length with zeros and moves them to `device`."""
    return None if rows is None else nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device, non_blocking=True)


def encode(
    interface: ModelInterface,
    inputs: Mapping,
    needs: frozenset[str] = frozenset(),
    video_budget: str = "clip",
    served: Callable[[nn.Module], AbstractContextManager] | None = None,
    graphs: bool = False,
    repeats: Repeats | None = None,
) -> list[VisualEncoding]:
    """Encodes each modality whose raw inputs are in `inputs`; an empty list for a text-only batch.

    Args:
        interface (`ModelInterface`): of the model.
        inputs (`Mapping`): the batch.
        needs (`frozenset[str]`): what the pruner reads beside the features: "grid", "attention", "keys", "text".
        video_budget (`str`): whether a unit is a whole "clip" or a "frame".
        served (`Callable`, *optional*): images are encoded inside the context `served(tower)`.
        graphs (`bool`): whether a frozen tower builds a graph, as in the model's own `forward`.
        repeats (`Repeats`, *optional*): images that are the same, of which each is encoded once where that can be told.
    """
    # Modalities in the batch, except those that `forward` encodes itself.
    present = modalities_in(inputs)
    encoders = [e for name, e in interface.encoders.items() if name in present and not e.family.whole]
    encodings = []
    for e in encoders:
        is_image = e.modality.name == "image"
        cached, once = (served, repeats) if is_image else (None, None)
        # A cache sees repeats by itself. Some families mix the images of a sample, or project them in `forward`.
        if cached is not None or e.family.runs or e.family.project is not None or e.family.layered:
            once = None
        if once is not None and reads_more(e.arguments, inputs):
            once = None
        encodings.append(encode_modality(interface, inputs, e, needs, video_budget, cached, graphs, once))
    return encodings


def encode_modality(
    interface: ModelInterface,
    inputs: Mapping,
    encoder: Encoder,
    needs: frozenset[str],
    video_budget: str,
    served: Callable[[nn.Module], AbstractContextManager] | None = None,
    graphs: bool = False,
    repeats: Repeats | None = None,
) -> VisualEncoding:
    """Encodes one modality; see [`encode`]."""
    # Images that come again are left out, and their tokens put in their places at the end.
    whole = inputs
    inputs = inputs if repeats is None else repeats.distinct(inputs)
    outer, modality, owner = interface.outer, encoder.modality, encoder.owner
    family, token_id = encoder.family, encoder.token_id
    if encoder.missing:
        raise ValueError(
            f"{interface.name} was given {modality.name} inputs but has no `{modality.method}` or placeholder id."
        )
    check_pixels(inputs, modality)
    # Encode; the pruner may capture the tower's attention, and the feature cache may replace the tower.
    arguments, consumed = encoder_arguments(encoder, inputs)
    tower = outer.get_encoder(modality=modality.name) if needs & IN_TOWER or served is not None else None
    with ExitStack() as around:
        capture = around.enter_context(capture_attention(tower)) if needs & IN_TOWER else None
        if not graphs:
            around.enter_context(frozen_tower(outer, modality))
        if served is not None:
            around.enter_context(served(tower))
        output = encoder.function(**arguments, return_dict=True)
        container, companions = tokens_of(output, family, interface.name), companions_of(output, family)
    # The tokens as flat rows (T, D), and how many of them each unit and each of its parts has.
    rows, parts = flat_rows(container), parts_of(container, family, inputs, token_id)
    if modality.name == "video":
        parts = clips(owner, parts, inputs, video_budget)
    # Some families drop rows of the encoder's output by a mask (T,).
    encoded, kept = parts, None
    if inputs.get(family.row_mask) is not None and modality.name != "image":
        kept = inputs[family.row_mask].bool().flatten()
        rows, parts = rows[kept], masked_parts(parts, kept)
        consumed.add(family.row_mask)
    # Units that are pruned on their own: whole images and clips, or single frames.
    clipwise = video_budget == "clip" or modality.name != "video"
    lengths = [sum(unit) for unit in parts] if clipwise else [n for unit in parts for n in unit]
    lengths = [n for n in lengths if n]  # the unit of a sample without images may be empty
    if repeats is not None and len(lengths) != len(repeats.first):  # units are no images, so all are encoded
        return encode_modality(interface, whole, encoder, needs, video_budget, served, graphs)
    check_count(token_id, sum(lengths), len(rows))
    encoding = VisualEncoding(modality.name, token_id, output, family, rows, lengths, consumed)
    encoding.companions = companions
    # Project what `forward` would project: (T, D') -> (T, D).
    if family.project is not None:
        encoding.features = family.project(owner, rows)
    # What the pruner reads beside the features.
    if needs & {"grid", *IN_TOWER}:
        layout = token_layout(owner, inputs, modality.name, encoded, lengths, kept)
        encoding.grids = layout.grids
        place = partial(at_tokens, tower=tower, modality=modality, inputs=inputs, layout=layout)
        if "attention" in needs:
            encoding.attention = place(capture.received(), absent=float("-inf"))  # tokens without a patch rank last
        if "keys" in needs:
            encoding.keys = place(capture.keys(), absent=0.0)
    if repeats is not None:
        encoding = encoding.repeated(repeats.places)
    if "text" in needs:
        found = instructions(interface, whole, token_id, encoding.lengths)
        encoding.text, encoding.text_valid = found.embedded(outer, inputs["input_ids"])
    return encoding


@contextmanager
def frozen_tower(outer: nn.Module, modality: Modality) -> Iterator[None]:
    """Runs a frozen tower without a graph.

    Activation checkpointing in transformers makes the embeddings of every tower require gradients, and backward would
    run through the whole tower for them.
    """
    tower = outer.get_encoder(modality=modality.name) if hasattr(outer, "get_encoder") else None
    if tower is None or tower is outer:
        yield
        return
    if any(p.requires_grad for p in tower.parameters()):
        with frozen_blocks(tower):
            yield
        return
    # Hooks turn gradients off during the tower's forward only, not for the projector after it.
    with ExitStack() as hooks:
        before = torch.is_grad_enabled()
        begin = tower.register_forward_pre_hook(lambda *_: torch.set_grad_enabled(False) and None)
        end = tower.register_forward_hook(lambda *_: torch.set_grad_enabled(before) and None, always_call=True)
        for handle in (begin, end):
            hooks.callback(handle.remove)
        yield


@contextmanager
def frozen_blocks(tower: nn.Module) -> Iterator[None]:
    """The same for a tower of which a part is trained, such as the projector inside Qwen's, but none of the blocks:
    nothing is carried back beyond that part."""
    blocks = [part for part in tower.modules() if isinstance(part, GradientCheckpointingLayer)]
    try:
        embeddings = tower.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    frozen = [embeddings, *blocks] if blocks and isinstance(embeddings, nn.Module) else []
    if not frozen or any(p.requires_grad for part in frozen for p in part.parameters()):
        yield
        return
    # Behind transformers' own hook, which makes the embeddings require gradients.
    with embeddings.register_forward_hook(lambda module, args, embedded: embedded.detach()):
        yield


def parts_of(container: Container, family: Family, inputs: Mapping, token_id: int) -> list[list[int]]:
    """Tokens of each part of each unit, from the encoder's container or from the runs of placeholders."""
    parts = part_lengths(container)
    if parts is not None and not family.runs:
        return parts
    # Each run of placeholders is a unit: split the encoder's parts at the runs.
    runs = placeholder_runs(inputs["input_ids"], token_id, family.lines)
    return [[n] for n in runs] if parts is None else units_by_runs(parts, runs)


def companions_of(output, family: Family) -> dict[str, list[torch.Tensor]]:
    """Other features of the same tokens that `forward` reads, each level `(T, D')`."""
    # The lowest level holds the tokens themselves.
    if family.layered:
        levels = list(getattr(output, family.field))
        del levels[lowest(levels)]
        return {family.field: [flat_rows(tokens) for _, tokens in levels]}
    levels = {name: getattr(output, name, None) for name in COMPANIONS}
    return {name: [flat_rows(level) for level in value] for name, value in levels.items() if value is not None}


def lowest(levels: Sequence[tuple[int, Container]]) -> int:
    """Which of the levels (layer, tokens) enters the language model first."""
    return min(range(len(levels)), key=lambda level: levels[level][0])


def encoder_arguments(encoder: Encoder, inputs: Mapping) -> tuple[dict[str, object], set[str]]:
    """The encoder's arguments, and the names of the inputs that only the encoder reads."""
    owner, modality, names = encoder.owner, encoder.modality, encoder.arguments
    # The forward reads these from the config, but some encoders have other defaults.
    arguments = {key: getattr(owner.config, key) for key in CONFIGURED if key in names and hasattr(owner.config, key)}
    arguments |= {key: inputs[key] for key in names if key in inputs}
    consumed = {key for key in inputs if key in arguments or key in modality.raw} - {"input_ids"}
    # The raw input in the model's dtype. If the encoder names it otherwise, it is the first argument.
    raw = next(key for key in modality.raw if inputs.get(key) is not None)
    named = raw if raw in arguments or not names else names[0]
    arguments[named] = in_dtype_of(owner, inputs[raw])
    return arguments, consumed


def in_dtype_of(owner: nn.Module, raw: object) -> object:
    """Casts raw inputs to the dtype of a half-precision model, as most forwards do."""
    dtype = getattr(owner, "dtype", None)
    floating = isinstance(raw, torch.Tensor) and raw.is_floating_point()
    return raw.to(dtype) if floating and dtype in (torch.float16, torch.bfloat16) else raw


def check_pixels(inputs: Mapping, modality: Modality) -> None:
    """Raises a `ValueError` for images without pixels."""
    for key in modality.raw:
        pixels = inputs.get(key)
        if isinstance(pixels, torch.Tensor) and not pixels.numel():
            raise ValueError(
                f"`{key}` is of shape {tuple(pixels.shape)}: it holds no {modality.name} data. Leave empty images out "
                f"of the batch, and leave `{key}` out where there are none."
            )


def tokens_of(output, family: Family, name: str) -> Container:
    """The visual tokens in the encoder's output, in their container."""
    container = getattr(output, family.field, None)
    # A list of (layer, tokens): the lowest level.
    if family.layered:
        container = container[lowest(container)][1]
    # A tensor (U, N, D) or (T, D), or one (..., N, D) per unit.
    known = isinstance(container, (torch.Tensor, list, tuple)) and len(container)
    if not known or not all(isinstance(unit, torch.Tensor) for unit in container):
        raise ValueError(
            f"{name} returned its encoded tokens as {type(container).__name__} in `{family.field}`, which is none of "
            "the known forms: a tensor, or a list or tuple of tensors. This family is not supported yet."
        )
    return container


def at_tokens(
    rows: torch.Tensor, tower: nn.Module, modality: Modality, inputs: Mapping, layout: TokenLayout, absent: float
) -> list[torch.Tensor]:
    """Maps a value per patch of the tower, `(P, ...)`, to the tokens of each image, `(n_i, ...)`.

    Args:
        absent (`float`): the value of tokens that no patch made.

    Raises:
        ValueError: the tower's patches cannot be matched with the model's tokens.
    """
    # The tower merges squares of patches to tokens: average each square, (P, ...) -> (T, ...).
    grid_thw, merge = inputs.get(f"{modality.name}_grid_thw"), getattr(tower, "spatial_merge_size", None)
    if grid_thw is not None and merge and len(rows) == layout.total * merge**2:
        rows = merged_patches(rows, tower, grid_thw)
    if layout.total != len(rows):
        uses = f"uses {layout.total}" if layout.total else "blends several into each of its own"
        raise ValueError(
            f"{type(tower).__name__} attends over {len(rows)} tokens, the model {uses}: their attention cannot "
            f"be matched. {REMEDY}"
        )
    # One more row for tokens without a patch, which index -1 reads; then rows by token, (n_i, ...).
    rows = torch.cat([rows, rows.new_full((1, *rows.shape[1:]), absent)])
    return [rows[patches.to(rows.device, non_blocking=True)] for patches in layout.patches]


def merged_patches(rows: torch.Tensor, tower: nn.Module, grid_thw: torch.Tensor) -> torch.Tensor:
    """Qwen-VL: the mean over the patches that become one token, `(P, ...)` to `(T, ...)`."""
    # Patches of one token are adjacent, `spatial_merge_size ** 2` of them.
    merged = rows.unflatten(0, (-1, tower.spatial_merge_size**2)).mean(1)
    # With window attention, the tower's tokens are in the order of windows: back to raster order.
    if getattr(tower, "window_size", None):
        from transformers.vision_utils import get_vision_window_index

        window_index, _ = get_vision_window_index(
            grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size
        )
        merged = torch.empty_like(merged).index_copy_(0, window_index.to(merged.device), merged)
    return merged
