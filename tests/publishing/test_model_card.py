"""The card of a run: what it says, where its values come from, and that nothing else does."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetInfo
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from training import DATA, make

from hf_dualspeed import cli
from hf_dualspeed.publishing.cards import split_front_matter
from hf_dualspeed.publishing.model_card import (
    QUANTIZED,
    adopt_published_card,
    is_empty_form,
    license_of,
    model_card,
    pruning_words,
    write_model_card,
)
from hf_dualspeed.publishing.results import dataset_name, is_hub_id, read_results, write_results
from hf_dualspeed.trainer import speedup

RESULTS = {
    "name": "run",
    "base_model": "org/base",
    "datasets": ["org/data", "easy-vqa"],
    "hub": {"base_model": "org/base", "datasets": ["org/data"]},
    "learning_curve": "learning_curve.png",
    "eval_dataset": "easy-vqa",
    "eval_split": "test",
    "accuracy": 0.875,
    "n": 1234,
    "majority_accuracy": 0.25,
    "steps": {"fast": 90, "slow": 10},
    "seconds": {"total": 61.2, "fast": 40.25, "slow": 20.5},
    "settings": {"pruner": {"pruner_type": "divprune", "pruning_ratio": 0.9}, "slow_mode_ratio": 0.1},
    "seeds": {"seed": 7, "data_seed": None},
    "speedup": {
        "plain_seconds": 0.5,
        "fast_seconds": 0.125,
        "slow_seconds": 0.625,
        "slow_share": 0.1,
        "speedup": 2.8571,
        "rounds": 3,
        "samples": 16,
    },
    "visual_tokens": {"full": 230400, "kept": 22500},
    "peak_memory": {"bytes": 3 * 2**29, "of": "process"},
    "versions": {"torch": "9.9"},
    "machine": {"cpu": "a CPU", "accelerator": None},
    "date": "2026-01-02 03:04",
}
FORM = ModelCard.from_template(ModelCardData()).text
MEASURED = ("speedup", "visual_tokens", "peak_memory", "accuracy", "steps", "seconds", "versions", "learning_curve")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(speedup, "STEPS_PER_ROUND", 10)


@pytest.fixture
def card(tmp_path):
    return ModelCard.load(write_model_card(tmp_path, RESULTS))


def test_metadata(card):
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.tags == ["dualspeed"]
    assert card.data.base_model == "org/base"
    assert card.data.datasets == ["org/data"]
    assert card.data.model_name == "run"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.875, "easy-vqa")


def test_the_hub_reads_the_results(card):
    index = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert (name, results) == ("run", card.data.eval_results)
    assert eval_results_to_model_index(name, results) == index
    ModelCardData(**card.data.to_dict(), ignore_metadata_errors=False)


@pytest.mark.parametrize(
    ("dataset", "kind"),
    [
        ("org/data", "org/data"),
        ("easy-vqa", "easy-vqa"),
        ("data/val.json", "val.json"),
        ("runs/my questions/", "my-questions"),
        ("C:\\data\\\u00e4", "C-data"),
    ],
)
def test_names_of_data_sets_are_ones_that_the_hub_takes(dataset, kind):
    """The Hub's own pattern of `dataset.type` in a model index."""
    scored = {"dataset": dataset, "metric": "anls", "view": "full", "value": 1, "n": 3}
    data = ModelCard(model_card({**RESULTS, "name": " ", "eval_dataset": dataset, "evaluations": [scored]})).data
    assert data.model_name == "model"
    for result in data.eval_results:
        assert result.dataset_type == kind
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result.dataset_type)
        assert (result.dataset_name, result.task_type) == (dataset, "image-text-to-text")
    assert {result.metric_type for result in data.eval_results} == {"accuracy", "anls"}
    index = data.to_dict()["model-index"]
    assert eval_results_to_model_index(*model_index_to_eval_results(index)) == index


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("license: mit", {"license": "mit"}),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own", "license_link": "LICENSE"},
        ),
        ("license_name: own", {}),
        ("license: [mit]", {}),
        ("license: [", {}),
        ("tags: [a]", {}),
    ],
)
def test_the_licence_is_that_of_the_base_model(hub, tmp_path, card, known):
    text = f"---\n{card}\n---\nwords"
    (tmp_path / "README.md").write_text(text)
    hub.put("org/base", {"README.md": text, "config.json": "{}"})
    hub.put("org/bare", {"config.json": "{}"})
    assert license_of(str(tmp_path)) == license_of("org/base") == known
    for unknown in ("org/bare", "org/missing", str(tmp_path / "missing"), "llava", "", None):
        assert license_of(unknown) == {}
    data = ModelCard(model_card({**RESULTS, "hub": known})).data
    assert {key: data.get(key) for key in known} == known
    assert data.get("license") == known.get("license")


