"""`dualspeed push` and `dualspeed card` on folders of all sorts: what is published, what is refused, what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import TOKEN
from safetensors.torch import save_file

from hf_dualspeed import cli
from hf_dualspeed.publishing.push import push
from hf_dualspeed.publishing.results import read_results
from hf_dualspeed.utils import writing

REPO = "tester/thing"
OTHER_TOKEN = "hf_" + 3 * "AbcDef12345"
# What a run and its tools write, and all that a repo of the run may hold.
WRITTEN = {"config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"}
WRITTEN |= {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"}
WRITTEN |= {"vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json"}
WRITTEN |= {"video_preprocessor_config.json", "additional_chat_templates/short.jinja", "LICENSE", "LICENSE.txt"}
WRITTEN |= {"mode_isolator.safetensors", "pruner.safetensors", "pruner_config.json", "learning_curve.png"}
WRITTEN |= {"second/adapter_config.json", "second/adapter_model.safetensors"}
# What else people and programs leave there.
PRIVATE = {"credentials.json", "wandb_key.txt", "hf_token.txt", "training.py", "notes.md", "data.json", "a[1].json"}
PRIVATE |= {"*.json", "?*.txt", "trainer_state.json", "optimizer.pt", "scheduler.pt", "training_args.bin", "x.pkl"}
PRIVATE |= {".env", ".hidden.safetensors", "holiday.png", "vocab.bin", "second/notes.txt", "second/README.md"}
PRIVATE |= {"checkpoint-4/config.json", "checkpoint-4/adapter_config.json", "checkpoint-4/model.safetensors"}
PRIVATE |= {"last-checkpoint/adapter_config.json", "other/config.json", ".cache/adapter_config.json"}
PRIVATE |= {"additional_chat_templates/secret.json"}


def weights(path: Path) -> None:
    save_file({"a": torch.ones(2)}, path)


@pytest.fixture
def folder(tmp_path):
    """The least that is a finished run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    weights(run / "model.safetensors")
    (run / "results.json").write_text(json.dumps({"name": "run", "steps": {"fast": 3, "slow": 1}}))
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, names: set[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if name.endswith(".safetensors"):
            weights(path)
        else:
            path.write_text("{}" if name.endswith(".json") else f"content of {name}")


# --- what is published --------------------------------------------------------------------------------------------


def test_only_what_a_model_consists_of_is_pushed(folder, hub, capsys):
    fill(folder, WRITTEN | PRIVATE)
    assert cli.main(["push", str(folder), REPO]) == 0
    files = hub.files(REPO)
    assert files.keys() == WRITTEN | {"model.safetensors", "results.json", "README.md"}
    assert files == {name: data for name, data in contents(folder).items() if name in files}
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("Left out: ")]
    for name in PRIVATE:
        place, _, inner = name.partition("/")
        shown = name if not inner or f"{place}/adapter_config.json" in WRITTEN or "templates" in place else f"{place}/"
        assert repr(shown) in line, name
    assert not [name for name in files if repr(name) in line]


def test_links_are_not_pushed(folder, hub, tmp_path, capsys):
    fill(tmp_path, {"secret.json", "vault/adapter_config.json", "vault/more.safetensors", "vault/private.txt"})
    (folder / "generation_config.json").symlink_to(tmp_path / "secret.json")
    (folder / "vault").symlink_to(tmp_path / "vault")
    fill(folder, {"second/adapter_config.json"})
    (folder / "second/adapter_model.safetensors").symlink_to(tmp_path / "vault/more.safetensors")
    assert cli.main(["push", str(folder), REPO]) == 0
    assert hub.files(REPO).keys() == {
        "config.json",
        "model.safetensors",
        "results.json",
        "README.md",
        "second/adapter_config.json",
    }
    error = capsys.readouterr().err
    for name in ("generation_config.json", "vault/", "second/adapter_model.safetensors"):
        assert repr(name) in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md", "results.json"])
def test_links_in_place_of_what_is_needed_are_refused(folder, hub, tmp_path, name, capsys):
    (folder / name).touch()
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    assert cli.main(["push", str(folder), REPO]) == 2
    assert f"{name}' is a link, and links are not pushed" in capsys.readouterr().err
    assert not hub.repos


