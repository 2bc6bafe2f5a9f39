"""CDPruner, VisPruner, HoloV and TRIM: against plain references, at their edges, on real model classes."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, MIXED, batch
from pruner_cases import build, grid, tokens

from hf_dualspeed import AutoPruner, VisualTokens, prune_inputs
from hf_dualspeed.pruners import budget
from hf_dualspeed.pruners.vispruner import schedule

NAMES = ("cdpruner", "holov", "trim", "vispruner")
RAGGED = [(6, 7), (4, 4), (1, 1), (5, 5)]


def kept(out, index: int) -> list[int]:
    return out.positions[index, : out.lengths[index]].tolist()


def instruction_of(batch: VisualTokens, index: int) -> torch.Tensor | None:
    words = batch.text[index][batch.text_valid[index]].double()
    return words.mean(0) if len(words) else None


# --- CDPruner -----------------------------------------------------------------------------------------------------


def reference_relevance(features: torch.Tensor, asked: torch.Tensor | None) -> list[float]:
    """Cosine with the instruction, min-max scaled within the image; equal without one."""
    if asked is None:
        return [1.0] * len(features)
    cosine = [float(F.cosine_similarity(token, asked, dim=0)) for token in features]
    low, high = min(cosine), max(cosine)
    return [(c - low) / (high - low) if high > low else 1.0 for c in cosine]


def reference_cdpruner(features: torch.Tensor, asked: torch.Tensor | None, keep: int) -> list[int]:
    """The token that makes the log-determinant of the kept tokens' kernel greatest, one after the other, in float64."""
    features = features.double()
    relevance = torch.tensor(reference_relevance(features, asked), dtype=torch.float64)
    unit = features / features.norm(dim=1, keepdim=True)
    kernel = torch.diag(relevance) @ (unit @ unit.T) @ torch.diag(relevance)
    chosen = []
    while len(chosen) < keep:
        best, best_value = None, None
        for i in range(len(features)):
            if i in chosen:
                continue
            rows = torch.tensor([*chosen, i])
            value = float(torch.logdet(kernel[rows][:, rows]))
            if best is None or value > best_value + 1e-12:  # the earlier one where two tie
                best, best_value = i, value
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_cdpruner_is_greedy_on_the_log_determinant(seed):
    given = tokens(*RAGGED, seed=seed)
    given.text_valid[3] = False  # a plain DPP
    out = build("cdpruner", pruning_ratio=0.7)(given)
    for i, n in enumerate(given.lengths):
        expected = reference_cdpruner(given.features[i, :n], instruction_of(given, i), budget(n, 0.7))
        assert kept(out, i) == sorted(expected)


def test_cdpruner_goes_on_by_relevance_where_nothing_new_is_left():
    given = tokens((5, 6), (4, 4), width=6)
    out = build("cdpruner", pruning_ratio=0.4)(given)
    for i, n in enumerate(given.lengths):
        features, asked = given.features[i, :n], instruction_of(given, i)
        spanning = reference_cdpruner(features, asked, 6)
        relevance = reference_relevance(features.double(), asked)
        rest = sorted(set(range(n)) - set(spanning), key=lambda j: -relevance[j])
        assert kept(out, i) == sorted([*spanning, *rest[: budget(n, 0.4) - 6]])


def test_cdpruner_takes_no_duplicate_before_the_last_distinct_token():
    distinct = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    given = VisualTokens(distinct.repeat(1, 3, 1), text=text)
    # The least relevant distinct token has relevance 0, by the scaling: it is no better than a duplicate.
    out = build("cdpruner", pruning_ratio=1 - 11 / 36)(given)
    assert [len({p % 12 for p in kept(out, i)}) for i in range(2)] == [11, 11]
    assert kept(out, 0) == sorted(reference_cdpruner(distinct[0], text[0].double().mean(0), 11))


def test_cdpruner_scales_relevance_within_each_image():
    given = tokens((5, 5), (5, 5))
    expected = build("cdpruner", pruning_ratio=0.6)(given).positions[0]
    given.text[1] = given.features[1, :1] * 100  # relevance of 1 beside the small ones of the first
    assert torch.equal(build("cdpruner", pruning_ratio=0.6)(given).positions[0], expected)


