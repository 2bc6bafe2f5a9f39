"""`dualspeed bench --selection`: choosing tokens alone, in plain PyTorch and as in fast steps."""

from __future__ import annotations

import json

import pytest
from bench_cases import FLAGS

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


def test_both_ways_are_measured_beside_the_fast_step(path):
    results = json.loads(path.read_text())
    (run,) = results["runs"]
    times = run["seconds_by_round"]
    assert {name: len(values) for name, values in times.items()} == {"fast": 2, "selection": 2, "selection_plain": 2}
    assert 0 < run["ratios"]["share"]["median"] < 1
    low, high = sorted(own / step for own, step in zip(times["selection"], times["fast"], strict=True))
    assert low <= run["ratios"]["share"]["median"] <= high
    sizes = [(size["tokens"], size["visual_tokens"], size["width"]) for size in results["sizes"]]
    assert sizes == [(kind, count, width) for kind in ("regions", "noise") for count in (16, 600) for width in (16, 32)]


def test_the_report_has_both_tables_and_a_plot(path):
    page = path.with_suffix(".md").read_text()
    assert "| regions | 600 | 32 |" in page
    assert "| llava-1.5 | 2 | 16 |" in page
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
