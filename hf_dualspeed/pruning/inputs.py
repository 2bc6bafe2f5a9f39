"""The fast pass: encode, select, isolate, shorten. The model's own forward does the rest.

Shapes: B batch, S sequence, S' shortened sequence, U images, K kept tokens, l isolator tokens, D hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function

from ..models.interface import RAW_KEYS, encoder_owner, raw_keys, unwrap, visual_token_ids
from ..pruners import PrunedTokens, Pruner
from ..pruners.ops import unpruned
from .decoder import LayerPass, check_layers
from .encoding import VisualEncoding
from .isolator import ModeIsolator
from .packing import Packing, one_sample
from .shortening import FILL, Shortening, plan_shortening


def check_pruner(model: nn.Module, pruner: Pruner) -> None:
    """Raises a `ValueError` where the pruner drops tokens inside the language model and this one does not let it."""
    if pruner.in_language_model:
        check_layers(model, pruner)


def check_inputs(inputs: Mapping) -> None:
    """Raises a `ValueError` for a batch that cannot be shortened."""
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        raise ValueError("`inputs` must hold `input_ids` of shape (B, S): placeholders are found by their token id.")
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"`attention_mask` must be of shape {tuple(ids.shape)} like `input_ids`, got {tuple(mask.shape)}. "
            "Masks of other shapes cannot be shortened."
        )


@dataclass
class ShortenedBatch:
    """A batch whose visual tokens were pruned.

    Args:
        inputs (`dict`): for the model's forward.
        log_sizes (`torch.Tensor` of shape `(B, S')`, *optional*): for proportional attention, the logarithm of how many
            tokens each one stands for, in float32; None where each stands for itself.
        visual_tokens (`tuple[int, int]`): of all images, before and after pruning; (0, 0) where they are dropped later,
            inside the language model.
        auxiliary_loss (`torch.Tensor` of no dimensions, *optional*): what a learned pruner adds to the loss.
    """

    inputs: dict
    log_sizes: torch.Tensor | None = None
    visual_tokens: tuple[int, int] = (0, 0)
    auxiliary_loss: torch.Tensor | None = None


def shorten_inputs(
    model: nn.Module,
    inputs: Mapping,
    encodings: list[VisualEncoding],
    pruner: Pruner,
    isolator: ModeIsolator | None,
    position_ids: str,
    generator: torch.Generator | None = None,
    layer_pass: LayerPass | None = None,
    progress: float = 1.0,
) -> ShortenedBatch:
    """[`prune_inputs`] after encoding, when the fraction `progress` of training is done. With a `layer_pass` all tokens
    stay, for it to drop later."""
    if pruner.in_language_model and layer_pass is None:
        raise ValueError(
            f"The pruner {pruner.config.pruner_type!r} drops tokens inside the language model, so the inputs cannot be "
            "shortened beforehand. Use `with prune_visual_tokens(model, pruner): model(**inputs)`, the trainer, or "
            "another pruner, such as 'divprune'."
        )
    if not encodings:
        return ShortenedBatch(dict(inputs))
    prompt = isolator() if isolator is not None and isolator.length else None
    # Select: the isolator and the kept tokens of each modality.
    kept = {e.modality: keep_tokens(e, pruner, prompt, generator, progress) for e in encodings}
    check_placeholders(model, encodings)
    # Shorten: dropped placeholders leave every (B, S) tensor, isolator tokens enter it.
    packing = Packing.of(model, inputs)
    mask = mask_of(inputs)
    finite = [of.finite for of in kept.values() if of.finite is not None]
    plan = plan_shortening(inputs["input_ids"], mask, {e.token_id: kept[e.modality].repeats for e in encodings}, finite)
    consumed = set().union(*(e.consumed for e in encodings))
    short = shorten_tensors(model, inputs, plan, consumed)
    short["position_ids"] = shortened_positions(model, inputs, mask, plan, position_ids, packing)
    if layer_pass is not None:
        layer_pass.locate(short, encodings, 0 if prompt is None else len(prompt), packing is not None)
    if packing is not None:
        short |= packing.shortened(plan, position_ids, inputs)
    elif prompt is not None:
        short |= one_sample(model, plan)
    # Hand over: kept tokens in place of pixels, and what proportional attention, counters and losses need beside.
    log_sizes = key_log_sizes(short["input_ids"], encodings, kept)
    short |= absent_inputs(model, consumed) | merged_inputs(model, short, encodings, kept)
    losses = [of.auxiliary_loss for of in kept.values() if of.auxiliary_loss is not None]
    return ShortenedBatch(
        short,
        log_sizes,
        (0, 0) if pruner.in_language_model else visual_tokens_of(encodings, kept),
        sum(losses) if losses else None,
    )


def visual_tokens_of(encodings: list[VisualEncoding], kept: Mapping[str, Kept]) -> tuple[int, int]:
    """How many visual tokens there were, and how many are kept; counted on the host."""
    return sum(sum(e.lengths) for e in encodings), sum(of.count for of in kept.values())


def key_log_sizes(ids: torch.Tensor, encodings: list[VisualEncoding], kept: Mapping[str, Kept]) -> torch.Tensor | None:
    """The logarithm of how many tokens each one of the shortened `ids` `(B, S')` stands for, in float32; None where
    each stands for itself."""
    merged = [(encoding.token_id, kept[encoding.modality].sizes) for encoding in encodings]
    merged = [(token_id, sizes) for token_id, sizes in merged if sizes is not None]
    if not merged:
        return None
    log_sizes = torch.zeros(ids.shape, device=ids.device)
    for token_id, sizes in merged:
        log_sizes = log_sizes.masked_scatter(ids == token_id, sizes.log())
    return log_sizes


@dataclass
class Kept:
    """What is left of the tokens of one modality.

    Args:
        features (`torch.Tensor` of shape `(sum (l + K_i), D)`): isolator and kept tokens of each unit.
        companions (`dict[str, list[torch.Tensor]]`): other features of the same tokens.
        lengths (`list[int]`): l + K_i of each unit.
        repeats (`torch.LongTensor` of shape `(sum N_i,)`): how often each placeholder appears in the shortened batch.
        sizes (`torch.Tensor` of shape `(sum (l + K_i),)`, *optional*): how many tokens each one stands for; None where
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
    """Prunes one modality and puts the isolator in front of each unit."""
    tokens, length = encoding.tokens(generator), 0 if prompt is None else len(prompt)
    if pruner.in_language_model:
        pruned = replace(unpruned(tokens), finite=tokens.features.detach().isfinite().all())
    else:
        with record_function("dualspeed.select"):
            pruned = pruner(tokens, progress=progress)
    rows, repeats = kept_rows(pruned, encoding.lengths, length)

    def carried(level: torch.Tensor) -> torch.Tensor:
        return isolated_by_zeros(pruned.apply_to(encoding.padded(level)), prompt).index_select(0, rows)

    companions = {name: [carried(level) for level in levels] for name, levels in encoding.companions.items()}
    features = isolated(pruned.features, prompt).index_select(0, rows)
    sizes = None
    if pruned.lengths != encoding.lengths:  # isolator tokens stand for themselves
        sizes = F.pad(pruned.sizes.float(), (length, 0), value=1.0).flatten().index_select(0, rows)
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


