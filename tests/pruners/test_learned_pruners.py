"""TokenLearner and DynamicViT: their rules, what they learn, and their training through the trainer."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from launching import DDP, FSDP2, assert_same_training, run
from peft import LoraConfig, get_peft_model
from pruner_cases import build, grid, image, tokens
from safetensors.torch import load_file
from tiny_models import FAMILIES, batch
from torch import nn
from torch.distributions import Gumbel
from torch.utils._python_dispatch import TorchDispatchMode
from training import Watch, history, make

from hf_dualspeed import AutoPruner, Pruner, VisualTokens, prune_inputs, register_pruner
from hf_dualspeed.pruners import budget
from hf_dualspeed.pruners.dynamicvit import gumbel_like, relaxed
from hf_dualspeed.pruners.ops import take
from hf_dualspeed.pruners.registry import _REGISTRY
from hf_dualspeed.pruners.token_learner import SPREAD, unique_places

LEARNED = ("token_learner", "dynamicvit")
SMALL = {"token_learner": {"max_tokens": 32}, "dynamicvit": {"scorer_size": 16}}
RAGGED = [(4, 9), (7, 3), (1, 1), (2, 30)]


# --- the rules ----------------------------------------------------------------------------------------------------


def reference_maps(pruner, features: torch.Tensor, places: torch.Tensor, keep: int) -> torch.Tensor:
    """TokenLearner's maps of one image, `(K, N)`, map by map and token by token, in float64."""
    weight, bias = pruner.project.weight.double(), pruner.project.bias.double()
    extent = places.double().amax(0) + 1
    used = [axis for axis in range(3) if extent[axis] > 1]
    maps = torch.zeros(keep, len(features), dtype=torch.float64)
    for k in range(keep):
        for n, feature in enumerate(features.double()):
            hidden = F.gelu(weight @ ((feature - feature.mean()) / (feature.var(correction=0) + 1e-5).sqrt()) + bias)
            centre = [(0.5 + (k + 1) * step) % 1 for step in SPREAD]
            apart = sum(((places[n, a] + 0.5) / extent[a] - centre[a]) ** 2 for a in used)
            reach = 2 * keep ** (2 / max(1, len(used))) * math.exp(pruner.focus[k].item())
            maps[k, n] = pruner.maps.weight[k].double() @ hidden - reach * apart
    return maps.softmax(1)


@pytest.mark.parametrize("seed", range(3))
def test_token_learner_sums_by_learned_maps(seed):
    pruner, cases = build("token_learner", pruning_ratio=0.75), tokens(*RAGGED, seed=seed)
    with torch.no_grad():
        pruner.focus.normal_(generator=torch.Generator().manual_seed(seed))
        pruner.maps.weight.mul_(20)  # as after training: content weighs as much as place
        out = pruner(cases)
        others = out.merge(cases.keys)
    for i, n in enumerate(cases.lengths):
        keep = out.lengths[i]
        maps = reference_maps(pruner, cases.features[i, :n], cases.grid[i, :n], keep).detach()
        taken, order = [], sorted(range(keep), key=lambda k: int(maps[k].argmax()))
        for rank, k in enumerate(order):  # to the next free place, as long as there is room for those that follow
            free = max(int(maps[k].argmax()), taken[-1] + 1 if taken else 0)
            taken.append(min(free, n - keep + rank))
        assert out.positions[i, :keep].tolist() == taken
        for rows, merged in ((cases.features, out.features), (cases.keys, others)):
            expected = maps[order] @ rows[i, :n].double()
            torch.testing.assert_close(merged[i, :keep].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("places", "expected"),
    [([0, 0, 0], [0, 1, 2]), ([9, 9, 9], [7, 8, 9]), ([5, 8, 5], [5, 6, 8]), ([9, 0, 9], [0, 8, 9])],
)
def test_shared_places_move_to_the_next_free_one(places, expected):
    positions, order, _ = unique_places(torch.tensor([places]), [3], [10], 12)
    assert positions.tolist() == [expected]
    assert [places[k] for k in order[0]] == sorted(places)


