"""Conformance checks: does a vision-language model of transformers work with DualSpeed? One model, one batch.

Shapes: B batch, S sequence, S' shortened sequence, U units, N tokens of a unit, M supervised positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from .models.components import language_parts
from .models.interface import ModelInterface
from .pruners import AutoPruner, Pruner, budget
from .pruning.api import prune_inputs
from .pruning.encoding import VisualEncoding, encode
from .pruning.inputs import full_positions
from .pruning.isolator import ModeIsolator
from .pruning.packing import shortest_reach
from .pruning.proportional_attention import key_sizes_of
from .trainer.dual_forward import DualForward
from .trainer.schedule import FAST, SLOW
from .utils.progress import track
from .utils.validation import checked

RATIO = 0.75
ISOLATOR = 3
NEW_TOKENS = 4
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


@dataclass
class Batch:
    """The inputs of all checks, and what the model can do.

    Args:
        inputs (`Mapping`): Several samples with labels, of different lengths and image counts.
        alone (`Mapping`, *optional*): One of these samples by itself.
        row (`int`): The row of that sample.
        masks_tokens (`bool`): Whether the attention mask can hide a token from all others. Convolutions and state
            space layers see every position.
        trains_encoder (`bool`): Whether gradients flow from visual tokens. Tokens from a codebook have none.
        generates (`bool`): Whether the model's `generate` takes encoded images.
        beams (`bool`): Whether `generate` can repeat encoded inputs for several beams.
        position_ids (`str`): As in [`prune_inputs`].
        video_budget (`str`): As in [`prune_inputs`].
        proportional_attention (`bool`): As in [`prune_inputs`].
    """

    inputs: Mapping
    alone: Mapping | None = None
    row: int = 0
    masks_tokens: bool = True
    trains_encoder: bool = True
    generates: bool = True
    beams: bool = True
    position_ids: str = "original"
    video_budget: str = "clip"
    proportional_attention: bool = True


@dataclass
class Check:
    """A check's outcome: whether it passed (None: the batch cannot show it), and why not."""

    name: str
    passed: bool | None
    detail: str = ""


@checked
def check_model(model: nn.Module, batch: Batch) -> list[Check]:
    """Runs all checks in evaluation mode. Restores the model's mode."""
    training = model.training
    model.eval()
    try:
        return [run(name, check, model, batch) for name, check in track(CHECKS.items(), "Checking the model")]
    finally:
        model.train(training)
        model.zero_grad()


def run(name: str, check: Callable[[nn.Module, Batch], bool | None], model: nn.Module, batch: Batch) -> Check:
    try:
        return Check(name, None if check(model, batch) is False else True)
    except (AssertionError, ValueError, RuntimeError, TypeError, IndexError, KeyError, AttributeError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}"[:500])


def pruner_of(name: str = "divprune", ratio: float = RATIO, **settings) -> Pruner:
    return AutoPruner.from_name(name, pruning_ratio=ratio, **settings)


def shorten(model: nn.Module, batch: Batch, ratio: float = RATIO, name: str = "divprune", **options) -> dict:
    return shorten_one(model, batch, batch.inputs, ratio, name, **options)


def shorten_one(
    model: nn.Module, batch: Batch, inputs: Mapping, ratio: float, name: str, settings: Mapping | None = None, **options
) -> dict:
    pruner = pruner_of(name, ratio, **settings or {})
    names = ("position_ids", "video_budget", "proportional_attention")
    return prune_inputs(model, inputs, pruner, **{key: getattr(batch, key) for key in names} | options)


def encodings(model: nn.Module, batch: Batch) -> list[VisualEncoding]:
    return encode(ModelInterface(model), batch.inputs, video_budget=batch.video_budget)


