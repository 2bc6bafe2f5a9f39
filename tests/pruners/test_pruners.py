"""One contract for every registered pruner, and references for the rules."""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, batch
from families.base import HIDDEN
from pruner_cases import build, grid, image, tokens
from torch.utils.flop_counter import FlopCounterMode

from hf_dualspeed import (
    AutoPruner,
    DualSpeedTrainingArguments,
    PrunedTokens,
    Pruner,
    PrunerConfig,
    VisualTokens,
    available_pruners,
    prune_inputs,
    pruners,
    register_pruner,
)
from hf_dualspeed.pruners import budget, pruner_class
from hf_dualspeed.pruners.divprune import DivPrune
from hf_dualspeed.pruners.registry import _REGISTRY
from hf_dualspeed.trainer.setup import resolve_pruner

RATIOS = (0.1, 0.5, 0.75, 0.9, 0.999)


SHAPES = [[(24, 24)], [(6, 6), (6, 6)], [(4, 9), (7, 3), (1, 1), (2, 30)], [(6, 6, 5, 8), (6, 6)]]


SELECTING = [name for name in available_pruners() if not pruner_class(name).merges]
VARIANTS = [(name, "merge") for name in available_pruners()] + [(name, "discard") for name in SELECTING]


@pytest.mark.parametrize(("name", "dropped"), VARIANTS)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_contract(name, dropped, shapes, ratio):
    pruner = build(name, pruning_ratio=ratio, dropped_tokens=dropped)
    batch = tokens(*shapes)
    out = pruner(batch)
    expected = [budget(n, ratio) for n in batch.lengths]
    assert out.lengths == expected
    assert out.features.shape == (len(shapes), max(expected), 16)
    assert out.positions.shape == (len(shapes), max(expected))
    for i, (keep, count) in enumerate(zip(expected, batch.lengths, strict=True)):
        positions = out.positions[i, :keep]
        assert (positions[1:] > positions[:-1]).all()
        assert 0 <= positions[0]
        assert positions[-1] < count
        assert out.valid is None or out.valid[i].sum() == keep
        assert (dropped == "merge") == (out.merge is not None)
        if dropped == "discard":
            assert torch.equal(out.features[i, :keep], batch.features[i, positions])
        # Kept tokens stand for all: each for one at least, for a merging rule's own, and padding for none.
        assert out.sizes[i, keep:].sum() == 0
        torch.testing.assert_close(out.sizes[i, :keep].sum(), torch.tensor(float(count)))
        assert (out.sizes[i, :keep] >= 1 - 1e-6).all()
        if pruner.deterministic:
            alone = pruner(image(batch, i))
            assert torch.equal(alone.positions[0], positions)
            torch.testing.assert_close(alone.features[0], out.features[i, :keep])
            torch.testing.assert_close(alone.sizes[0], out.sizes[i, :keep])
    assert (out.valid is None) == (min(expected) == max(expected))


@pytest.mark.parametrize("name", SELECTING)
@pytest.mark.parametrize("shapes", SHAPES)
def test_dropped_tokens_are_averaged_into_the_most_similar_kept_one(name, shapes):
    """By a reference that loops; other features of the same tokens are averaged alike."""
    batch = tokens(*shapes)
    out = build(name, pruning_ratio=0.8)(batch)
    other = torch.randn(*batch.features.shape[:2], 3)
    carried = out.apply_to(other)
    for i, (keep, count) in enumerate(zip(out.lengths, batch.lengths, strict=True)):
        kept = out.positions[i, :keep].tolist()
        heaps = {k: [k] for k in kept}
        for n in set(range(count)) - heaps.keys():
            similar = torch.cosine_similarity(batch.features[i, n], batch.features[i, kept], dim=-1)
            heaps[kept[int(similar.argmax())]].append(n)
        assert out.sizes[i, :keep].tolist() == [len(heaps[k]) for k in kept]
        for given, found in ((batch.features, out.features), (other, carried)):
            means = torch.stack([given[i, sorted(heaps[k])].mean(0) for k in kept])
            torch.testing.assert_close(found[i, :keep], means)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_of_half_precision_neither_overflow_nor_drift(dtype):
    batch = VisualTokens(torch.full((1, 600, 8), 200.0, dtype=dtype))
    out = build("grid", pruning_ratio=0.999)(batch)
    assert torch.equal(out.features, batch.features[:, :1])


