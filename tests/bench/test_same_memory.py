"""`dualspeed bench --same-memory`: the largest micro-batches that fit, and steps of as many samples."""

import json
from types import SimpleNamespace

import pytest
import torch
from bench_cases import FLAGS, tiny_bench
from PIL import Image
from transformers.models.llama import modeling_llama

from hf_dualspeed import cli
from hf_dualspeed.bench import same_memory
from hf_dualspeed.bench.options import BenchArguments, parse_arguments
from hf_dualspeed.bench.same_memory import GIB, Fitted, kernels_of, largest
from hf_dualspeed.utils.constants import INTERRUPTED

MEMORY = ["--same-memory", *FLAGS, "--rounds", "2", "--checkpointing", "off", "--memory-gib"]


def fitted_of(folder, optimizer="none", gib=0.02, checkpointing="off", **options):
    options = {"same_memory": True, "memory_gib": gib, "batch": 8, "rounds": 2, **options}
    return Fitted(tiny_bench(folder, checkpointing, **options), optimizer, int(gib * GIB))


@pytest.mark.parametrize(("limit", "start", "most"), [(n, s, 40) for n in (0, 1, 5, 39, 40, 99) for s in (1, 7, 64)])
def test_the_largest_number_is_found_by_trying(limit, start, most):
    tried = []
    found = largest(lambda number: tried.append(number) or number <= limit, start, most)
    best = min(limit, most)
    assert best - max(0, best // 8) <= found <= best
    assert len(tried) <= 12
    assert max(tried) <= most
    assert found in (*tried, 0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.json"
    assert cli.main(["bench", *MEMORY, "0.0055", "--output", str(path)]) == 0
    return path, json.loads(path.read_text())


def test_each_trainer_fills_the_memory(measured, tmp_path):
    results = measured[1]
    (run,) = results["runs"]
    assert (results["benchmark"], results["settings"]["memory_gib"]) == (same_memory.KIND, 0.0055)
    assert [(trial["optimizer"], trial["kernels"]) for trial in run["trials"]] == [("none", "off"), ("adamw", "off")]
    for trial in run["trials"]:
        sizes = trial["micro_batch"]
        assert 1 <= sizes["plain"] < trial["samples"] <= sizes["fast"]
        assert all(0 < held <= run["budget_bytes"] for held in trial["memory"].values())
        rounds = {name: torch.tensor(v, dtype=torch.float64) for name, v in trial["seconds_by_round"].items()}
        speedup = rounds["plain"] / (0.95 * rounds["fast"] + 0.05 * rounds["slow"])
        assert trial["expected_speedup"]["median"] == pytest.approx(speedup.quantile(0.5).item())
        flops = trial["flops"]
        limit = flops["plain"] / (0.95 * flops["fast"] + 0.05 * flops["slow"])
        assert trial["flop_limit"] == pytest.approx(limit)
    none, adamw = run["trials"]
    assert adamw["micro_batch"]["plain"] < none["micro_batch"]["plain"]  # its state takes room
    fitted = fitted_of(tmp_path, gib=0.0055, pruning_ratio=0.9)
    sizes = none["micro_batch"]
    assert fitted.fits("plain", sizes["plain"])
    assert not fitted.fits("plain", sizes["plain"] + max(1, sizes["plain"] // 8) + 1)


def test_the_page_shows_the_table(measured):
    path, results = measured
    page = path.with_suffix(".md").read_text()
    assert same_memory.readme_table(results) in page
    assert page.count("each at its fastest setting") == 2
    assert f"![Seconds per sample]({path.stem}.png)" in page
    with Image.open(path.with_suffix(".png")) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0, 114, 178), (86, 180, 233), (153, 153, 153)} <= colours


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    fitted, found = fitted_of(tmp_path), {}
    for name in ("plain", "fast", "slow"):
        for rows in ([6], [2, 2, 2], [4, 2]):
            fitted.step(name, [fitted.batch(size) for size in rows])
            found[name, len(rows)] = [p.grad.clone() for p in fitted.trained if p.grad is not None]
            fitted.model.zero_grad()
        for passes in (2, 3):
            torch.testing.assert_close(found[name, passes], found[name, 1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("plain", "fast", "samples", "passes"),
    [(4, 12, 12, (3, 1)), (2, 7, 7, (4, 1)), (13, 12, 12, (1, 1)), (30, 12, 24, (1, 2)), (5, 7, 5, (1, 1))],
)
def test_a_step_has_as_many_samples_for_both(tmp_path, monkeypatch, plain, fast, samples, passes):
    sizes = iter((plain, fast))
    monkeypatch.setattr(same_memory, "largest", lambda *_: next(sizes))
    fitted = Fitted.__new__(Fitted)
    fitted.bench = SimpleNamespace(options=SimpleNamespace(batch=64))
    fitted.fits, fitted.held, fitted.fit_parts = (lambda *_: True), (lambda *_: 1), (lambda: 2)
    found = fitted.fit({})
    assert (found["samples"], found["micro_batch"]) == (samples, {"plain": plain, "fast": fast})
    assert tuple(-(-samples // fitted.micro(name)) for name in ("plain", "fast")) == passes


def test_micro_batches_are_of_like_size(tmp_path):
    fitted = fitted_of(tmp_path)
    fitted.samples, fitted.sizes = 7, {"plain": 3, "fast": 7}
    assert [len(batch["input_ids"]) for batch in fitted.batches("plain")] == [2, 2, 3]
    assert fitted.micro("plain") == 3
    assert [len(batch["input_ids"]) for batch in fitted.batches("slow")] == [7]


def test_the_optimizers_state_counts_and_weights_stay(tmp_path):
    fitted = fitted_of(tmp_path)
    without = fitted.held("plain", 2)
    stepped = Fitted(fitted.bench, "adamw", fitted.budget)
    trained = sum(p.nbytes for p in stepped.trained)
    before = [p.clone() for p in stepped.trained]
    assert stepped.held("plain", 2) - without == pytest.approx(2 * trained, rel=0.1)
    assert stepped.optimizer.state
    assert all(map(torch.equal, before, stepped.trained))
    stepped.close()
    assert fitted.bench.dual.optimizer is None


def test_slow_steps_run_in_more_parts_where_they_do_not_fit(tmp_path):
    fitted = fitted_of(tmp_path, slow_splits="1")
    fitted.samples, fitted.sizes = 8, {"plain": 2, "fast": 8}
    fitted.fits("fast", 8)
    fitted.bench.dual.args.slow_mode_splits = 1
    fitted.budget = fitted.held("slow", 8) - 1
    assert fitted.fit_parts() == 2
    assert fitted.held("slow", 8) <= fitted.budget
    fitted.budget = 1
    with pytest.raises(ValueError, match=r"slow step.*not even in 8 parts.*larger --memory-gib"):
        fitted.fit_parts()


def test_memory_that_runs_out_does_not_fit(tmp_path, monkeypatch):
    fitted = fitted_of(tmp_path)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(fitted.bench.plain, "training_step", full)
    assert not fitted.fits("plain", 1)
    assert all(p.grad is None for p in fitted.trained)
    with pytest.raises(ValueError, match=r"One sample of llava-1.5 does not fit into 0\.02 GiB in the Trainer step"):
        fitted.fit({})
    monkeypatch.setattr(fitted.bench.plain, "training_step", lambda *_: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="must match"):  # another error is none of memory
        fitted.fits("plain", 1)


def test_kernels_train_alike_and_are_put_back(tmp_path, monkeypatch):
    monkeypatch.setattr(same_memory, "BACKEND", "eager")
    fitted, before = fitted_of(tmp_path, checkpointing="on"), dict(vars(modeling_llama))

    def applied(model, config):
        assert model is fitted.bench.model
        assert config == {"fused_linear_cross_entropy": False}
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", None)

    def losses():
        for name in ("plain", "fast", "slow"):
            fitted.step(name, [fitted.batch(2)])
            fitted.bench._clean(name)
        return dict(fitted.bench.losses)

    plain = losses()
    with kernels_of(fitted.bench) as used:
        assert (used["liger"], used["compiled_layers"]) == (False, 4)  # of language model and tower
        assert "liger" in used["why_no_liger"]
        assert losses() == pytest.approx(plain, rel=1e-4)
    monkeypatch.setattr(same_memory, "apply_liger_kernel", applied)
    monkeypatch.setattr(same_memory, "without_ligers_layers", lambda interface, device: None)
    with kernels_of(fitted.bench) as used:
        assert used["liger"]
        assert used["why_no_liger"] is None
        assert modeling_llama.apply_rotary_pos_emb is None
    assert dict(vars(modeling_llama)) == before


def test_fast_steps_that_recompute_are_a_trial_of_their_own(tmp_path, monkeypatch):
    class Noted:
        def __init__(self, bench, optimizer, budget):
            self.bench = bench

        def fit(self, start):
            return {"micro_batch": start, "samples": 4, "slow_parts": 1, "memory": dict.fromkeys(same_memory.STEPS, 1)}

        def flops(self, name):
            return self.bench.count_flops(name)

        def seconds(self, names):
            return {name: [float(self.flops(name))] for name in names}

        def close(self):
            pass

    bench = tiny_bench(tmp_path, "on", same_memory=True, memory_gib=1.0, optimizer=["none"])
    monkeypatch.setattr(same_memory, "Fitted", Noted)
    run = same_memory.trials(bench, list(same_memory.STEPS))
    without, recomputing = run["trials"]
    assert [trial["fast_mode_checkpointing"] for trial in run["trials"]] == [False, True]
    assert recomputing["flops"]["fast"] > 1.1 * without["flops"]["fast"]
    assert recomputing["flops"]["plain"] == without["flops"]["plain"]
    trials = [{**trial, "micro_batch": {"plain": 1, "fast": 4}} for trial in run["trials"]]
    run |= same_memory.derive({"trials": trials}, 0.05)
    assert [row[1] for row in same_memory.rows_of({"runs": [run]})] == ["on", "on, fast steps too"]
    (line,) = same_memory.best_lines({"runs": [run]})
    assert "DualSpeed" in line.split("checkpointing on, kernels off; ")[1]


def test_an_interrupted_measurement_keeps_whole_trials(measured, tmp_path, monkeypatch):
    assert not measured[0].with_suffix(".part.json").exists()
    seconds, timed = Fitted.seconds, []

    def stopped(fitted, names):
        timed.append(fitted)
        if len(timed) > 1:
            raise KeyboardInterrupt
        return seconds(fitted, names)

    monkeypatch.setattr(Fitted, "seconds", stopped)
    assert cli.main(["bench", *MEMORY, "0.0055", "--output", str(tmp_path / "memory.json")]) == INTERRUPTED
    path = tmp_path / "memory.part.json"
    assert cli.main(["bench", "--same-memory", "--render-only", "--output", str(path)]) == 0
    (run,) = json.loads(path.read_text())["runs"]
    assert [trial["optimizer"] for trial in run["trials"]] == ["none"]
    assert {"seconds", "expected_speedup"} <= run["trials"][0].keys()


def test_why_there_are_no_kernels_is_said():
    reason = "liger-kernel is not installed"
    trials = [{"why_no_liger": reason}, {}, {"why_no_liger": None}]
    assert same_memory.absent_lines({"runs": [{"trials": trials}]}) == [f"Without Liger's kernels: {reason}."]


def test_a_cpu_needs_to_be_told_how_much(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    free = BenchArguments(same_memory=True)
    with pytest.raises(ValueError, match=r"`memory_gib` is unset.*Use --memory-gib 4"):
        same_memory.budget_of(free, torch.device("cpu"))
    assert same_memory.budget_of(free, torch.device("cuda")) == 190
    assert same_memory.budget_of(BenchArguments(same_memory=True, memory_gib=0.5), torch.device("cuda")) == GIB // 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory-gib", "4"], r"`memory_gib` is 4\.0, but only --same-memory reads it"),
        (["--growth", "--kernels", "on"], r"`kernels` is \['on'\], but only --same-memory"),
        (["--same-memory", "--steps", "4"], r"`steps` is 4, but only --lengths"),
        (["--same-memory", "--growth"], r"`growth` and `same_memory` are measured one at a time.*--same-memory"),
        (["--same-memory", "--memory-gib", "0"], r"`memory_gib` must be in \(0"),
        (["--same-memory", "--optimizer", "sgd"], r"`optimizer` must be one of 'none', 'adamw'"),
        (["--same-memory", "--kernels", "yes"], r"`kernels` must be one of 'on', 'off'"),
    ],
)
def test_bad_flags_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)