def test_an_unreachable_hub_knows_no_licence(hub):
    hub.stop()
    assert license_of("org/base") == {}


def test_the_card_of_a_run_has_the_licence_of_its_base_model(hub, tmp_path):
    hub.put("org/base", {"README.md": "---\nlicense: apache-2.0\n---\n"})
    trainer = make(tmp_path, max_steps=1)
    trainer.facts["base_model"] = "org/base"
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    hub.stop()  # which is not asked again
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")  # a person's stays ...
    trainer.create_model_card()
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"
    trainer.create_model_card(license="bsd-3-clause")  # ... unless one is given
    assert ModelCard.load(tmp_path / "README.md").data.license == "bsd-3-clause"


@pytest.mark.parametrize(
    "line",
    [
        "| this model, all visual tokens | 87.5% |",
        "| most frequent answer to each question, without the image | 25.0% |",
        "| fast | 90 | 40.2 |",
        "| slow | 10 | 20.5 |",
        "| pruner | pruner_type: divprune, pruning_ratio: 0.9 |",
        "`divprune` leaves of the visual tokens, 0.9 of them removed",
        "| seed | 7 |",
        "| torch | 9.9 |",
        "![Loss of fast and slow steps](learning_curve.png)",
        "AutoModelForImageTextToText.from_pretrained",
        "1234 questions",
        "arXiv:2602.03815",
        "Measured speed-up: 2.86x over plain steps on all tokens, with the 10.0% of slow steps that were run",
        "a micro-batch of 16 samples of the training data, forward and backward, no optimizer; median of 3",
        "| plain, all tokens, as `transformers.Trainer` runs it | 0.5 |",
        "Fast steps kept 22,500 of 230,400 visual tokens: 90.2% saved there",
        "Peak memory: 1.50 GiB (resident memory of the process since its start).",
        "fine-tuned from `org/base` on `org/data`, `easy-vqa` with DualSpeed",
        ": 90 of 100 optimizer steps trained on pruned visual tokens. At inference",
    ],
)
def test_text(card, line):
    assert line in card.text


@pytest.mark.parametrize("left", MEASURED)
def test_what_was_not_measured_is_left_out(left):
    text = model_card({key: value for key, value in RESULTS.items() if key != left})
    words = {
        "speedup": "speed-up",
        "visual_tokens": "230,400",
        "peak_memory": "GiB",
        "accuracy": "87.5",
        "steps": "| 90 |",
        "seconds": "Training took",
        "versions": "9.9",
        "learning_curve": "![",
    }
    assert words[left] in model_card(RESULTS)
    assert words[left] not in text
    assert "None" not in text
    ModelCard(text)


