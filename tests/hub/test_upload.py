"""Pushes that meet a person's commits, or one another: nothing that either wrote is lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from hf_dualspeed import AutoPruner
from hf_dualspeed.commands.push_metric import push_metric
from hf_dualspeed.commands.space import push_space
from hf_dualspeed.publishing.push import push

REPO = "tester/thing"
WORDS = "---\ntags:\n- mine\n---\n\n## Notes\n\nIt likes cats.\n"


def pruner(ratio: float = 0.75):
    return AutoPruner.from_name("divprune", pruning_ratio=ratio)


@pytest.fixture
def folder(tmp_path):
    """The least that is a finished run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    save_file({"a": torch.ones(2)}, run / "model.safetensors")
    (run / "results.json").write_text(json.dumps({"name": "run", "steps": {"fast": 3, "slow": 1}}))
    return run


@pytest.mark.parametrize(
    ("place", "pushed"),
    [
        (REPO, lambda folder: pruner().push_to_hub(REPO)),
        (REPO, lambda folder: push(folder, REPO)),
        (f"spaces/{REPO}", lambda folder: push_metric("anls", REPO)),
        (f"spaces/{REPO}", lambda folder: push_space(REPO, {"dualspeed": "tester/model"})),
    ],
    ids=["pruner", "model", "metric", "space"],
)
def test_words_that_a_person_writes_just_before_the_commit_stay(place, pushed, hub, folder, monkeypatch):
    commit, late = HfApi.create_commit, [WORDS]

    def slow_commit(api, *given, **options):
        if late:
            hub.put(place, {"README.md": late.pop(), "notes.txt": "mine"})
        return commit(api, *given, **options)

    monkeypatch.setattr(HfApi, "create_commit", slow_commit)
    pushed(folder)
    files = hub.files(place)
    card = files["README.md"].decode()
    assert "## Notes\n\nIt likes cats.\n" in card
    assert "- mine\n" in card
    assert "<!-- dualspeed -->" in card
    assert files["notes.txt"] == b"mine"
    pushed(folder)
    assert hub.files(place)["README.md"].decode() == card


def test_pushes_at_the_same_time_all_get_through(hub):
    ratios = [0.5, 0.6, 0.7, 0.8]
    with ThreadPoolExecutor(len(ratios)) as pool:
        commits = list(pool.map(lambda ratio: pruner(ratio).push_to_hub(REPO, commit_message=f"at {ratio}"), ratios))
    assert len({one.oid for one in commits}) == len(ratios)
    assert sorted(hub.titles(REPO)) == [*(f"at {ratio}" for ratio in ratios), "initial commit"]


def test_a_file_that_another_push_wrote_meanwhile_is_written_again(hub, monkeypatch):
    """A file as it was when the push began is not sent, but it is where another commit changed it since."""
    pruner(0.5).push_to_hub(REPO)
    wanted, commit, late = hub.files(REPO)["pruner_config.json"], HfApi.create_commit, [b"{}"]

    def slow_commit(api, repo_id, operations, *given, **options):
        if late:
            hub.put(REPO, {"pruner_config.json": late.pop(), "README.md": "# Another\n"})
        return commit(api, repo_id, operations, *given, **options)

    monkeypatch.setattr(HfApi, "create_commit", slow_commit)
    pruner(0.5).push_to_hub(REPO)
    assert hub.files(REPO)["pruner_config.json"] == wanted


def test_what_a_person_set_for_a_space_stays(hub):
    place = f"spaces/{REPO}"
    push_space(REPO, {"dualspeed": "tester/one"})
    card = hub.files(place)["README.md"].decode()
    assert "title: DualSpeed\n" in card  # not the Hub's own
    assert "configuration reference" not in card
    own = card.replace("title: DualSpeed\n", "title: Ours\nsuggested_hardware: t4-small\n")
    own = own.replace("python_version: '3.11'", "python_version: '3.8'")
    hub.put(place, {"README.md": own + "\n## Ask us\n\nat the desk\n"})
    push_space(REPO, {"dualspeed": "tester/two"})
    renewed = hub.files(place)["README.md"].decode()
    for kept in ("title: Ours\n", "suggested_hardware: t4-small\n", "\n## Ask us\n\nat the desk\n"):
        assert kept in renewed
    for ours in ("- tester/two\n", "python_version: '3.11'\n", "- token-pruning\n"):
        assert ours in renewed
    assert "tester/one" not in renewed
