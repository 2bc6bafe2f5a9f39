import pytest
from huggingface_hub import ModelCard

from hf_dualspeed.model_card import write_model_card

RESULTS = {
    "model": "org/base",
    "dataset": "easy-vqa",
    "eval_dataset": "easy-vqa",
    "eval_split": "test",
    "accuracy": 0.875,
    "n": 1234,
    "majority_accuracy": 0.25,
    "steps": {"fast": 90, "slow": 10},
    "seconds": {"total": 61.2, "fast": 40.25, "slow": 20.5},
    "settings": {"pruner": {"pruner_type": "divprune"}, "pruning_ratio": 0.9, "slow_mode_ratio": 0.1},
    "seeds": {"seed": 7, "data_seed": None},
    "versions": {"torch": "9.9"},
    "machine": {"cpu": "a CPU", "accelerator": None},
    "date": "2026-01-02 03:04",
}


@pytest.fixture
def card(tmp_path):
    (tmp_path / "learning_curve.png").touch()
    return ModelCard.load(write_model_card(tmp_path, RESULTS, "org/base", ["org/data", "easy-vqa"]))


def test_metadata(card, tmp_path):
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.tags == ["dualspeed"]
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/data"]
    assert card.data.model_name == tmp_path.name
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.875, "easy-vqa")


@pytest.mark.parametrize(
    "line",
    [
        "| this model, all visual tokens | 87.5% |",
        "| most frequent answer to each question, without the image | 25.0% |",
        "| fast | 90 | 40.2 |",
        "| slow | 10 | 20.5 |",
        "| pruner | pruner_type: divprune |",
        "| seed | 7 |",
        "| torch | 9.9 |",
        "![Loss of fast and slow steps](learning_curve.png)",
        "AutoModelForImageTextToText.from_pretrained",
        "1234 questions",
        "arXiv:2602.03815",
    ],
)
def test_text(card, line):
    assert line in card.text


def test_what_was_not_measured_is_left_out(card, tmp_path):
    for absent in ("data_seed", "accelerator", "isolator_length", "None"):
        assert absent not in card.text
    bare = ModelCard.load(write_model_card(tmp_path / "..", {}, None, ["easy-vqa"]))
    (tmp_path / ".." / "README.md").unlink()
    assert bare.data.eval_results is None
    assert bare.data.base_model is None
    assert bare.data.datasets is None
    assert "from scratch" in bare.text
    assert "Its quality has not been measured." in bare.text
    for absent in ("## Results", "learning_curve.png", "## Versions", "None"):
        assert absent not in bare.text


def test_local_folders_are_no_hub_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    card = ModelCard.load(write_model_card(tmp_path, RESULTS, "runs/base", ["data.json"]))
    assert card.data.base_model is None
    assert card.data.datasets is None