def test_what_becomes_of_dropped_tokens_is_a_setting_of_selecting_pruners(tmp_path):
    with pytest.raises(
        ValueError, match="`dropped_tokens` must be one of 'merge', 'discard', got 'mrge'. Did you mean"
    ):
        build("divprune", dropped_tokens="mrge")
    with pytest.raises(
        ValueError, match="`dropped_tokens` is 'discard', but the pruner 'tome' merges tokens by a rule"
    ):
        build("tome", dropped_tokens="discard")
    assert "dropped_tokens" not in build("tome").config.to_dict()
    pruner = build("divprune", dropped_tokens="discard")
    pruner.save_pretrained(tmp_path)
    assert AutoPruner.from_pretrained(tmp_path).config.dropped_tokens == "discard"
    pruner.reconfigure(dropped_tokens="merge")
    assert pruner(tokens((4, 4))).merge is not None


def test_a_pruner_that_counts_nothing_is_counted_by_the_nearest():
    """One of a user's own that overrides `reduce` need not know of sizes."""
    batch, own = tokens((4, 4)), build("divprune", pruning_ratio=0.5)
    expected = own(batch).sizes
    reduce = own.reduce
    own.reduce = lambda *given: replace(reduce(*given), sizes=None)
    assert torch.equal(own(batch).sizes, expected)


@pytest.mark.parametrize("name", available_pruners())
def test_what_is_no_visual_tokens_is_named_and_an_empty_image_pruned(name):
    pruner = build(name, pruning_ratio=0.5)
    with pytest.raises(ValueError, match="`tokens` must be VisualTokens, got a Tensor"):
        pruner(torch.ones(1, 4, 16))
    batch = tokens((4, 4), (3, 3))
    empty = replace(batch, valid=batch.valid & torch.tensor([[True], [False]]), lengths=None)
    assert pruner(empty).lengths == [8, 0]


@pytest.mark.parametrize("name", available_pruners())
def test_ratio_zero_is_the_identity(name):
    batch = tokens((4, 4), (3, 5))
    out = build(name, pruning_ratio=0.0)(batch)
    assert torch.equal(out.features, batch.features)
    assert out.lengths == [16, 15]
    assert out.sizes.sum(1).tolist() == [16, 15]


@pytest.mark.parametrize("name", available_pruners())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_selected_in_float32(name, dtype):
    batch = tokens((8, 8), dtype=dtype)
    exact = tokens((8, 8), dtype=dtype)
    exact.features = exact.features.float()
    low, high = (build(name, pruning_ratio=0.8)(b) for b in (batch, exact))
    assert low.features.dtype == dtype
    assert torch.equal(low.positions, high.positions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = tokens((8, 8), dtype=dtype)
        assert torch.equal(build(name, pruning_ratio=0.8)(again).positions, high.positions)


@pytest.mark.parametrize(("name", "dropped"), VARIANTS)
def test_gradients_reach_kept_tokens_and_those_averaged_into_them(name, dropped):
    batch = tokens((6, 6))
    batch.features.requires_grad_(True)
    out = build(name, pruning_ratio=0.75, dropped_tokens=dropped)(batch)
    assert not out.positions.requires_grad
    out.features.sum().backward()
    touched = batch.features.grad.abs().sum(-1)[0] > 0
    kept = out.positions[0].tolist()
    if out.merge is None:
        assert touched.nonzero()[:, 0].tolist() == kept
    else:
        assert touched[kept].all()
        assert touched.all() or pruner_class(name).merges


@pytest.mark.parametrize("name", available_pruners())
def test_duplicate_tokens_do_no_harm(name):
    batch = VisualTokens(
        torch.ones(2, 20, 16),
        grid=grid(4, 5).expand(2, -1, -1),
        attention=torch.ones(2, 20),
        keys=torch.ones(2, 20, 8),
        text=torch.ones(2, 3, 16),
        generator=torch.Generator().manual_seed(0),
    )
    out = build(name, pruning_ratio=0.5)(batch)
    assert out.features.isfinite().all()
    assert all(len(set(row)) == 10 for row in out.positions.tolist())


@pytest.mark.parametrize("name", available_pruners())
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_named(name, value):
    batch = tokens((4, 4))
    batch.features[0, 3, 2] = value
    with pytest.raises(ValueError, match="`features` holds NaN or infinite values.* lower the learning rate"):
        build(name, pruning_ratio=0.5)(batch)


def test_the_fast_pass_names_such_features_too_where_it_waits_anyway():
    family = FAMILIES["llava"]
    model = family.model()
    inputs = batch(family, model)
    inputs["pixel_values"][-1, 0, 0, 0] = float("nan")
    for name in ("divprune", "cdpruner", "tome", "dynamicvit"):
        with pytest.raises(ValueError, match="`features` holds NaN or infinite values"):
            prune_inputs(model, inputs, build(name, HIDDEN, pruning_ratio=0.5))


@pytest.mark.parametrize("name", available_pruners())
def test_an_image_without_instruction_is_pruned_all_the_same(name):
    batch = tokens((4, 4), (4, 4))
    batch.text_valid = torch.tensor([[False] * 5, [True] * 5])
    out = build(name, pruning_ratio=0.5)(batch)
    assert out.features.isfinite().all()
    assert all(len(set(row)) == 8 for row in out.positions.tolist())


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.6), ("cosine", 0.5 + 0.4 * (1 - 0.5**0.5) / 2)])
def test_the_ratio_changes_over_training(tmp_path, schedule, middle):
    pruner = build("random", pruning_ratio=0.9, pruning_schedule=schedule, initial_pruning_ratio=0.5)
    assert pruner(tokens((10, 10))).lengths == [10]  # out of training: the ratio at its end
    kept = {}
    for progress in (0.0, 0.25, 1.0):
        kept[progress] = pruner(tokens((10, 10)), progress=progress).lengths[0]
    assert kept == {0.0: 50, 0.25: budget(100, middle), 1.0: 10}
    pruner.save_pretrained(tmp_path)
    assert AutoPruner.from_pretrained(tmp_path).config == pruner.config