def test_nothing_at_all(card):
    for absent in ("data_seed", "accelerator", "isolator_length", "None"):
        assert absent not in card.text
    bare = ModelCard(model_card({"datasets": ["easy-vqa"]}))
    assert (bare.data.eval_results, bare.data.base_model, bare.data.datasets) == (None, None, None)
    for unknown in ("from scratch", "fine-tuned", "steps trained"):
        assert unknown not in bare.text
    assert "Its quality has not been measured." in bare.text
    for absent in ("## Results", "learning_curve.png", "## Versions", "## Speed", "| setting |", "None"):
        assert absent not in bare.text


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({"model": "tiny LLaVA, from scratch"}, "A vision-language model trained from scratch with DualSpeed"),
        ({"model": None}, "A vision-language model trained with DualSpeed"),
        ({"base_model": "a/b"}, "A vision-language model fine-tuned from `a/b` with DualSpeed"),
        ({"steps": {"fast": 0, "slow": 4}}, "): 0 of 4 optimizer steps trained on pruned visual tokens."),
        ({"peak_memory": {"bytes": 2**30, "of": "accelerator"}}, "Peak memory in training: 1.00 GiB (what PyTorch"),
        ({"name": "a\nb"}, "# a b <!--"),
        ({"settings": {"path": "a|b\nc"}}, "| path | a\\|b c |"),
    ],
)
def test_sentences_say_what_the_results_do(results, words):
    assert words in model_card(results)


def test_what_is_no_number_is_left_out():
    evaluation = {"eval_loss": float("nan"), "eval_f1": 0.5, "eval_bleu": float("inf")}
    text = model_card({"eval_dataset": "org/test", "evaluation": evaluation, "accuracy": float("nan"), "n": 4})
    assert [r.metric_type for r in ModelCard(text).data.eval_results] == ["f1"]
    assert "| loss |" not in text


HOSTILE = (
    '<img src=x onerror="alert(1)"> [a](javascript:alert(1)) ![b](http://x.org/b.png) `c`\n# d\n```\n"); import os #'
)
HOSTILE += " _e_ ~~f~~ g@h.org"


