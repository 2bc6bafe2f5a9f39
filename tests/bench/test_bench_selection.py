"""`dualspeed bench --selection`: choosing tokens alone, in plain PyTorch and as in fast steps."""

from __future__ import annotations

import json

import pytest
from bench_cases import FLAGS, tiny_bench

from hf_dualspeed import cli
from hf_dualspeed.bench import growth, selection
from hf_dualspeed.bench.options import BenchArguments
from hf_dualspeed.pruners.farthest import batched


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "TOKENS", (16, 600))
        patch.setattr(selection, "WIDTHS", (16, 32))
        path = tmp_path_factory.mktemp("selection") / "selection.json"
        flags = [*FLAGS, "--shape", "llava-1.5", "--batch", "2", "--rounds", "2", "--output", str(path)]
        assert cli.main(["bench", "--selection", *flags]) == 0
    return path


def test_each_way_is_measured_once_beside_the_fast_step(path):
    results = json.loads(path.read_text())
    (run,) = results["runs"]
    times = run["seconds_by_round"]
    # Without a kernel, as on a CPU, fast steps choose in plain PyTorch: there is no second way.
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys(
        ("fast", "selection", "similarities"), 2
    )
    assert 0 < run["shares"]["selection"]["median"] < 1
    low, high = sorted(own / step for own, step in zip(times["selection"], times["fast"], strict=True))
    assert low <= run["shares"]["selection"]["median"] <= high
    sizes = [(size["tokens"], size["visual_tokens"], size["width"]) for size in results["sizes"]]
    assert sizes == [(kind, count, width) for kind in ("regions", "noise") for count in (16, 600) for width in (16, 32)]
    assert results["whole"] == []


def test_plain_pytorch_is_a_second_way_where_the_kernel_runs(monkeypatch):
    tokens = selection.VisualTokens(selection.image("noise", 16, 8))
    pruners = {name: selection.AutoPruner.from_name(name, pruning_ratio=0.5) for name in ("divprune", "grid")}
    assert list(selection.ways_of(pruners["divprune"], tokens)) == ["selection", "similarities"]
    monkeypatch.setattr(selection, "triton_runs", lambda device: True)
    assert list(selection.ways_of(pruners["divprune"], tokens)) == ["selection", "selection_plain", "similarities"]
    assert list(selection.ways_of(pruners["grid"], tokens)) == ["selection"]


def run_of(layers: int, tower_layers: int) -> dict:
    """A run of which each layer has 2 operations, each of the tower 0.5, the encoder 1 besides and all else 3, at 2 s
    for an operation."""
    encoder = 1 + 0.5 * tower_layers
    flops = {"fast": 3 + 2 * layers + encoder, "encoder": encoder}
    seconds = {"fast": {"median": 2 * flops["fast"]}, "selection": {"median": 1.6}}
    said = {"shape": "llava-next", "layers": layers, "tower_layers": tower_layers}
    return {**said, "flops": flops, "seconds": seconds}


def test_the_step_of_all_layers_follows_from_the_operations_of_two_depths():
    whole = selection.whole_model(run_of(4, 3), run_of(2, 2))
    assert (whole["layers"], whole["tower_layers"]) == (32, 24)
    assert whole["fast"] == pytest.approx(2 * (3 + 2 * 32 + 1 + 0.5 * 24))
    assert whole["share"] == pytest.approx(1.6 / 160)
    assert (whole["layer"], whole["tower_layer"]) == pytest.approx((4, 1))
    # Towers as deep as each other: all of the encoder counts as that of their layers.
    assert selection.whole_model(run_of(2, 2), run_of(1, 2))["fast"] == pytest.approx(2 * (3 + 2 * 32 + 24))


def test_two_depths_of_a_real_model_are_compared():
    assert selection.fewer_layers(BenchArguments(selection=True)) is None
    assert selection.fewer_layers(BenchArguments(selection=True, layers=3)) is None
    assert selection.fewer_layers(BenchArguments(selection=True, layers=4, scale="full")) == 2
    with pytest.raises(ValueError, match="`layers` is 1, but --selection compares two depths"):
        selection.fewer_layers(BenchArguments(selection=True, layers=1, scale="full"))


def test_operations_of_a_part_of_a_model_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "fewer_layers", lambda options: 1)
    deep, shallow = (tiny_bench(tmp_path, layers=layers, rounds=2, selection=True) for layers in (2, 1))
    run, fewer = selection.timed(deep, []), selection.count(shallow, [])
    assert (run["layers"], fewer["layers"]) == (2, 1)
    assert run["flops"]["fast"] > fewer["flops"]["fast"]
    assert run["flops"]["encoder"] == fewer["flops"]["encoder"]  # two layers of the tower are the least
    run |= selection.derive(run, 0.05)
    assert 0 < selection.whole_model(run, fewer)["share"] < run["shares"]["selection"]["median"]


def test_a_report_says_what_follows_for_the_whole_model(path):
    results = json.loads(path.read_text())
    page = selection.readme_table({**results, "whole": [selection.whole_model(run_of(4, 3), run_of(2, 2))]})
    assert "llava-next with all 32 layers and 24 of the tower" in page
    assert "a fast step of 160 s, of which selection is 1.00%" in page


def test_the_report_has_both_tables_and_a_plot(path):
    page = path.with_suffix(".md").read_text()
    assert "| regions | 600 | 32 |" in page
    assert "| llava-1.5 | 2 and 2 | 2 | 16 |" in page
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert cli.main(["bench", "--selection", "--render-only", "--output", str(path)]) == 0
    with pytest.raises(ValueError, match="holds 'selection of visual tokens', not .* or --selection"):
        growth.report(json.loads(path.read_text()), path)


def test_plain_selection_is_plain(monkeypatch):
    calls, plain = [], batched.farthest_first
    monkeypatch.setattr(batched, "farthest_first", lambda *args: calls.append("plain") or plain(*args))
    pruner = selection.AutoPruner.from_name("divprune", pruning_ratio=0.9)
    tokens = selection.VisualTokens(selection.image("regions", 600, 32))
    selection.plainly(pruner, lambda: pruner(tokens))
    assert calls == ["plain"]
    assert not pruner.plain_path


def test_it_is_one_kind_of_measurement():
    options = BenchArguments(selection=True)
    assert (options.kind, options.checkpointing) == ("selection", ["off"])
    assert options.output.endswith("bench_selection.json")
    with pytest.raises(ValueError, match="`lengths` and `selection` are measured one at a time"):
        BenchArguments(lengths=True, selection=True)