def test_bad_schedules_of_the_ratio_are_named():
    with pytest.raises(ValueError, match=r"`initial_pruning_ratio` must be in \[0, 1\), got None"):
        build("random", pruning_schedule="cosine")
    with pytest.raises(ValueError, match="`initial_pruning_ratio` is 0.5, but with pruning_schedule='constant'"):
        build("random", initial_pruning_ratio=0.5)
    with pytest.raises(ValueError, match="`pruning_schedule` must be one of 'constant', 'linear', 'cosine', got"):
        build("random", pruning_schedule="step")


def test_budget():
    assert budget(576, 0.9) == 57
    assert [budget(10, r) for r in (0.0, 0.9, 0.7, 0.999)] == [10, 1, 3, 1]
    assert budget(1, 0.99) == 1


def reference_divprune(features: torch.Tensor, keep: int) -> list[int]:
    """The paper's rule, token by token, in float64."""
    unit = F.normalize(features.double(), dim=-1)
    distance = 1 - unit @ unit.T
    distance.fill_diagonal_(float("inf"))
    chosen = [int(distance.min(1).values.argmax())]
    while len(chosen) < keep:
        rest = [i for i in range(len(features)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("matrix", "block"), [(2**30, 512), (2**30, 5), (4 * 42**2, 512), (8, 5)])
def test_divprune_is_the_papers_rule(seed, matrix, block, monkeypatch):
    # In memory at once, in memory image by image, and not at all.
    monkeypatch.setattr("hf_dualspeed.pruners.farthest.batched.MATRIX_BYTES", matrix)
    monkeypatch.setattr("hf_dualspeed.pruners.farthest.batched.BLOCK", block)
    batch = tokens((6, 7), (4, 4), seed=seed)
    out = AutoPruner.from_name("divprune", pruning_ratio=0.7)(batch)
    for i, n in enumerate(batch.lengths):
        assert out.positions[i, : out.lengths[i]].tolist() == reference_divprune(batch.features[i, :n], budget(n, 0.7))


def test_divprune_does_not_wait_for_the_device_nor_loop_over_images(monkeypatch):
    # The meta device has no values: any read of one, any branch on one and any `.item()` raises there.
    monkeypatch.setattr(torch, "autocast", lambda *given, **options: nullcontext())  # which it has not either
    features = torch.randn(3, 50, 8, device="meta")
    assert DivPrune(DivPrune.config_class(0.9)).reduce(
        VisualTokens(features, lengths=[50] * 3), [5] * 3
    ).sizes.shape == (3, 5)
    calls = {}
    for images in (1, 16):
        with torch.profiler.profile() as profile:
            DivPrune(DivPrune.config_class(0.9)).reduce(VisualTokens(torch.randn(images, 50, 8)), [5] * images)
        calls[images] = sum(event.count for event in profile.key_averages() if event.key.startswith("aten::"))
    assert calls[16] <= calls[1] * 1.1


def test_divprune_multiplies_each_pair_once(monkeypatch):
    monkeypatch.setattr("hf_dualspeed.pruners.farthest.batched.BLOCK", 16)
    features = torch.randn(2, 160, 8)
    with FlopCounterMode(display=False) as counter:
        DivPrune(DivPrune.config_class(0.9)).reduce(VisualTokens(features), [16] * 2)
    blocks = 160 // 16
    assert counter.get_total_flops() == 2 * 2 * 160 * 160 * 8 * (blocks + 1) / (2 * blocks)


def test_random_draws_from_its_generator():
    pruner = AutoPruner.from_name("random", pruning_ratio=0.5)
    draws = [pruner(tokens((10, 10))).positions.tolist() for _ in range(2)]
    assert draws[0] == draws[1]
    batch = tokens((10, 10))
    assert pruner(batch).positions.tolist() != pruner(batch).positions.tolist()


def test_grid_is_evenly_spaced_and_pooling_averages_its_cells():
    batch = tokens((8, 8))
    kept = AutoPruner.from_name("grid", pruning_ratio=0.75)(batch)
    places = batch.grid[0, kept.positions[0], 1:]
    assert sorted(set(places[:, 0].tolist())) == sorted(set(places[:, 1].tolist())) == [0, 2, 4, 6]
    pooled = AutoPruner.from_name("avg_pool", pruning_ratio=0.75)(batch)
    expected = F.avg_pool2d(batch.features.view(1, 8, 8, 16).permute(0, 3, 1, 2), 2).flatten(2).mT
    torch.testing.assert_close(pooled.features, expected)
    assert torch.equal(pooled.positions, kept.positions)
    # 57 of 24 x 24 tokens is no product of two fitting numbers: bands of 7 and 8 columns.
    out = AutoPruner.from_name("grid", pruning_ratio=0.9)(tokens((24, 24)))
    gaps = torch.cdist(*(2 * [tokens((24, 24)).grid[0, out.positions[0], 1:].float()]))
    assert gaps.fill_diagonal_(99).min() >= 3
    without = AutoPruner.from_name("grid", pruning_ratio=0.75)(VisualTokens(batch.features))
    assert without.positions[0].tolist() == list(range(1, 64, 4))


def test_cls_attention_keeps_the_most_attended():
    batch = tokens((5, 5))
    out = AutoPruner.from_name("cls_attention", pruning_ratio=0.8)(batch)
    assert out.positions[0].tolist() == sorted(batch.attention[0].topk(5).indices.tolist())
    with pytest.raises(ValueError, match="'cls_attention' needs `VisualTokens.attention`, got None"):
        AutoPruner.from_name("cls_attention")(VisualTokens(torch.randn(1, 4, 2)))


@pytest.mark.parametrize("name", available_pruners())
def test_saved_config_builds_the_same_pruner(tmp_path, name, caplog):
    build(name, pruning_ratio=0.6).save_pretrained(tmp_path)
    loaded = AutoPruner.from_pretrained(tmp_path)
    assert type(loaded) is _REGISTRY[name]
    assert loaded.config.to_dict().items() >= {"pruner_type": name, "pruning_ratio": 0.6}.items()
    path = tmp_path / "pruner_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    assert AutoPruner.from_pretrained(tmp_path).config == loaded.config
    assert "from_the_future" in caplog.text


def test_bad_names_folders_and_ratios_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"`pruner` must be one of .*'divprune'.*got 'divprum'.*Did you mean 'divprune'"
    ):
        AutoPruner.from_name("divprum")
    with pytest.raises(FileNotFoundError, match=r"No pruner_config\.json"):
        AutoPruner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`pruning_ratio` must be in \[0, 1\), got 1"):
        AutoPruner.from_name("grid", pruning_ratio=1)
    (tmp_path / "pruner_config.json").write_text('{"pruner_type": "os.system"}')
    with pytest.raises(ValueError, match="must be one of"):
        AutoPruner.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`features` must be of shape \(B, N, D\)"):
        VisualTokens(torch.randn(3, 4))
    with pytest.raises(ValueError, match="`attention` must begin with the shape"):
        VisualTokens(torch.randn(1, 4, 2), attention=torch.randn(1, 5))
    with pytest.raises(TypeError, match="from_name"):
        AutoPruner()


