"""The cards in model_cards/ are what their result files give, to the byte."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from benchmarks.compare import compare
from benchmarks.compare import report as compare_report
from hf_dualspeed.publishing.model_card import model_card
from hf_dualspeed.publishing.results import read_results

ROOT = Path(__file__).parents[2]
CARDS = ROOT / "model_cards"
COMPARE = ROOT / "docs" / "results" / "compare.json"


def comparison() -> dict:
    return json.loads(COMPARE.read_text(encoding="utf-8"))


def test_quickstart():
    folder = CARDS / "quickstart"
    results = read_results(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == model_card(results)
    assert results["dataset"] == "easy-vqa"
    assert (folder / results["learning_curve"]).read_bytes().startswith(b"\x89PNG")
    assert {"accuracy", "speedup", "visual_tokens", "peak_memory", "machine"} <= results.keys()


def test_quickstart_is_that_of_the_recipe():
    """A shortened or changed run would pass for the recipe's."""
    import yaml

    recipe = yaml.safe_load((ROOT / "trainer_configs/quickstart.yaml").read_text())
    results = read_results(CARDS / "quickstart")
    assert sum(results["steps"].values()) == recipe["max_steps"]
    for key in ("pruning_ratio", "slow_mode_ratio"):
        assert results["settings"][key] == recipe[key]
    assert results["training"]["global_batch_size"] == recipe["per_device_train_batch_size"]
    assert results["n"] > 2000


def test_compare(tmp_path):
    folder = CARDS / "compare"
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == compare_report.card(comparison(), "compare.png")
    for suffix in (".png", ".json"):
        assert (folder / f"compare{suffix}").read_bytes() == COMPARE.with_suffix(suffix).read_bytes()
    card = ModelCard(text)
    own = comparison()["summary"]["dualspeed"]
    assert card.data.eval_results[0].metric_value == own["accuracy_full"]["mean"]
    assert f"{own['speed_up']['mean']:.2f}x" in text


def test_the_command_writes_the_same_card(tmp_path):
    for suffix in (".json", ".png"):
        shutil.copy(COMPARE.with_suffix(suffix), tmp_path)
    words = ["--results", str(tmp_path / "compare.json"), "--render-only", "--card", str(tmp_path / "card")]
    compare.main(words)
    assert (tmp_path / "card/README.md").read_bytes() == (CARDS / "compare/README.md").read_bytes()
    compare.main(words)  # renewed, not doubled
    assert (tmp_path / "card/README.md").read_bytes() == (CARDS / "compare/README.md").read_bytes()


@pytest.mark.parametrize("name", ["quickstart", "compare"])
def test_no_paths_and_no_missing_pictures(name):
    folder = CARDS / name
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w:.])/(?:home|root|tmp|work)/", text)
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (folder / target).is_file()


def test_compare_hides_a_token():
    words = ["--config", "a.yaml", "--hub_token", "hf_secret", "--seeds", "0"]
    assert compare.without_token(words) == ["--config", "a.yaml", "--hub_token", "<HUB_TOKEN>", "--seeds", "0"]
    assert compare.without_token(["--hub_token=hf_secret"]) == ["--hub_token=<HUB_TOKEN>"]