def hostile(value: object) -> object:
    """The value with each of its texts made hostile, but for those that choose a branch."""
    if isinstance(value, dict):
        return {key: inner if key == "of" else hostile(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [hostile(inner) for inner in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.mark.parametrize("key", ["name", "base_model", "hub", "date", "accuracy", "peak_memory", "visual_tokens"])
def test_none_is_as_good_as_nothing(key):
    """A number that is not finite is stored as null."""
    absent = {name: value for name, value in RESULTS.items() if name != key}
    assert model_card({**absent, key: None}) == model_card(absent)


def test_measurements_that_were_not_finite_are_left_out():
    results = {**RESULTS, "steps": {"fast": 3, "slow": None}, "evaluation": {"eval_loss": None, "eval_f1": 0.5}}
    results |= {"seconds": {"fast": None, "slow": 1.0}}
    card = model_card(results)
    assert "0.5" in card
    assert "None" not in card


def test_what_results_say_becomes_no_html_link_or_code():
    names = {"dataset": "", "split": "", "metric": "", "pruner": "", "value": 0.5, "n": 3, "pruning_ratio": 0.5}
    given = {**RESULTS, "evaluations": [names], "eval_part": "", "kept_tokens": "", "model": ""}
    given["hub"] = {"base_model": "", "datasets": [""], "repo_id": ""}
    for adapter in (True, False):
        card = model_card({**hostile(given), "adapter": adapter})
        head, body = split_front_matter(card)
        assert head["base_model"] == HOSTILE
        tokens = pytest.importorskip("markdown_it").MarkdownIt("gfm-like", {"html": True, "linkify": False}).parse(body)
        inner = [child for token in tokens for child in token.children or ()]
        assert not {"em_open", "s_open", "strong_open"} & {token.type for token in inner}
        html = {token.content.strip() for token in (*tokens, *inner) if token.type.startswith("html")}
        assert all(text.startswith("<!-- ") and text.endswith(" -->") and text.count("-->") == 1 for text in html), html
        links = {token.attrs.get("href") or token.attrs.get("src") for token in inner if token.attrs}
        assert all(link.startswith(("https://arxiv.org/", "%3Cimg")) for link in links), links
        (python,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
        called = {node.func.attr for node in ast.walk(ast.parse(python)) if isinstance(node, ast.Call)}
        assert called <= {"from_pretrained", "merge_and_unload"}
        headings = [line for line in body.splitlines() if line.startswith("#")]
        assert all(line.endswith("<!-- dualspeed -->") for line in headings)


def test_a_changing_ratio_in_words():
    config = {"pruner_type": "grid", "pruning_ratio": 0.9, "pruning_schedule": "cosine", "initial_pruning_ratio": 0.5}
    assert pruning_words(config) == (
        "`grid` leaves of the visual tokens, at first 0.5 and in the end 0.9 of them removed (cosine)"
    )


def test_a_ratio_that_followed_the_losses_in_words():
    settings = {**RESULTS["settings"], "mode_schedule": "adaptive", "min_pruning_ratio": 0.25}
    text = model_card({**RESULTS, "settings": settings})
    end = settings["pruner"]["pruning_ratio"]
    assert f"leaves of the visual tokens, 0.25 to {end:.4g} of them removed (adaptive)" in text


def test_the_repo_is_named_once_it_is_known():
    text = model_card({**RESULTS, "hub": {"repo_id": "someone/thing"}})
    assert text.count('.from_pretrained("someone/thing")') == 2
    assert "# thing <!--" in text
    assert ModelCard(text).data.model_name == "thing"


def test_evaluation_of_the_trainer_is_shown():
    evaluation = {"eval_loss": 1.25, "eval_f1": 0.5, "eval_runtime": 3.0, "eval_samples_per_second": 9.0}
    results = {"name": "run", "eval_dataset": "org/test", "evaluation": evaluation}
    card = ModelCard(model_card(results))
    assert "| loss | 1.25 |\n| f1 | 0.5 |" in card.text
    assert "runtime" not in card.text
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"loss": 1.25, "f1": 0.5}
    # Also where a metric of one's own is called as a recipe's is.
    own = ModelCard(model_card({**results, "evaluation": {"eval_accuracy": 0.75}})).data
    assert [(result.metric_type, result.metric_value) for result in own.eval_results] == [("accuracy", 0.75)]
    nameless = ModelCard(model_card({key: value for key, value in results.items() if key != "eval_dataset"}))
    assert "| loss | 1.25 |" in nameless.text
    assert nameless.data.eval_results is None  # of what data, the Hub could not say


# --- renewed ------------------------------------------------------------------------------------------------------


def test_sections_of_a_person_stay(tmp_path):
    path = write_model_card(tmp_path, RESULTS)
    front, body = path.read_text().split("\n---\n", 1)
    mine = "## My notes\n\nIt likes cats.\n\n"
    path.write_text(f"{front}\nlicense: mit\n---\n{body.replace('## Limits', mine + '## Limits')}")
    write_model_card(tmp_path, {**RESULTS, "accuracy": 0.5, "speedup": None})
    card = ModelCard.load(path)
    assert mine in card.text
    assert card.data.license == "mit"
    assert "| this model, all visual tokens | 50.0% |" in card.text
    assert "87.5%" not in card.text
    assert "speed-up" not in card.text
    assert card.data.eval_results[0].metric_value == 0.5


def test_a_later_run_leaves_nothing_of_the_card_of_an_earlier_one(tmp_path):
    later = {**RESULTS, "accuracy": 0.5, "date": "2027-01-01 00:00", "speedup": None, "hub": {"repo_id": "a/b"}}
    for one, other in ((RESULTS, later), (later, RESULTS), ({}, later), (later, {})):
        write_model_card(tmp_path, one)
        assert write_model_card(tmp_path, other).read_text() == model_card(other)


def test_front_matter_of_a_person_outlives_that_of_an_earlier_run(tmp_path):
    path = write_model_card(tmp_path, RESULTS)
    text = path.read_text().replace("tags:\n", "license: mit\ntags:\n- mine\n", 1)
    path.write_text(text)
    data = ModelCard.load(write_model_card(tmp_path, {"name": "run"})).data
    assert (data.license, data.tags) == ("mit", ["mine", "dualspeed"])
    assert (data.base_model, data.datasets, data.eval_results) == (None, None, None)


def test_the_empty_form_of_peft_is_no_card_of_a_person(tmp_path):
    peft = pytest.importorskip("peft")
    from tiny_models import FAMILIES

    model, _ = FAMILIES["llava"].build()
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    form = (tmp_path / "README.md").read_text()
    assert "[More Information Needed]" in form
    assert "\ntags:\n" in form
    assert write_model_card(tmp_path, RESULTS).read_text() == model_card(RESULTS)
    quantized = f"\n## Training procedure\n\n{QUANTIZED}\n"
    assert is_empty_form(form + quantized + "- load_in_4bit: True\n- bnb: [a]\n### Framework versions\n\n- PEFT 0.1\n")


@pytest.mark.parametrize(
    "card",
    [
        FORM.replace("[More Information Needed]", "It likes cats.", 1),
        FORM + "\n## Notes\n\nIt likes cats.\n",
        "# My model\n\n## Uses\n\nIt likes cats.\n\n## Citation\n\n[More Information Needed]\n",
        "---\nlicense: mit\nabout: It likes cats.\n---\n" + FORM,
    ],
    ids=["filled", "section", "own", "head"],
)
def test_a_form_that_is_half_filled_in_is_a_persons(tmp_path, monkeypatch, card):
    local, adopting = tmp_path / "local", tmp_path / "adopting"
    local.mkdir()
    (local / "README.md").write_text(card)
    assert "It likes cats." in write_model_card(local, RESULTS).read_text()
    monkeypatch.setattr("hf_dualspeed.publishing.model_card.published_card", lambda *_: card)
    adopt_published_card(adopting, "a/b")
    assert (adopting / "README.md").read_text() == card


def test_an_empty_form_on_the_hub_is_not_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hf_dualspeed.publishing.model_card.published_card", lambda *_: "---\nlibrary_name: peft\n---\n" + FORM
    )
    adopt_published_card(tmp_path, "a/b")
    assert not (tmp_path / "README.md").exists()


def test_cards_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_bytes(b"# caf\xe9")
    monkeypatch.setattr("hf_dualspeed.publishing.model_card.published_card", lambda *_: "")
    for refused in (lambda: write_model_card(tmp_path, RESULTS), lambda: adopt_published_card(tmp_path, "a/b")):
        with pytest.raises(ValueError, match=r"README\.md' is no text in UTF-8: .* Save it as UTF-8"):
            refused()
    assert path.read_bytes() == b"# caf\xe9"
    path.unlink()
    path.write_text("---\ntags: [{a: b}]\n---\n# Mine\n")
    monkeypatch.setattr("hf_dualspeed.publishing.model_card.published_card", lambda *_: "")
    with pytest.raises(ValueError, match="`tags` in the front matter of README.md"):
        adopt_published_card(tmp_path, "a/b")


def test_dualspeed_card_renders_the_same_from_the_results_alone(tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    other.mkdir()
    write_results(folder, RESULTS)
    text = write_model_card(folder, RESULTS).read_text()
    write_results(other, RESULTS)
    for place in (folder, other):
        assert cli.main(["card", str(place)]) == 0
        assert (place / "README.md").read_text() == text
    assert str(other / "README.md") in capsys.readouterr().out.replace("\n", "")
    assert cli.main(["card", str(tmp_path)]) == 2
    assert "No results.json" in capsys.readouterr().err


def test_results_that_are_no_json_are_named(tmp_path):
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results\.json' is not valid JSON"):
        read_results(tmp_path)


# --- a trainer without a recipe -----------------------------------------------------------------------------------


def named(rows: list[dict], **info) -> Dataset:
    return Dataset.from_list(rows, info=DatasetInfo(**info))


def test_data_sets_that_know_their_name():
    source = {"hf://datasets/org/things@0123abc/data/train.parquet": {"num_bytes": 1, "checksum": None}}
    assert dataset_name(named(DATA, dataset_name="things", download_checksums=source)) == "org/things"
    assert dataset_name(named(DATA, dataset_name="easy")) == "easy"
    for unknown in (named(DATA, dataset_name="json"), named(DATA), DATA, None, {"a": DATA}):
        assert dataset_name(unknown) is None


@pytest.mark.parametrize(
    "name", ["org/data.json", "../data", "data/train.jsonl", "tests/data", "a/b/c", "easy-vqa", None]
)
def test_what_is_no_hub_id(name):
    assert is_hub_id("org/data.v1")
    assert not is_hub_id(name)


def test_a_plain_trainer_has_a_filled_card(tmp_path):
    source = {"hf://datasets/org/things@0123abc/data/train.parquet": {"num_bytes": 1, "checksum": None}}
    trainer = make(
        tmp_path / "run",
        data=named(DATA, download_checksums=source),
        slow_mode_ratio=0.5,
        mode_schedule="periodic",
        max_steps=10,
        speedup_rounds=1,
        eval_strategy="steps",
        eval_steps=5,
        hub_model_id="someone/thing",
    )
    trainer.train()
    trainer.save_model()
    folder = tmp_path / "run"
    assert not (folder / "README.md").exists()
    saved = json.loads((folder / "results.json").read_text())
    trainer.create_model_card(language="en", license="mit", tags=["mine"])
    card = ModelCard.load(folder / "README.md")
    results = read_results(folder)
    assert results.items() >= {k: v for k, v in saved.items() if k not in ("date", "machine")}.items()
    assert model_card(results) == (folder / "README.md").read_text()
    assert (folder / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (card.data.datasets, card.data.license, card.data.language) == (["org/things"], "mit", "en")
    assert card.data.tags == ["dualspeed", "mine"]
    counts = trainer.clock.visual_tokens
    for line in (
        f"Fast steps kept {counts['kept']:,} of {counts['full']:,} visual tokens",
        f"Measured speed-up: {results['speedup']['speedup']:.2f}x",
        "| fast | 5 |",
        "| slow | 5 |",
        "Peak memory: ",
        'from_pretrained("someone/thing")',
        "![Loss of fast and slow steps](learning_curve.png)",
        f"| loss | {trainer.evaluate()['eval_loss']:.4g} |",
    ):
        assert line in card.text
    assert str(tmp_path) not in card.text


def test_pruners_inside_the_language_model_say_so_and_count_nothing(tmp_path):
    trainer = make(tmp_path, pruner="pyramiddrop", max_steps=10, speedup_rounds=1, slow_mode_ratio=0.5)
    trainer.train()
    results = trainer.record()
    assert "visual_tokens" not in results  # these go from layer to layer
    assert results["speedup"]["fast_seconds"] > 0
    words = "`pyramiddrop` leaves of the visual tokens, 0.9 of them removed inside the language model;"
    assert words in model_card(results)


def test_evaluations_of_other_weights_are_left_out(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, **saving)
    trainer.train()
    assert trainer.record()["evaluation"]["eval_loss"] > 0
    further = make(tmp_path, max_steps=4, **saving)
    further.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert any("eval_loss" in entry for entry in further.state.log_history)
    assert "evaluation" not in further.record()
    best = make(
        tmp_path,
        max_steps=4,
        learning_rate=10.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
    )
    best.train()
    losses = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert best.record()["evaluation"]["eval_loss"] == min(losses)


def test_resuming_keeps_what_was_measured_before(tmp_path):
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 8, "speedup_rounds": 1, "slow_mode_ratio": 0.5}
    whole = make(tmp_path, **options)
    whole.facts |= {"accuracy": 0.75, "n": 4, "dataset_split": "train"}
    whole.train()
    whole.create_model_card()
    before = read_results(tmp_path)
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))  # two steps are too few to measure anew
    again.create_model_card()
    after = read_results(tmp_path)
    assert after["speedup"] == before["speedup"]
    assert after["visual_tokens"] == before["visual_tokens"]
    assert after["steps"] == before["steps"]
    assert after["dataset_split"] == "train"
    assert "accuracy" not in after  # of weights that have been trained on
    assert (before["accuracy"], after["peak_memory"]["bytes"] >= before["peak_memory"]["bytes"]) == (0.75, True)
    anew = make(tmp_path, **{**options, "max_steps": 4})
    anew.train()
    assert "speedup" not in anew.record()  # another run in the same folder
    assert Path(tmp_path / "results.json").is_file()


def test_a_speed_up_of_other_settings_is_not_taken_over(tmp_path):
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 8, "slow_mode_ratio": 0.5}
    first = make(tmp_path, **options, speedup_rounds=1)
    first.train()
    first.create_model_card()
    assert "speedup" in read_results(tmp_path)
    other = make(tmp_path, **options, speedup_rounds=0, pruning_ratio=0.5)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert "speedup" not in other.record()
    same = make(tmp_path, **options, speedup_rounds=0)
    same.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert same.record()["speedup"] == read_results(tmp_path)["speedup"]