def test_outsiders_register_pruners(tmp_path):
    @dataclass
    class FirstConfig(PrunerConfig):
        skip: int = 0

    try:

        @register_pruner("first")
        class First(Pruner):
            config_class = FirstConfig

            def rank(self, tokens, most):
                return torch.arange(self.config.skip, self.config.skip + most).expand(len(tokens.lengths), -1)

        assert "first" in available_pruners()
        pruner = AutoPruner.from_name("first", pruning_ratio=0.5, skip=2)
        assert pruner(tokens((3, 4))).positions[0].tolist() == [2, 3, 4, 5, 6, 7]
        pruner.save_pretrained(tmp_path)
        assert AutoPruner.from_pretrained(tmp_path).config == pruner.config

        @register_pruner("twin")  # the same settings under another name
        class Twin(First):
            config_class = FirstConfig

        assert AutoPruner.from_name("first").config.to_dict()["pruner_type"] == "first"
        assert AutoPruner.from_name("twin").config.to_dict()["pruner_type"] == "twin"
        assert PrunerConfig.pruner_type == FirstConfig.pruner_type == ""
        with pytest.raises(ValueError, match="`name` 'first' is taken by"):

            @register_pruner("first")
            class Second(Pruner):
                pass

        with pytest.raises(ValueError, match="`needs` of Third must be among"):

            @register_pruner("third")
            class Third(Pruner):
                needs = frozenset({"labels"})
    finally:
        _REGISTRY.pop("first", None)
        _REGISTRY.pop("twin", None)