def check_placeholders(model: nn.Module, encodings: list[VisualEncoding]) -> None:
    """Raises a `ValueError` where two modalities of the batch are written with one placeholder."""
    if len({encoding.token_id for encoding in encodings}) < len(encodings):
        raise ValueError(
            f"{type(unwrap(model)).__name__} writes images and videos with one placeholder (token id "
            f"{encodings[0].token_id}), so a batch may hold images or videos, not both."
        )


def whole_inputs(model: nn.Module, inputs: Mapping, encodings: list[VisualEncoding]) -> dict:
    """The batch with all tokens of `encodings` in place of raw images, for a pass that need not encode again."""
    encoded = raw_keys(unwrap(model).config)
    absent = absent_inputs(model, set().union(*(e.consumed for e in encodings)))
    whole = {key: value for key, value in inputs.items() if key not in encoded} | absent
    outputs = {e.modality: e.output for e in encodings if not e.embedded}
    embedded = {e.token_id: e.features for e in encodings if e.embedded}
    if embedded and encoder_owner(model, "compute_3d_position_ids") is not None:  # which reads the ids
        whole["position_ids"] = full_positions(model, inputs, mask_of(inputs))
    return whole | handed_over(model, inputs["input_ids"], outputs, embedded)


def mask_of(inputs: Mapping) -> torch.Tensor:
    """The batch's attention mask `(B, S)`; of ones where it has none."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"]) if mask is None else mask


def absent_inputs(model: nn.Module, consumed: set[str]) -> dict:
    """Inputs of the encoder that `forward` must be given even where they have been encoded: None."""
    parameters = inspect.signature(unwrap(model).forward).parameters.values()
    required = {p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return dict.fromkeys(required & {*consumed, *RAW_KEYS})


def merged_inputs(model: nn.Module, inputs: Mapping, encodings: list[VisualEncoding], kept: Mapping[str, Kept]) -> dict:
    """What hands the encoded tokens to `forward`: `mm_encoder_outputs`, and input embeddings for those it takes
    nowhere else."""
    outputs, embedded = {}, {}
    for encoding in encodings:
        of = kept[encoding.modality]
        if encoding.embedded:
            embedded[encoding.token_id] = of.features
        else:
            outputs[encoding.modality] = encoding.with_features(of.features, of.companions, of.lengths)
    return handed_over(model, inputs["input_ids"], outputs, embedded)


def handed_over(model: nn.Module, ids: torch.Tensor, outputs: dict, embedded: Mapping[int, torch.Tensor]) -> dict:
    """Encoder outputs by modality, and tokens by placeholder that go in as embeddings, as arguments of `forward`."""
    arguments = {"mm_encoder_outputs": outputs} if outputs else {}
    if embedded:
        arguments |= {"input_ids": None, "inputs_embeds": embedded_ids(model, ids, embedded)}
    return arguments


def embedded_ids(model: nn.Module, ids: torch.Tensor, embedded: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Input embeddings `(B, S, D)` with the rows of `embedded` at their placeholders."""
    outer = unwrap(model)
    text = ids
    for token_id in embedded:  # some placeholders are no row of the embedding
        text = text.masked_fill(ids == token_id, fill_value(outer.config))
    states = outer.get_input_embeddings()(text)
    for token_id, rows in embedded.items():
        states = states.masked_scatter((ids == token_id)[..., None], rows.to(states.dtype))
    return states