def test_images_of_the_card_and_nothing_more_linked_there(folder, hub):
    fill(folder, {"cat one.png", "dog.JPG", "bird.png", "notes.txt"})
    (folder / "README.md").write_text(
        "## Mine\n\n![cat](cat%20one.png) <img src='./dog.JPG'> [n](notes.txt) ![](../run/bird.png)\n"
    )
    push(folder, REPO)
    assert hub.files(REPO).keys() == {
        "config.json",
        "model.safetensors",
        "results.json",
        "README.md",
        "cat one.png",
        "dog.JPG",
    }


def test_code_that_a_config_names_is_pushed_with_what_it_imports(folder, hub, tmp_path):
    auto_map = {"AutoModel": "modeling_own.Own", "AutoConfig": "someone/else--configuration.Config", "x": "../up.Up"}
    (folder / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["words.Words", None]}}))
    (folder / "pruner_config.json").write_text(json.dumps({"auto_map": {"AutoPruner": "first.First"}}))
    fill(folder, {"words.py", "first.py", "training.py", "configuration.py", "up.py"})
    (folder / "modeling_own.py").write_text("from .helper import A\nfrom .linked import B\nfrom .gone import C\n")
    (folder / "helper.py").write_text("from .deeper import B\nfrom ..up import X\nfrom ./../secret import Y\n")
    (folder / "deeper.py").write_text("from .modeling_own import Own\n")
    (tmp_path / "secret.py").write_text("")
    (folder / "linked.py").symlink_to(tmp_path / "secret.py")
    push(folder, REPO)
    pushed = {name for name in hub.files(REPO) if name.endswith(".py")}
    assert pushed == {"modeling_own.py", "helper.py", "deeper.py", "words.py", "first.py"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", "[1]", "config.json' must hold a JSON mapping"),
        ("pruner_config.json", "{", "pruner_config.json' is no JSON"),
        ("first.py", b"caf\xe9", "first.py' is no Python file in UTF-8"),
        ("README.md", b"caf\xe9", "run/README.md' is no text in UTF-8"),
        ("README.md", b"---\ntags:\n- {a: 1}\n---\n", "`tags` in the front matter of README.md"),
        ("results.json", '{"accuracy": 0.5}', "run/results.json' holds no results of a run: `n` is missing"),
        ("results.json", '{"hub": [1]}', "run/results.json' holds no results of a run: `hub` must be a mapping"),
    ],
)
def test_files_that_cannot_be_read_are_named_before_anything_is_made(folder, hub, name, text, said, capsys):
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "first.First"}}))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = contents(folder)
    assert cli.main(["push", str(folder), REPO]) == 2
    assert said in capsys.readouterr().err
    assert contents(folder) == before
    assert not hub.repos


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", ".x.safetensors", "model.bin", 3])
def test_shards_lie_beside_their_index(folder, hub, shard, capsys):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert cli.main(["push", str(folder), REPO]) == 2
    assert "names no files of weights beside it" in capsys.readouterr().err
    assert not hub.repos


def test_parts_of_an_earlier_run_leave_the_repo(folder, hub):
    fill(folder, {"mode_isolator.safetensors", "pruner.safetensors"})
    push(folder, REPO)
    hub.put(REPO, {"a_persons.txt": "words"})
    (folder / "mode_isolator.safetensors").unlink()
    push(folder, REPO)
    assert hub.files(REPO).keys() & {"mode_isolator.safetensors", "pruner.safetensors", "a_persons.txt"} == {
        "pruner.safetensors",
        "a_persons.txt",
    }


def test_a_whole_model_replaces_adapters_and_other_weights_of_the_repo(folder, hub):
    """Which would be loaded in its place: adapters with their base model, and one file ahead of several."""
    earlier = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"}
    earlier |= {f"model-0000{part}-of-00002.safetensors" for part in (1, 2)}
    kept = {"config.json", "second/adapter_config.json", "a_persons.safetensors"}
    hub.put(REPO, dict.fromkeys(earlier | kept, "{}"))
    push(folder, REPO)
    assert hub.files(REPO).keys() == kept | {"model.safetensors", "results.json", "README.md"}
    # An adapter is loaded over its base model, which may lie in the same repo.
    (folder / "model.safetensors").unlink()
    fill(folder, {"adapter_config.json", "adapter_model.safetensors"})
    push(folder, REPO)
    assert hub.files(REPO).keys() >= {"model.safetensors", "adapter_config.json", "adapter_model.safetensors"}