@pytest.mark.parametrize(("rows", "columns"), [(24, 24), (12, 40), (1, 64)])
def test_first_maps_are_regions_that_cover_the_image(rows, columns):
    pruner = build("token_learner", pruning_ratio=0.9)
    cases = tokens((rows, columns))
    with torch.no_grad():
        keep = budget(rows * columns, 0.9)
        maps = pruner.weights(cases, [keep])[0]
        spread = pruner(cases).features[0].std(0).mean()
    reach = 1 / maps.square().sum(1)  # tokens that a map averages
    assert 2 < reach.min()
    assert reach.max() < 8 * rows * columns / keep
    assert maps.sum(0).min() > 0.05 * keep / (rows * columns)  # no token is left out
    assert spread > 0.1  # means of all tokens would differ by nothing


def test_gumbel_top_k_draws_in_proportion_to_the_scores():
    scores = torch.tensor([0.0, 1.0, 2.0]).expand(20000, 3)
    noise = gumbel_like(scores, torch.Generator().manual_seed(0))
    assert noise.mean() == pytest.approx(float(Gumbel(0.0, 1.0).mean), abs=0.02)
    drawn = (scores + noise).argmax(1).bincount() / len(scores)
    torch.testing.assert_close(drawn, scores[0].softmax(0), rtol=0, atol=0.015)