def isolated(features: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """Kept tokens `(U, K, D)` behind the isolator `(l, D)`, flattened: `(U * (l + K), D)`."""
    if prompt is not None:
        prompt = prompt.to(features.dtype).expand(len(features), -1, -1)
        features = torch.cat([prompt, features], dim=1)
    return features.flatten(0, 1)


def isolated_by_zeros(features: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """[`isolated`] for features that are added deeper in the model, where the isolator adds nothing."""
    return isolated(features, None if prompt is None else features.new_zeros(len(prompt), features.shape[-1]))


def kept_rows(pruned: PrunedTokens, lengths: list[int], isolator_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of [`isolated`] are real, and how often each placeholder appears in the shortened batch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: rows `(sum (l + K_i),)` and repeats `(sum N_i,)`. All sizes are known on
        the host, so nothing here waits for the device.
    """
    device = pruned.positions.device
    slots, first, rows, kept, starts = pruned.positions.shape[1], 0, [], [], []
    for image, (count, keep) in enumerate(zip(lengths, pruned.lengths, strict=True)):
        begin = image * (isolator_length + slots)
        rows.append(torch.arange(begin, begin + isolator_length + keep))
        kept.append(torch.arange(image * slots, image * slots + keep))
        starts.append(first)
        first += count
    starts = torch.tensor(starts).to(device, non_blocking=True)
    positions = (pruned.positions + starts[:, None]).flatten()
    positions = positions[torch.cat(kept).to(device, non_blocking=True)]
    repeats = torch.zeros(first, dtype=torch.long, device=device)
    repeats.index_fill_(0, positions, 1)  # `repeats[positions] = 1` would copy the 1 from the host, and wait
    repeats[starts] += isolator_length
    return torch.cat(rows).to(device, non_blocking=True), repeats


def shorten_tensors(model: nn.Module, inputs: Mapping, plan: Shortening, consumed: set[str]) -> dict:
    """Shortens every `[B, S]` tensor that the language model reads; what only the encoder reads is left out."""
    shape = inputs["input_ids"].shape
    config = unwrap(model).config
    encoded, short = raw_keys(config), {}
    left = tuple(key for key in RAW_KEYS if key not in encoded)  # for `forward`, with their masks
    for key, value in inputs.items():
        if key in consumed or key in encoded or key == "position_ids":
            continue
        if isinstance(value, torch.Tensor) and value.shape == shape and not key.startswith(left):
            value = plan.apply(value, fill_value(config) if key == "input_ids" else FILL.get(key, 0))
        short[key] = value
    given = short.get("attention_mask")
    short["attention_mask"] = plan.mask.to(plan.source.dtype if given is None else given.dtype)
    if "labels" in short:  # the two modes must count the same tokens
        for token_id in visual_token_ids(config):
            short["labels"] = short["labels"].masked_fill(short["input_ids"] == token_id, -100)
    return short


def fill_value(config) -> int:
    """A padding id that is no placeholder."""
    pad = config.get_text_config().pad_token_id
    taken = visual_token_ids(config)
    return pad if pad is not None and pad not in taken else next(i for i in range(len(taken) + 1) if i not in taken)


def shortened_positions(
    model: nn.Module, inputs: Mapping, mask: torch.Tensor, plan: Shortening, scheme: str, packing: Packing | None
) -> torch.Tensor:
    """Position ids of the shortened batch, `(B, S')`, or `(3, B, S')` for M-RoPE."""
    full = full_positions(model, inputs, mask)
    if scheme == "original":
        return plan.apply(full)
    compact = plan.mask.long().cumsum(1) - 1 if packing is None else packing.restarted(plan)
    return compact.clamp(min=0).expand(*full.shape[:-2], -1, -1)


def full_positions(model: nn.Module, inputs: Mapping, mask: torch.Tensor) -> torch.Tensor:
    """The positions that the model would give the full sequence, `(B, S)` or `(3, B, S)`."""
    given = inputs.get("position_ids")
    if given is not None:
        return given
    ids = inputs["input_ids"]
    owner = encoder_owner(model, "compute_3d_position_ids")
    if owner is None:
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # The model's own numbering of images needs the kind of each token, and some take silence for "all text".
    rope = encoder_owner(model, "get_rope_index")
    asks = rope is not None and "mm_token_type_ids" in inspect.signature(rope.get_rope_index).parameters
    if asks and inputs.get("mm_token_type_ids") is None:
        raise ValueError(
            "`inputs` lacks `mm_token_type_ids`, without which the model numbers image tokens as text. "
            "Let the collator pass on all that the processor returns."
        )
    names = inspect.signature(owner.compute_3d_position_ids).parameters
    arguments = {key: inputs.get(key) for key in names}
    if inputs.get("feature_attention_mask") is not None:  # of mel frames, which `forward` counts like this
        arguments["audio_feature_lengths"] = inputs["feature_attention_mask"].sum(1)
    before = getattr(owner, "rope_deltas", None)  # which numbering the full sequence overwrites
    positions = owner.compute_3d_position_ids(**{**arguments, "attention_mask": mask, "past_key_values": None})
    owner.rope_deltas = before
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids) if positions is None else positions
