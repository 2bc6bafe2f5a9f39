"""`dualspeed bench --lengths`: the same samples at random and by length."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from hf_dualspeed import cli
from hf_dualspeed.bench import lengths as bench_lengths
from hf_dualspeed.bench import report as bench_report
from hf_dualspeed.bench.lengths import GROUPED, RANDOM, drawn_lengths, padded, padding
from hf_dualspeed.bench.options import BenchArguments, parse_arguments

FLAGS = ["--lengths", "--image-size", "56", "--hidden-size", "64", "--layers", "2", "--batch", "4", "--steps", "8"]
FLAGS += ["--text-tokens", "150", "--slow-ratio", "0.25", "--threads", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("lengths") / "bench_lengths.json"
    assert cli.main(["bench", *FLAGS, "--output", str(path)]) == 0
    return path, json.loads(path.read_text())


def test_drawn_lengths_follow_the_distribution_that_the_page_names():
    lengths = torch.tensor(drawn_lengths(20000, 1024), dtype=torch.float64)
    assert (lengths.min(), lengths.max()) == (16, 1024)
    assert lengths.median() == pytest.approx(60, rel=0.05)
    inner = lengths[(lengths > 16) & (lengths < 1024)].log()
    assert (inner.quantile(0.75) - inner.quantile(0.25)).item() == pytest.approx(2 * 0.6745 * 0.9, rel=0.1)
    assert drawn_lengths(5, 1024) == drawn_lengths(5, 1024)


def test_padded_batches_hold_each_text_and_its_end_as_labels():
    whole = {"input_ids": torch.arange(10, 40).view(2, 15), "pixel_values": torch.ones(2)}
    batch = padded(whole, 5, [9, 4])
    assert batch["attention_mask"].tolist() == [[1] * 14, [1] * 9 + [0] * 5]
    assert batch["input_ids"].tolist() == [list(range(10, 24)), [*range(25, 34), *[0] * 5]]
    assert batch["labels"].tolist() == [[-100] * 10 + [20, 21, 22, 23], [-100] * 7 + [32, 33] + [-100] * 5]
    assert padding([[0, 1]], torch.tensor([14, 9])) == {"tokens": 28, "padding": 5}


def test_both_kinds_of_batches_hold_the_same_samples_in_the_same_modes(tmp_path, monkeypatch):
    bench = bench_lengths.LengthBench(parse_arguments(FLAGS), str(tmp_path))
    assert bench.modes == ["slow"] * 4 + ["fast"] * 4
    for mode in ("fast", "slow"):
        samples = {
            arm: sorted(s for batch, m in zip(plan, bench.modes, strict=True) if m == mode for s in batch)
            for arm, plan in bench.plans.items()
        }
        assert samples[RANDOM] == samples[GROUPED]
    # What is said of padding is what the model runs on.
    ran, count = [], bench.dual.clock.count
    monkeypatch.setattr(
        bench.dual.clock, "count", lambda mode, tokens, *more: ran.append(tokens) or count(mode, tokens, *more)
    )
    for arm, plan in bench.plans.items():
        said, tokens = bench.padding_of(plan, bench.modes), {"fast": 0, "slow": 0}
        for step, mode in enumerate(bench.modes):
            bench.run_step(arm, step)
            tokens[mode] += ran.pop()
        assert tokens == {mode: said[mode]["tokens"] for mode in tokens}


def test_results_and_page(measured):
    path, results = measured
    run = results["runs"][0]
    assert run["steps"] == {"fast": 4, "slow": 4}
    assert (len(run["text_lengths"]), results["rounds"]) == (32, 2)
    for mode in ("fast", "slow"):
        real = {arm: p[mode]["tokens"] - p[mode]["padding"] for arm, p in run["padding"].items()}
        assert real[RANDOM] == real[GROUPED] > 0
        assert run["padding"][GROUPED][mode]["padding"] <= run["padding"][RANDOM][mode]["padding"]
        assert run["flops"][GROUPED][mode] <= run["flops"][RANDOM][mode]
        assert run["epoch_padding"][GROUPED][mode]["padding"] < 0.8 * run["epoch_padding"][RANDOM][mode]["padding"]
        times = [torch.tensor(run["seconds_by_round"][arm][mode]) for arm in (RANDOM, GROUPED)]
        assert run["gains"][mode]["median"] == pytest.approx((times[0] / times[1]).quantile(0.5).item(), rel=1e-4)
    work = {arm: {mode: run["flops"][arm][mode] / 4 for mode in ("fast", "slow")} for arm in (RANDOM, GROUPED)}
    mixes = [0.75 * of["fast"] + 0.25 * of["slow"] for of in work.values()]
    assert run["gains"]["mix"]["by_flops"] == pytest.approx(mixes[0] / mixes[1])
    shares = bench_lengths.shares(results, GROUPED)
    assert min(shares["fast"], shares["slow"]) <= shares["mix"] <= max(shares["fast"], shares["slow"])
    # In one row no token is padding, so that both kinds of batches hold the same tokens.
    row = run["switches"]["padding_free"]
    assert row[GROUPED]["flops"] < run["flops"][GROUPED]["fast"]
    assert row[RANDOM]["flops"] < run["flops"][RANDOM]["fast"]
    assert row[RANDOM]["gain"]["by_flops"] == run["flops"][RANDOM]["fast"] / row[RANDOM]["flops"]
    times = [torch.tensor(of) for of in (run["seconds_by_round"][RANDOM]["fast"], row[RANDOM]["seconds_by_round"])]
    assert row[RANDOM]["gain"]["median"] == pytest.approx((times[0] / times[1]).quantile(0.5).item(), rel=1e-4)
    page = path.with_suffix(".md").read_text()
    assert "in one row (`padding_free`)" in page
    older = {**results, "runs": [{k: v for k, v in run.items() if k not in ("switches", "left_out")}]}
    assert "in one row" not in bench_lengths.readme_table(older)
    assert bench_lengths.readme_table(results) in page
    assert "lengths of the texts are drawn" in page
    assert not math.isnan(run["seconds"][GROUPED]["mix"]["median"])
    with Image.open(path.with_suffix(".png")) as image:
        assert {(0, 114, 178), (153, 153, 153)} <= {c for _, c in image.convert("RGB").getcolors(1 << 24)}


def test_each_switch_is_turned_on_for_its_own_steps_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_lengths, "BACKEND", "eager")
    switches = ["fast_length_multiple", "compile_regions", "compile_regions+fast_length_multiple"]
    words = [*FLAGS, "--steps", "2", "--switches", *switches]
    bench = bench_lengths.LengthBench(parse_arguments(words), str(tmp_path))
    assert bench.switches == switches
    assert len(bench.compiled) == 4  # layers of language model and tower
    losses, seen, step, ran = {}, {}, len(bench.modes) - 1, []
    monkeypatch.setattr(bench.dual.clock, "count", lambda mode, tokens, *more: ran.append(tokens))
    for given in ("", *switches, "padding_free"):
        bench.run_step(GROUPED, step, given)
        losses[given] = bench.loss.item()
        used = all(layer._compiled_call_impl is not None for layer in bench.compiled)
        seen[given] = (ran.pop() % (4 * 64) == 0, used, bench.dual.dual_forward.padding_free)
    assert list(losses.values()) == [pytest.approx(losses[""], rel=1e-4)] * 5
    assert seen == {
        "": (False, False, False),
        "fast_length_multiple": (True, False, False),
        "compile_regions": (False, True, False),
        "compile_regions+fast_length_multiple": (True, True, False),
        "padding_free": (False, False, True),
    }
    bench.options.rounds = 1
    run = bench.run_steps()
    assert run["switches"]["compile_regions"][RANDOM]["flops"] is None
    assert run["switches"]["fast_length_multiple"][RANDOM]["flops"] > run["flops"][RANDOM]["fast"]
    results = {"runs": [{**run, **bench_lengths.derive(run, 0.25)}]}
    assert [row[0] for row in bench_lengths.switch_rows(results)][-1] == (
        "compiled layers (`compile_regions`) and lengths rounded up (`fast_length_multiple=64`)"
    )


def test_a_switch_that_cannot_be_turned_on_is_named(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(bench_lengths.torch, "compile", broken)
    words = ["--switches", "padding_free", "compile_regions+fast_length_multiple"]
    bench = bench_lengths.LengthBench(parse_arguments([*FLAGS, *words]), str(tmp_path))
    assert bench.switches == ["padding_free"]
    lines = bench_lengths.left_out_lines({"runs": [{"left_out": bench.left_out}]})
    assert lines == ["Without compiled layers (`compile_regions`): No working C++ compiler found."]
    with pytest.raises(ValueError, match="`switches` must be one of .*, got 'packing'"):
        parse_arguments(["--lengths", "--switches", "padding_free+packing"])
    with pytest.raises(ValueError, match=r"`switches` is \['padding_free'\], but only --lengths"):
        parse_arguments(["--switches", "padding_free"])


def test_files_of_another_kind_and_options_that_do_not_go_together_are_named(measured):
    path, results = measured
    with pytest.raises(ValueError, match="holds 'steps on batches of like length'.*Give --growth, --lengths"):
        bench_report.readme_table(results)
    assert cli.main(["bench", *FLAGS, "--render-only", "--output", str(path)]) == 0
    defaults = parse_arguments(["--lengths"])
    assert (defaults.checkpointing, defaults.rounds, defaults.text_tokens) == (["off"], 2, 1024)
    assert defaults.output == "docs/results/bench_lengths.json"
    assert "steps" not in BenchArguments().recorded()
    assert (BenchArguments().rounds, BenchArguments().text_tokens) == (8, 200)
    for flags, message in (
        (["--growth"], "Give --growth or --lengths"),
        (["--shape", "llava-next"], r"`lengths` is measured on llava-1\.5"),
        (["--model", "x"], r"`lengths` is measured on llava-1\.5"),
        (["--steps", "1"], r"`steps` must be in \[2, inf\), got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_arguments(["--lengths", *flags])
    with pytest.raises(ValueError, match="`steps` is 5, but only --lengths reads it"):
        parse_arguments(["--steps", "5"])
