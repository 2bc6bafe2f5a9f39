"""Drops visual tokens between the layers of the language model, by hooks on its decoder layers.

A stage is a decoder layer before which tokens are dropped. From there on, hidden states, masks and positions hold only
the kept tokens. After the last layer, the states are spread over the full length again, because labels and
`logits_to_keep` refer to it. Sliding windows reach as far as without dropping, except under FlashAttention, which
counts kept tokens only.

Shapes: B batch, S sequence, L shortened sequence after a stage, L' before it, U units (images, clips), N tokens of a
unit (padded), K kept tokens of a unit (padded), D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..models.attention import attention_hook, attention_of, query_obstacle
from ..models.interface import ModelInterface
from ..pruners import VisualTokens, budget
from ..pruners.base import LayerPruner
from ..pruners.config import MERGE
from ..pruners.ops import in_source_order, kept_mask, members, nearest_kept
from .encoding import VisualEncoding
from .instructions import flat_places
from .layer_arguments import Cut, cut_argument, names_of
from .packing import VARLEN, is_flash, varlen
from .proportional_attention import KeySizes, key_sizes_of, set_sizes_of, sizes_of

REMEDY = "Choose a pruner that works in front of the language model, such as 'divprune'."
# Kinds of layers that mix tokens by attention only.
ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
# Arguments that layers receive and do not read.
UNREAD = {"labels", "logits_to_keep"}


def refused(interface: ModelInterface, pruner: LayerPruner, reason: str, remedy: str = REMEDY) -> ValueError:
    name = pruner.config.pruner_type
    return ValueError(f"The pruner {name!r} cannot drop tokens inside {interface.name}: {reason}. {remedy}")


def check_layers(interface: ModelInterface, pruner: LayerPruner, progress: float = 1.0) -> dict[int, float]:
    """The pruner's stages in this model, in order, at the fraction `progress` of training.

    Raises:
        ValueError: tokens cannot be dropped between the model's layers, or not at these; the message says why.
    """
    config, family = interface.text_config, interface.family
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    # Tokens can be dropped only between layers that mix them by attention, each with its own keys and values.
    foreign = sorted(set(kinds) - ATTENDING)
    if foreign:
        raise refused(interface, pruner, f"it has layers of kind {', '.join(map(repr, foreign))}")
    if getattr(config, "num_kv_shared_layers", None):
        raise refused(
            interface, pruner, "some of its layers share keys and values, which would be of different lengths"
        )
    if family.layered:
        raise refused(interface, pruner, "it adds visual features to the hidden states of several layers")
    if family.places:
        raise refused(interface, pruner, "its attention takes position ids for places in the sequence")
    # Attention before a stage decides what to drop, so the first layer cannot be one.
    count = len(decoder_layers(interface, pruner)[1])
    stages = pruner.stages(count, pruner.config.ratio_at(progress))
    outside = [index for index in stages if not 1 <= index < count]
    if outside or not stages:
        reason = f"none of its {count} layers has another in front of it and the number {outside}"
        raise refused(interface, pruner, reason, "Let the pruner's stages lie inside.")
    return dict(sorted(stages.items()))


def decoder_layers(interface: ModelInterface, pruner: LayerPruner) -> tuple[nn.Module, nn.ModuleList]:
    """The module that runs the language model's layers, and the layers."""
    count = interface.text_config.num_hidden_layers
    for module in interface.outer.get_decoder().modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return module, layers
    raise refused(interface, pruner, f"its decoder has no list of {count} `layers`")


@dataclass
class Units:
    """The droppable tokens of all units of a batch.

    Args:
        rows (`torch.LongTensor` of shape `(U, 1)`): the batch row of each unit.
        turns (`torch.LongTensor` of shape `(U, 1)`): the number of the unit within its row.
        places (`torch.LongTensor` of shape `(U, N)`): positions of its tokens in the row; padding repeats the first.
        query (`torch.LongTensor` of shape `(U, 1)`): position of its last instruction token.
        lengths (`list[int]`): tokens of each unit.
        sizes (`torch.Tensor` of shape `(U, N)`): how many tokens each one stands for; 0 on padding.
    """

    rows: torch.Tensor
    turns: torch.Tensor
    places: torch.Tensor
    query: torch.Tensor
    lengths: list[int]
    sizes: torch.Tensor


