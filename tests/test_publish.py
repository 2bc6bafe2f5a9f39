"""`dualspeed push` and `dualspeed card` on folders of all sorts: what is published, what is refused, what is kept."""

from __future__ import annotations

import json

import pytest

from hf_dualspeed import cli
from hf_dualspeed.results import read_results

# --- dualspeed card -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({"accuracy": 0.5}, "`n` is missing"),
        ({"accuracy": "x", "n": 3}, "`accuracy` must be a number, got 'x'"),
        ({"accuracy": True, "n": 3}, "`accuracy` must be a number, got 'True'"),
        ({"hub": [1]}, "`hub` must be a mapping, got '[1]'"),
        ({"hub": None}, "`hub` must be a mapping, got 'None'"),
        ({"hub": {"datasets": [1]}}, "`hub.datasets` must be a list of words, got '[1]'"),
        ({"settings": 3}, "`settings` must be a mapping, got '3'"),
        ({"settings": {"pruner": "divprune"}}, "`settings.pruner` must be a mapping, got 'divprune'"),
        ({"settings": {"pruner": {"pruner_type": "divprune"}}}, "`settings.pruner.pruning_ratio` is missing"),
        (
            {"settings": {"pruner": {"pruner_type": "grid", "pruning_ratio": 0.9, "pruning_schedule": "linear"}}},
            "`settings.pruner.initial_pruning_ratio` is missing",
        ),
        ({"seconds": {"total": "x"}}, "`seconds.total` must be a number, got 'x'"),
        ({"speedup": {"speedup": 2}}, "`speedup.slow_share` is missing"),
        ({"visual_tokens": {"full": 5}}, "`visual_tokens.kept` is missing"),
        ({"peak_memory": {"bytes": 1}}, "`peak_memory.of` is missing"),
        ({"progress": {"step": 1}}, "`progress.of` is missing"),
        ({"versions": []}, "`versions` must be a mapping, got '[]'"),
        ({"steps": [1]}, "`steps` must be a mapping"),
        ({"training": {"processes": "two"}}, "`training.processes` must be a number"),
        ({"evaluation": {"eval_x": "word"}}, "`evaluation.eval_x` must be a number, got 'word'"),
        ({"tags": "abc"}, "`tags` must be a list of words, got 'abc'"),
        ({"name": 3}, "`name` must be a word, got '3'"),
    ],
)
def test_results_of_another_shape_are_named(tmp_path, results, said, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert cli.main(["card", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"results.json' holds no results of a run: {said}" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe", b"{"])
def test_results_that_cannot_be_read_are_named(tmp_path, text, capsys):
    (tmp_path / "results.json").write_bytes(text)
    assert cli.main(["card", str(tmp_path)]) == 2
    assert "results.json' is not valid JSON" in capsys.readouterr().err


def test_results_that_know_little_make_a_card(tmp_path):
    results = {"visual_tokens": {}, "peak_memory": {}, "accuracy": None, "settings": {"seed": None}, "later": [{}]}
    (tmp_path / "results.json").write_text(json.dumps({**results, "machine": {"accelerator": None}, "steps": {}}))
    assert read_results(tmp_path)["later"] == [{}]
    assert cli.main(["card", str(tmp_path)]) == 0
    assert "## How to load it" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("card", [b"caf\xe9", b"---\ntags:\n- {a: 1}\n---\n", b"---\nsince: 2026-99-99\n---\n"])
def test_local_cards_that_cannot_be_read_are_named(tmp_path, card, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"name": "x"}))
    (tmp_path / "README.md").write_bytes(card)
    assert cli.main(["card", str(tmp_path)]) == 2
    assert "README.md" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_bytes() == card