@pytest.fixture
def first():
    """A class of a user's own with settings of its own, as they are written above the class."""

    @dataclass
    class FirstConfig(PrunerConfig):
        skip: int = 0

    @register_pruner("first")
    class First(Pruner):
        config_class, learned = FirstConfig, None

        def __init__(self, config):
            super().__init__(config)
            if type(self).learned is not None:
                self.weight = type(self).learned

    yield First, FirstConfig
    _REGISTRY.pop("first")


@pytest.mark.parametrize("written", ["own", "plain"])
def test_a_config_from_above_a_registered_class_gets_its_name(tmp_path, first, written):
    cls, own = first
    cls(own(pruning_ratio=0.5, skip=2) if written == "own" else PrunerConfig(pruning_ratio=0.5)).save_pretrained(
        tmp_path
    )
    loaded = AutoPruner.from_pretrained(tmp_path)
    assert type(loaded) is cls
    assert (loaded.config.pruning_ratio, loaded.config.skip) == (0.5, 2 if written == "own" else 0)


@pytest.mark.parametrize("learned", [False, True])
def test_a_loaded_pruner_is_in_evaluation_mode(tmp_path, first, learned):
    """One of a user's own may drop out or draw in training."""
    first[0].learned = torch.nn.Parameter(torch.ones(1)) if learned else None
    pruner = AutoPruner.from_name("first")
    assert not pruner.training
    pruner.train().save_pretrained(tmp_path)
    assert not AutoPruner.from_pretrained(tmp_path).training


def test_a_config_without_a_name_or_with_that_of_another_class_is_not_saved(tmp_path, first):
    """It could not be loaded, or would be as that class, without a word."""
    derived, other = type("Derived", (DivPrune,), {}), first[0]
    nameless = type("Nameless", (Pruner,), {})(PrunerConfig())
    for pruner in (derived(DivPrune.config_class()), other(DivPrune.config_class()), nameless):
        said = "'', .* would find nothing" if pruner is nameless else "'divprune', .* gets DivPrune in its place"
        with pytest.raises(ValueError, match=f"a {type(pruner).__name__} has the name {said}"):
            pruner.save_pretrained(tmp_path)
        args = DualSpeedTrainingArguments(str(tmp_path), use_cpu=True)
        with pytest.raises(ValueError, match="has the name"):
            resolve_pruner(pruner, args, None)
    assert derived(DivPrune.config_class(0.5))(tokens((4, 4))).lengths == [8]


RANKS = {
    "all tokens": lambda tokens, k: tokens.attention.argsort(1, descending=True),
    "too few": lambda tokens, k: tokens.attention.topk(k - 1).indices,
    "one image": lambda tokens, k: tokens.attention[0].topk(k).indices,
    "a mask": lambda tokens, k: tokens.attention > 0.5,
    "scores": lambda tokens, k: tokens.attention[:, :k],
    "all of topk": lambda tokens, k: tokens.attention.topk(k),
}


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("shapes", [[(4, 4), (4, 4)], [(4, 4), (3, 3)]])
def test_what_is_no_ranking_is_refused(monkeypatch, rank, shapes):
    pruner = build("random", pruning_ratio=0.5)
    monkeypatch.setattr(type(pruner), "rank", lambda self, *given: rank(*given))
    with pytest.raises(ValueError, match=r"`rank` of RandomPruner must return .* of shape \(2, 8\), got .*top_k"):
        pruner(tokens(*shapes))


