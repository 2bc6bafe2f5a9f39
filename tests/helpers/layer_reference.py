"""Plain, slow references for pruners inside the language model, token by token in Python."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field

import torch
from families import FAMILIES
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from hf_dualspeed import AutoPruner, prune_visual_tokens
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruning.encoding import encode

ISOLATOR = 3


def deep(name: str, layers: int = 4, sharp: bool = True):
    """A tiny model of more layers, whose attention is far from uniform if `sharp`."""
    shallow = FAMILIES[name].build()
    config = copy.deepcopy(shallow.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = (text.layer_types * layers)[:layers]
    torch.manual_seed(0)
    model = type(shallow)(config).eval()
    return sharpened(model) if sharp else model


def sharpened(model):
    """Attention far from uniform."""
    with torch.no_grad():
        for name, weight in model.get_decoder().named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.mul_(6)
    return model


def keep(count: int, gone: float) -> int:
    return max(1, math.floor(count * (1 - gone) + 1e-6))


@dataclass
class Unit:
    """An image or clip: its row, the places of its tokens, and that of the last instruction token."""

    row: int
    places: list[int] = field(default_factory=list)
    query: int = -1


@dataclass
class Isolated:
    """A batch with isolators, no token dropped: places of real tokens and of supervised ones in each row, and units."""

    length: int
    real: list[list[int]]
    supervised: list[list[int]]
    units: list[Unit]
    targets: list[int]


def isolate(model, inputs: dict, isolator: int = ISOLATOR) -> Isolated:
    """Where everything lies once each image stands behind an isolator."""
    lengths = {e.token_id: iter(e.lengths) for e in encode(ModelInterface(model), inputs)}
    units, rows, targets = [], [], []
    for row, (ids, mask) in enumerate(
        zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    ):
        labels = inputs["labels"][row].tolist() if "labels" in inputs else [-100] * len(ids)
        place, supervised, unit, left = 0, [], {}, dict.fromkeys(lengths, 0)
        for token, real, label in zip(ids, mask, labels, strict=True):
            if not real:
                continue
            if token in lengths:
                if not left[token]:
                    left[token], unit[token] = next(lengths[token]), Unit(row)
                    units.append(unit[token])
                    place += isolator
                left[token] -= 1
                unit[token].places.append(place)
            elif label != -100:
                supervised.append(place)
                targets.append(label)
            place += 1
        rows.append((place, supervised))
    length = max(n for n, _ in rows)
    left = (inputs["attention_mask"][:, 0] == 0).any()
    shift = [length - n if left else 0 for n, _ in rows]
    supervised = [[p + by for p in places] for (_, places), by in zip(rows, shift, strict=True)]
    for unit in units:
        unit.places = [p + shift[unit.row] for p in unit.places]
        behind = [p for p in supervised[unit.row] if p > unit.places[-1]]
        unit.query = (behind[0] if behind else rows[unit.row][0] + shift[unit.row]) - 1
    real = [list(range(by, by + n)) for (n, _), by in zip(rows, shift, strict=True)]
    return Isolated(length, real, supervised, units, targets)


# --- all tokens stay, and dropped ones are hidden from the others ---------------------------------------------------


class Hiding:
    """An attention function that hides dropped tokens, by the rule of the papers."""

    now: Hiding | None = None

    def __init__(self, model, batch: Isolated, stages: dict[int, float]):
        layers = next(m for m in model.get_decoder().modules() if hasattr(m, "layers")).layers
        self.layer = {id(module): i for i, layer in enumerate(layers) for module in layer.modules()}
        self.batch, self.stages = batch, stages
        self.dropped = [set() for _ in batch.real]

    def attend(self, module, query, key, value, mask, scaling, softcap=None):
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        scores = scores if mask is None else scores + mask
        layer = self.layer.get(id(module)) if Hiding.now is self else None
        if layer is not None:
            assert mask is not None or query.shape[2] == 1
            for row, dropped in enumerate(self.dropped):
                scores[row, :, :, sorted(dropped)] = torch.finfo(scores.dtype).min
        maps = scores.softmax(-1)
        if layer is not None and layer + 1 in self.stages:
            self.choose(maps.mean(1), self.stages[layer + 1])
        return (maps @ value).transpose(1, 2).contiguous(), None

    def choose(self, maps: torch.Tensor, gone: float) -> None:
        chosen = []
        for unit in self.batch.units:
            query = unit.query
            while query in self.dropped[unit.row]:
                query -= 1
            left = [p for p in unit.places if p not in self.dropped[unit.row]]
            best = sorted(left, key=lambda p: (-float(maps[unit.row, query, p]), p))
            chosen.append((unit.row, best[keep(len(unit.places), gone) :]))
        for row, places in chosen:
            self.dropped[row].update(places)


def hiding_attention(module, query, key, value, attention_mask=None, scaling=None, softcap=None, **options):
    function = Hiding.now or Plain
    return function.attend(module, query, key, value, attention_mask, scaling, softcap)


class PlainAttention(Hiding):
    def __init__(self):
        self.layer = {}


Plain = PlainAttention()
AttentionInterface.register("hiding_test", hiding_attention)
AttentionMaskInterface.register("hiding_test", eager_mask)


@torch.no_grad()
def hidden_logits(model, inputs: dict, stages: dict[int, float], isolator, scheme: str) -> tuple[torch.Tensor, list]:
    """Logits `(M, V)` of supervised tokens and what each row dropped: nothing shortened, dropped tokens hidden."""
    model = copy.deepcopy(model)
    model.get_decoder().config._attn_implementation = "hiding_test"  # towers stay as they are
    batch = isolate(model, inputs, isolator.length)
    whole = AutoPruner.from_name("fastv", pruning_ratio=0.0, layer=1)
    Hiding.now = hiding = Hiding(model, batch, stages)
    try:
        with prune_visual_tokens(model, whole, isolator, scheme):
            logits = model(**inputs).logits
    finally:
        Hiding.now = None
    rows = []
    for row, places in enumerate(batch.supervised):
        kept = [p for p in batch.real[row] if p not in hiding.dropped[row]]
        rows += [logits[row, max(k for k in kept if k < p)] for p in places]
    return torch.stack(rows), hiding.dropped


# --- one sample, layer by layer, dropped tokens physically removed --------------------------------------------------


@torch.no_grad()
def removed_logits(
    model, inputs: dict, stages: dict[int, float], isolator, both_ways: bool = False, merged: bool = False
) -> torch.Tensor:
    """Logits `(M, V)` of the supervised tokens of one unpadded sample, by a loop over the layers in eager mode;
    `both_ways`: the tokens of an image see each other, as in Gemma 3, which has rotary embeddings by kind of layer;
    `merged`: kept tokens are means of those most similar to them, and count for as many."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    (batch, decoder), given = (isolate(model, inputs, isolator.length), model.get_decoder()), {}
    handle = decoder.register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    whole = AutoPruner.from_name("fastv", pruning_ratio=0.0, layer=1)
    with prune_visual_tokens(model, whole, isolator, "original"):
        model(**inputs)
    handle.remove()
    hidden, positions, places = given["inputs_embeds"], given["position_ids"], batch.real[0]
    assert hidden.shape[1] == len(places)
    kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"] * len(decoder.layers)
    maps, sizes = [], dict.fromkeys(places, 1.0)
    for layer in decoder.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    for index, (layer, kind) in enumerate(zip(decoder.layers, kinds, strict=True)):
        if index in stages:
            paid, gone = maps[-1][0].mean(0), set()
            for unit in batch.units:
                left = [p for p in unit.places if p in places]
                query = max(i for i, p in enumerate(places) if p <= unit.query)
                left.sort(key=lambda p: (-float(paid[query, places.index(p)]), p))
                count = keep(len(unit.places), stages[index])
                gone |= set(left[count:])
                if merged:
                    hidden = merge(hidden, places, sizes, sorted(left[:count]), sorted(left[count:]))
            stay = [i for i, p in enumerate(places) if p not in gone]
            places = [places[i] for i in stay]
            hidden, positions = hidden[:, stay], positions[..., stay]
        place = torch.tensor(places)
        seen = place <= place[:, None]
        if kind == "sliding_attention":
            seen &= place > place[:, None] - decoder.config.sliding_window
        for unit in batch.units if both_ways else ():
            inside = (place >= unit.places[0] - isolator.length) & (place <= unit.places[-1])
            seen |= inside & inside[:, None]
        mask = hidden.new_zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        mask = mask + torch.tensor([sizes[p] for p in places]).log()
        extra = (kind,) if both_ways else ()
        embeddings = decoder.rotary_emb(hidden, positions, *extra)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=embeddings)
    states = decoder.norm(hidden)[0]
    return model.lm_head(states[[places.index(p) - 1 for p in batch.supervised[0]]])


def merge(hidden: torch.Tensor, places: list[int], sizes: dict[int, float], kept: list[int], gone: list[int]):
    """The states `(1, S, D)` at `places` with those at `gone` averaged into the most similar of those at `kept`, by how
    many tokens each stands for; counts them in `sizes`."""
    state = {p: hidden[0, places.index(p)] for p in (*kept, *gone)}
    heap = {p: [p] for p in kept}
    for p in gone:
        similar = [torch.cosine_similarity(state[p], state[k], dim=0) for k in kept]
        heap[kept[int(torch.stack(similar).argmax())]].append(p)
    hidden = hidden.clone()
    for p, own in heap.items():
        total = sum(sizes[q] for q in own)
        hidden[0, places.index(p)] = sum(sizes[q] * state[q] for q in own) / total
        sizes[p] = total
    return hidden