def test_cdpruner_listens_to_the_instruction():
    given = tokens((8, 8))
    asked = given.features[0, 20:25]
    given.text[0], given.text_valid[0] = asked, True
    near = F.cosine_similarity(given.features[0], asked.mean(0)[None], dim=1)
    told = kept(build("cdpruner", pruning_ratio=0.9)(given), 0)
    given.text_valid[0] = False
    plain = kept(build("cdpruner", pruning_ratio=0.9)(given), 0)
    assert near[told].mean() > near[plain].mean() + 0.1
    given.text_valid[0], given.text[0] = True, float("nan")  # what is no instruction is never read
    given.text_valid[0] = False
    assert kept(build("cdpruner", pruning_ratio=0.9)(given), 0) == plain


# --- TRIM ---------------------------------------------------------------------------------------------------------


def reference_trim(features: torch.Tensor, asked: torch.Tensor | None, keep: int) -> tuple[list[int], torch.Tensor]:
    """Kept positions and tokens, `(K, D)`, by the rule, in float64."""
    features = features.double()
    direction = features.mean(0) if asked is None else asked
    similarity = [float(F.cosine_similarity(token, direction, dim=0)) for token in features]
    best = sorted(range(len(features)), key=lambda i: -similarity[i])
    chosen, rest = best[: keep - 1], best[keep - 1 :]
    mean = features[rest].mean(0)
    centre = min(rest, key=lambda i: float((features[i] - mean).norm()))
    rows = {i: features[i] for i in chosen} | {centre: mean}
    return sorted(rows), torch.stack([rows[i] for i in sorted(rows)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.3, 0.8, 0.99])
def test_trim_is_the_top_and_the_mean_of_the_rest(seed, ratio):
    given = tokens(*RAGGED, seed=seed)
    given.text_valid[3] = False
    out = build("trim", pruning_ratio=ratio)(given)
    for i, n in enumerate(given.lengths):
        positions, features = reference_trim(given.features[i, :n], instruction_of(given, i), budget(n, ratio))
        assert kept(out, i) == positions
        torch.testing.assert_close(out.features[i, : len(positions)].double(), features, rtol=1e-4, atol=1e-5)


def test_trim_with_a_budget_of_one_is_the_mean_alone():
    given = tokens((4, 5), (3, 3))
    out = build("trim", pruning_ratio=0.999)(given)
    expected = torch.stack([given.features[i, :n].mean(0) for i, n in enumerate(given.lengths)])
    torch.testing.assert_close(out.features[:, 0], expected)


def test_trim_merges_other_features_alike_and_takes_means_in_float32():
    given = tokens((6, 6), (4, 5))
    out = build("trim", pruning_ratio=0.8)(given)
    torch.testing.assert_close(out.apply_to(given.features * 2), out.features * 2)
    wide = torch.full((2, 36, 3), 1.0)
    wide[:, ::2] = 1 + 2**-7  # of which a sum in bfloat16 loses the small part
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = out.apply_to(wide.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, out.apply_to(wide).bfloat16())


@pytest.mark.parametrize("name", ["cdpruner", "trim"])
def test_instructions_of_another_width_are_named(name):
    given = tokens((4, 4))
    given.text = torch.randn(1, 5, 7)
    with pytest.raises(ValueError, match="`text` must be as wide as `features`, 16, got 7"):
        build(name, pruning_ratio=0.5)(given)


# --- VisPruner ----------------------------------------------------------------------------------------------------


def reference_vispruner(features: torch.Tensor, attention: torch.Tensor, keep: int, share: float) -> list[int]:
    """The rule with lists of tokens, in float64; 8 tokens a round."""
    unit = F.normalize(features.double(), dim=1)
    order = sorted(range(len(unit)), key=lambda i: -float(attention[i]))
    important = int(keep * share)
    chosen, rest, goal = order[:important], order[important:], keep - important
    while goal and len(rest) > goal:
        even, odd = rest[::2], rest[1::2]
        nearest = {i: max(float(unit[i] @ unit[j]) for j in odd) for i in even}
        even = sorted(even, key=lambda i: -nearest[i])[min(8, len(rest) - goal) :]
        rest = [*even, *odd]
    return sorted([*chosen, *(rest if goal else [])])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ratio", "share"), [(0.8, 0.5), (0.3, 0.25), (0.9, 0.0), (0.6, 1.0)])