def test_words_that_a_person_writes_while_files_are_uploaded_stay(folder, hub):
    (folder / "results.json").write_text(json.dumps({"accuracy": 0.5, "n": 2}))
    push(folder, REPO)
    assert "## Results" in hub.files(REPO)["README.md"].decode()
    words, upload = "\n## Notes\n\nIt likes cats.\n", HfApi.preupload_lfs_files

    def slow_upload(api, *given, **options):
        upload(api, *given, **options)
        card = hub.files(REPO)["README.md"].decode()
        if words not in card:
            hub.put(REPO, {"README.md": card + words})

    (folder / "results.json").write_text(json.dumps({"name": "run", "steps": {"fast": 7, "slow": 1}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "preupload_lfs_files", slow_upload)
        push(folder, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert words in card
    assert "7 of 8 optimizer steps" in card
    assert "## Results" not in card
    push(folder, REPO)
    assert words in (folder / "README.md").read_text()


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("token", "whose"), [(TOKEN, "your Hub token"), (OTHER_TOKEN, "what looks like a Hub token")])
@pytest.mark.parametrize("name", ["LICENSE", "config.json", "chat_template.jinja", "README.md", "results.json"])
def test_no_token_is_pushed(folder, hub, name, token, whose, capsys):
    text = json.dumps({"x": token}) if name.endswith(".json") else f"## Mine\n\nsay {token} or so\n"
    (folder / name).write_text(text)
    before = contents(folder)
    assert cli.main(["push", str(folder), REPO]) == 2
    error = capsys.readouterr().err
    assert f"{folder / name}' holds {whose}" in error
    assert token not in error
    assert contents(folder) == before
    assert not hub.repos


def test_tokens_that_are_left_out_hinder_nothing(folder, hub):
    (folder / "notes.txt").write_text(TOKEN)
    push(folder, REPO)
    assert "notes.txt" not in hub.files(REPO)


def test_a_missing_token_is_told_from_a_wrong_one(folder, hub, monkeypatch, capsys):
    before = contents(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert cli.main(["push", str(folder), REPO]) == 2
    assert "the Hub does not accept the token" in capsys.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    assert cli.main(["push", str(folder), REPO]) == 2
    error = capsys.readouterr().err
    assert "there is no token. Log in with `hf auth login`" in error
    assert "does not accept" not in error
    assert contents(folder) == before


# --- pushes that fail ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET|HEAD", "README.md"),
        ("POST", "/repos/create"),
        ("POST", "/branch/"),
        ("GET", "/tree/"),
        ("POST", "/preupload/"),
        ("POST", "/lfs/objects"),
        ("PUT", "/lfs-store/"),
        ("POST", "/commit/"),
    ],
)
def test_a_failed_push_changes_nothing_here(folder, hub, method, path):
    (folder / "README.md").write_text("## Mine\n\nwords\n")
    before = contents(folder)
    hub.put(REPO, {"README.md": "## On the Hub\n\nmore words\n"})
    there = hub.files(REPO)
    for kind in method.split("|"):
        hub.fail(500, 1000, kind, path)
    with pytest.raises(HfHubHTTPError, match="HTTP 500.*Nothing local has changed; run this again"):
        push(folder, REPO, revision="trial")
    assert contents(folder) == before
    assert hub.files(REPO) == there
    hub.failures.clear()
    push(folder, REPO, revision="trial")
    assert hub.files(REPO, "trial") == contents(folder)
    assert read_results(folder)["hub"] == {"repo_id": REPO}
    for words in ("## Mine", "## On the Hub", f'from_pretrained("{REPO}")'):
        assert words in (folder / "README.md").read_text()
    again = contents(folder)
    push(folder, REPO, revision="trial")
    assert contents(folder) == again == hub.files(REPO, "trial")


def test_a_folder_without_results_keeps_its_card(folder, hub, capsys):
    (folder / "results.json").unlink()
    assert cli.main(["push", str(folder), REPO]) == 0
    assert hub.files(REPO).keys() == {"config.json", "model.safetensors"}
    (folder / "README.md").write_text("words\n")
    assert cli.main(["push", str(folder), REPO]) == 0
    assert hub.files(REPO)["README.md"] == b"words\n"
    assert "No results.json in" in capsys.readouterr().err


def test_what_cannot_be_written_here_is_said_after_the_push(folder, hub, caplog, monkeypatch):
    write = writing.write_file

    def refuse(path, data):
        if Path(path).parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return write(path, data)

    monkeypatch.setattr("hf_dualspeed.publishing.push.write_file", refuse)
    commit = push(folder, REPO)
    assert commit.oid == hub.repos[REPO].branches["main"]
    assert "Pushed, but the local README.md is still the earlier one" in caplog.text


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
