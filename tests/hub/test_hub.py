"""Pruners are pushed to a hub on 127.0.0.1 and loaded from it, through the unmodified client; and all that can fail."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import traceback
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import CommitInfo, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import TOKEN
from safetensors.torch import load_file, save, save_file
from tiny_models import FAMILIES, batch

from hf_dualspeed import AutoPruner, DualSpeedTrainer, DualSpeedTrainingArguments, PrunerConfig
from hf_dualspeed.hub import source
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.recipes.run import check_pruner
from hf_dualspeed.trainer.setup import resolve_pruner

REPO = "tester/pruner"
CONFIG, WEIGHTS = "pruner_config.json", "pruner.safetensors"


def divprune(ratio: float = 0.75):
    return AutoPruner.from_name("divprune", pruning_ratio=ratio)


def learned(seed: int = 0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoPruner.from_name("token_learner", hidden_size=8, bottleneck_size=4, max_tokens=16)


def weights(pruner) -> bytes:
    return save(pruner.state_dict())


def is_learned(pruner, seed: int) -> bool:
    """Whether it has the weights of `learned(seed)`, bit for bit."""
    return weights(pruner) == weights(learned(seed))


def config(**values) -> str:
    return json.dumps({"pruner_type": "divprune", **values})


# --- there and back -----------------------------------------------------------------------------------------------


def test_a_pruner_goes_to_the_hub_and_back(hub):
    commit = divprune().push_to_hub(REPO, commit_message="first")
    assert isinstance(commit, CommitInfo)
    assert hub.files(REPO).keys() == {CONFIG, "README.md"}
    assert hub.titles(REPO) == ["first", "initial commit"]
    assert not hub.repos[REPO].private
    assert AutoPruner.from_pretrained(REPO).config == divprune().config
    assert PrunerConfig.from_pretrained(REPO) == divprune().config


def test_schedules_are_published(hub):
    pruner = AutoPruner.from_name("grid", pruning_schedule="cosine", initial_pruning_ratio=0.5)
    pruner.push_to_hub(REPO)
    assert AutoPruner.from_pretrained(REPO).config == pruner.config


def test_a_learned_pruner_takes_its_weights_along(hub, tmp_path):
    pruner = learned()
    pruner.push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    loaded = AutoPruner.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    assert loaded.state_dict().keys() == pruner.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, pruner.state_dict()[name]), name
    assert (tmp_path / "cache").is_dir()
    assert not Path(constants.HF_HUB_CACHE).is_dir()
    divprune().push_to_hub(REPO)  # one without weights leaves none behind
    assert WEIGHTS not in hub.files(REPO)


def test_branches_tags_and_commits(hub):
    first = divprune(0.5).push_to_hub(REPO).oid
    hub.repos[REPO].tags["v1"] = first
    divprune(0.6).push_to_hub(REPO)
    divprune(0.7).push_to_hub(REPO, revision="next")
    found = {r: AutoPruner.from_pretrained(REPO, revision=r).config.pruning_ratio for r in (None, "v1", first, "next")}
    assert found == {None: 0.6, "v1": 0.5, first: 0.5, "next": 0.7}


def test_a_repo_that_changes_between_two_loads(hub):
    first = learned(0).push_to_hub(REPO).oid
    assert is_learned(AutoPruner.from_pretrained(REPO), 0)
    learned(1).push_to_hub(REPO)
    for revision, seed in ((None, 1), ("main", 1), (first, 0)):
        assert is_learned(AutoPruner.from_pretrained(REPO, revision=revision), seed)
        assert not is_learned(AutoPruner.from_pretrained(REPO, revision=revision), 1 - seed)


def test_config_and_weights_are_of_one_commit(hub, monkeypatch):
    learned(0).push_to_hub(REPO)
    fetch = source.Source.fetch

    def changing(self, filename):
        if filename == WEIGHTS:  # somebody pushes after the config was read
            hub.put(REPO, {WEIGHTS: weights(learned(1))})
        return fetch(self, filename)

    monkeypatch.setattr(source.Source, "fetch", changing)
    assert is_learned(AutoPruner.from_pretrained(REPO), 0)


def test_the_second_load_needs_no_network(hub, caplog):
    commit = learned().push_to_hub(REPO).oid
    AutoPruner.from_pretrained(REPO)
    gets = hub.asked("^GET")
    AutoPruner.from_pretrained(REPO)
    assert hub.asked("^GET") == gets  # nothing is downloaded twice
    hub.stop()
    for options in ({}, {"revision": commit}, {"local_files_only": True}):
        assert is_learned(AutoPruner.from_pretrained(REPO, **options), 0)
    assert "in the cache" in caplog.text
    assert commit in caplog.text
    with pytest.raises(ConnectionError, match="tester/pruner"):
        AutoPruner.from_pretrained(REPO, force_download=True)


def test_offline_mode_asks_nobody(hub, monkeypatch):
    def switch(offline: bool) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        huggingface_hub.close_session()  # the client looks when it opens one

    divprune().push_to_hub(REPO)
    asked = len(hub.log)
    switch(True)
    with pytest.raises(ConnectionError, match="'tester/pruner'.*HF_HUB_OFFLINE"):
        AutoPruner.from_pretrained(REPO)
    assert len(hub.log) == asked
    switch(False)
    AutoPruner.from_pretrained(REPO)
    asked = len(hub.log)
    switch(True)
    assert AutoPruner.from_pretrained(REPO).config == divprune().config
    assert len(hub.log) == asked


# --- in training --------------------------------------------------------------------------------------------------


def test_arguments_and_recipes_name_a_repo(hub, tmp_path, monkeypatch):
    commit = divprune(0.6).push_to_hub(REPO).oid
    divprune(0.7).push_to_hub(REPO)
    arguments = lambda **given: DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, **given)  # noqa: E731
    assert resolve_pruner(None, arguments(pruner=REPO), None).pruning_ratio == 0.7
    assert resolve_pruner(None, arguments(pruner=REPO, pruner_revision=commit), None).pruning_ratio == 0.6
    assert resolve_pruner(None, arguments(pruner=REPO, pruning_ratio=0.1), None).pruning_ratio == 0.1
    check_pruner(arguments(pruner=REPO), trust_remote_code=False)
    # A folder wins over a repo, and a registered name over a folder.
    monkeypatch.chdir(tmp_path)
    divprune(0.2).save_pretrained(REPO)
    divprune(0.2).save_pretrained("grid")
    assert resolve_pruner(None, arguments(pruner=REPO), None).pruning_ratio == 0.2
    assert resolve_pruner(None, arguments(pruner="grid"), None).config.pruner_type == "grid"


def test_a_recipe_in_yaml_trains_with_a_repo(hub, tmp_path):
    commit = divprune(0.6).push_to_hub(REPO).oid
    divprune(0.7).push_to_hub(REPO)
    recipe = {"model_name_or_path": "m", "dataset": "d", "output_dir": str(tmp_path / "out"), "use_cpu": True}
    recipe |= {"pruner": REPO, "pruner_revision": commit, "max_steps": 1, "report_to": "none", "slow_mode_ratio": 0}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    _, arguments = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    model, processor = FAMILIES["llava"].build()
    inputs = batch(FAMILIES["llava"], processor)
    trainer = DualSpeedTrainer(model, arguments, train_dataset=[0], data_collator=lambda samples: dict(inputs))
    trainer.train()
    trainer.save_model()
    assert AutoPruner.from_pretrained(tmp_path / "out").config == divprune(0.6).config


@pytest.mark.parametrize(
    "name", ["divprum", "../x", "/etc/passwd", "a/b/c", "a..b/c", "user/..", "user/na--me", "", "datasets/a/b", "a\\b"]
)
def test_what_is_no_pruner_is_told_what_may_be_given(hub, name, tmp_path):
    with pytest.raises(ValueError, match=r"registered names .*'divprune'.* existing folder .* Hub repo") as error:
        AutoPruner.from_pretrained(name) if name else AutoPruner.from_pretrained(tmp_path / "none")
    assert ("Did you mean 'divprune'" in str(error.value)) == (name == "divprum")
    if name:
        with pytest.raises(ValueError, match="registered names"):
            check_pruner(DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, pruner=name), False)
    assert not hub.log
    with pytest.raises(ValueError, match="`repo_id` must be a Hub repo 'user/name'"):
        divprune().push_to_hub(name)


def test_a_registered_name_is_no_folder(hub):
    with pytest.raises(ValueError, match=r"AutoPruner\.from_name\('divprune'\)"):
        AutoPruner.from_pretrained("divprune")


# --- what the hub refuses -----------------------------------------------------------------------------------------


def test_private_repos_need_the_token(hub, monkeypatch):
    divprune().push_to_hub(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError, match=r"'tester/pruner'.* or is private .*hf auth login"):
        AutoPruner.from_pretrained(REPO)
    assert AutoPruner.from_pretrained(REPO, token=TOKEN).config == divprune().config


def test_no_token_cannot_push(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(
        HfHubHTTPError, match=r"Cannot push to the Hub repo 'tester/pruner': there is no token.*hf auth login"
    ):
        divprune().push_to_hub(REPO)
    divprune().push_to_hub(REPO, token=TOKEN)
    assert CONFIG in hub.files(REPO)


def test_a_wrong_token(hub, monkeypatch):
    hub.put(REPO, {CONFIG: config()})
    monkeypatch.setenv("HF_TOKEN", "hf_wrongPlantedToken")
    for action in (AutoPruner.from_pretrained, divprune().push_to_hub):
        with pytest.raises(HfHubHTTPError, match=r"'tester/pruner'.*does not accept the token.*HF_TOKEN") as error:
            action(REPO)
        assert error.value.response.status_code == 401
        assert not isinstance(error.value, RepositoryNotFoundError)


def test_somebody_elses_repo(hub):
    with pytest.raises(HfHubHTTPError, match="'other/pruner'.*403"):
        divprune().push_to_hub("other/pruner")


def test_missing_repo_revision_and_file(hub):
    with pytest.raises(RepositoryNotFoundError, match="'tester/none'.* does not exist"):
        AutoPruner.from_pretrained("tester/none")
    hub.put(REPO, {"README.md": "nothing here"})
    with pytest.raises(RevisionNotFoundError, match=r"'tester/pruner' at revision 'v9'.*no such revision"):
        AutoPruner.from_pretrained(REPO, revision="v9")
    with pytest.raises(EntryNotFoundError, match=r"'tester/pruner' at revision 'main'.*no pruner_config\.json"):
        AutoPruner.from_pretrained(REPO)
    hub.put(REPO, {CONFIG: json.dumps(learned().config.to_dict())})
    with pytest.raises(EntryNotFoundError, match=r"no pruner\.safetensors"):
        AutoPruner.from_pretrained(REPO)


# --- what fails on the way ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("silent", [False, True])
def test_truncated_downloads(hub, silent):
    learned().push_to_hub(REPO)
    hub.cut(WEIGHTS, 100, silent)
    with pytest.raises(ConnectionError, match="'tester/pruner'.*[Rr]un this again"):
        AutoPruner.from_pretrained(REPO)
    hub.failures.clear()
    assert is_learned(AutoPruner.from_pretrained(REPO), 0)


def test_one_break_is_made_good(hub):
    learned().push_to_hub(REPO)
    hub.cut(WEIGHTS, 1)
    assert AutoPruner.from_pretrained(REPO).config == learned().config


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/preupload/", 500),
        ("POST", "/lfs/objects", 502),
        ("PUT", "/lfs-store/", 503),
        ("POST", "/commit/", 503),
    ],
)
def test_a_server_error_in_the_middle_of_a_push_and_a_retry(hub, tmp_path, method, path, status):
    learned(0).push_to_hub(REPO)
    before = hub.files(REPO)
    pruner = learned(1)
    pruner.save_pretrained(tmp_path / "own")
    local = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()}
    hub.fail(status, 100, method, path)
    with pytest.raises(HfHubHTTPError, match=rf"'tester/pruner'.*HTTP {status}.*Nothing local has changed"):
        pruner.push_to_hub(REPO)
    assert hub.files(REPO) == before
    assert {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir()} == local
    hub.failures.clear()
    pruner.push_to_hub(REPO)
    assert hub.files(REPO)[WEIGHTS] == local[WEIGHTS]


def test_a_server_that_fails_now_and_then_is_asked_again(hub):
    hub.fail(503, 2, "PUT", "/lfs-store/")
    hub.fail(429, 1, "HEAD", "README.md", Retry_After="0")
    learned().push_to_hub(REPO)
    hub.fail(500, 2, "HEAD", CONFIG)
    assert AutoPruner.from_pretrained(REPO).config == learned().config


def test_a_server_that_is_gone(hub):
    divprune().push_to_hub(REPO)
    hub.stop()
    for action in (AutoPruner.from_pretrained, divprune().push_to_hub):
        with pytest.raises(ConnectionError, match="'tester/pruner'.*[Cc]onnection"):
            action(REPO)


@pytest.mark.parametrize(
    ("status", "headers", "said"),
    [
        (403, {"X_Error_Code": "GatedRepo"}, "is gated. Ask for access"),
        (403, {}, "HTTP 403"),
        (429, {}, "too many requests"),
        (418, {}, "the Hub refused .HTTP 418: failed on demand"),
    ],
)
def test_other_refusals(hub, status, headers, said):
    divprune().push_to_hub(REPO)
    hub.fail(status, 100, path=CONFIG, **headers)
    with pytest.raises(HfHubHTTPError, match=rf"Cannot load the Hub repo 'tester/pruner'.*{said}"):
        AutoPruner.from_pretrained(REPO)


def test_a_push_that_meets_others_again_and_again(hub):
    hub.fail(412, 100, "POST", "/commit/")
    with pytest.raises(HfHubHTTPError, match="'tester/pruner'.*changed meanwhile"):
        divprune().push_to_hub(REPO)


def test_a_failing_server_on_loading(hub):
    divprune().push_to_hub(REPO)
    hub.fail(503, 100, path=CONFIG)
    with pytest.raises(HfHubHTTPError, match="'tester/pruner'.*HTTP 503"):
        AutoPruner.from_pretrained(REPO)
    with pytest.raises(ConnectionError, match="not in the cache"):
        AutoPruner.from_pretrained(REPO, local_files_only=True)


# --- what is not read ---------------------------------------------------------------------------------------------


def test_sizes_are_checked_before_anything_is_downloaded(hub, monkeypatch):
    hub.put(REPO, {CONFIG: " " * (2**20 + 1)})
    with pytest.raises(ValueError, match=r"pruner_config\.json of the Hub repo 'tester/pruner'.* 1048577 bytes"):
        AutoPruner.from_pretrained(REPO)
    assert not hub.asked(f"GET .*{CONFIG}")
    learned().push_to_hub(REPO)
    monkeypatch.setitem(source.LIMITS, WEIGHTS, 100)
    with pytest.raises(ValueError, match=r"pruner\.safetensors .* at most 100"):
        AutoPruner.from_pretrained(REPO)
    assert not hub.asked(f"GET .*name={WEIGHTS}")


def test_only_a_pruners_files_are_read(hub):
    found = source.find_source(REPO, [])
    for name in ("pytorch_model.bin", "../secret.json", "sub/x.py", "/etc/passwd", "pruner_config.json/../x"):
        with pytest.raises(ValueError, match="is no file of a pruner"):
            found.fetch(name)
    assert not hub.log


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "is not a JSON object"),
        ("{", "is not a JSON object: "),
        ("\xff\xfe", "is not a JSON object: "),
        ("[" * 100_000, "is not a JSON object"),
        ('{"pruner_type": "divprune", "pruning_ratio": NaN}', "NaN is no JSON number"),
        ('{"pruner_type": "divprune", "pruning_ratio": -Infinity}', "-Infinity is no JSON number"),
        (
            config(pruning_ratio="0.5"),
            r"`pruning_ratio` in pruner_config\.json of .*'tester/pruner'.* float, got '0.5'",
        ),
        (config(pruning_ratio=True), "`pruning_ratio` .* got 'True'"),
        ('{"pruner_type": "divprune", "pruning_ratio": 1e999}', "`pruning_ratio` .* got 'inf'"),
        (config(pruning_ratio=10**400), "`pruning_ratio` .* got '1000"),
        (config(pruning_ratio=[0.5]), r"`pruning_ratio` .* got '\[0\.5\]'"),
        (config(pruning_ratio=1.5), r"pruner_config\.json of .*: `pruning_ratio` must be in \[0, 1\), got 1\.5"),
        (config(pruning_schedule=3), "`pruning_schedule` .* must be of type str, got '3'"),
        (config(initial_pruning_ratio={}), "`initial_pruning_ratio` .* got"),
        ('{"pruner_type": "token_learner", "hidden_size": [8]}', r"`hidden_size` .* must be of type int, got '\[8\]'"),
        ('{"pruner_type": "token_learner", "hidden_size": 8.5}', "`hidden_size` .* got '8.5'"),
        ('{"pruner_type": "token_learner", "hidden_size": 99999999999}', "`hidden_size` .* got '99999999999'"),
        ('{"pruner_type": "os.system"}', "must be one of .*'divprune'.* got 'os.system'"),
        ('{"pruner_type": ["divprune"]}', "must be one of .*'divprune'"),
        ("{}", "must be one of .*'divprune'"),
    ],
)
def test_configs_that_hold_something_else(hub, text, said):
    hub.put(REPO, {CONFIG: text.encode("latin-1")})
    with pytest.raises(ValueError, match=said):
        AutoPruner.from_pretrained(REPO)


def test_unknown_keys_of_newer_configs_warn(hub, caplog):
    hub.put(REPO, {CONFIG: config(pruning_ratio=0.5, invented_later={"a": 1})})
    assert AutoPruner.from_pretrained(REPO).config.pruning_ratio == 0.5
    assert "does not know invented_later of pruner_config.json of the Hub repo 'tester/pruner'" in caplog.text


def test_weights_that_are_something_else(tmp_path):
    pruner = learned()
    pruner.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS
    whole = path.read_bytes()
    for damaged in (b"", b"\x80\x04pickle", whole[: len(whole) // 2], (2**60).to_bytes(8, "little") + b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"pruner\.safetensors' is no whole safetensors file"):
            AutoPruner.from_pretrained(tmp_path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file({**tensors, "more": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"'more' is \(1,\) there and nothing in the pruner"):
        AutoPruner.from_pretrained(tmp_path)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.ones(2, 2, 2)}, path)
    with pytest.raises(ValueError, match=rf"'{name}' is \(2, 2, 2\) there"):
        pruner.load_weights(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"No pruner\.safetensors"):
        AutoPruner.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"pruner_type": "token_learner", "hidden_size": 2**20, "bottleneck_size": 2**14},
        {"pruner_type": "token_learner", "hidden_size": 2**31 - 1, "bottleneck_size": 2**31 - 1},
        {"pruner_type": "dynamicvit", "hidden_size": 2**20, "scorer_size": 2**20},
    ],
)
def test_sizes_of_a_config_take_no_memory_before_the_weights_fit_them(hub, tmp_path, settings, monkeypatch):
    empty = torch.empty

    def bounded(*size, **options):
        numbers = math.prod(size if isinstance(size[0], int) else size[0])
        assert torch.get_default_device().type == "meta" or numbers < 2**20
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", bounded)  # with which layers make their weights
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    with pytest.raises(
        (FileNotFoundError, ValueError), match=r"pruner\.safetensors|cannot have the sizes of pruner_config"
    ):
        AutoPruner.from_pretrained(tmp_path)
    learned().save_pretrained(tmp_path / "small")
    files = {CONFIG: json.dumps(settings), WEIGHTS: (tmp_path / "small" / WEIGHTS).read_bytes()}
    hub.put(REPO, files)
    with pytest.raises(ValueError, match=r"pruner\.safetensors' does not fit|cannot have the sizes of pruner_config"):
        AutoPruner.from_pretrained(REPO)


def test_weights_of_another_kind_of_number_are_refused(tmp_path):
    pruner = learned()
    pruner.save_pretrained(tmp_path)
    tensors = pruner.state_dict()
    for dtype, word in ((torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64"), (torch.int64, "I64")):
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=rf"pruner\.safetensors' holds '.*' as {word}, .* torch.float32"):
            AutoPruner.from_pretrained(tmp_path)
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    loaded = AutoPruner.from_pretrained(tmp_path).state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.bfloat16().float())
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"'{name}' in '.*pruner\.safetensors' holds NaN"):
        AutoPruner.from_pretrained(tmp_path)


# --- tokens -------------------------------------------------------------------------------------------------------


def test_tokens_appear_nowhere(hub, tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    pruner = learned()
    pruner.push_to_hub(REPO, token=TOKEN, private=True)
    AutoPruner.from_pretrained(REPO, token=TOKEN).save_pretrained(tmp_path / "saved")
    said = [repr(source.find_source(REPO, [], token=TOKEN))]
    hub.fail(500, 100, path="/commit/")
    for action in (
        lambda: learned(1).push_to_hub(REPO),
        lambda: AutoPruner.from_pretrained("tester/none", token=TOKEN),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            action()
        said += [str(error.value), repr(error.value), "".join(traceback.format_exception(error.value))]
    hub.stop()
    with pytest.raises(ConnectionError) as error:
        AutoPruner.from_pretrained(REPO, token=TOKEN, force_download=True)
    said += [*traceback.format_exception(error.value), caplog.text, *capsys.readouterr()]
    assert not any(TOKEN in words for words in said)
    written = [Path(folder) / name for folder, _, names in os.walk(tmp_path) for name in names]
    assert len(written) > 5
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert not any(TOKEN.encode() in data for data in hub.files(REPO).values())
    shutil.rmtree(tmp_path / "saved")