def test_vispruner_is_the_papers_rule(seed, ratio, share):
    given = tokens(*RAGGED, (9, 13), seed=seed)
    out = build("vispruner", pruning_ratio=ratio, important_share=share)(given)
    for i, n in enumerate(given.lengths):
        expected = reference_vispruner(given.features[i, :n], given.attention[i, :n], budget(n, ratio), share)
        assert kept(out, i) == expected


def test_vispruner_by_attention_alone_is_cls_attention():
    given = tokens((6, 6), (5, 5))
    everything = build("vispruner", pruning_ratio=0.75, important_share=1.0)(given)
    assert torch.equal(everything.positions, build("cls_attention", pruning_ratio=0.75)(given).positions)


def test_vispruner_drops_a_repeated_background():
    """40 equal tokens beside 10 distinct ones, of which attention prefers none."""
    features = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(0))
    features[:, :40] = features[:, :1]
    attention = torch.rand(1, 50, generator=torch.Generator().manual_seed(1))
    given = VisualTokens(features, attention=attention)
    out = build("vispruner", pruning_ratio=0.74, important_share=0.0)(given)
    assert len(kept(out, 0)) == 13
    assert len(set(range(40, 50)) & set(kept(out, 0))) >= 8  # a random choice has 2.6 of them


def test_vispruner_drops_more_at_once_from_large_images_and_never_too_many():
    counts, keep = [576, 2880, 16384, 7, 2, 1], [57, 288, 1638, 1, 2, 1]
    rounds = schedule(counts, keep, counts)
    assert len(rounds) <= 72
    first = rounds[0][1]
    assert first == [8, 40, 228, 4, 0, 0]  # of 7 tokens, 4 stand at even places
    dropped = [sum(drop[i] for _, drop in rounds) for i in range(len(counts))]
    assert dropped == [n - k for n, k in zip(counts, keep, strict=True)]
    assert schedule([20], [0], [20]) == []


# --- HoloV --------------------------------------------------------------------------------------------------------


def reference_holov(features: torch.Tensor, attention: torch.Tensor, crops: list[list[int]], keep: int) -> list[int]:
    """Score by score, seat by seat, in float64."""
    unit, attention = F.normalize(features.double(), dim=1), attention.double()
    queues, worth = [], []
    for crop in crops:
        variance = []
        for i in crop:
            others = [float(unit[i] @ unit[j]) for j in crop if j != i]
            mean = sum(others) / max(1, len(others))
            variance.append(sum((s - mean) ** 2 for s in others) / max(1, len(others)))
        mean_attention = sum(float(attention[i]) for i in crop) / len(crop)
        mean_variance = sum(variance) / len(crop)
        score = {
            i: float(attention[i]) + 0.09 * v * mean_attention / (mean_variance + 1e-6)
            for i, v in zip(crop, variance, strict=True)
        }
        queues.append(sorted(crop, key=lambda i: -score[i]))
        worth.append(sum(score.values()) / len(crop))
    seats, chosen = [0] * len(crops), []
    for _ in range(keep):
        open_crops = [c for c in range(len(crops)) if seats[c] < len(crops[c])]
        winner = max(open_crops, key=lambda c: worth[c] / (seats[c] + 0.5))
        chosen.append(queues[winner][seats[winner]])
        seats[winner] += 1
    return sorted(chosen)


def blocks(rows: int, columns: int, height: int, width: int) -> list[list[int]]:
    corners = [(r, c) for r in range(0, rows, height) for c in range(0, columns, width)]
    return [[(r + i) * columns + c + j for i in range(height) for j in range(width)] for r, c in corners]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_holov_shares_the_budget_among_square_crops(seed, ratio):
    given = tokens((12, 12), (8, 8), (4, 16), seed=seed)
    out = build("holov", pruning_ratio=ratio)(given)
    crops = [blocks(12, 12, 3, 3), blocks(8, 8, 2, 2), blocks(4, 16, 2, 2)]
    for i, n in enumerate(given.lengths):
        expected = reference_holov(given.features[i, :n], given.attention[i, :n], crops[i], budget(n, ratio))
        assert kept(out, i) == expected


