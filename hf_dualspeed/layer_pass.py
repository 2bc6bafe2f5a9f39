"""Drops visual tokens between the layers of the language model, by hooks on its decoder layers.

A stage is a decoder layer in front of which tokens are dropped. From there on hidden states, masks and positions are
cut to the kept tokens; behind the last layer the states are laid out over the full length again, so that labels and
`logits_to_keep` stay right. Sliding windows reach as far as they would without dropping, but for FlashAttention, which
counts what is left. Shapes: B batch, S sequence, L shortened sequence of a stage, U units (images, clips),
N tokens of a unit (padded), D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from .attention_capture import attention_of, listening, query_obstacle
from .encoding import VisualEncoding
from .families import family_of
from .instructions import flat_places
from .packing import VARLEN, is_flash, varlen
from .proportional_attention import key_sizes_of
from .protocol import unwrap
from .pruners import VisualTokens, budget
from .pruners.base import in_source_order, kept_mask
from .pruners.layers import LayerPruner

REMEDY = "Choose a pruner that works in front of the language model, such as 'divprune'."
# Kinds of layers whose tokens meet in attention alone.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
# Arguments that layers are handed and do not read.
UNREAD = {"labels", "logits_to_keep"}
ROTARY = ("position_embeddings", "freqs_cis")


def refused(model: nn.Module, pruner: LayerPruner, reason: str, remedy: str = REMEDY) -> ValueError:
    name, model_name = pruner.config.pruner_type, type(unwrap(model)).__name__
    return ValueError(f"The pruner {name!r} cannot drop tokens inside {model_name}: {reason}. {remedy}")


def check_layers(model: nn.Module, pruner: LayerPruner) -> dict[int, float]:
    """The pruner's stages in this model, in order.

    Raises:
        ValueError: tokens cannot be dropped between its layers, or not there; the message says why.
    """
    outer = unwrap(model)
    config, family = outer.config.get_text_config(), family_of(outer.config)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    foreign = sorted(set(kinds) - ATTENDING)
    if foreign:
        raise refused(model, pruner, f"it has layers of kind {', '.join(map(repr, foreign))}")
    if getattr(config, "num_kv_shared_layers", None):
        raise refused(model, pruner, "some of its layers share keys and values, which would be of different lengths")
    if family.layered:
        raise refused(model, pruner, "it adds visual features to the hidden states of several layers")
    if family.places:
        raise refused(model, pruner, "its attention takes position ids for places in the sequence")
    count = len(decoder_layers(model, pruner)[1])
    stages = pruner.stages(count)
    outside = [index for index in stages if not 1 <= index < count]
    if outside or not stages:
        reason = f"none of its {count} layers has another in front of it and the number {outside}"
        raise refused(model, pruner, reason, "Let the pruner's stages lie inside.")
    return dict(sorted(stages.items()))


def decoder_layers(model: nn.Module, pruner: LayerPruner) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the language model's layers, and these."""
    outer = unwrap(model)
    count = outer.config.get_text_config().num_hidden_layers
    for module in outer.get_decoder().modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return module, layers
    raise refused(model, pruner, f"its decoder has no list of {count} `layers`")


@dataclass
class Units:
    """The droppable tokens of all units of a batch.

    Args:
        rows (`torch.LongTensor` of shape `(U, 1)`): the row a unit lies in.
        turns (`torch.LongTensor` of shape `(U, 1)`): which unit of its row it is.
        places (`torch.LongTensor` of shape `(U, N)`): of its tokens in the row; padding repeats the first.
        query (`torch.LongTensor` of shape `(U, 1)`): the place of its last instruction token.
        lengths (`list[int]`): tokens of each unit.
    """

    rows: torch.Tensor
    turns: torch.Tensor
    places: torch.Tensor
    query: torch.Tensor
    lengths: list[int]


@dataclass
class Budget:
    """What a stage leaves, known on the host.

    Args:
        lengths (`list[int]`): tokens of each unit.
        rows (`list[int]`): tokens of each row, text and isolators included.
    """

    lengths: list[int]
    rows: list[int]


@dataclass
class Cut:
    """What a stage has decided. Rows hold their tokens in order, then fillers that no token sees.

    Args:
        places (`torch.LongTensor` of shape `(B, L)`): where each slot's token lies in the model's input.
        slots (`torch.LongTensor` of shape `(B, L)`): where it lay before this stage.
        back (`torch.LongTensor` of shape `(B, S)`): the slot of each place; of a dropped one, that of the last kept
            token before it.
        filler (`torch.BoolTensor` of shape `(B, L)`, *optional*): True on fillers; None where there are none.
    """

    places: torch.Tensor
    slots: torch.Tensor
    back: torch.Tensor
    filler: torch.Tensor | None


