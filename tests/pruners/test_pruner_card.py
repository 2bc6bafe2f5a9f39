"""The card of a published pruner, and `dualspeed push-pruner`."""

from __future__ import annotations

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import TOKEN
from pruner_cases import build
from tiny_models import FAMILIES, HIDDEN, batch

from hf_dualspeed import AutoPruner, available_pruners, cli
from hf_dualspeed.pruners import card as card_of_pruners
from hf_dualspeed.pruners.card import pruner_card
from hf_dualspeed.publishing.cards import MARKER, merge_card

REPO = "tester/pruner"


def text(pruner, **options) -> str:
    return pruner_card(pruner, REPO, **options)


@pytest.mark.parametrize("name", available_pruners())
def test_cards_of_all_pruners(name):
    pruner = build(name, pruning_ratio=0.9)
    card = ModelCard(text(pruner))
    assert card.data.tags == ["dualspeed", "dualspeed-pruner"]
    assert card.data.library_name == "hf_dualspeed"
    assert type(pruner).__doc__.strip().partition("\n")[0] in card.text
    assert "| 576 (LLaVA-1.5) | 57 |" in card.text
    assert f'| `pruner_type` | `"{name}"` |' in card.text
    assert ("[arXiv 2602.03815](https://arxiv.org/abs/2602.03815)") in card.text
    assert ("safetensors" in card.text) == bool(pruner.state_dict())
    for absent in ("None", "TODO", "## Results", "trust_remote_code"):
        assert absent not in card.text
    assert merge_card(text(pruner), text(pruner)) == text(pruner)
    headings = [line for line in card.text.splitlines() if re.match("#+ ", line) and not line.startswith("# load")]
    assert all(line.endswith(MARKER) for line in headings)


def test_the_paper_is_cited():
    assert "- the rule: [arXiv 2503.02175](https://arxiv.org/abs/2503.02175)" in text(build("divprune"))
    assert "the rule:" not in text(build("random"))


@pytest.mark.parametrize("name", ["divprune", "dynamicvit", "fastv"])
def test_the_three_lines_run(hub, name):
    settings = {"fastv": {"layer": 1}, "dynamicvit": {"hidden_size": HIDDEN}}.get(name, {})
    AutoPruner.from_name(name, pruning_ratio=0.5, **settings).push_to_hub(REPO)
    card = hub.files(REPO)["README.md"].decode()
    (lines,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert lines.count("\n") == 2
    assert (".to(model.device)\n" in lines) == (name == "dynamicvit")
    model, processor = FAMILIES["llava"].build("left")
    scope = {"model": model, "inputs": batch(FAMILIES["llava"], processor)}
    exec(lines, scope)
    assert scope["pruner"].config.pruner_type == name
    assert scope["loss"].isfinite() if name == "fastv" else scope["answer"].shape[0] == len(scope["inputs"]["labels"])


def test_whoever_trains_with_code_of_its_own_is_told_how_to_trust_it(monkeypatch):
    """The arguments of a training have no such word, so a name there is refused."""
    by_name = f'DualSpeedTrainingArguments(..., pruner="{REPO}")'
    assert by_name in text(build("grid"))
    monkeypatch.setattr(card_of_pruners, "is_custom", lambda pruner: True)
    told = text(build("grid"))
    assert by_name not in told
    assert f"`DualSpeedTrainer(..., pruner=pruner)`, or `pruner: {REPO}` and `trust_remote_code: true` in a" in told


def test_a_ratio_that_changes_is_told_at_both_ends():
    card = text(build("grid", pruning_ratio=0.9, pruning_schedule="cosine", initial_pruning_ratio=0.5))
    assert "from 50.0% to 90.0% (cosine)" in card
    assert "| 576 (LLaVA-1.5) | 288 | 57 |" in card


def test_results_are_shown_as_given():
    assert "| accuracy | 0.5 |" in text(build("grid"), results={"accuracy": 0.5, "speed-up": "2x"})
    rows = [{"pruner": "a|b\nc", "accuracy": 0.5}, {"pruner": "d", "seconds": 3}]
    card = text(build("grid"), results=rows)
    assert "| pruner | accuracy | seconds |\n| --- | --- | --- |\n| a\\|b c | 0.5 |  |\n| d |  | 3 |" in card
    for wrong in ([{"a": [1]}], {"a": {"b": 1}}, [1], "words"):
        with pytest.raises(ValueError, match="`results` must be a mapping"):
            text(build("grid"), results=wrong)


def test_headings_in_a_description_are_no_sections(monkeypatch):
    pruner = build("grid")
    monkeypatch.setattr(type(pruner), "__doc__", "Keeps some.\n\n## Note\n\nwords")
    assert "\\## Note" in text(pruner)


def test_what_a_person_wrote_on_the_hub_stays(hub):
    build("grid").push_to_hub(REPO, results={"accuracy": 0.5})
    own = "## Where it fails\n\nDense text;  see\ttable.\n"
    card = hub.files(REPO)["README.md"].decode().replace("tags:", "license: mit\ntags:\n- mine") + "\n" + own
    hub.put(REPO, {"README.md": card})
    build("grid", pruning_ratio=0.5).push_to_hub(REPO)
    renewed = hub.files(REPO)["README.md"].decode()
    assert renewed.endswith(own)
    assert "| 576 (LLaVA-1.5) | 288 |" in renewed
    assert "accuracy" not in renewed
    data = ModelCard(renewed).data
    assert (data.license, data.tags) == ("mit", ["mine", "dualspeed", "dualspeed-pruner"])
    build("grid").push_to_hub(REPO, revision="new")  # a new branch begins with the card of the main one
    assert own in hub.files(REPO, "new")["README.md"].decode()


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (b"---\n[\n---\nwords", "front matter"),
        (b"---\ntags:\n- {a: 1}\n---\nwords", "`tags` in the front matter"),
        (b"---\nsince: 2026-99-99\n---\nwords", "front matter"),
        (b"---\na: " + b"[" * 500 + b"\n---\nwords", "front matter"),
        (b"caf\xe9", "README.md of the Hub repo 'tester/pruner' at revision 'main' is no text in UTF-8"),
    ],
)
def test_a_broken_card_is_not_replaced(hub, capsys, tmp_path, card, said):
    hub.put(REPO, {"README.md": card})
    with pytest.raises(ValueError, match=said.split("'")[0]):
        build("grid").push_to_hub(REPO)
    assert cli.main(["push-pruner", "grid", REPO]) == 2
    assert said in capsys.readouterr().err
    assert hub.files(REPO) == {"README.md": card}
    build("grid").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes(card)
    assert cli.main(["push-pruner", str(tmp_path), "tester/other"]) == 2
    error = capsys.readouterr().err
    assert "README.md" in error
    assert "UTF-8" in error or "front matter" in error
    assert "tester/other" not in hub.repos


