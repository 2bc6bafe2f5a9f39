"""Merging pruners against plain references in float64, and what their means must preserve."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, batch
from pruner_cases import image, tokens

from hf_dualspeed import AutoPruner, VisualTokens, prune_inputs
from hf_dualspeed.models.interface import ModelInterface
from hf_dualspeed.pruners import budget, prumerge
from hf_dualspeed.pruners import clustering as merging
from hf_dualspeed.pruning.encoding import encode

MERGING = ("prumerge", "tome", "visionzip")
CLUSTERING = ("tome", "visionzip")
SHAPES = [(6, 7), (4, 4), (1, 1), (3, 9, 5, 5)]


def pruner(name, ratio=0.75, **settings):
    return AutoPruner.from_name(name, pruning_ratio=ratio, **settings)


def with_newlines(batch: VisualTokens) -> VisualTokens:
    """The last token of each row of the images as if no patch had made it."""
    for row, count in enumerate(batch.lengths):
        ends = torch.ones(count, dtype=torch.bool)
        ends[:-1] = (batch.grid[row, 1:count, :2] != batch.grid[row, : count - 1, :2]).any(-1)
        batch.attention[row, :count][ends] = float("-inf")
        batch.keys[row, :count][ends] = 0
    return batch


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a, b, dim=0))


# --- references: lists of clusters, or of weights, by source position, token by token ------------------------------


def reference_visionzip(attention, keys, keep, ratio) -> dict[int, list[int]]:
    """Members of each kept token's mean."""
    aside = math.floor(keep * ratio + 0.5)
    ranked = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    dominant, rest = ranked[: keep - aside], sorted(ranked[keep - aside :])
    comparable = [i for i in rest if attention[i] > -math.inf]
    in_line = comparable + [i for i in rest if i not in comparable]
    targets = [in_line[j * max(len(comparable), aside) // aside] for j in range(aside)]
    clusters = {i: [i] for i in dominant + targets}
    for i in comparable:
        if aside and i not in targets:
            clusters[max(targets, key=lambda t: (cosine(keys[i], keys[t]), -targets.index(t)))].append(i)
    return clusters


def reference_tome(features, keep) -> dict[int, list[int]]:
    clusters = {i: [i] for i in range(len(features))}
    value, size = dict(enumerate(features)), dict.fromkeys(clusters, 1)
    while len(clusters) > keep:
        order = sorted(clusters)
        sources, targets = order[::2], order[1::2]
        best = {a: max(targets, key=lambda b: (cosine(value[a], value[b]), -b)) for a in sources}
        sources.sort(key=lambda a: (-cosine(value[a], value[best[a]]), a))
        for a in sources[: min(len(order) - keep, len(order) // 2)]:
            b = best[a]
            value[b] = (value[a] * size[a] + value[b] * size[b]) / (size[a] + size[b])
            size[b] += size[a]
            clusters[b] += clusters.pop(a)
    for position, members in clusters.items():
        torch.testing.assert_close(value[position], features[members].mean(0))
    return clusters


def reference_prumerge(attention, keys, keep, neighbours) -> dict[int, dict[int, float]]:
    """Weights of each kept token's mean."""
    patches = [i for i in range(len(attention)) if attention[i] > -math.inf]
    ranked = sorted(range(len(attention)), key=lambda i: (-attention[i], i))
    values = sorted(float(attention[i]) for i in patches)

    def quantile(q):
        place = q * (len(values) - 1)
        low, high = math.floor(place), math.ceil(place)
        return values[low] + (values[high] - values[low]) * (place - low)

    fence = quantile(0.75) + 1.5 * (quantile(0.75) - quantile(0.25)) if patches else 0.0
    kept = [i for i in ranked if i in patches and attention[i] > fence][:keep]
    missing = keep - len(kept)
    for j in range(missing):
        sample = patches[min((2 * j + 1) * len(patches) // (2 * missing), len(patches) - 1)] if patches else None
        if sample is not None and sample not in kept:
            kept.append(sample)
    kept += [i for i in ranked if i not in kept][: keep - len(kept)]
    weights = {}
    for i in kept:
        others = [j for j in patches if j != i] if i in patches else []
        others.sort(key=lambda j: (-cosine(keys[i], keys[j]), j))
        weights[i] = {i: 1.0} | {j: float(attention[j]) for j in others[:neighbours]}
    return weights


def reference(name, batch, row, keep, settings) -> dict[int, dict[int, float]]:
    """Weights of each kept token's mean, in source order."""
    features, attention, keys = (
        None if tensor is None else tensor[row, : batch.lengths[row]].detach().double()
        for tensor in (batch.features, batch.attention, batch.keys)
    )
    if name == "prumerge":
        weights = reference_prumerge(attention, keys, keep, settings.get("neighbours", 32))
    else:
        clusters = (
            reference_tome(features, keep)
            if name == "tome"
            else reference_visionzip(attention, keys, keep, settings.get("contextual_ratio", 10 / 64))
        )
        weights = {i: dict.fromkeys(members, 1.0) for i, members in clusters.items()}
    return dict(sorted(weights.items()))


def means(weights: dict[int, dict[int, float]], features: torch.Tensor) -> torch.Tensor:
    rows = [sum(w * features[j].double() for j, w in of.items()) / sum(of.values()) for of in weights.values()]
    return torch.stack(rows).float()


def same(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


CASES = [
    ("tome", {}),
    ("visionzip", {}),
    ("visionzip", {"contextual_ratio": 0.5}),
    ("visionzip", {"contextual_ratio": 1.0}),
    ("visionzip", {"contextual_ratio": 0.0}),
    ("prumerge", {}),
    ("prumerge", {"neighbours": 3}),
    ("prumerge", {"neighbours": 0}),
]


@pytest.mark.parametrize("newlines", [False, True])
@pytest.mark.parametrize("ratio", [0.2, 0.6, 0.85, 0.97])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_is_the_papers_rule(name, settings, ratio, newlines):
    for seed in range(3):
        batch = tokens(*SHAPES, seed=seed)
        batch.attention = batch.attention.pow(4)  # a long tail, so that there are outliers
        batch = with_newlines(batch) if newlines else batch
        out = pruner(name, ratio, **settings)(batch)
        for row, keep in enumerate(budget(n, ratio) for n in batch.lengths):
            weights = reference(name, batch, row, keep, settings)
            assert out.positions[row, :keep].tolist() == list(weights)
            same(out.features[row, :keep], means(weights, batch.features[row]))


def test_prumerge_meets_more_and_fewer_outliers_than_the_budget():
    batch = tokens((10, 10))
    batch.attention = torch.linspace(0, 1, 100)[None] * 1e-3
    batch.attention[0, [3, 40, 41, 77, 98]] = torch.tensor([5.0, 1.0, 4.0, 3.0, 2.0])
    kept = {keep: pruner("prumerge", 1 - keep / 100)(batch).positions[0].tolist() for keep in (3, 5, 9)}
    assert kept == {3: [3, 41, 77], 5: [3, 40, 41, 77, 98], 9: [3, 12, 37, 40, 41, 62, 77, 87, 98]}
    # 4 spatial samples, at 12.5, 37.5 ...; one that is an outlier already gives way to the most attended of the rest.
    batch.attention[0, [3, 12]] = torch.tensor([0.0, 5.0])
    assert pruner("prumerge", 0.91)(batch).positions[0].tolist() == [12, 37, 40, 41, 62, 77, 87, 98, 99]


def test_visionzip_splits_every_budget_like_54_and_10():
    batch = tokens((24, 24))
    for keep, dominant in ((64, 54), (128, 108), (192, 162)):
        out = pruner("visionzip", 1 - keep / 576)(batch)
        most = batch.attention[0].topk(dominant).indices.sort().values
        untouched = (out.features[0] == batch.features[0, out.positions[0]]).all(-1)
        assert set(most.tolist()) <= set(out.positions[0, untouched].tolist())
        assert dominant <= untouched.sum() <= dominant + 2
        torch.testing.assert_close(out.features.norm(dim=-1).max(), batch.features[0, most].norm(dim=-1).max())


@pytest.mark.parametrize("name", CLUSTERING)
def test_means_of_clusters_preserve_the_mean_of_all(name):
    """With the number of its tokens as weight; the reference tells that number."""
    settings = {"contextual_ratio": 1.0} if name == "visionzip" else {}
    batch = tokens((6, 7), (5, 5))
    out = pruner(name, 0.8, **settings)(batch)
    for row, (count, keep) in enumerate(zip(batch.lengths, out.lengths, strict=True)):
        sizes = torch.tensor([len(of) for of in reference(name, batch, row, keep, settings).values()])
        assert sizes.sum() == count
        mean = (out.features[row, :keep] * sizes[:, None]).sum(0) / count
        torch.testing.assert_close(mean, batch.features[row, :count].mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MERGING)
def test_other_features_are_merged_with_the_same_weights(name):
    batch = tokens(*SHAPES)
    out = pruner(name)(batch)
    assert torch.equal(out.apply_to(batch.features), out.features)
    other = torch.randn(*batch.features.shape[:2], 3, generator=torch.Generator().manual_seed(1))
    carried = out.apply_to(other)
    for row, keep in enumerate(out.lengths):
        same(carried[row, :keep], means(reference(name, batch, row, keep, {}), other[row]))
    assert out.apply_to(batch.features.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", MERGING)
def test_merging_is_in_float32_under_autocast(name):
    batch = tokens((8, 8), (5, 5))
    exact = pruner(name)(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = pruner(name)(batch)
        assert torch.equal(again.features, exact.features)
        assert torch.equal(again.apply_to(batch.features), exact.features)


@pytest.mark.parametrize("name", MERGING)
def test_means_of_low_precision_features_are_rounded_once(name):
    batch = tokens((12, 12), dtype=torch.bfloat16)
    low = pruner(name, 0.95)(batch)
    batch.features = batch.features.float()
    assert torch.equal(low.features, pruner(name, 0.95)(batch).features.bfloat16())


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("fault", ["newlines", "no keys", "no attention", "no patch at all", "equal keys"])
def test_tokens_without_attention_or_keys_do_no_harm(name, fault):
    batch = tokens((6, 7), (3, 3), (1, 5))
    if fault == "newlines":
        with_newlines(batch)
    if fault in ("no keys", "no patch at all"):
        batch.keys[:] = 0
    if fault in ("no attention", "no patch at all"):
        batch.attention[:] = 0 if fault == "no attention" else float("-inf")
    if fault == "equal keys":
        batch.keys[:] = 1
    for ratio in (0.1, 0.5, 0.9):
        out = pruner(name, ratio)(batch)
        assert out.features.isfinite().all()
        for row, (keep, count) in enumerate(zip(out.lengths, batch.lengths, strict=True)):
            positions = out.positions[row, :keep]
            assert (positions.diff() > 0).all()
            assert positions.max() < count
            alone = pruner(name, ratio)(image(batch, row))
            assert torch.equal(alone.positions[0], positions)
            torch.testing.assert_close(alone.features[0], out.features[row, :keep])


@pytest.mark.parametrize("name", ["prumerge", "visionzip"])
def test_newlines_are_not_mixed_into_patches(name):
    batch = with_newlines(tokens((6, 7)))
    newline = batch.attention[0].isneginf()
    assert newline.sum() == 6
    batch.features[0, newline] = 1e4
    assert pruner(name)(batch).features.abs().max() < 10
    kept = pruner(name, 0.05)(batch)  # more than there are patches
    assert (kept.features[0].abs().amax(-1) == 1e4).sum() == 39 - 36
    assert (kept.features[0].abs().amax(-1) < 10).sum() == 36


@pytest.mark.parametrize("name", MERGING)
def test_padding_is_never_merged_in(name):
    batch = tokens((6, 7), (3, 3))
    out = pruner(name, 0.5)(batch)
    batch.features[1, 9:], batch.keys[1, 9:], batch.attention[1, 9:] = 1e4, 1.0, 9.0
    again = pruner(name, 0.5)(batch)
    assert torch.equal(again.positions[1, :4], out.positions[1, :4])
    torch.testing.assert_close(again.features[1, :4], out.features[1, :4])


def test_gradients_are_the_weights_of_the_means():
    batch = tokens((4, 4))
    batch.features = torch.randn(1, 16, 1, requires_grad=True)
    for name, settings in (("tome", {}), ("visionzip", {"contextual_ratio": 0.5}), ("prumerge", {"neighbours": 4})):
        out = pruner(name, **settings)(batch)
        for slot, weight in enumerate(out.features[0, :, 0]):
            (gradient,) = torch.autograd.grad(weight, batch.features, retain_graph=True)
            assert gradient.sum() == pytest.approx(1.0)
            assert gradient[0, out.positions[0, slot]] > 0
            torch.testing.assert_close((gradient * batch.features.detach()).sum(), weight.detach())


def test_tome_merges_duplicates_first_and_half_at_most():
    features = torch.eye(8)[[0, 0, 1, 2, 3, 3, 4, 5]][None]
    out = pruner("tome", 0.25)(VisualTokens(features))
    assert out.positions[0].tolist() == [1, 2, 3, 5, 6, 7]
    assert torch.equal(out.features[0], features[0, [1, 2, 3, 5, 6, 7]])
    # Sizes weigh: of 4 tokens one is left in two rounds, the mean of all and not of pairs of different sizes.
    three = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    torch.testing.assert_close(pruner("tome", 0.99)(VisualTokens(three)).features, three.mean(1, keepdim=True))


def test_large_images_are_compared_in_chunks():
    queries, targets = torch.randn(2, 50, 4), torch.randn(2, 20, 4)
    valid = torch.arange(20) < torch.tensor([[20], [7]])
    whole, parts = (merging.nearest(queries, targets, valid, chunk) for chunk in (1024, 7))
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])
    assert whole[1][1].max() < 7


def meta_tokens(images: int, device="meta") -> tuple[VisualTokens, list[int]]:
    lengths = [50 - i for i in range(images)]
    valid = (torch.arange(50) < torch.tensor(lengths)[:, None]).to(device)
    shapes = {"features": (16,), "attention": (), "keys": (8,)}
    parts = {name: torch.rand(images, 50, *shape, device=device) for name, shape in shapes.items()}
    return VisualTokens(**parts, valid=valid, lengths=lengths), [n // 5 for n in lengths]


@pytest.mark.parametrize("name", MERGING)
def test_merging_does_not_wait_for_the_device_nor_loop_over_images(name, monkeypatch):
    # The meta device has no values: any read of one, any branch on one and any `.item()` raises there.
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: nullcontext())  # which it has not either
    batch, keep = meta_tokens(3)
    if name == "prumerge":
        positions = merging.first(prumerge.chosen(batch, keep), max(keep))
        assert prumerge.absorbed(batch, positions, 4).shape == (3, 10, 50)
    else:
        out = merging.averaged(batch, pruner(name).homes(batch, keep), keep, pruner(name).drops)
        assert out.features.shape == (3, 10, 16)
        assert out.positions.shape == out.valid.shape == (3, 10)
    calls = {}
    for images in (2, 16):
        batch, keep = meta_tokens(images, "cpu")
        with torch.profiler.profile() as profile:
            pruner(name).reduce(batch, keep)
        calls[images] = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
    assert calls[16] <= calls[2] * 1.1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("visionzip", {"contextual_ratio": 1.5}, r"`contextual_ratio` must be in \[0, 1\], got 1.5"),
        ("prumerge", {"neighbours": -1}, r"`neighbours` must be in \[0, inf\), got -1"),
        ("prumerge", {"neighbours": 2.5}, "`neighbours` must be a whole number, got 2.5"),
        ("prumerge", {"pruning_ratio": 1}, "`pruning_ratio` must be in"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        AutoPruner.from_name(name, **settings)


WITH_KEYS = ("llava", "llava_next", "llava_onevision", "paligemma", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize(("name", "family"), [*product(MERGING, WITH_KEYS), ("tome", "smolvlm")])
def test_on_models(name, family):
    torch.manual_seed(0)
    model = FAMILIES[family].model()
    inputs = batch(FAMILIES[family], model)
    encoding = encode(ModelInterface(model), inputs, AutoPruner.from_name(name).needs)[0]
    seen = encoding.tokens()
    out = pruner(name, 0.5)(seen)
    companions = [encoding.padded(level) for level in (encoding.companions or {}).get("deepstack_features", [])]
    assert bool(companions) == (family == "qwen3_vl")
    for row, keep in enumerate(out.lengths):
        weights = reference(name, seen, row, keep, {})
        assert out.positions[row, :keep].tolist() == list(weights)
        for features in (seen.features, *companions):
            same(out.apply_to(features)[row, :keep], means(weights, features[row]))
    loss = model(**prune_inputs(model, inputs, pruner(name, 0.5))).loss
    loss.backward()
    assert loss.isfinite()