class LayerPass:
    """One batch's way through the language model, with visual tokens dropped between its layers.

    [`locate`] reads the batch; between [`open`] and [`close`] the model's forward then drops tokens. Decisions are kept
    that long, for layers that are computed again in backward.
    """

    def __init__(self, model: nn.Module, pruner: LayerPruner, proportional_attention: bool = True):
        self.model, self.pruner = model, pruner
        self._key_sizes = key_sizes_of(model) if proportional_attention else None
        self.stages = check_layers(model, pruner)
        self.owner, self.layers = decoder_layers(model, pruner)
        # A layer is known by the module that calls the attention function.
        self._watched = {id(m): index for index in self.stages for m in self.layers[index - 1].modules()}
        self._budgets: dict[int, Budget] = {}
        self._cuts: dict[int, Cut] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._obstacle: str | None = None
        self._handed: list[tuple] = []
        self._hooks, self._ear = ExitStack(), ExitStack()

    def locate(self, inputs: Mapping, encodings: list[VisualEncoding], isolator_length: int, packed: bool) -> None:
        """Finds the tokens that may be dropped in a batch that holds all of them.

        Args:
            inputs (`Mapping`): `input_ids` and `attention_mask` `(B, S)`, and `labels` if there are some.
            encodings (`list[VisualEncoding]`): whose tokens are in it, each unit behind an isolator.
            isolator_length (`int`): tokens of the isolator.
            packed (`bool`): whether rows hold several samples.

        Raises:
            ValueError: such a batch cannot be cut.
        """
        if packed:
            raise refused(self.model, self.pruner, "rows of the batch hold several samples", "Pad the batch instead.")
        self._units, row_of, counts = find_units(inputs, encodings, isolator_length)
        self._budgets = budgets(self.stages, self._units.lengths, row_of, counts)
        deepest = max((len(levels) for e in encodings for levels in e.companions.values()), default=0)
        if deepest > min(self._budgets, default=deepest):
            reason = f"it adds visual features to the hidden states of its first {deepest} layers"
            raise refused(self.model, self.pruner, reason, f"Let the first stage lie behind them. {REMEDY}")
        self._most = max(map(row_of.count, row_of))
        mask, rows, places = inputs["attention_mask"].bool(), self._units.rows, self._units.places
        self._fixed = mask.index_put((rows, places), mask.new_zeros(()))  # text and isolators

    def open(self) -> None:
        """Hooks the layers."""
        hooks = [
            self.owner.register_forward_pre_hook(self._enter),
            self.owner.register_forward_hook(self._leave, always_call=True),
        ]
        for index, layer in enumerate(self.layers):
            if any(stage <= index for stage in self._budgets):
                hook = partial(self._cut_inputs, index)
                hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        for handle in hooks:
            self._hooks.callback(handle.remove)

    def close(self) -> None:
        """Takes the hooks away and forgets the batch."""
        self._ear.close()
        self._hooks.close()
        self._budgets, self._cuts, self._scores, self._handed = {}, {}, {}, []

    # --- in the forward pass --------------------------------------------------------------------------------------

    def _enter(self, owner: nn.Module, args: tuple) -> None:
        self._ear.enter_context(listening(self))

    def _leave(self, owner: nn.Module, args: tuple, output):
        """Lays the states out over the full length: each place gets those of the last kept token up to it, which is
        the one that predicts what follows."""
        self._ear.close()
        self._handed = []
        if output is None or not self._cuts:  # None after an error
            return output
        cut = self._cuts[max(self._cuts)]
        states = output[0]
        states = states.gather(1, cut.back[..., None].expand(-1, -1, states.shape[-1]))
        if isinstance(output, tuple):
            return states, *output[1:]
        output["last_hidden_state"] = states
        return output

    def listens_to(self, module: nn.Module) -> bool:
        return id(module) in self._watched

    def hear(self, module, query, key, mask, rest: tuple, options: dict) -> None:
        """Keeps, of the attention in front of a stage, what the instruction pays to each droppable token, `(U, N)`."""
        index = self._watched[id(module)]
        if index not in self._budgets or index in self._cuts or self._obstacle:
            return
        self._obstacle = query_obstacle(query, key, mask, rest, options)
        if self._obstacle is None:
            units = self._units
            asked = self._slots(index, units.query)
            places = asked.new_zeros(len(query), self._most).index_put((units.rows, units.turns), asked)
            paid = attention_of(module, places, query, key, mask, options)
            self._scores[index] = paid[units.rows, units.turns, self._slots(index, units.places)]

    def _slots(self, index: int, places: torch.Tensor) -> torch.Tensor:
        """Where tokens at `places` `(U, n)` lie in front of stage `index`."""
        before = max((stage for stage in self._cuts if stage < index), default=None)
        return places if before is None else self._cuts[before].back[self._units.rows, places]

    def _cut_inputs(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Cuts what layer `index` is handed."""
        stage = max(stage for stage in self._budgets if stage <= index)
        named = names_of(layer, args)
        values = dict(zip(named, args, strict=True)) | kwargs
        hidden = values.pop("hidden_states", None)
        if hidden is None or hidden.dim() != 3:
            shape = None if hidden is None else tuple(hidden.shape)
            raise refused(self.model, self.pruner, f"its {type(layer).__name__} is handed hidden states {shape}")
        if stage == index and index not in self._cuts:
            self._cuts[index] = self._decide(index, hidden)
        cut = self._cuts[stage]
        short = {name: self._handed_on(name, value, layer, cut) for name, value in values.items()}
        if stage == index:
            hidden = hidden.gather(1, cut.slots[..., None].expand(-1, -1, hidden.shape[-1]))
        short["hidden_states"] = hidden
        if len(hidden) == 1 and is_flash(unwrap(self.model).config.get_text_config()):
            # One sample, whatever its position ids look like.
            ends = torch.tensor([0, hidden.shape[1]], dtype=torch.int32).to(hidden.device, non_blocking=True)
            short |= varlen(ends, hidden.shape[1])
        return tuple(short.pop(name) for name in named), short

    @torch.no_grad()
    def _decide(self, index: int, hidden: torch.Tensor) -> Cut:
        """Chooses what is kept from layer `index` on."""
        if index not in self._scores:
            attention = self._obstacle or "does not call transformers' attention function"
            raise refused(self.model, self.pruner, f"its layer {index - 1} {attention}")
        units, left = self._units, self._budgets[index]
        scores = self._scores.pop(index)
        features = hidden[units.rows, self._slots(index, units.places)]
        with torch.autocast(hidden.device.type, enabled=False):
            valid = kept_mask(units.lengths, hidden.device)
            tokens = VisualTokens(features, valid, attention=scores, lengths=units.lengths)
            ranked = self.pruner.rank(tokens, max(left.lengths))
        positions, _, valid = in_source_order(ranked, left.lengths, scores.shape[1])
        places = units.places.gather(1, positions)
        if valid is not None:
            places = torch.where(valid, places, places[:, :1])
        self._units = replace(units, places=places, lengths=left.lengths)
        kept = self._fixed.index_put((units.rows, places), self._fixed.new_ones(()))
        before = max((stage for stage in self._cuts if stage < index), default=None)
        return cut_of(kept, left.rows, None if before is None else self._cuts[before])

    def _handed_on(self, name: str, value, layer: nn.Module, cut: Cut):
        """An argument of a layer, cut; layers are often handed the same one."""
        if value is None or name in UNREAD or isinstance(value, (bool, int, float, str)) or name.startswith(VARLEN):
            return value
        known = next((done for given, by, done in self._handed if given is value and by is cut), None)
        if known is None:
            try:
                known = cut_argument(name, value, cut)
            except ValueError as error:
                raise refused(self.model, self.pruner, f"its {type(layer).__name__} {error}") from None
            self._handed = [*self._handed[-7:], (value, cut, known)]
        return known


# --- where tokens lie ---------------------------------------------------------------------------------------------


def find_units(
    inputs: Mapping, encodings: list[VisualEncoding], isolator_length: int
) -> tuple[Units, list[int], list[int]]:
    """The droppable tokens of a batch, the row of each unit, and the real tokens of each row. It waits for the device
    once: how many tokens a row loses depends on the units that lie in it."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = [n for encoding in encodings for n in encoding.lengths]
    flat = torch.cat([places_of(ids, e.token_id, e.lengths, isolator_length, max(lengths)) for e in encodings])
    rows, places = flat[:, :1] // ids.shape[1], flat % ids.shape[1]
    known = torch.cat([rows[:, 0], mask.long().sum(1)]).tolist()
    row_of, counts = known[: len(lengths)], known[len(lengths) :]
    turns = torch.tensor([[row_of[:unit].count(row)] for unit, row in enumerate(row_of)])
    last = torch.tensor([[n - 1] for n in lengths]).to(ids.device, non_blocking=True)
    query = last_instruction(inputs, rows[:, 0], places.gather(1, last))
    turns = turns.to(ids.device, non_blocking=True)
    return Units(rows, turns, places, query, lengths), row_of, counts


def places_of(ids: torch.Tensor, token_id: int, lengths: list[int], isolator_length: int, most: int) -> torch.Tensor:
    """Where in the flattened batch the tokens of each unit lie, behind its isolator: `(U, most)`; padding repeats the
    first."""
    starts = torch.tensor([isolator_length, *(n + isolator_length for n in lengths[:-1])]).cumsum(0)[:, None]
    place = torch.arange(most)
    order = starts + torch.where(place < torch.tensor(lengths)[:, None], place, 0)
    return flat_places(ids, token_id, order.to(ids.device, non_blocking=True))


def last_instruction(inputs: Mapping, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The place in front of the first supervised token behind each unit, whose last token lies at `ends` `(U, 1)`;
    without one, the last token of its row, `(U, 1)`."""
    ids, labels = inputs["input_ids"], inputs.get("labels")
    place = torch.arange(ids.shape[1], device=ids.device)
    last = torch.where(inputs["attention_mask"].bool(), place, 0).amax(1, keepdim=True)[rows]
    if labels is None:
        return last
    behind = (labels != -100)[rows] & (place > ends)
    return torch.where(behind, place - 1, last).amin(1, keepdim=True)


def budgets(stages: dict[int, float], lengths: list[int], row_of: list[int], counts: list[int]) -> dict[int, Budget]:
    """What each stage leaves of units of `lengths` in the rows `row_of`, which hold `counts` tokens. A stage that drops
    nothing is left out."""
    found, now = {}, lengths
    for index, ratio in stages.items():
        left = [min(n, budget(whole, ratio)) for n, whole in zip(now, lengths, strict=True)]
        if left != now:
            rows = list(counts)
            for row, whole, n in zip(row_of, lengths, left, strict=True):
                rows[row] -= whole - n
            found[index], now = Budget(left, rows), left
    return found


def cut_of(kept: torch.Tensor, counts: list[int], before: Cut | None) -> Cut:
    """How to keep the `counts[b]` tokens of row b where `kept` `(B, S)` is True."""
    seen, length = kept.cumsum(1), max(counts)
    slot = torch.arange(length, device=kept.device)
    most = seen[:, -1:]
    places = torch.searchsorted(seen, torch.minimum(slot + 1, most)).clamp(max=kept.shape[1] - 1)
    slots = places if before is None else before.back.gather(1, places)
    filler = None if min(counts) == length else slot >= most
    return Cut(places, slots, (seen - 1).clamp(min=0), filler)


# --- what layers are handed ---------------------------------------------------------------------------------------


def names_of(layer: nn.Module, args: tuple) -> list[str]:
    """The names of a layer's positional arguments."""
    inner = getattr(layer, "_checkpoint_wrapped_module", layer)
    parameters = inspect.signature(inner.forward).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [names[i] if i < len(names) else f"argument {i}" for i in range(len(args))]


def cut_argument(name: str, value, cut: Cut):
    """An argument of a layer that runs over the tokens of `cut` alone.

    Raises:
        ValueError: it holds something of each token that can't be cut without knowing it.
    """
    batch, length = cut.back.shape
    if name == "attention_mask":
        return cut_mask(value, cut)
    if name.startswith(ROTARY) and not isinstance(value, torch.Tensor):
        if isinstance(value, Mapping):
            return {key: cut_argument(name, part, cut) for key, part in value.items()}
        return tuple(cut_argument(name, part, cut) for part in value)
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
    if name == "position_ids" and shape[-1:] == (length,) and shape[-2:-1] in ((batch,), (1,)):
        wide = value.expand(*shape[:-2], batch, length)
        return wide.gather(-1, cut.places.expand(*shape[:-2], -1, -1))
    if name.startswith(ROTARY) and shape[-2:-1] == (length,) and shape[:-2] in ((1,), (batch,), (3, batch)):
        wide = value.expand(*shape[:-3], batch, length, shape[-1])
        return wide.gather(-2, cut.places[..., None].expand(*wide.shape[:-2], -1, shape[-1]))
    if any(length in tensor.shape for tensor in tensors_in(value)):
        raise ValueError(f"is handed `{name}`, {describe(value)}, which it is not known how to cut")
    return value


def cut_mask(mask: torch.Tensor, cut: Cut) -> torch.Tensor:
    """An attention mask `(B, S)` or `(B, 1, S, S)`, cut; no token sees fillers."""
    batch, length = cut.back.shape
    shape = tuple(mask.shape) if isinstance(mask, torch.Tensor) else ()
    if shape == (batch, length):
        short = mask.gather(1, cut.places)
        return short if cut.filler is None else short.masked_fill(cut.filler, 0)
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[2:] != (length, length):
        raise ValueError(f"is handed an attention mask, {describe(mask)}, which it is not known how to cut")
    short = mask.expand(batch, -1, -1, -1)
    short = short.gather(2, cut.places[:, None, :, None].expand(-1, shape[1], -1, length))
    short = short.gather(3, cut.places[:, None, None].expand(-1, shape[1], cut.places.shape[1], -1))
    if cut.filler is not None:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        short = short.masked_fill(cut.filler[:, None, None], hidden)
    return short


def tensors_in(value) -> Iterator[torch.Tensor]:
    """The tensors in a value, in containers too."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def describe(value) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors_in(value))
    return f"a {type(value).__name__} of shape {shapes}" if shapes else f"a {type(value).__name__}"