def test_dynamicvit_draws_in_training_and_keeps_the_best_in_evaluation():
    settings = {"pruning_ratio": 0.75, "hidden_size": 16, "dropped_tokens": "discard"}
    pruner, cases = AutoPruner.from_name("dynamicvit", **settings), tokens((6, 6), (4, 5))
    best = pruner.scores(cases)
    out = pruner(cases)
    for i, n in enumerate(cases.lengths):
        assert out.positions[i, : out.lengths[i]].tolist() == sorted(best[i, :n].topk(n // 4).indices.tolist())
        assert pruner(image(cases, i)).positions[0].tolist() == out.positions[i, : out.lengths[i]].tolist()
    pruner.train()
    draws = []
    for seed in (0, 0, 1):
        cases.generator = torch.Generator().manual_seed(seed)
        drawn = pruner(cases)
        assert drawn.lengths == [9, 5]
        picked = cases.features.gather(1, drawn.positions[..., None].expand(-1, -1, 16))
        assert torch.equal(drawn.features[0], picked[0])  # to the bit: the relaxed choice is in the gradient alone
        draws.append(drawn.positions.tolist())
    assert draws[0] == draws[1] != draws[2]


def test_relaxed_choice_has_the_gradient_of_means_over_what_was_dropped():
    generator = torch.Generator().manual_seed(0)
    cases = tokens((3, 3), (2, 2), (1, 1))
    scores = torch.randn(3, 9, generator=generator, requires_grad=True)
    lengths, toward = [3, 2, 1], torch.randn(3, 3, 16, generator=generator)
    positions = torch.tensor([[1, 4, 6], [0, 3, 8], [0, 8, 8]])
    kept = type("Kept", (), {"positions": positions, "features": torch.zeros(3, 3, 16)})
    mask = torch.arange(3) < torch.tensor(lengths)[:, None]
    (relaxed(kept, scores, cases) * toward * mask[..., None]).sum().backward()
    loss, exact = 0.0, scores.detach().double().requires_grad_(True)
    for b, (keep, n) in enumerate(zip(lengths, cases.lengths, strict=True)):
        dropped = [i for i in range(n) if i not in positions[b, :keep]]
        for k in range(keep):
            choice = [int(positions[b, k]), *dropped]
            mean = exact[b, choice].softmax(0) @ cases.features[b, choice].double()
            loss = loss + toward[b, k].double() @ mean
    loss.backward()
    torch.testing.assert_close(scores.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert (scores.grad[2] == 0).all()  # nothing was dropped


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_reach_every_parameter_and_the_tokens(name):
    pruner, cases = build(name, pruning_ratio=0.75, **SMALL[name]).train(), tokens(*RAGGED)
    cases.features.requires_grad_(True)
    target = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(9))
    out = pruner(cases)
    ((out.features - target).square() * out.valid[..., None]).sum().backward()
    for parameter_name, parameter in pruner.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert parameter.grad.abs().max() > 1e-6, parameter_name
    assert cases.features.grad.isfinite().all()
    assert not cases.features.grad[~cases.valid].any()
    touched = cases.features.grad.abs().sum(-1) > 0
    for i, keep in enumerate(out.lengths):
        assert touched[i, out.positions[i, :keep]].all()
    if name == "dynamicvit":  # the estimate for the scores stays with the scores
        pruner.reconfigure(dropped_tokens="discard")
        cases.features.grad = None
        pruner(cases).features.square().sum().backward()
        assert (cases.features.grad.abs().sum(-1) > 0).sum() == sum(out.lengths)


def test_tokens_learn_what_maps_look_at():
    pruner, cases = build("token_learner", pruning_ratio=0.75), tokens(*RAGGED)
    cases.features.requires_grad_(True)
    pruner(cases).merge(cases.keys).square().sum().backward()  # of other features, so through the maps alone
    assert cases.features.grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("training", [False, True])
def test_half_precision_weights_and_autocast_compute_in_float32(name, training):
    exact = build(name, pruning_ratio=0.75).train(training)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(half.state_dict())
    expected, got = exact(tokens((8, 8))), half(tokens((8, 8)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = exact(tokens((8, 8)))
    for out in (got, cast):
        assert torch.equal(out.features, expected.features)
        assert torch.equal(out.positions, expected.positions)


class CountedOperators(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LEARNED)
def test_no_wait_for_the_device_and_no_loop_over_images(name, monkeypatch):
    pruner = build(name, pruning_ratio=0.9).train()
    counts = {}
    for images in (1, 16):
        rows = torch.arange(50) < torch.tensor([50] + [40] * (images - 1))[:, None]
        cases = [torch.randn(images, 50, 16), rows, grid(5, 10).expand(images, -1, -1)]
        lengths = [50] + [40] * (images - 1)
        with CountedOperators() as counted:
            pruner(VisualTokens(cases[0], cases[1], cases[2], lengths=lengths))
        counts[images] = counted.calls
    assert counts[16] <= counts[1] * 1.1
    # The meta device has no values: any read of one, any branch on one and any `.item()` raises there. Nor autocast.
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    cases = [value.to("meta") for value in cases]
    out = copy.deepcopy(pruner).to("meta").reduce(VisualTokens(*cases, lengths=lengths), [5] + [4] * 15)
    assert out.features.shape == (16, 5, 16)


def test_ratio_loss_pulls_the_keep_probability_to_the_share_kept():
    pruner = build("dynamicvit", pruning_ratio=0.75, ratio_weight=2.0).train()
    cases = tokens((6, 6), (4, 5))
    scores = pruner.scores(cases)
    loss = pruner(cases).auxiliary_loss
    means = [scores[i, :n].sigmoid().mean().item() for i, n in enumerate(cases.lengths)]
    assert loss.item() == pytest.approx(2 * sum((m - 0.25) ** 2 for m in means) / 2, rel=1e-5)
    optimizer = torch.optim.Adam(pruner.parameters(), 1e-2)
    for _ in range(60):
        loss = pruner(cases).auxiliary_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3


def test_bad_settings_and_budgets_are_named():
    pruner = build("token_learner", pruning_ratio=0.5, max_tokens=16)
    with pytest.raises(
        ValueError, match=r"`max_tokens` is 16, but an image of 36 tokens keeps 18 .* 0\.5\. Set max_tok"
    ):
        pruner(tokens((4, 4), (6, 6)))
    for name in LEARNED:
        with pytest.raises(
            ValueError, match="`hidden_size` is 32, but the visual tokens are 16 wide. Set hidden_size=16"
        ):
            build(name, hidden_size=32)(tokens((6, 6)))
    for name, settings, message in (
        ("token_learner", {"max_tokens": 0}, r"`max_tokens` must be in \[1, inf\), got 0"),
        ("dynamicvit", {"temperature": 0.0}, r"`temperature` must be in \(0, inf\), got 0\.0"),
        ("dynamicvit", {"ratio_weight": -1}, "`ratio_weight` must be in"),
        ("dynamicvit", {"scorer_size": 18}, "`scorer_size` must be a multiple of 4, got 18"),
    ):
        with pytest.raises(ValueError, match=message):
            build(name, **settings)


# --- learning -----------------------------------------------------------------------------------------------------

SIDE, WIDTH, KEPT = 8, 16, 4


class Reader(nn.Module):
    """Attends to normed tokens, as a language model does, and tells three numbers."""

    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)

    def forward(self, features):
        rows = F.layer_norm(features, (WIDTH,))
        return (self.query(rows).softmax(1) * self.value(rows)).sum(1)


def riddles(count: int, generator: torch.Generator):
    """Images of 64 noisy tokens, of which one, marked in one feature, holds the answer: tokens, answers, its place."""
    at = torch.randint(SIDE * SIDE, (count,), generator=generator)
    features = torch.randn(count, SIDE * SIDE, WIDTH, generator=generator)
    rows = torch.arange(count)
    features[..., 3] = 0
    features[rows, at, 3] = 4
    places = grid(SIDE, SIDE).expand(count, -1, -1)
    return VisualTokens(features, grid=places, generator=generator), features[rows, at, :3].clone(), at


@torch.no_grad()
def found(pruner, generator: torch.Generator) -> float:
    """How often the answer is kept, or how much of its best map lies on it."""
    cases, _, at = riddles(512, generator)
    if pruner.merges:
        return float(pruner.weights(cases, [KEPT] * 512)[torch.arange(512), :, at].amax(1).mean())
    return float((pruner(cases).positions == at[:, None]).any(1).float().mean())


@pytest.mark.parametrize(
    ("name", "settings", "steps"), [("token_learner", {}, 200), ("dynamicvit", {"scorer_size": 64}, 350)]
)
def test_learns_from_the_loss_alone_where_the_answer_is(name, settings, steps):
    # By chance dynamicvit keeps it in 4 / 64 of all images.
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    pruner = AutoPruner.from_name(name, pruning_ratio=1 - KEPT / SIDE**2, hidden_size=WIDTH, **settings)
    reader = Reader()
    before = found(pruner.eval(), generator)
    optimizer = torch.optim.Adam([*pruner.parameters(), *reader.parameters()], lr=3e-3)
    pruner.train()
    for _ in range(steps):
        cases, answers, _ = riddles(64, generator)
        loss = F.mse_loss(reader(pruner(cases).features), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = found(pruner.eval(), generator)
    print(f"{name}: {before:.3f} before, {after:.3f} after")
    assert before < 0.2
    assert after > 0.85


# --- through the trainer ------------------------------------------------------------------------------------------


def options(name: str, **more) -> dict:
    return {
        "pruner": name,
        "pruner_kwargs": SMALL[name],
        "pruning_ratio": 0.75,
        "slow_mode_ratio": 0.5,
        "max_steps": 6,
        "seed": 1,
        **more,
    }


def learned(trainer) -> list[str]:
    return [f"dualspeed.pruner.{name}" for name, _ in trainer.dual_forward.pruner.named_parameters()]


@pytest.mark.parametrize("name", LEARNED)
def test_training_moves_it_in_fast_steps_alone_shortens_saves_and_resumes(tmp_path, name):
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = make(tmp_path, **options(name, **saving))
    watch, lengths = Watch(learned(trainer)), []
    trainer.add_callback(watch)
    trainer.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append((trainer.dual_forward.mode, kwargs["inputs_embeds"].shape[1])),
        with_kwargs=True,
    )
    trainer.train()
    modes = [trainer.mode_at(step) for step in range(6)]
    assert {"fast", "slow"} == set(modes)
    for mode, moved in zip(modes, watch.moved, strict=True):
        assert set(moved.values()) == {mode == "fast"}, moved
    inputs = [trainer.data_collator(trainer.train_dataset[i : i + 2]) for i in range(0, 8, 2)]
    full = {i["input_ids"].shape[1] for i in inputs}
    assert {n for mode, n in lengths if mode == "slow"} & full  # the student's; the teacher's are short
    assert not {n for mode, n in lengths if mode == "fast"} & full
    assert max(n for mode, n in lengths if mode == "fast") < max(full)
    resumed = make(tmp_path, **options(name, **saving))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert history(resumed, "loss", "grad_norm") == history(trainer, "loss", "grad_norm")
    for (parameter_name, ours), theirs in zip(
        resumed.model.named_parameters(), trainer.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), parameter_name
    trainer.save_model()
    saved = load_file(tmp_path / "pruner.safetensors")
    pruner = trainer.dual_forward.pruner
    assert {n: tuple(p.shape) for n, p in pruner.state_dict().items()} == {n: tuple(p.shape) for n, p in saved.items()}
    loaded = AutoPruner.from_pretrained(tmp_path)
    assert loaded.config == pruner.config
    assert loaded.config.hidden_size == 32
    model, inputs = trainer.model.eval(), batch(FAMILIES["llava"], FAMILIES["llava"].build()[1])
    with torch.no_grad():
        ours, theirs = (model(**prune_inputs(model, inputs, p)).logits for p in (pruner, loaded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", LEARNED)
def test_first_weights_follow_from_the_seed(tmp_path, name):
    weights = []
    for seed, ambient in ((0, 1), (0, 2), (5, 1)):
        model = FAMILIES["llava"].build(seed=3)[0]
        torch.manual_seed(ambient)
        trainer = make(tmp_path, model=model, **options(name, seed=seed))
        weights.append(trainer.dual_forward.pruner.state_dict())
    for key in weights[0]:
        assert torch.equal(weights[0][key], weights[1][key])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("name", LEARNED)
def test_bfloat16_model_trains_it_in_float32(tmp_path, name):
    model = FAMILIES["llava"].build()[0].to(torch.bfloat16)
    trainer = make(tmp_path, model=model, **options(name, slow_mode_ratio=0.0, max_steps=2))
    before = copy.deepcopy(trainer.dual_forward.pruner.state_dict())
    trainer.train()
    assert all(math.isfinite(loss) for (loss,) in history(trainer, "loss"))
    for key, value in trainer.dual_forward.pruner.state_dict().items():
        assert value.dtype == torch.float32
        assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_trains_it_beside_the_adapters(tmp_path, name, family):
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    model = get_peft_model(FAMILIES[family].build()[0], config)
    trainer = make(tmp_path, family, model=model, **options(name, slow_mode_ratio=0.0, max_steps=2))
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved.issuperset(learned(trainer))
    assert all("lora_" in n or n.startswith("dualspeed.") for n in moved)
    trainer.processing_class = None  # Qwen's tiny processor lacks a video part, which saving asks for
    trainer.save_model()
    assert {"adapter_model.safetensors", "pruner.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert not [key for key in adapters if "dualspeed" in key]
    loaded = AutoPruner.from_pretrained(tmp_path)
    for key, value in trainer.dual_forward.pruner.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("name", LEARNED)
def test_ratio_schedule_trains_it_too(tmp_path, name):
    settings = {**SMALL[name], "pruning_schedule": "linear", "initial_pruning_ratio": 0.25}
    trainer = make(tmp_path, **options(name, slow_mode_ratio=0.0, max_steps=4, pruner_kwargs=settings))
    kept = []
    trainer.dual_forward.pruner.register_forward_hook(lambda module, args, out: kept.append(set(out.lengths)))
    before = copy.deepcopy(trainer.dual_forward.pruner.state_dict())
    trainer.train()
    ratios = [0.25 + (0.75 - 0.25) * step / 3 for step in range(4)]
    assert kept == [{budget(16, ratio)} for ratio in ratios]
    assert all(not torch.equal(v, before[k]) for k, v in trainer.dual_forward.pruner.state_dict().items())


def test_ratio_loss_is_logged_and_trained(tmp_path):
    logs = {}
    for weight in (0.0, 2.0):
        settings = {"scorer_size": 16, "ratio_weight": weight}
        trainer = make(tmp_path, **options("dynamicvit", slow_mode_ratio=0.0, max_steps=1, pruner_kwargs=settings))
        trainer.train()
        (logs[weight],) = history(trainer, "loss", "fast_loss", "pruner_loss")
    assert logs[0.0][2] is None
    assert logs[0.0][1] == pytest.approx(logs[2.0][1], rel=1e-5)
    assert logs[2.0][2] == pytest.approx(2 * 0.25**2, rel=0.2)  # first scores are near 0, and a quarter is kept
    assert logs[2.0][0] == pytest.approx(logs[2.0][1] + logs[2.0][2], rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("config", "given"), [(DDP, ()), (FSDP2, ("--images",))], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(tmp_path, config, given):
    # Not dynamicvit: as with every pruner that draws, each rank draws its own.
    one, two = tmp_path / "one", tmp_path / "two"
    given = ("--pruner", "token_learner", *given)
    (alone,) = run(one, "--batch", "2", *given)
    assert_same_training(one, two, alone, run(two, "--batch", "1", *given, config=config))
    # It starts at zero and moves little, so that the tolerance for weights would hide a gradient of one rank alone.
    expected, focus = (load_file(f / "rank0.safetensors")["dualspeed.pruner.focus"] for f in (one, two))
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(focus, expected, rtol=1e-3, atol=1e-9)
    assert torch.equal(load_file(two / "pruner.safetensors")["focus"], focus)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("config", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_what_dynamicvit_learned_is_equal_on_all_ranks(tmp_path, config):
    reports = run(tmp_path, "--batch", "1", "--images", "--pruner", "dynamicvit", config=config)
    assert [report["world"] for report in reports] == [2, 2]
    weights = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


# --- the auxiliary loss -------------------------------------------------------------------------------------------


def test_out_of_training_the_ratio_at_its_end_counts_for_the_maps():
    schedule = {"pruning_ratio": 0.75, "pruning_schedule": "linear", "initial_pruning_ratio": 0.25}
    pruner = AutoPruner.from_name("token_learner", hidden_size=WIDTH, max_tokens=16, **schedule)
    assert pruner(tokens((6, 6))).lengths == [9]
    for training in (False, True):
        with pytest.raises(ValueError, match=r"`max_tokens` is 16, but an image of 36 tokens keeps 27 .* 0\.25"):
            pruner.train(training)(tokens((6, 6)), progress=0.0)


@pytest.fixture
def taxed():
    """A pruner whose auxiliary loss is half the square of its one weight, and whose choice is fixed."""

    @register_pruner("taxed")
    class Taxed(Pruner):
        def __init__(self, config):
            super().__init__(config)
            self.weight = nn.Parameter(torch.tensor(2.0))

        def reduce(self, tokens, lengths):
            positions = torch.arange(max(lengths)).expand(len(lengths), -1)
            loss = self.weight.square() / 2 if self.training else None
            return replace(take(tokens, positions, lengths), auxiliary_loss=loss)

    yield "taxed"
    _REGISTRY.pop("taxed")


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(4, 1), (2, 2), (1, 4)])
def test_the_auxiliary_loss_is_a_mean_over_micro_batches(tmp_path, taxed, batch_size, micro_batches):
    pictures = [{"index": i} for i in (0, 3, 4, 6)]  # an image in each
    trainer = make(
        tmp_path,
        pruner=taxed,
        slow_mode_ratio=0.0,
        data=pictures,
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=micro_batches,
        optim="sgd",
        learning_rate=0.1,
        weight_decay=0.0,
        max_grad_norm=0.0,
    )
    trainer.train()
    assert trainer._pruner.weight.item() == pytest.approx(2.0 - 0.1 * 2.0)
    assert history(trainer, "pruner_loss") == [[pytest.approx(2.0)]]


def test_gumbel_noise_is_finite_where_a_draw_is_zero(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator=None: self.zero_())
    assert gumbel_like(torch.zeros(3), None).isfinite().all()
