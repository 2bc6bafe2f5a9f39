"""From encoded images to the inputs of the model's forward: select, isolate and shorten, or hand over all tokens.

Shapes: B batch, S sequence, S' shortened sequence, U units (images, clips), N tokens of a unit (padded), K kept tokens
of a unit (padded), l isolator tokens, D hidden; N_i and K_i without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.profiler import record_function

from ..models.interface import RAW_KEYS, ModelInterface
from ..pruners import PrunedTokens, Pruner
from ..pruners.ops import unpruned
from ..utils.validation import as_type
from .decoder import LayerPass, check_layers
from .encoding import VisualEncoding
from .isolator import ModeIsolator
from .packing import Packing, one_sample, separate_rows
from .positions import numbered
from .sample_rows import SampleRows
from .shortening import FILL, Shortening, plan_shortening


def check_pruner(interface: ModelInterface, pruner: Pruner) -> None:
    """Raises a `ValueError` if the pruner drops tokens inside the language model and cannot do so in this one."""
    if pruner.in_language_model:
        check_layers(interface, pruner)


def check_inputs(inputs: Mapping) -> None:
    """Raises a `ValueError` for a batch that cannot be shortened."""
    for name in ("input_ids", "attention_mask", "labels"):
        as_type(name, inputs.get(name), torch.Tensor | None)
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.is_floating_point():
        raise ValueError(
            "`inputs` must hold `input_ids` of shape (B, S), whole numbers: placeholders are found by their token id."
        )
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` must be of shape {tuple(ids.shape)} like `input_ids`, got {tuple(mask.shape)}. "
            "Masks of other shapes cannot be shortened. Return the mask of padding, and pad samples in place of "
            "packing them: a trainer's padding_free=True lays those of a fast step in one row."
        )


@dataclass
class ShortenedBatch:
    """A batch with pruned visual tokens.

    Args:
        inputs (`dict`): for the model's forward.
        log_sizes (`torch.Tensor` of shape `(B, S')`, *optional*): for proportional attention, the logarithm of how many
            tokens each one stands for, in float32; None if each stands for itself.
        visual_tokens (`tuple[int, int]`): of all images, before and after pruning; (0, 0) if they are dropped later,
            inside the language model.
        auxiliary_loss (`torch.Tensor` of no dimensions, *optional*): what a learned pruner adds to the loss.
        rows (`SampleRows`, *optional*): the samples of one row, which attention has to see each by itself.
    """

    inputs: dict
    log_sizes: torch.Tensor | None = None
    visual_tokens: tuple[int, int] = (0, 0)
    auxiliary_loss: torch.Tensor | None = None
    rows: SampleRows | None = None


def shorten_inputs(
    interface: ModelInterface,
    inputs: Mapping,
    encodings: list[VisualEncoding],
    pruner: Pruner,
    isolator: ModeIsolator | None,
    position_ids: str,
    generator: torch.Generator | None = None,
    layer_pass: LayerPass | None = None,
    progress: float = 1.0,
    multiple: int = 1,
    padding_free: bool = False,
) -> ShortenedBatch:
    """[`prune_inputs`] after encoding, at the fraction `progress` of training, padded to a `multiple` of tokens.

    With a `layer_pass` all tokens stay, and it drops them later. With `padding_free`, samples of a padded batch are
    laid end to end in one row.
    """
    if pruner.in_language_model and layer_pass is None:
        raise ValueError(
            f"The pruner {pruner.config.pruner_type!r} drops tokens inside the language model, so the inputs cannot be "
            "shortened beforehand. Use `with prune_visual_tokens(model, pruner): model(**inputs)`, the trainer, or "
            "another pruner, such as 'divprune'."
        )
    packing = Packing.of(interface, inputs)
    one_row = padding_free and packing is None and len(inputs["input_ids"]) > 1
    if not encodings and not one_row and (multiple == 1 or layer_pass is not None):
        return ShortenedBatch(dict(inputs))
    if packing is not None and multiple > 1:
        raise ValueError(
            f"`fast_length_multiple` is {multiple}, but the batch holds packed samples, which are told apart without "
            "padding. Set fast_length_multiple=1, or pad the batch instead of packing it."
        )
    prompt = isolator() if isolator is not None and isolator.length else None
    # Select: the isolator (l, D), and per modality the kept tokens of all units, (sum (l + K_i), D).
    kept = {e.modality: keep_tokens(e, pruner, prompt, generator, progress) for e in encodings}
    check_placeholders(interface, encodings)
    # Shorten: (B, S) -> (B, S'). Dropped placeholders leave every tensor, isolator tokens enter it.
    mask = mask_of(inputs)
    finite = [of.finite for of in kept.values() if of.finite is not None]
    copies = {e.token_id: kept[e.modality].repeats for e in encodings}
    generates = packing is None and inputs.get("labels") is None
    plan = plan_shortening(inputs["input_ids"], mask, copies, finite, multiple, one_row, generates)
    packing = Packing.of_rows(interface, inputs["input_ids"]) if one_row else packing
    consumed = set().union(*(e.consumed for e in encodings))
    original = {}
    if position_ids == "original":
        original = {"position_ids": full_positions(interface, inputs, mask, generates)}
    short = shorten_tensors(interface, inputs, original, plan, consumed)
    # Placeholders of each modality in the shortened batch, (B, S'). They have no labels, because both modes must count
    # the same tokens.
    places = {token_id: short["input_ids"] == token_id for token_id in interface.visual_token_ids}
    if "labels" in short:
        for place in places.values():
            short["labels"] = short["labels"].masked_fill(place, -100)
        if one_row:  # the end of a sample does not predict the next one's first token
            short["labels"] = short["labels"].masked_fill(packing.begins(plan), -100)
    if position_ids != "original":
        short["position_ids"] = compact_positions(interface, inputs, plan, packing)
    # Find the tokens that layers will drop later.
    if layer_pass is not None:
        length = 0 if prompt is None else len(prompt)
        layer_pass.locate(short, encodings, length, packing is not None, generator)
    # Keep the samples of a packed row apart, and a single sample together.
    rows = separate_rows(interface, plan) if one_row else None
    if rows is None and packing is not None:
        short |= packing.shortened(plan, position_ids, inputs)
    elif packing is None and (prompt is not None or original):
        short |= one_sample(interface, plan.source)
    # Hand over: kept tokens in place of pixels, plus key sizes (B, S'), token counts and losses.
    log_sizes = key_log_sizes(places, encodings, kept)
    short |= absent_inputs(interface, consumed) | merged_inputs(interface, short, encodings, kept)
    losses = [of.auxiliary_loss for of in kept.values() if of.auxiliary_loss is not None]
    counts = sum(sum(e.lengths) for e in encodings), sum(of.count for of in kept.values())
    return ShortenedBatch(
        short,
        log_sizes,
        (0, 0) if pruner.in_language_model else counts,
        sum(losses) if losses else None,
        rows,
    )


def key_log_sizes(
    places: Mapping[int, torch.Tensor], encodings: list[VisualEncoding], kept: Mapping[str, Kept]
) -> torch.Tensor | None:
    """The log of how many tokens each of the shortened batch `(B, S')` stands for, in float32; None if all are 1.

    `places` `(B, S')` are True at the placeholders of an id.
    """
    merged = [(places[encoding.token_id], kept[encoding.modality].sizes) for encoding in encodings]
    merged = [(place, sizes) for place, sizes in merged if sizes is not None]
    if not merged:
        return None
    # 0 for text; at each modality's placeholders, in order, log(size) of its kept tokens (sum (l + K_i),).
    log_sizes = torch.zeros(merged[0][0].shape, device=merged[0][0].device)
    for place, sizes in merged:
        log_sizes.masked_scatter_(place, sizes.log())
    return log_sizes


@dataclass
class Kept:
    """The remaining tokens of one modality.

    Args:
        features (`torch.Tensor` of shape `(sum (l + K_i), D)`): isolator and kept tokens of each unit.
        companions (`dict[str, list[torch.Tensor]]`): other features of the same tokens.
        lengths (`list[int]`): l + K_i of each unit.
        repeats (`torch.LongTensor` of shape `(sum N_i,)`): how often each placeholder appears in the shortened batch.
        sizes (`torch.Tensor` of shape `(sum (l + K_i),)`, *optional*): how many tokens each one stands for; None if
            each stands for itself.
        finite (`torch.BoolTensor` of no dimensions, *optional*): whether all features were finite.
        count (`int`): sum K_i.
        auxiliary_loss (`torch.Tensor` of no dimensions, *optional*): what a learned pruner adds to the loss.
    """

    features: torch.Tensor
    companions: dict[str, list[torch.Tensor]]
    lengths: list[int]
    repeats: torch.Tensor
    sizes: torch.Tensor | None
    finite: torch.Tensor | None
    count: int
    auxiliary_loss: torch.Tensor | None


def keep_tokens(
    encoding: VisualEncoding,
    pruner: Pruner,
    prompt: torch.Tensor | None,
    generator: torch.Generator | None,
    progress: float,
) -> Kept:
    """Prunes one modality and puts the isolator before each unit."""
    tokens, length = encoding.tokens(generator), 0 if prompt is None else len(prompt)
    # Prune: (U, N, D) -> (U, K, D).
    if pruner.in_language_model:
        pruned = replace(unpruned(tokens), finite=tokens.features.detach().isfinite().all())
    else:
        with record_function("dualspeed.select"):
            pruned = pruner(tokens, progress=progress)
    # Real rows of (U * (l + K), D), and repeats of each placeholder (sum N_i,).
    rows = real_rows(pruned, length)
    repeats = repeats_of(pruned, rows, encoding.lengths, length)

    # Other features of the kept tokens, zeros for the isolator: (sum N_i, D') -> (sum (l + K_i), D').
    def carried(level: torch.Tensor) -> torch.Tensor:
        return chosen(isolated_by_zeros(pruned.apply_to(encoding.padded(level)), prompt), rows)

    # Isolator before each unit, padding removed: (U, K, D) -> (sum (l + K_i), D).
    companions = {name: [carried(level) for level in levels] for name, levels in encoding.companions.items()}
    features = chosen(isolated(pruned.features, prompt), rows)
    # Tokens that each row stands for, (U, K) -> (sum (l + K_i),): 1 for isolator tokens.
    sizes = None
    if pruned.lengths != encoding.lengths:
        sizes = chosen(F.pad(pruned.sizes.float(), (length, 0), value=1.0).flatten(), rows)
    return Kept(
        features,
        companions,
        [length + keep for keep in pruned.lengths],
        repeats,
        sizes,
        pruned.finite,
        sum(pruned.lengths),
        pruned.auxiliary_loss,
    )


def check_placeholders(interface: ModelInterface, encodings: list[VisualEncoding]) -> None:
    """Raises a `ValueError` if two modalities of the batch share a placeholder."""
    if len({encoding.token_id for encoding in encodings}) < len(encodings):
        raise ValueError(
            f"{interface.name} writes images and videos with one placeholder (token id "
            f"{encodings[0].token_id}), so a batch may hold images or videos, not both."
        )


def whole_inputs(interface: ModelInterface, inputs: Mapping, encodings: list[VisualEncoding]) -> dict:
    """The batch with all tokens of `encodings` in place of raw images, for a pass that does not encode again."""
    absent = absent_inputs(interface, set().union(*(e.consumed for e in encodings)))
    whole = {key: value for key, value in inputs.items() if key not in interface.raw_keys} | absent
    # All tokens, as the encoder returned them, or as embeddings at their placeholders.
    outputs = {e.modality: e.output for e in encodings if not e.embedded}
    embedded = {e.token_id: e.features for e in encodings if e.embedded}
    if embedded and interface.positions_owner is not None:  # M-RoPE positions need the ids
        whole["position_ids"] = full_positions(interface, inputs, mask_of(inputs))
    return whole | handed_over(interface, inputs["input_ids"], outputs, embedded)


def mask_of(inputs: Mapping) -> torch.Tensor:
    """The batch's attention mask `(B, S)`; ones if it has none."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def absent_inputs(interface: ModelInterface, consumed: set[str]) -> dict:
    """Required arguments of `forward` that have been encoded already: None for each."""
    return dict.fromkeys(interface.forward.required & {*consumed, *RAW_KEYS})