def test_what_reduce_returns_must_fit_together():
    good = {"features": torch.zeros(2, 3, 4), "positions": torch.arange(3).expand(2, -1), "valid": None}
    PrunedTokens(**good, lengths=[3, 3])
    for change, message in (
        ({"lengths": [3, 2]}, r"`lengths` are \[3, 2\], but rows hold 3 tokens, `valid` is None"),
        ({"lengths": [4, 3]}, "`lengths` are .*, but rows hold 3"),
        ({"features": torch.zeros(2, 5, 4)}, r"`features` must begin with the shape \(B, K\), \(2, 3\)"),
        ({"sizes": torch.ones(2, 5)}, "`sizes` must begin with the shape"),
        ({"valid": torch.ones(3, 3, dtype=torch.bool)}, "`valid` must begin with the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            PrunedTokens(**{**good, "lengths": [3, 3], **change})


@pytest.mark.parametrize("name", available_pruners())
def test_docstrings_say_source_inputs_and_cost(name):
    cls = pruner_class(name)
    words = f"{sys.modules[cls.__module__].__doc__} {cls.__doc__}"
    assert "Cost:" in words
    assert re.search(r"arXiv \d{4}\.\d{5}|A baseline, not a published", " ".join(words.split()))
    assert re.search(r"Inputs:|[Nn]eeds ", words)
    assert len(cls.__doc__.strip().partition("\n")[0]) < 110  # the line of `dualspeed pruners`


def test_importing_the_package_is_enough_to_know_all_pruners():
    folder = Path(pruners.__file__).parent
    imports = [
        node for node in ast.parse((folder / "__init__.py").read_text()).body if isinstance(node, ast.ImportFrom)
    ]
    imported = {alias.name for node in imports if node.module is None for alias in node.names}
    assert imported == {path.stem for path in folder.glob("*.py") if "\n@register_pruner(" in path.read_text()}


def test_settings_that_are_whole_numbers_are_checked():
    with pytest.raises(ValueError, match="`crops` must be a whole number, got 2.5"):
        build("holov", crops=2.5)
    with pytest.raises(ValueError, match="`max_tokens` must be a whole number, got 32.5"):
        build("token_learner", max_tokens=32.5)
    with pytest.raises(ValueError, match="`layer` must be a whole number, got True"):
        build("fastv", layer=True)


def test_attention_that_is_not_a_number_is_named():
    batch = tokens((4, 4))
    batch.attention[0, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        build("prumerge", pruning_ratio=0.5)(batch)
    batch.attention[0, 5] = float("-inf")  # what no patch made
    assert build("prumerge", pruning_ratio=0.5)(batch).features.isfinite().all()


def test_settings_change_but_for_sizes_of_learned_weights():
    pruner = build("dynamicvit", scorer_size=16)
    pruner.reconfigure(pruning_ratio=0.25, temperature=2.0)
    assert (pruner.pruning_ratio, pruner.config.temperature) == (0.25, 2.0)
    with pytest.raises(ValueError, match="{'scorer_size': 32} do not fit the weights that the pruner 'dynamicvit'"):
        pruner.reconfigure(scorer_size=32)
    assert pruner.config.scorer_size == 16
    with pytest.raises(ValueError, match="unknown key 'scorer'"):
        pruner.reconfigure(scorer=1)


def test_an_auxiliary_loss_comes_with_the_kept_tokens():
    pruner = build("dynamicvit", scorer_size=16, ratio_weight=1.0, pruning_ratio=0.5).train()
    assert pruner(tokens((4, 4))).auxiliary_loss.requires_grad
    assert copy.deepcopy(pruner).eval()(tokens((4, 4))).auxiliary_loss is None
    assert pruner(tokens((1, 1))).auxiliary_loss is None  # nothing is pruned


@pytest.mark.parametrize("initial", [0.0, 0.25])
def test_too_few_maps_are_named_before_a_schedule_needs_them(initial):
    settings = {"max_tokens": 8, "pruning_ratio": 0.75, "initial_pruning_ratio": initial}
    pruner = build("token_learner", pruning_schedule="linear", **settings)
    assert pruner(tokens((4, 4))).lengths == [4]  # out of training there is no schedule
    pruner.train()
    with pytest.raises(ValueError, match=rf"keeps {budget(16, initial)} at the pruning ratio {initial:g}. Set max_tok"):
        pruner(tokens((4, 4)), progress=0.9)