def real(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """States `(B, S, D)` without padding, `(T, D)`, by the mask `(B, S)`."""
    return states[mask.bool()]


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


@torch.no_grad()
def ratio_zero_is_plain(model: nn.Module, batch: Batch) -> None:
    """Ratio 0 without an isolator gives the plain forward's logits."""
    # Compare logits at real positions: (B, S, V) of the plain forward, (B, S', V) of the pruned one.
    plain = model(**batch.inputs)
    short = shorten(model, batch, 0.0)
    out = model(**short)
    same(real(out.logits, short["attention_mask"]), real(plain.logits, batch.inputs["attention_mask"]))
    if plain.loss is not None:
        same(out.loss, plain.loss)


def lengths_and_gradients(model: nn.Module, batch: Batch) -> None:
    """The sequence has exactly the expected length. Gradients reach the isolator and the encoder or projector."""
    for name in ("divprune", "grid", "avg_pool", "random"):
        isolator = ModeIsolator.for_model(ModelInterface(model).outer, ISOLATOR)
        # Tokens of the batch: all real ones, with K + l in place of each unit's N.
        lengths = [n for encoding in encodings(model, batch) for n in encoding.lengths]
        kept = sum(budget(n, RATIO) + ISOLATOR for n in lengths)
        short = shorten(model, batch, name=name, isolator=isolator)
        expected = int(batch.inputs["attention_mask"].sum()) - sum(lengths) + kept
        assert int(short["attention_mask"].sum()) == expected, f"{name}: {short['attention_mask'].sum()} != {expected}"
        model.zero_grad()
        out = model(**short)
        assert torch.isfinite(out.loss), f"the loss is {out.loss}"
        out.loss.backward()
        assert isolator.prompt.grad.abs().sum() > 0, "no gradient reaches the isolator"
        language = {id(p) for part in language_parts(ModelInterface(model).outer) for p in part.parameters()}
        visual = [p for p in model.parameters() if id(p) not in language and p.grad is not None]
        reached = any(p.grad.abs().sum() > 0 for p in visual)
        assert reached or not batch.trains_encoder, "no gradient reaches the projector"
        assert all(torch.isfinite(p.grad).all() for p in visual), "a gradient is not finite"


@torch.no_grad()
def original_positions_are_masking(model: nn.Module, batch: Batch) -> bool | None:
    """With `position_ids="original"`, logits of kept positions equal those of a full forward that masks dropped ones.

    With proportional attention, kept tokens of that forward count for as many as they stand for.
    """
    mask = batch.inputs["attention_mask"].clone()
    # A window shorter than the sequence counts kept tokens alone, which masking does not show.
    near = shortest_reach(ModelInterface(model).text_config, mask.shape[1])
    if not batch.masks_tokens or batch.position_ids != "original" or near is not None:
        return False
    sizes = torch.ones(mask.shape)
    # Write each unit's kept places and sizes into mask and sizes (B, S), by flat places of the encoding's tokens.
    for encoding in encodings(model, batch):
        kept = pruner_of()(encoding.tokens())
        keep, counted = torch.zeros(sum(encoding.lengths), dtype=mask.dtype), torch.ones(sum(encoding.lengths))
        start = 0
        for length, row, own, count in zip(encoding.lengths, kept.positions, kept.sizes, kept.lengths, strict=True):
            keep[start + row[:count]] = 1
            counted[start + row[:count]] = own[:count]
            start += length
        visual = batch.inputs["input_ids"] == encoding.token_id
        mask[visual], sizes[visual] = keep, counted
    positions = full_positions(ModelInterface(model), batch.inputs, batch.inputs["attention_mask"])
    masked = {**batch.inputs, "attention_mask": mask, "position_ids": positions}
    short = shorten(model, batch, settings={"dropped_tokens": "discard"})
    key_sizes, found = key_sizes_of(ModelInterface(model)), real(model(**short).logits, short["attention_mask"])
    plain = real(model(**masked).logits, mask)
    if not batch.proportional_attention:
        same(found, plain)
        return None
    key_sizes.take(batch)
    try:
        key_sizes.set(sizes.log())
        same(found, real(model(**masked).logits, mask))
    finally:
        key_sizes.release(batch)
    assert not torch.allclose(found, plain, **TOLERANCE), "the sizes of tokens change nothing"
    return None


@torch.no_grad()
def alone_as_in_a_batch(model: nn.Module, batch: Batch) -> bool | None:
    """A deterministic pruner gives a sample the same result alone and in a batch."""
    if batch.alone is None:
        return False
    for name in ("divprune", "grid", "avg_pool"):
        together = shorten(model, batch, name=name)
        alone = shorten_one(model, batch, batch.alone, RATIO, name)
        mask, single = together["attention_mask"][batch.row].bool(), alone["attention_mask"][0].bool()
        # Left padding may shift positions that a batch brings, and rotary embeddings ignore a shift.
        beside, own = together["position_ids"][..., batch.row, mask], alone["position_ids"][..., 0, single]
        assert torch.equal(beside - beside[..., :1], own - own[..., :1]), f"{name} keeps other positions"
        same(model(**together).logits[batch.row][mask], model(**alone).logits[0][single])
    return None


@torch.no_grad()
def sees_no_future(model: nn.Module, batch: Batch) -> bool | None:
    """If the last token changes no earlier logits of the plain forward, it changes none of the pruned forward."""
    # Replace the last real token of each row of (B, S) by its neighbour, a text token as well.
    ends = batch.inputs["input_ids"].shape[1] - 1 - batch.inputs["attention_mask"].flip(1).argmax(1)
    rows = torch.arange(len(ends))
    ids = batch.inputs["input_ids"].clone()
    ids[rows, ends] = ids[rows, ends - 1]
    changed = {**batch.inputs, "input_ids": ids}
    early = batch.inputs["attention_mask"].bool()
    early[rows, ends] = False
    if not torch.allclose(model(**batch.inputs).logits[early], model(**changed).logits[early], **TOLERANCE):
        return False  # bidirectional attention
    short, other = (shorten_one(model, batch, i, RATIO, "divprune") for i in (batch.inputs, changed))
    early = short["attention_mask"].bool()
    early[rows, early.shape[1] - 1 - early.long().flip(1).argmax(1)] = False
    same(model(**short).logits[early], model(**other).logits[early])
    return None


@torch.no_grad()
def teacher_and_student_align(model: nn.Module, batch: Batch) -> None:
    """A slow step's teacher and student logits `(M, V)` are of the same tokens, and equal at ratio 0."""
    for ratio in (0.0, RATIO):
        options = {"proportional_attention": batch.proportional_attention}
        forward = DualForward(pruner_of(ratio=ratio), None, batch.position_ids, batch.video_budget, **options)
        forward.attach(model)
        try:
            with forward.in_mode(SLOW, distil=True):
                slow = model(**batch.inputs)
            student, teacher, count = slow.logits, slow.teacher_logits, len(slow.targets)
            assert teacher.shape == student.shape == (count, student.shape[-1]), "logits do not align"
            if ratio == 0.0:
                same(teacher, student)
            with forward.in_mode(FAST):
                fast = model(**batch.inputs)
            same(fast.logits, teacher)
            assert len(fast.targets) == count, "the modes count different tokens"
        finally:
            forward.detach()
            del model.dualspeed


def padding_free_is_padded(model: nn.Module, batch: Batch) -> bool | None:
    """With `padding_free`, the samples in one row get the logits and gradients that they get padded."""
    passes = []
    for padding_free in (False, True):
        torch.manual_seed(0)
        isolator = ModeIsolator.for_model(ModelInterface(model).outer, ISOLATOR)
        options = {"proportional_attention": batch.proportional_attention, "padding_free": padding_free}
        forward = DualForward(pruner_of(), isolator, batch.position_ids, batch.video_budget, **options)
        try:
            forward.attach(model)
        except ValueError:  # refused by name
            return False
        try:
            model.zero_grad()
            with forward.in_mode(FAST) as done:
                out = model(**batch.inputs)
                (out.loss + forward.cross_entropy(out.logits, out.targets) / len(out.targets)).backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            passes.append((done.tokens, out.logits.detach(), gradients))
        finally:
            forward.detach()
            del model.dualspeed
    (padded, logits, gradients), (tokens, own_logits, own_gradients) = passes
    if tokens == padded:  # samples of one length
        return False
    same(own_logits, logits)
    assert own_gradients.keys() == gradients.keys(), "other parameters get gradients"
    # Sums in another order differ by a share of the largest value.
    for name, gradient in gradients.items():
        error, scale = (own_gradients[name] - gradient).abs().max(), gradient.abs().max().clamp(min=1e-3)
        assert error < TOLERANCE["rtol"] * scale, f"the gradient of {name} is off by {error / scale:.1e}"
    return None


@torch.no_grad()
def generates(model: nn.Module, batch: Batch) -> bool | None:
    """`model.generate(**prune_inputs(...))` gives the plain answer at ratio 0, and answers from shorter prompts."""
    if not batch.generates or not batch.inputs["attention_mask"][:, -1].all():
        return False  # with right padding, generation would continue the padding
    prompt = {key: value for key, value in batch.inputs.items() if key != "labels"}
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    plain = model.generate(**prompt, **options)[:, -NEW_TOKENS:]
    short = model.generate(**shorten_one(model, batch, prompt, 0.0, "divprune"), **options)[:, -NEW_TOKENS:]
    assert torch.equal(short, plain), f"{short.tolist()} in place of {plain.tolist()}"
    same_without_a_cache(model, batch, prompt, options)
    if batch.beams and batch.alone is not None:  # transformers repeats a sample's tokens for each beam
        beams, single = {**options, "num_beams": 2}, {k: v for k, v in batch.alone.items() if k != "labels"}
        plain = model.generate(**single, **beams)[0, -NEW_TOKENS:]
        short = model.generate(**shorten_one(model, batch, prompt, 0.0, "divprune"), **beams)[batch.row, -NEW_TOKENS:]
        assert torch.equal(short, plain), f"with beams {short.tolist()} in place of {plain.tolist()}"
    return None


def same_without_a_cache(model: nn.Module, batch: Batch, prompt: dict, options: dict) -> None:
    """The answer from pruned tokens is the same with a cache, which holds the sizes of tokens, and without one.

    Not checked where transformers itself cannot generate without a cache.
    """
    # Random weights may answer with a placeholder, which has no image.
    options = {**options, "suppress_tokens": ModelInterface(model).visual_token_ids}
    try:
        model.generate(**prompt, **options, use_cache=False)
    except (ValueError, IndexError, RuntimeError):
        return
    answers = [
        model.generate(**shorten_one(model, batch, prompt, RATIO, "divprune"), **options, use_cache=cache)
        for cache in (True, False)
    ]
    assert torch.equal(*(answer[:, -NEW_TOKENS:] for answer in answers)), "another answer with a cache than without"


CHECKS = {
    "ratio 0 is the plain forward": ratio_zero_is_plain,
    "lengths and gradients": lengths_and_gradients,
    "original positions equal masking": original_positions_are_masking,
    "alone as in a batch": alone_as_in_a_batch,
    "no token sees the future": sees_no_future,
    "teacher and student align": teacher_and_student_align,
    "padding-free as padded": padding_free_is_padded,
    "generation": generates,
}