# --- the command --------------------------------------------------------------------------------------------------


def test_push_pruner_by_name(hub, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results.json"
    results.write_text(json.dumps([{"data": "easy-vqa", "accuracy": 0.998}]))
    words = [REPO, "--pruning_ratio", "0.75", "--set", "pruning_schedule=linear", "initial_pruning_ratio=0.5"]
    assert cli.main(["push-pruner", "grid", *words, "--private", "--results", str(results)]) == 0
    out = capsys.readouterr().out
    assert f"{hub.url}/{REPO}/commit/{hub.repos[REPO].branches['main']}" in out
    assert f'pruner = AutoPruner.from_pretrained("{REPO}")' in out
    assert TOKEN not in out
    assert hub.repos[REPO].private
    assert "| easy-vqa | 0.998 |" in hub.files(REPO)["README.md"].decode()
    loaded = AutoPruner.from_pretrained(REPO).config
    assert (loaded.pruning_ratio, loaded.pruning_schedule, loaded.initial_pruning_ratio) == (0.75, "linear", 0.5)


def test_push_pruner_of_a_folder(hub, tmp_path, capsys):
    pruner = build("token_learner")
    pruner.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n\nwords\n")
    words = ["push-pruner", str(tmp_path), REPO, "--pruning_ratio", "0.5", "--revision", "next"]
    assert cli.main(words) == 0
    assert "revision=" in capsys.readouterr().out
    loaded = AutoPruner.from_pretrained(REPO, revision="next")
    assert loaded.pruning_ratio == 0.5
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, pruner.state_dict()[name])
    assert hub.files(REPO, "next")["README.md"].decode().count("# Mine\n\nwords\n") == 1
    assert (tmp_path / "README.md").read_text() == "# Mine\n\nwords\n"
    assert cli.main(["push-pruner", str(tmp_path), REPO, "--set", "hidden_size=3"]) == 2
    assert "do not fit the weights" in capsys.readouterr().err


def test_the_card_of_a_model_is_not_the_pruners(hub, tmp_path):
    build("grid").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# A model\n")
    assert cli.main(["push-pruner", str(tmp_path), REPO]) == 0
    assert b"A model" not in hub.files(REPO)["README.md"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["divprum", REPO], "Did you mean 'divprune'"),
        (["grid", "pruner"], "`repo_id` must be a Hub repo 'user/name', got 'pruner'"),
        (["grid", REPO, "--pruning_ratio", "1.5"], "`pruning_ratio` must be in [0, 1), got 1.5"),
        (
            ["grid", REPO, "--set", "prunig_ratio=1"],
            "`--set` has an unknown key 'prunig_ratio'. Did you mean 'pruning_ratio'?",
        ),
        (["grid", REPO, "--set", "pruning_ratio"], "`--set` takes KEY=VALUE, got 'pruning_ratio'"),
        (["grid", REPO, "--set", "pruning_schedule=3"], "`pruning_schedule` in the command line must be of type str"),
        (["token_learner", REPO], "is learned: give the folder"),
        (["grid", REPO, "--results", __file__], "is no JSON file"),
        (["grid", "other/pruner"], "HTTP 403"),
    ],
)
def test_push_pruner_says_what_is_wrong(hub, capsys, words, said):
    assert cli.main(["push-pruner", *words]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not hub.repos


def test_push_pruner_takes_no_token_on_the_command_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["push-pruner", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "HF_TOKEN" in out
    assert "--token" not in out