def test_results_name_the_data_set_that_was_evaluated(tmp_path):
    validation, test = named(DATA, dataset_name="validation"), named(DATA, dataset_name="test")
    trainer = make(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.eval_dataset = validation
    trainer.train()
    assert trainer.record()["eval_dataset"] == "validation"
    trainer.evaluate(test)
    assert trainer.record()["eval_dataset"] == "test"
    trainer.create_model_card()
    assert {r.dataset_name for r in ModelCard.load(tmp_path / "README.md").data.eval_results} == {"test"}
    trainer.evaluate({"one": validation, "two": test})
    found = trainer.record()
    assert "eval_dataset" not in found  # it is three
    assert {"eval_one_loss", "eval_two_loss", "eval_loss"} <= found["evaluation"].keys()
    anew = make(tmp_path / "anew", max_steps=2)
    anew.eval_dataset = validation
    anew.train()
    assert "eval_dataset" not in anew.record()
    anew.eval_dataset = {"one": validation}
    anew.evaluate()
    assert anew.record()["eval_dataset"] == "validation"


def test_metrics_that_are_no_numbers_are_not_recorded(tmp_path):
    trainer = make(tmp_path, max_steps=1)
    trainer.train()
    trainer.compute_metrics = lambda predictions: {"nothing": float("nan"), "half": 0.5}
    trainer.evaluate()
    trainer.facts["accuracy"] = float("nan")
    trainer.create_model_card()
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert ".nan" not in (tmp_path / "README.md").read_text()
    assert trainer.record()["evaluation"]["eval_half"] == 0.5


def test_no_card_keeps_a_model_from_being_saved(tmp_path):
    peft = pytest.importorskip("peft")
    from tiny_models import FAMILIES

    built = {"plain": FAMILIES["llava"].build()[0]}
    built["adapter"] = peft.get_peft_model(FAMILIES["llava"].build()[0], peft.LoraConfig(target_modules="all-linear"))
    for name, model in built.items():
        for number, card in enumerate((b"# caf\xe9", b"---\na: [\n---\n", b"---\ntags: [{a: b}]\n---\n")):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            (folder / "README.md").write_bytes(card)
            trainer = make(folder, model=model, max_steps=1)
            trainer.save_model()
            assert list(folder.glob("*model.safetensors"))
            assert (folder / "README.md").read_bytes() == card
            assert not list(folder.glob("_README*"))


def test_a_card_outlives_a_save_that_was_cut_off(tmp_path):
    (tmp_path / "_README.md.kept").write_text("# Mine\n")  # the process died with the card aside
    (tmp_path / "README.md").write_text(FORM)
    make(tmp_path, max_steps=1).save_model()
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_parts_of_an_earlier_run_do_not_stay(tmp_path):
    make(tmp_path, pruner="token_learner", pruner_kwargs={"max_tokens": 64}).save_model()
    parts = [tmp_path / name for name in ("pruner.safetensors", "mode_isolator.safetensors")]
    assert all(path.is_file() for path in parts)
    make(tmp_path, isolator_length=0).save_model()
    assert not any(path.exists() for path in parts)