@dataclass
class Budget:
    """What a stage keeps, known on the host.

    Args:
        lengths (`list[int]`): tokens of each unit.
        rows (`list[int]`): tokens of each row, text and isolators included.
    """

    lengths: list[int]
    rows: list[int]


class LayerPass:
    """One batch's pass through the language model, with visual tokens dropped between its layers.

    [`locate`] reads the batch. Between [`open`] and [`close`], the model's forward drops tokens. Decisions are kept
    until [`close`], because backward may recompute layers.
    """

    def __init__(
        self,
        interface: ModelInterface,
        pruner: LayerPruner,
        proportional_attention: bool = True,
        progress: float = 1.0,
    ):
        self.interface, self.pruner = interface, pruner
        self._shared = key_sizes_of(interface) if proportional_attention else None
        self.stages = check_layers(interface, pruner, progress)
        self.owner, self.layers = decoder_layers(interface, pruner)
        # Attention functions report the calling module, so each module maps to the stage after its layer.
        self._watched = {id(m): index for index in self.stages for m in self.layers[index - 1].modules()}
        self._budgets: dict[int, Budget] = {}
        self._cuts: dict[int, Cut] = {}
        self._scores: dict[int, torch.Tensor] = {}
        self._obstacle: str | None = None
        self._recent: list[tuple] = []  # (argument, cut, result) of the last layers' arguments
        # Key sizes from each stage on, kept for layers that backward recomputes.
        self._key_sizes: dict[int, KeySizes] = {}
        self._hooks, self._observing = ExitStack(), ExitStack()

    def locate(
        self,
        inputs: Mapping,
        encodings: list[VisualEncoding],
        isolator_length: int,
        packed: bool,
        generator: torch.Generator | None = None,
    ) -> None:
        """Finds the tokens that may be dropped in a batch that holds all of them.

        Args:
            inputs (`Mapping`): `input_ids` and `attention_mask` `(B, S)`, and `labels` if there are any.
            encodings (`list[VisualEncoding]`): the encoded tokens in it, each unit after an isolator.
            isolator_length (`int`): tokens of the isolator.
            packed (`bool`): whether rows hold several samples.
            generator (`torch.Generator`, *optional*): for pruners that sample.

        Raises:
            ValueError: tokens of this batch cannot be dropped.
        """
        if packed:
            raise refused(
                self.interface, self.pruner, "rows of the batch hold several samples", "Pad the batch instead."
            )
        self._generator = generator
        self._units, row_of, counts = find_units(inputs, encodings, isolator_length)
        self._budgets = budgets(self.stages, self._units.lengths, row_of, counts)
        # DeepStack adds features of all visual tokens to the first layers, so stages must come after them.
        deepest = max((len(levels) for e in encodings for levels in e.companions.values()), default=0)
        if deepest > min(self._budgets, default=deepest):
            reason = f"it adds visual features to the hidden states of its first {deepest} layers"
            raise refused(self.interface, self.pruner, reason, f"Let the first stage lie behind them. {REMEDY}")
        self._most = max(map(row_of.count, row_of))
        # Tokens that always stay, (B, S): text and isolators.
        mask, rows, places = inputs["attention_mask"].bool(), self._units.rows, self._units.places
        self._fixed = mask.index_put((rows, places), mask.new_zeros(()))

    def open(self) -> None:
        """Registers the hooks."""
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
        if self._shared is None:
            return
        # Each layer reads the key sizes of the last stage up to it; `close` restores the shared ones.
        self._key_sizes = {stage: KeySizes(model_name=self.interface.name) for stage in self._budgets}
        for index, layer in enumerate(self.layers):
            stage = max((stage for stage in self._budgets if stage <= index), default=None)
            if stage is not None:
                set_sizes_of(layer, self._key_sizes[stage])
                self._hooks.callback(set_sizes_of, layer, self._shared)

    def close(self) -> None:
        """Removes the hooks and forgets the batch."""
        self._observing.close()
        self._hooks.close()
        self._budgets, self._cuts, self._scores, self._recent = {}, {}, {}, []

    # --- in the forward pass --------------------------------------------------------------------------------------

    def _enter(self, owner: nn.Module, args: tuple) -> None:
        self._observing.enter_context(attention_hook(self))

    def _leave(self, owner: nn.Module, args: tuple, output):
        """Spreads the states over the full length.

        Each position gets the states of the last kept token up to it, which predict what follows.
        """
        self._observing.close()
        self._recent = []
        for sizes in self._key_sizes.values() if output is not None else ():
            sizes.check_used()
        if output is None or not self._cuts:  # None after an error
            return output
        # (B, L, D) -> (B, S, D)
        cut = self._cuts[max(self._cuts)]
        states = output[0]
        states = states.gather(1, cut.back[..., None].expand(-1, -1, states.shape[-1]))
        if isinstance(output, tuple):
            return states, *output[1:]
        output["last_hidden_state"] = states
        return output

    def observes(self, module: nn.Module) -> bool:
        return id(module) in self._watched

    def on_attention(self, module, query, key, mask, rest: tuple, options: dict) -> None:
        """Keeps the attention that the last instruction token pays to each droppable token before a stage, `(U, N)`."""
        index = self._watched[id(module)]
        if index not in self._budgets or index in self._cuts or self._obstacle:
            return
        self._obstacle = query_obstacle(query, key, mask, rest, options)
        if self._obstacle is None:
            units = self._units
            # Current positions of the instruction tokens, (U, 1), laid out per row: (B, most units of a row).
            asked = self._slots(index, units.query)
            places = asked.new_zeros(len(query), self._most).index_put((units.rows, units.turns), asked)
            # Their attention over all keys, (B, most units, L'), then at each unit's own tokens, (U, N).
            sizes = sizes_of(module).log_sizes if self._key_sizes else None
            paid = attention_of(module, places, query, key, mask, options, sizes)
            self._scores[index] = paid[units.rows, units.turns, self._slots(index, units.places)]

    def _slots(self, index: int, places: torch.Tensor) -> torch.Tensor:
        """Current positions, before stage `index`, of the tokens at original positions `places` `(U, n)`."""
        before = max((stage for stage in self._cuts if stage < index), default=None)
        return places if before is None else self._cuts[before].back[self._units.rows, places]

    def _cut_inputs(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Shortens the inputs of layer `index` and sets the sizes of its keys."""
        stage = max(stage for stage in self._budgets if stage <= index)
        named = names_of(layer, args)
        values = dict(zip(named, args, strict=True)) | kwargs
        hidden = values.pop("hidden_states", None)
        if hidden is None or hidden.dim() != 3:
            shape = None if hidden is None else tuple(hidden.shape)
            raise refused(self.interface, self.pruner, f"its {type(layer).__name__} is handed hidden states {shape}")
        # The first call of a stage's layer decides; recomputed layers reuse the decision.
        if stage == index and index not in self._cuts:
            self._cuts[index] = self._decide(index, hidden)
        cut = self._cuts[stage]
        if self._key_sizes:
            self._key_sizes[stage].set(cut.log_sizes)
        # Masks and positions, in every layer from the stage on.
        short = {name: self._cut_argument(name, value, layer, cut) for name, value in values.items()}
        # Hidden states, in the stage's own layer: (B, L', D) -> (B, L, D); later layers receive short ones.
        if stage == index:
            left = hidden.gather(1, cut.slots[..., None].expand(-1, -1, hidden.shape[-1]))
            hidden = left if cut.merge is None else cut.merge(hidden, left)
        short["hidden_states"] = hidden
        if len(hidden) == 1 and is_flash(self.interface.text_config):
            # FlashAttention would read gaps in position ids as sample boundaries: declare one sample.
            ends = torch.tensor([0, hidden.shape[1]], dtype=torch.int32).to(hidden.device, non_blocking=True)
            short |= varlen(ends, hidden.shape[1])
        return tuple(short.pop(name) for name in named), short

    @torch.no_grad()
    def _decide(self, index: int, hidden: torch.Tensor) -> Cut:
        """Chooses the tokens that stay from layer `index` on."""
        if index not in self._scores:
            attention = self._obstacle or "does not call transformers' attention function"
            raise refused(self.interface, self.pruner, f"its layer {index - 1} {attention}")
        # States of the droppable tokens, (B, L', D) -> (U, N, D), and their attention scores (U, N).
        units, left = self._units, self._budgets[index]
        scores, slots = self._scores.pop(index), self._slots(index, self._units.places)
        features = hidden[units.rows, slots]
        # The pruner ranks each unit's tokens; the best of them stay, (U, K) in source order.
        valid, generator = kept_mask(units.lengths, hidden.device), self._generator
        tokens = VisualTokens(features, valid, attention=scores, generator=generator, lengths=units.lengths)
        ranked = self.pruner.checked_rank(tokens, max(left.lengths))
        positions, _, valid = in_source_order(ranked, left.lengths, scores.shape[1])
        # Their positions in the full sequence, (U, K); padding repeats the first.
        places = units.places.gather(1, positions)
        if valid is not None:
            places = torch.where(valid, places, places[:, :1])
        # Weights (U, K, N) of each token in each kept one: its size where the kept one is the most similar, else 0.
        weights = members(nearest_kept(tokens, positions, valid), positions.shape[1]) * units.sizes[:, None]
        self._units = replace(units, places=places, lengths=left.lengths, sizes=weights.sum(2))
        # Everything that stays, (B, S), and how to get there from the previous stage.
        kept = self._fixed.index_put((units.rows, places), self._fixed.new_ones(()))
        before = max((stage for stage in self._cuts if stage < index), default=None)
        cut = cut_of(kept, left.rows, None if before is None else self._cuts[before])
        # Row and slot of every kept token without padding, (sum K_i,) each.
        real = torch.cat([torch.arange(k) + unit * positions.shape[1] for unit, k in enumerate(left.lengths)])
        real = real.to(hidden.device, non_blocking=True)
        rows = units.rows.expand_as(places).flatten()[real]
        there = cut.back[units.rows, places].flatten()[real]
        # log(size) of each key, (B, L): 0 on text and isolators.
        sizes = torch.zeros(cut.slots.shape, device=hidden.device)
        cut.log_sizes = sizes.index_put((rows, there), self._units.sizes.flatten()[real].log())
        if self.pruner.config.dropped_tokens == MERGE:
            cut.merge = partial(merged, weights, (units.rows, slots), real, (rows, there))
        return cut

    def _cut_argument(self, name: str, value, layer: nn.Module, cut: Cut):
        """Cuts one argument of a layer. Layers often receive the same object, so the last results are cached."""
        if value is None or name in UNREAD or isinstance(value, (bool, int, float, str)) or name.startswith(VARLEN):
            return value
        known = next((done for given, by, done in self._recent if given is value and by is cut), None)
        if known is None:
            try:
                known = cut_argument(name, value, cut)
            except ValueError as error:
                raise refused(self.interface, self.pruner, f"its {type(layer).__name__} {error}") from None
            self._recent = [*self._recent[-7:], (value, cut, known)]
        return known


def merged(
    weights: torch.Tensor,
    sources: tuple[torch.Tensor, torch.Tensor],
    real: torch.Tensor,
    targets: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    left: torch.Tensor,
) -> torch.Tensor:
    """The states after a stage `(B, L, D)`, in which each kept token is the mean of the tokens that it stands for.

    Args:
        weights (`torch.Tensor` of shape `(U, K, N)`): weight of each token of a unit in each kept one.
        sources: row `(U, 1)` and slot `(U, N)` of the tokens in `hidden` `(B, L', D)`.
        real (`torch.LongTensor` of shape `(sum K_i,)`): which of the `U * K` kept ones are not padding.
        targets: row and slot of these in `left` `(B, L, D)`, both `(sum K_i,)`.
    """
    # Weighted means in float32: (U, K, N) @ (U, N, D) -> (U, K, D).
    with torch.autocast(hidden.device.type, enabled=False):
        means = weights @ hidden[sources].float() / weights.sum(2, keepdim=True).clamp(min=1)
    # Write the real ones to their slots.
    return left.index_put(targets, means.flatten(0, 1)[real].to(left.dtype))


def find_units(
    inputs: Mapping, encodings: list[VisualEncoding], isolator_length: int
) -> tuple[Units, list[int], list[int]]:
    """The droppable tokens of a batch, the row of each unit, and the number of real tokens of each row.

    Waits for the device once: the units of a row determine how many tokens it loses.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = [n for encoding in encodings for n in encoding.lengths]
    # Positions in the flattened batch, (U, N), split into row and column.
    flat = torch.cat([places_of(ids, e.token_id, e.lengths, isolator_length, max(lengths)) for e in encodings])
    rows, places = flat[:, :1] // ids.shape[1], flat % ids.shape[1]
    # The one host synchronisation: row of each unit (U,) and real tokens of each row (B,).
    known = torch.cat([rows[:, 0], mask.long().sum(1)]).tolist()
    row_of, counts = known[: len(lengths)], known[len(lengths) :]
    # Number of each unit within its row, (U, 1).
    turns = torch.tensor([[row_of[:unit].count(row)] for unit, row in enumerate(row_of)])
    # Last token of each unit, (U, 1), and the instruction token that asks about it.
    last = torch.tensor([[n - 1] for n in lengths]).to(ids.device, non_blocking=True)
    query = last_instruction(inputs, rows[:, 0], places.gather(1, last))
    turns = turns.to(ids.device, non_blocking=True)
    # Each real token stands for itself: ones (U, N), zeros on padding.
    sizes = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).float().to(ids.device, non_blocking=True)
    return Units(rows, turns, places, query, lengths, sizes), row_of, counts