def test_holov_without_a_grid_takes_runs():
    given = tokens((5, 10), (3, 7))
    given.grid = None
    out = build("holov", pruning_ratio=0.6, crops=7)(given)
    for i, n in enumerate(given.lengths):
        runs = [[j for j in range(n) if j * 7 // n == run] for run in range(7)]
        expected = reference_holov(given.features[i, :n], given.attention[i, :n], runs, budget(n, 0.6))
        assert kept(out, i) == expected


def test_holov_hands_on_what_a_crop_cannot_use_and_keeps_some_of_everywhere():
    given = tokens((8, 8))
    given.attention[0] = 0.01
    first = [r * 8 + c for r in range(2) for c in range(2)]
    given.attention[0, first] = 1.0
    chosen = kept(build("holov", pruning_ratio=0.5)(given), 0)
    assert set(first) <= set(chosen)  # its share is 27 seats, of which it can fill 4
    others = [len(set(crop) & set(chosen)) for crop in blocks(8, 8, 2, 2)[1:]]
    assert sum(others) == 28
    assert max(others) - min(others) <= 1
    by_attention = kept(build("cls_attention", pruning_ratio=0.5)(given), 0)
    assert min(len(set(crop) & set(by_attention)) for crop in blocks(8, 8, 2, 2)) == 0


@pytest.mark.parametrize("name", ["holov", "vispruner"])
def test_tokens_that_no_patch_made_come_last_by_attention(name):
    given = tokens((6, 6), (5, 6))
    newline = given.grid[..., 2] == 5
    given.attention = given.attention.masked_fill(newline, float("-inf"))
    settings = {"important_share": 1.0} if name == "vispruner" else {}
    out = build(name, pruning_ratio=0.2, **settings)(given)
    assert [int(newline[i, kept(out, i)].sum()) for i in range(2)] == [0, 0]
    out = build(name, pruning_ratio=0.05, **settings)(given)
    assert [int(newline[i, kept(out, i)].sum()) for i in range(2)] == [4, 3]
    assert out.features.isfinite().all()


# --- all four -----------------------------------------------------------------------------------------------------


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"`important_share` must be in \[0, 1\], got 1.5"):
        AutoPruner.from_name("vispruner", important_share=1.5)
    with pytest.raises(ValueError, match=r"`crops` must be in \[1, inf\), got 0"):
        AutoPruner.from_name("holov", crops=0)
    with pytest.raises(ValueError, match=r"`variance_weight` must be in \[0, inf\), got -1"):
        AutoPruner.from_name("holov", variance_weight=-1)


def of_images(count: int, device: str = "cpu", **options) -> VisualTokens:
    return VisualTokens(
        torch.randn(count, 50, 8, device=device),
        grid=grid(5, 10).to(device).expand(count, -1, -1),
        attention=torch.rand(count, 50, device=device),
        text=torch.randn(count, 4, 8, device=device),
        text_valid=torch.ones(count, 4, dtype=torch.bool, device=device),
        **options,
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device_nor_loops_over_images(name, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())  # which knows no meta device
    # The meta device has no values: any read of one, any branch on one and any `.item()` raises there.
    pruner = build(name, pruning_ratio=0.8)
    assert pruner(of_images(3, "meta", defer_checks=True)).features.shape == (3, 10, 8)
    ragged = of_images(3, "meta", defer_checks=True)
    ragged.valid, ragged.lengths = torch.ones(3, 50, dtype=torch.bool, device="meta"), [50, 20, 1]
    assert pruner(ragged).positions.shape == (3, 10)
    calls = {}
    for images in (1, 16):
        given = of_images(images)
        with torch.profiler.profile() as profile:
            pruner(given)
        calls[images] = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
    assert calls[16] <= calls[1] * 1.1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "smolvlm"])
def test_real_models(name, family):
    model = FAMILIES[family].model()
    inputs = batch(FAMILIES[family], model, MIXED)
    pruner = build(name, pruning_ratio=0.6)
    if family == "smolvlm" and "attention" in pruner.needs:
        with pytest.raises(ValueError, match="their attention cannot be matched|attention of .* is unknown"):
            prune_inputs(model, inputs, pruner)
        return
    short = prune_inputs(model, inputs, pruner)
    same = prune_inputs(model, inputs, build("random", pruning_ratio=0.6))
    assert short["input_ids"].shape == same["input_ids"].shape
    loss = model(**short).loss
    loss.backward()
    assert loss.isfinite()