def merged_inputs(
    interface: ModelInterface, inputs: Mapping, encodings: list[VisualEncoding], kept: Mapping[str, Kept]
) -> dict:
    """Passes kept tokens to `forward`: in `mm_encoder_outputs`, or as input embeddings if it takes no encoded ones."""
    outputs, embedded = {}, {}
    for encoding in encodings:
        of = kept[encoding.modality]
        if encoding.embedded:
            embedded[encoding.token_id] = of.features
        else:
            outputs[encoding.modality] = encoding.with_features(of.features, of.companions, of.lengths)
    return handed_over(interface, inputs["input_ids"], outputs, embedded)


def handed_over(
    interface: ModelInterface, ids: torch.Tensor, outputs: dict, embedded: Mapping[int, torch.Tensor]
) -> dict:
    """Arguments of `forward` for encoder outputs by modality and for embedded tokens by placeholder id."""
    arguments = {"mm_encoder_outputs": outputs} if outputs else {}
    if embedded:
        arguments |= {"input_ids": None, "inputs_embeds": embedded_ids(interface, ids, embedded)}
    return arguments


def embedded_ids(interface: ModelInterface, ids: torch.Tensor, embedded: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Input embeddings `(B, S, D)` with the rows of `embedded` at their placeholders."""
    # Embeddings of the text, (B, S) -> (B, S, D).
    text = ids
    for token_id in embedded:  # some placeholder ids have no row in the embedding
        text = text.masked_fill(ids == token_id, fill_value(interface))
    states = interface.outer.get_input_embeddings()(text)
    # Encoded tokens (T, D) at their placeholders.
    for token_id, rows in embedded.items():
        states = states.masked_scatter((ids == token_id)[..., None], rows.to(states.dtype))
    return states


def isolated(features: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """Puts the isolator `(l, D)` before the kept tokens `(U, K, D)` and flattens: `(U * (l + K), D)`."""
    # (l, D) -> (U, l, D), then (U, l + K, D).
    if prompt is not None:
        prompt = prompt.to(features.dtype).expand(len(features), -1, -1)
        features = torch.cat([prompt, features], dim=1)
    return features.flatten(0, 1)


def isolated_by_zeros(features: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """[`isolated`] for features that are added deeper in the model, to which the isolator adds zeros."""
    return isolated(features, None if prompt is None else features.new_zeros(len(prompt), features.shape[-1]))


def real_rows(pruned: PrunedTokens, isolator_length: int) -> torch.Tensor | None:
    """The rows `(sum (l + K_i),)` of [`isolated`] that are no padding; None if all are real.

    Found on the device. Their number is known on the host, so nothing waits.
    """
    if min(pruned.lengths) == max(pruned.lengths):
        return None
    # Real rows up to each one, (U * (l + K),): number j is the first row with j + 1 of them.
    seen = F.pad(pruned.valid, (isolator_length, 0), value=True).flatten().cumsum(0)
    count = sum(pruned.lengths) + isolator_length * len(pruned.lengths)
    return torch.searchsorted(seen, torch.arange(1, count + 1, device=seen.device))


def chosen(tensor: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The `rows` of a tensor, all if None."""
    return tensor if rows is None else tensor.index_select(0, rows)


def repeats_of(
    pruned: PrunedTokens, rows: torch.Tensor | None, lengths: list[int], isolator_length: int
) -> torch.Tensor:
    """How often each placeholder appears in the shortened batch, `(sum N_i,)`; `rows` are those of [`real_rows`]."""
    device, total = pruned.positions.device, sum(lengths)
    # Number of each unit's first placeholder in the batch, (U, 1).
    if min(lengths) == max(lengths):
        starts = torch.arange(0, total, lengths[0], device=device)[:, None]
    else:
        firsts = accumulate(lengths[:-1], initial=0)
        starts = torch.tensor([[first] for first in firsts]).to(device, non_blocking=True)
    # Placeholder of each row, (U, l + K) -> (sum (l + K_i),): isolator tokens stand at the unit's first one.
    places = F.pad(pruned.positions, (isolator_length, 0)) if isolator_length else pruned.positions
    places = chosen((places + starts).flatten(), rows)
    return torch.zeros(total, dtype=torch.long, device=device).scatter_add_(0, places, torch.ones_like(places))


def shorten_tensors(
    interface: ModelInterface, inputs: Mapping, positions: dict, plan: Shortening, consumed: set[str]
) -> dict:
    """Shortens every `[B, S]` tensor that the language model reads, and leaves out what only the encoder reads.

    `positions` are shortened with them. Padding holds a text id for ids, -100 for labels, else 0.
    """
    shape, given = inputs["input_ids"].shape, inputs.get("attention_mask")
    encoded = interface.raw_keys
    left = tuple(key for key in RAW_KEYS if key not in encoded)  # `forward` encodes these, with their masks
    read = {key: value for key, value in inputs.items() if key not in consumed and key not in encoded}
    read = {key: value for key, value in read.items() if key not in ("position_ids", "attention_mask")}
    # (B, S) -> (B, S'), all at once.
    of_tokens = {
        key: value
        for key, value in read.items()
        if isinstance(value, torch.Tensor) and value.shape == shape and not key.startswith(left)
    }
    short = read | plan.apply_to_all(of_tokens | positions, FILL | {"input_ids": fill_value(interface)})
    # The mask of the shortened batch, in the dtype of the given one.
    short["attention_mask"] = plan.mask.to(plan.source.dtype if given is None else given.dtype)
    return short


def fill_value(interface: ModelInterface) -> int:
    """A padding id that is no placeholder."""
    pad, taken = interface.text_config.pad_token_id, interface.visual_token_ids
    # The model's padding id if it has a suitable one, else the smallest id that is no placeholder.
    return pad if pad is not None and pad not in taken else next(i for i in range(len(taken) + 1) if i not in taken)


def compact_positions(
    interface: ModelInterface, inputs: Mapping, plan: Shortening, packing: Packing | None
) -> torch.Tensor:
    """Position ids that count the real tokens of each sample, `(B, S')`, equal on all axes `(A, B, S')` of M-RoPE."""
    compact = plan.mask.cumsum(1) - 1 if packing is None else packing.restarted(plan)
    compact = compact.clamp_(min=0)
    # Axes: those of the positions that the batch brings, or that the model would make.
    given, owner = inputs.get("position_ids"), interface.positions_owner
    if given is not None:
        return compact.expand(*given.shape[:-2], -1, -1)
    if owner is None:
        return compact
    return compact.expand(*full_positions(interface, inputs, mask_of(inputs)).shape[:-2], -1, -1)


def full_positions(
    interface: ModelInterface, inputs: Mapping, mask: torch.Tensor, generates: bool = False
) -> torch.Tensor:
    """The positions that the model, or its `generate`, gives the full sequence, `(B, S)` or `(3, B, S)`."""
    # The batch may bring its own, and the model may number on several axes.
    positions, owner = inputs.get("position_ids"), interface.positions_owner
    if positions is None and owner is not None:
        positions = numbered(owner, inputs, mask)
    if positions is not None:
        return positions
    # Some leave padding out, as `generate` does; most number 0, 1, ...
    if generates or interface.skips_padding:
        return (mask.long().cumsum(1) - 1).clamp_(min=0)
    return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