def places_of(ids: torch.Tensor, token_id: int, lengths: list[int], isolator_length: int, most: int) -> torch.Tensor:
    """Positions of each unit's tokens in the flattened batch, without isolators, `(U, most)`.

    Padding repeats the first.
    """
    # Number of each unit's first token among all placeholders, isolators counted: (U, 1).
    starts = torch.tensor([isolator_length, *(n + isolator_length for n in lengths[:-1])]).cumsum(0)[:, None]
    # Numbers of all its tokens, (U, most).
    place = torch.arange(most)
    order = starts + torch.where(place < torch.tensor(lengths)[:, None], place, 0)
    return flat_places(ids, token_id, order.to(ids.device, non_blocking=True))


def last_instruction(inputs: Mapping, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The position before the first supervised token after each unit, `(U, 1)`; without one, the last token of the row.

    `ends` `(U, 1)` are the positions of the units' last tokens, `rows` `(U,)` their rows.
    """
    ids, labels = inputs["input_ids"], inputs.get("labels")
    place = torch.arange(ids.shape[1], device=ids.device)
    # Last real token of each unit's row, (U, 1).
    last = torch.where(inputs["attention_mask"].bool(), place, 0).amax(1, keepdim=True)[rows]
    if labels is None:
        return last
    # Supervised tokens after each unit, (U, S); the first one's predecessor, (U, 1).
    behind = (labels != -100)[rows] & (place > ends)
    return torch.where(behind, place - 1, last).amin(1, keepdim=True)


def budgets(stages: dict[int, float], lengths: list[int], row_of: list[int], counts: list[int]) -> dict[int, Budget]:
    """What each stage keeps of units of `lengths` in the rows `row_of`, which hold `counts` tokens.

    A stage that drops nothing is left out.
    """
    found, now = {}, lengths
    for index, ratio in stages.items():
        left = [min(n, budget(whole, ratio)) for n, whole in zip(now, lengths, strict=True)]
        if left != now:
            # A row loses what its units have lost since the first stage.
            rows = list(counts)
            for row, whole, n in zip(row_of, lengths, left, strict=True):
                rows[row] -= whole - n
            found[index], now = Budget(left, rows), left
    return found


def cut_of(kept: torch.Tensor, counts: list[int], before: Cut | None) -> Cut:
    """How to keep the `counts[b]` tokens of row b where `kept` `(B, S)` is True."""
    # Kept tokens up to each position, (B, S).
    seen, length = kept.cumsum(1), max(counts)
    slot = torch.arange(length, device=kept.device)
    # Slot j holds the first position with more than j kept tokens; slots beyond the row's end repeat its last, (B, L).
    most = seen[:, -1:]
    places = torch.searchsorted(seen, torch.minimum(slot + 1, most)).clamp(max=kept.shape[1] - 1)
    # The same in slots of the previous stage.
    slots = places if before is None else before.back.gather(1, places)
    filler = None if min(counts) == length else slot >= most
    return Cut(places, slots, (seen - 1).clamp(min=0), filler)
