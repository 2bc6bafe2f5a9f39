"""Runs on the Hub: pushed while training, at its end and later, through the unmodified client to a stand-in server."""

from __future__ import annotations

import importlib
import io
import json
import logging
import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from loopback_hub import TOKEN, USER, hub  # noqa: F401
from recipe_cases import TINY
from safetensors.torch import load_file
from training import make
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_dualspeed import AutoPruner, cli
from hf_dualspeed.publishing.results import read_results

REPO = f"{USER}/thing"
RUN = {"max_steps": 4, "slow_mode_ratio": 0.5, "mode_schedule": "periodic"}
PLAIN = {"config.json", "model.safetensors", "mode_isolator.safetensors", "pruner_config.json", "results.json"}
PLAIN |= {"README.md", "learning_curve.png", "processor_config.json"}


@pytest.fixture(autouse=True)
def fresh_client(monkeypatch):
    """transformers keeps a client with the address that it saw first."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)


@pytest.fixture
def secret(hub, monkeypatch):  # noqa: F811
    """A token that is given as an argument alone, and planted nowhere else."""
    monkeypatch.delenv("HF_TOKEN")
    return TOKEN


@pytest.fixture
def finished(tmp_path):
    """The folder of a run that was trained, saved, and pushed nowhere."""
    trainer = make(tmp_path / "run", save_strategy="steps", save_steps=2, **RUN)
    trainer.train()
    trainer.save_model()
    return tmp_path / "run"


def pushing(folder: Path, token: str, strategy: str, **options) -> dict:
    given = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": token, "hub_strategy": strategy}
    return {"tmp_path": folder, **RUN, "save_strategy": "steps", "save_steps": 2, **given, **options}


def holds(path: Path, token: str) -> bool:
    """Whether the token stands in a file, in an archive inside it (as `torch.save` writes them), or in its pickles."""
    data = path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            data += b"".join(archive.read(name) for name in archive.namelist())
    return token.encode() in data


def test_the_search_would_find_a_token(tmp_path):
    torch.save({"hub_token": TOKEN}, tmp_path / "args.bin")
    assert holds(tmp_path / "args.bin", TOKEN)
    assert not holds(tmp_path / "args.bin", "hf_another")


# --- by the trainer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_each_strategy_pushes_all_and_no_token(tmp_path, hub, secret, strategy, caplog, capsys):  # noqa: F811
    caplog.set_level(logging.DEBUG)
    folder = tmp_path / "run"
    trainer = make(**pushing(folder, secret, strategy, hub_always_push=True))
    seen = []
    during = trainer._push_from_checkpoint

    def watched(checkpoint):
        during(checkpoint)
        trainer.push_in_progress and trainer.push_in_progress.wait_until_done()
        seen.append(hub.files(REPO))

    trainer._push_from_checkpoint = watched
    trainer.train()
    assert len(seen) == 2
    if strategy == "end":
        assert not seen[0].keys() & PLAIN
    else:
        assert seen[0].keys() >= PLAIN
        isolator = load_bytes(seen[0]["mode_isolator.safetensors"], tmp_path)
        assert torch.equal(isolator["prompt"], load_file(folder / "checkpoint-2/mode_isolator.safetensors")["prompt"])
        early, late = (files["README.md"].decode() for files in seen)
        assert "written after 2 of at most 4 optimizer steps" in early
        assert "| fast | 1 |" in early
        assert "| fast | 2 |" in late
        assert "of at most" not in late
    trainer.push_to_hub()
    files = hub.files(REPO)
    assert files.keys() >= PLAIN
    places = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}.get(strategy, [])
    for place in places:
        assert f"{place}/mode_isolator.safetensors" in files
        assert f"{place}/pruner_config.json" in files
        assert f"{place}/optimizer.pt" in files
    assert places or not any("/" in name for name in files)
    card = ModelCard(files["README.md"].decode())
    assert f'from_pretrained("{REPO}")' in card.text
    assert json.loads(files["results.json"])["steps"] == {"fast": 2, "slow": 2}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert not holds(path, secret), path
    (tmp_path / "pulled").mkdir()
    for number, data in enumerate(files.values()):
        (tmp_path / "pulled" / str(number)).write_bytes(data)
        assert not holds(tmp_path / "pulled" / str(number), secret), list(files)[number]
    shown = capsys.readouterr()
    assert secret not in caplog.text + shown.out + shown.err
    assert trainer.args.hub_token == secret  # pushing again needs it


def load_bytes(data: bytes, folder: Path) -> dict:
    (folder / "loaded.safetensors").write_bytes(data)
    return load_file(folder / "loaded.safetensors")


def test_arguments_keep_the_token_in_memory_and_out_of_pickles(tmp_path):
    import copy
    import pickle

    args = make(tmp_path, hub_token=TOKEN).args
    stored = pickle.dumps(args)
    assert not any(TOKEN in str(argument) for _, argument, _ in pickletools.genops(stored))
    assert pickle.loads(stored).hub_token is None
    assert pickle.loads(stored).pruning_ratio == args.pruning_ratio
    for copied in (copy.copy(args), copy.deepcopy(args)):
        assert (copied.hub_token, type(copied), copied.output_dir) == (TOKEN, type(args), args.output_dir)
        assert copied is not args


def test_what_was_pushed_is_loaded_as_the_card_says(tmp_path, hub):  # noqa: F811
    trainer = make(tmp_path / "run", **RUN)
    trainer.train()
    trainer.args.hub_model_id = REPO
    trainer.push_to_hub(private=True)
    assert hub.repos[REPO].private
    (code,) = [part.partition("```")[0] for part in (tmp_path / "run/README.md").read_text().split("```python\n")[1:]]
    assert "dualspeed" not in code
    assert len(code.strip().splitlines()) == 3
    scope: dict = {}
    exec(code, scope)
    expected = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in scope["model"].named_parameters())
    assert scope["processor"].image_token_id == trainer.processing_class.image_token_id


def test_a_learned_part_of_the_pruner_is_pushed_at_each_save(tmp_path, hub, secret):  # noqa: F811
    trainer = make(**pushing(tmp_path / "run", secret, "every_save", pruner="token_learner", save_steps=4))
    trainer.train()
    pushed = load_bytes(hub.files(REPO)["pruner.safetensors"], tmp_path)
    kept = load_file(tmp_path / "run/checkpoint-4/pruner.safetensors")
    assert all(torch.equal(value, pushed[name]) for name, value in kept.items())


@pytest.mark.parametrize("path", ["/commit/", "/lfs-store/", "/preupload/"])
def test_a_push_that_fails_while_training_costs_nothing(tmp_path, hub, secret, path, caplog):  # noqa: F811
    folder = tmp_path / "run"
    trainer = make(**pushing(folder, secret, "every_save"))
    hub.fail(500, times=10**6, path=path)
    trainer.train()
    assert trainer.state.global_step == 4
    assert f"dualspeed push {folder} {REPO}" in caplog.text
    assert "README.md" not in hub.files(REPO)
    assert (folder / "checkpoint-4/model.safetensors").is_file()
    later = f"Nothing on this machine is lost.*dualspeed push .* {REPO}"
    with pytest.raises(HfHubHTTPError, match=rf"failed \(.*HTTP 500.*{later}"):
        trainer.push_to_hub()
    assert secret not in caplog.text
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    assert before.keys() >= PLAIN
    hub.failures.clear()
    trainer.push_to_hub()
    assert hub.files(REPO).keys() >= PLAIN
    assert hub.files(REPO)["model.safetensors"] == before["model.safetensors"]


def test_what_a_person_wrote_on_the_hub_stays(tmp_path, hub, secret):  # noqa: F811
    hub.put(REPO, {"README.md": "---\nlicense: mit\n---\n# My model\n\n## My notes\n\nIt likes cats.\n"})
    trainer = make(**pushing(tmp_path / "run", secret, "every_save"))
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.license == "mit"
    assert "# My model" in card.text
    assert "## My notes\n\nIt likes cats." in card.text
    assert "| fast | 2 |" in card.text


def readme(hub) -> str:  # noqa: F811
    return hub.files(REPO)["README.md"].decode()


def test_what_a_person_writes_on_the_hub_between_pushes_stays(tmp_path, hub, secret):  # noqa: F811
    trainer = make(**pushing(tmp_path / "run", secret, "every_save", hub_always_push=True))
    hub.put(REPO, {"README.md": "# Written while training\n\n## My notes\n\nfirst\n"})
    trainer.train()
    trainer._finish_current_push()
    assert "# Written while training\n\n## My notes\n\nfirst\n" in readme(hub)
    assert "| fast | 2 |" in readme(hub)
    banner, thanks = "![banner](b.png)\n\n", "\n# Thanks\n\nto all\n"
    hub.put(REPO, {"README.md": banner + readme(hub).replace("first", "second") + thanks})
    trainer.push_to_hub()
    hub.put(REPO, {"README.md": readme(hub).replace("to all", "to some")})
    trainer.push_to_hub()
    for kept in (banner, "## My notes\n\nsecond\n", "# Thanks\n\nto some\n"):
        assert kept in readme(hub)


def test_a_push_to_a_branch_keeps_its_card(tmp_path, hub, secret):  # noqa: F811
    trainer = make(**pushing(tmp_path / "run", secret, "end"))
    trainer.train()
    hub.repos[REPO].branches["trial"] = hub.repos[REPO].branches["main"]
    hub.put(REPO, {"README.md": "## Notes\n\nof the branch\n"}, branch="trial")
    hub.put(REPO, {"README.md": "## Other\n\nof main\n"})
    trainer.push_to_hub(revision="trial")
    card = hub.files(REPO, "trial")["README.md"].decode()
    assert "of the branch" in card
    assert "of main" not in card


@pytest.mark.parametrize("card", [b"# caf\xe9", b"---\na: [\n---\n", b"---\ntags: [{a: b}]\n---\n"])
def test_a_card_that_cannot_be_read_is_said_before_training(tmp_path, hub, secret, card, caplog):  # noqa: F811
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "README.md").write_bytes(card)
    with pytest.raises(ValueError, match="README.md"):
        make(**pushing(folder, secret, "every_save"))
    (folder / "README.md").unlink()
    trainer = make(**pushing(folder, secret, "every_save"))
    (folder / "README.md").write_bytes(card)  # broken meanwhile
    trainer.train()
    assert trainer.state.global_step == 4
    assert "checkpoint-2 is not pushed" in caplog.text
    assert (folder / "README.md").read_bytes() == card
    with pytest.raises(ValueError, match="README.md"):
        trainer.push_to_hub()
    assert (folder / "model.safetensors").is_file()
    assert "README.md" not in hub.files(REPO)


@pytest.mark.parametrize(("token", "remedy"), [("hf_wrong", "the Hub does not accept the token"), (None, "no token")])
def test_a_token_that_will_not_do_is_said_before_training(tmp_path, hub, secret, token, remedy):  # noqa: F811
    with pytest.raises(HfHubHTTPError, match=rf"Cannot push to the Hub repo '{REPO}': .*{remedy}.*hf auth login"):
        make(**pushing(tmp_path / "run", token, "end"))


def test_a_push_that_is_not_allowed_keeps_its_kind(tmp_path, hub):  # noqa: F811
    trainer = make(tmp_path / "run", max_steps=1, hub_model_id="someone/else")
    with pytest.raises(HfHubHTTPError, match=r"HTTP 403.*Nothing on this machine is lost") as refused:
        trainer.push_to_hub()
    assert refused.value.response.status_code == 403


PRUNER = '''
import torch

from hf_dualspeed import Pruner, register_pruner


@register_pruner("pushed_first")
class PushedFirst(Pruner):
    """Keeps the first."""

    def rank(self, tokens, most):
        return torch.arange(tokens.features.shape[1]).expand(len(tokens.lengths), -1)[:, :most]
'''


def test_code_and_further_adapters_are_pushed_at_each_save(tmp_path, hub, secret, monkeypatch):  # noqa: F811
    peft = pytest.importorskip("peft")
    from tiny_models import FAMILIES

    (tmp_path / "code").mkdir()
    (tmp_path / "code/pushed_pruner.py").write_text(PRUNER)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    importlib.import_module("pushed_pruner")
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2)
    model = peft.get_peft_model(FAMILIES["llava"].build()[0], config)
    model.add_adapter("second", config)
    trainer = make(**pushing(tmp_path / "run", secret, "every_save", pruner="pushed_first"), model=model)
    trainer.train()
    files = hub.files(REPO)
    assert json.loads(files["pruner_config.json"])["auto_map"] == {"AutoPruner": "pushed_pruner.PushedFirst"}
    assert files.keys() >= {"pushed_pruner.py", "second/adapter_config.json", "second/adapter_model.safetensors"}


def test_parts_of_an_earlier_run_leave_the_repo(tmp_path, hub, secret):  # noqa: F811
    folder, parts = tmp_path / "run", {"mode_isolator.safetensors", "pruner.safetensors"}
    learned = {"pruner": "token_learner", "pruner_kwargs": {"max_tokens": 64}}
    trainer = make(**pushing(folder, secret, "every_save", **learned))
    trainer.train()
    trainer.push_to_hub()
    assert hub.files(REPO).keys() >= parts
    trainer = make(**pushing(folder, secret, "every_save", isolator_length=0))
    trainer.train()
    assert not any((folder / name).exists() for name in parts)
    hub.put(REPO, {"adapter_config.json": "{}"})  # with which transformers would load another model
    trainer.push_to_hub()
    assert not {*parts, "adapter_config.json"} & hub.files(REPO).keys()
    assert hub.files(REPO).keys() >= PLAIN - parts


def test_a_trainer_over_trl_pushes(tmp_path, hub):  # noqa: F811
    pytest.importorskip("trl")
    import sft_training

    options = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN, "save_strategy": "steps", "save_steps": 2}
    trainer = sft_training.make(tmp_path / "run", sft_training.messages(), **RUN, **options)
    trainer.train()
    trainer.push_to_hub(dataset_name="someone/things")
    files = hub.files(REPO)
    assert files.keys() >= PLAIN
    card = ModelCard(files["README.md"].decode())
    assert card.data.datasets == ["someone/things"]
    assert {"dualspeed", "trl", "sft"} <= set(card.data.tags)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and holds(path, TOKEN)]


def test_a_recipe_pushes_its_results(tmp_path, hub, secret):  # noqa: F811
    pytest.importorskip("easy_vqa")
    (tmp_path / "run/private").mkdir(parents=True)
    for name in (".env", "notes.md", "private/id_rsa"):
        (tmp_path / "run" / name).write_text("private")
    words = ["train", "--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", REPO]
    words += ["--hub_token", secret, "--tiny_llava", json.dumps(TINY), "--dataset", "easy-vqa", "--max_steps", "2"]
    words += [
        "--eval_dataset",
        "easy-vqa",
        "--eval_limit",
        "4",
        "--use_cpu",
        "--report_to",
        "none",
        "--disable_tqdm",
        "true",
    ]
    words += ["--per_device_train_batch_size", "4", "--train_vision_tower", "true", "--logging_steps", "1"]
    words += ["--save_strategy", "steps", "--save_steps", "1"]
    assert cli.main(words) == 0
    files = hub.files(REPO)
    assert files.keys() >= PLAIN
    assert not [name for name, data in files.items() if data == b"private" or name == "training_args.bin"]
    card = ModelCard(files["README.md"].decode())
    # A score of 4 questions is in the text, and no score of the data set.
    accuracy = json.loads(files["results.json"])["accuracy"]
    assert "Accuracy on the first 4 questions of `easy-vqa` (test):" in card.text
    assert f"| this model, all visual tokens | {accuracy:.1%} |" in card.text
    assert card.data.eval_results is None
    assert "trained from scratch on `easy-vqa`" in card.text
    assert not [path for path in (tmp_path / "run").rglob("*") if path.is_file() and holds(path, secret)]


# --- dualspeed push -----------------------------------------------------------------------------------------------


def test_a_finished_run_is_pushed_later(finished, hub, capsys):  # noqa: F811
    (finished / ".cache").mkdir()
    (finished / ".cache/secret.json").write_text("{}")
    (finished / "optimizer.pt").write_bytes(b"state")
    (finished / ".env").write_text("x")
    words = ["push", str(finished), REPO, "--private", "--revision", "trial", "--commit_message", "Hello"]
    assert cli.main(words) == 0
    assert f"{hub.url}/{REPO}/commit/" in capsys.readouterr().out
    files = hub.files(REPO, "trial")
    assert files.keys() >= PLAIN
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "/" in name or name[0] == "."]
    assert "trainer_state.json" not in files
    assert hub.repos[REPO].private
    assert hub.titles(REPO, "trial")[0] == "Hello"
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
    assert read_results(finished)["hub"]["repo_id"] == REPO
    folder = snapshot_download(REPO, revision="trial")
    AutoModelForImageTextToText.from_pretrained(folder)
    AutoProcessor.from_pretrained(folder)
    assert AutoPruner.from_pretrained(folder).config.pruner_type == "divprune"


def test_pushing_again_keeps_what_a_person_wrote(finished, hub):  # noqa: F811
    assert cli.main(["push", str(finished), REPO]) == 0
    card = hub.files(REPO)["README.md"].decode()
    hub.put(REPO, {"README.md": card + "\n## On the Hub\n\nA remark.\n"})
    local = finished / "README.md"
    local.write_text(local.read_text() + "\n## Here\n\nAnother.\n")
    assert cli.main(["push", str(finished), REPO]) == 0
    pushed = hub.files(REPO)["README.md"].decode()
    assert "## On the Hub\n\nA remark." in pushed
    assert "## Here\n\nAnother." in pushed
    assert pushed == local.read_text()
    assert pushed.count("## How to load it") == 1
    assert cli.main(["push", str(finished), REPO]) == 0
    assert hub.files(REPO)["README.md"].decode() == pushed


def test_a_push_that_fails_is_said_and_can_be_run_again(finished, hub, capsys):  # noqa: F811
    before = {p.name: p.read_bytes() for p in finished.iterdir() if p.suffix == ".safetensors"}
    hub.fail(500, times=10**6, path="/commit/")
    assert cli.main(["push", str(finished), REPO]) == 2
    error = capsys.readouterr().err
    assert error.rpartition("Error: ")[2].count("\n") == 1  # the progress of the upload comes before
    assert "Nothing local has changed; run this again" in error
    assert TOKEN not in error
    assert {p.name: p.read_bytes() for p in finished.iterdir() if p.suffix == ".safetensors"} == before
    hub.failures.clear()
    assert cli.main(["push", str(finished), REPO]) == 0
    assert hub.files(REPO).keys() >= PLAIN


def test_other_peoples_repos_are_refused(finished, hub, capsys):  # noqa: F811
    assert cli.main(["push", str(finished), "someone/else"]) == 2
    assert "HTTP 403" in capsys.readouterr().err


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no such folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no checkpoint: neither config.json nor adapter"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: cut(folder / "model.safetensors"), "is no whole safetensors file"),
        (
            lambda folder: (
                (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
                and (folder / "model.safetensors.index.json").write_text(
                    json.dumps(
                        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002.safetensors"}}
                    )
                )
            ),
            "model-00002.safetensors is missing",
        ),
        (lambda folder: (folder / "README.md").write_text(f"token: {TOKEN}"), "README.md' holds your Hub token"),
        (lambda folder: (folder / "results.json").write_text("{"), "results.json' is not valid JSON"),
    ],
    ids=["folder", "config", "weights", "cut", "shard", "token", "results"],
)
def test_what_cannot_be_published_is_refused(finished, hub, damage, message, capsys):  # noqa: F811
    damage(finished)
    assert cli.main(["push", str(finished), REPO]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert TOKEN not in error
    assert REPO not in hub.repos or not hub.files(REPO)


@pytest.mark.parametrize("repo", ["thing", "../thing", "a/b/c", ""])
def test_repos_have_an_owner_and_a_name(finished, hub, repo, capsys):  # noqa: F811
    assert cli.main(["push", str(finished), repo]) == 2
    assert "must be a Hub repo 'user/name'" in capsys.readouterr().err
    assert not hub.log


@pytest.mark.parametrize("words", [["push", "--help"], ["card", "--help"]])
def test_help(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    assert f"dualspeed {words[0]}" in capsys.readouterr().out


def test_adapters_are_pushed_with_those_in_subfolders(tmp_path, hub):  # noqa: F811
    peft = pytest.importorskip("peft")
    from tiny_models import FAMILIES

    model, _ = FAMILIES["llava"].build()
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2)
    model = peft.get_peft_model(model, config)
    model.add_adapter("second", config)
    trainer = make(tmp_path / "run", model=model, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert cli.main(["push", str(tmp_path / "run"), REPO]) == 0
    files = hub.files(REPO)
    assert files.keys() >= {"adapter_config.json", "adapter_model.safetensors", "second/adapter_model.safetensors"}
    card = files["README.md"].decode()
    assert "[More Information Needed]" not in card
    assert f'PeftModel.from_pretrained(model, "{REPO}")' in card
