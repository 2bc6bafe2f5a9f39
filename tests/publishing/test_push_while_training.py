"""What a training pushes: files that `dualspeed push` allows and no others, by no link, without tokens and keys."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import snapshot_download
from loopback_hub import TOKEN, USER, hub  # noqa: F401
from tokenizers import AddedToken
from training import make
from transformers import TrainerCallback

from hf_dualspeed import cli
from hf_dualspeed.commands.push_pruner import build
from hf_dualspeed.evaluation.checkpoint import find_checkpoint
from hf_dualspeed.publishing.files import published_files
from hf_dualspeed.trainer.checkpoints import fault_of
from hf_dualspeed.utils.constants import SAVING_NAME

REPO = f"{USER}/thing"
STRATEGIES = ["end", "every_save", "checkpoint", "all_checkpoints"]
RUN = {"max_steps": 4, "slow_mode_ratio": 0.5, "mode_schedule": "periodic", "save_strategy": "steps", "save_steps": 2}
PUSH = {"push_to_hub": True, "hub_model_id": REPO, "hub_token": TOKEN, "hub_always_push": True}
MODEL = {"config.json", "generation_config.json", "model.safetensors", "mode_isolator.safetensors"}
MODEL |= {"pruner_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
RECORD = {"README.md", "results.json", "learning_curve.png"}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
KEY = "AKIA" + "IOSFODNN7EXAMPLE"


@pytest.fixture(autouse=True)
def fresh_client(monkeypatch):
    """transformers keeps a client with the address that it saw first."""
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)


class Plant(TrainerCallback):
    """Puts a person's files and links beside what is saved, also into each checkpoint before it is pushed."""

    def __init__(self, outside: Path):
        self.outside = outside
        (outside / "vault").mkdir(parents=True)
        for name in ("secret.json", "passwd", "vault/adapter_config.json", "vault/adapter_model.safetensors"):
            (outside / name).write_text('{"private": "outside"}')

    def on_train_begin(self, args, state, control, **kwargs):
        self(Path(args.output_dir))

    def on_push_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        for path in (folder, *folder.glob("checkpoint-*")):
            self(path)

    def __call__(self, folder: Path):
        for name in (
            ".env",
            "private/id_rsa",
            "notes.md",
            "data.json",
            "second/notes.txt",
            "runs/events.out",
            "own.py",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("private")
        (folder / "second/adapter_config.json").write_text("{}")
        links = {"vocab.json": "secret.json", "merges.txt": "passwd", "LICENSE": "passwd", "vault": "vault"}
        links |= {"scaler.pt": "passwd", "rng_state_7.pth": "passwd", "optimizer_0": "vault"}
        links |= {"second/adapter_model.safetensors": "vault/adapter_model.safetensors", "global_step2": "vault"}
        for name, target in links.items():
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(self.outside / target)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_pushes_what_is_allowed_and_follows_no_link(tmp_path, hub, strategy, caplog):  # noqa: F811
    trainer = make(tmp_path / "run", callbacks=[Plant(tmp_path / "outside")], **RUN, **PUSH, hub_strategy=strategy)
    trainer.train()
    trainer.push_to_hub()
    places = {"checkpoint": ["last-checkpoint"], "all_checkpoints": ["checkpoint-2", "checkpoint-4"]}.get(strategy, [])
    adapter = {"second/adapter_config.json"}
    expected = MODEL | RECORD | adapter
    for place in places:
        expected |= {f"{place}/{name}" for name in MODEL | STATE | adapter}
    files = hub.files(REPO)
    assert {name for name in files if not name.endswith("chat_template.jinja")} == expected
    assert not [name for name, data in files.items() if b"private" in data or b"outside" in data]
    assert "Not pushed: " in caplog.text
    for name in (".env", "private/", "notes.md", "vocab.json", "vault/", "second/adapter_model.safetensors"):
        assert repr(name) in caplog.text.split("Not pushed: ")[-1]
    assert not [name for name in ("checkpoint-2", "training_args.bin") if repr(name) in caplog.text]
    if strategy != "end":
        assert "checkpoint-4/vocab.json" in caplog.text.split("because they are links")[-1]
    assert (tmp_path / "outside/passwd").read_text() == '{"private": "outside"}'


def test_the_way_of_saving_counts_too(tmp_path, hub):  # noqa: F811
    trainer = make(tmp_path / "run", **{**RUN, "save_strategy": "no"}, **PUSH)
    trainer.train()
    Plant(tmp_path / "outside")(tmp_path / "run")
    trainer.save_model()  # pushes
    assert hub.files(REPO).keys() >= MODEL
    assert not [name for name, data in hub.files(REPO).items() if b"private" in data or name == "training_args.bin"]


def test_trl_and_a_later_push_keep_to_it(tmp_path, hub):  # noqa: F811
    pytest.importorskip("trl")
    import sft_training

    plant, folder = Plant(tmp_path / "outside"), tmp_path / "run"
    plant(folder)
    trainer = sft_training.make(folder, sft_training.messages(), **RUN, **PUSH, hub_strategy="checkpoint")
    trainer.add_callback(plant)
    trainer.train()
    assert hub.files(REPO).keys() >= MODEL | {f"last-checkpoint/{name}" for name in MODEL | STATE}
    trainer.push_to_hub(blocking=False).result()
    files = hub.files(REPO)
    assert not [name for name, data in files.items() if b"private" in data or b"outside" in data]
    assert not [name for name in files if name.startswith("runs/") or "args" in name or name.endswith(".py")]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_training_goes_on_from_the_hub_as_if_unbroken(tmp_path, hub, strategy):  # noqa: F811
    unbroken = make(tmp_path / "unbroken", **RUN)
    unbroken.train()
    stopped = make(tmp_path / "run", **RUN, **PUSH, hub_strategy=strategy)
    stopped.add_callback(StopAt(2))
    stopped.train()
    shutil.rmtree(tmp_path / "run")
    if strategy == "checkpoint":  # in the cache, files are links
        checkpoint = Path(snapshot_download(REPO), "last-checkpoint")
    else:
        checkpoint = Path(snapshot_download(REPO, local_dir=tmp_path / "pulled"), "checkpoint-2")
    assert fault_of(checkpoint) is None
    resumed = make(tmp_path / "resumed", **RUN)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = unbroken.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())
    assert resumed.state.log_history[-2]["loss"] == unbroken.state.log_history[-2]["loss"]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_what_an_earlier_checkpoint_had_leaves_the_last_one(tmp_path, hub):  # noqa: F811
    hub.put(
        REPO,
        {"last-checkpoint/rng_state_3.pth": b"of four processes", "notes/mine.md": "words", "pruner.safetensors": b"x"},
    )
    make(tmp_path / "run", **RUN, **PUSH, hub_strategy="checkpoint").train()
    files = hub.files(REPO)
    assert "last-checkpoint/rng_state_3.pth" not in files
    assert "pruner.safetensors" not in files
    assert files["notes/mine.md"] == b"words"


SHARDED = {
    "pytorch_model_fsdp_0/__0_0.distcp",
    "pytorch_model_fsdp_0/.metadata",
    "optimizer_0/__1_0.distcp",
    "optimizer_0/.metadata",
    "pytorch_model_fsdp.bin",
    "optimizer.bin",
    "global_step4/mp_rank_00_model_states.pt",
    "global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "latest",
    "rng_state_0.pth",
    "rng_state_1.pth",
}


def test_sharded_checkpoints_are_resumable_too(tmp_path):
    others = {
        "optimizer_0/notes.txt",
        "global_step4/.env",
        ".metadata",
        "training_args.bin",
        "zero_to_fp32.py",
        "_unfinished",
    }
    for name in SHARDED | others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert set(published_files(tmp_path, resumable=True)) == SHARDED
    assert published_files(tmp_path) == []


# --- links where a copy is made -----------------------------------------------------------------------------------


def test_a_link_in_the_output_folder_is_replaced_and_not_written_through(tmp_path, hub):  # noqa: F811
    folder, outside = tmp_path / "run", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("a person's")
    (folder / "config.json").symlink_to(outside)
    make(folder, **RUN, **PUSH, hub_strategy="every_save").train()
    assert outside.read_text() == "a person's"
    assert json.loads(hub.files(REPO)["config.json"])["model_type"] == "llava"


class LinkInstead(TrainerCallback):
    """Moves the checkpoint, or a folder of the run, away, and puts a link in its place."""

    def __init__(self, name):
        self.name = name

    def on_push_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir)
        if (folder / "checkpoint-2").is_symlink() or state.global_step > 2:
            return
        elsewhere = folder.parent / "elsewhere"
        if self.name == "checkpoint-2":
            shutil.move(folder / self.name, elsewhere)
        else:
            elsewhere.mkdir()
            (folder / "checkpoint-2" / self.name).mkdir()
            (folder / "checkpoint-2" / self.name / "adapter_config.json").write_text("{}")
        (folder / self.name).symlink_to(elsewhere)


@pytest.mark.parametrize("name", ["checkpoint-2", "second"])
def test_a_folder_that_is_a_link_is_refused_by_name(tmp_path, hub, name, caplog):  # noqa: F811
    folder = tmp_path / "run"
    trainer = make(folder, callbacks=[LinkInstead(name)], **RUN, **PUSH, hub_strategy="every_save")
    trainer.train()
    assert trainer.state.global_step == 4
    assert f"{str(folder / name)!r} is a link, and links are not" in caplog.text
    assert not [path for path in (tmp_path / "elsewhere").iterdir() if name == "second"]
    assert "Training in progress, step 2" not in hub.titles(REPO)
    assert "Training in progress, step 4" in hub.titles(REPO)


@pytest.mark.parametrize("moved", [0, 3])
def test_a_push_cut_off_between_files_leaves_no_mixture(tmp_path, hub, moved, monkeypatch):  # noqa: F811
    """Files of two steps, each whole, would be loaded as one model."""
    folder, replace, moves = tmp_path / "run", Path.replace, []

    def cut_off(path, target):
        if path.parent.name == SAVING_NAME and path.suffix != ".part":
            moves.append(path)
            if len(moves) - 1 == moved:
                raise KeyboardInterrupt
        return replace(path, target)

    trainer = make(folder, **RUN, **PUSH, hub_strategy="every_save")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut_off)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    with pytest.raises(ValueError, match="its saving was cut off"):
        find_checkpoint(str(folder))
    make(folder, **RUN, **PUSH, hub_strategy="every_save").train(resume_from_checkpoint=True)
    assert find_checkpoint(str(folder)).base is None
    assert not (folder / SAVING_NAME).exists()


# --- tokens and keys ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tokenizer", "config", "card"])
def test_a_key_is_said_before_training(tmp_path, hub, where):  # noqa: F811
    from tiny_models import FAMILIES

    model, processor = FAMILIES["llava"].build()
    folder = tmp_path / "run"
    folder.mkdir()
    if where == "tokenizer":
        processor.tokenizer.add_tokens([AddedToken(f"<{KEY}>", special=True)])
    elif where == "config":
        model.config.note = f"made with {KEY}"
    else:
        (folder / "README.md").write_text(f"## Mine\n\nI use {KEY} here\n")
    file = {"tokenizer": r"tokenizer\w*.json", "config": "config.json", "card": "README.md"}[where]
    with pytest.raises(ValueError, match=f"{file}' holds what looks like an AWS key and is not pushed") as refused:
        make(folder, model=model, processor=processor, **RUN, **PUSH)
    assert KEY not in str(refused.value)


def test_a_key_that_comes_later_stops_the_push_and_not_the_training(tmp_path, hub, caplog):  # noqa: F811
    folder = tmp_path / "run"
    trainer = make(folder, **RUN, **PUSH, hub_strategy="checkpoint")
    trainer.model.generation_config.note = f"made with {KEY}"
    trainer.train()
    assert trainer.state.global_step == 4
    assert fault_of(folder / "checkpoint-4") is None
    (last,) = [text for text in caplog.messages if text.startswith("Pushes to the Hub failed: ")]
    for said in (
        "'Training in progress, step 2'",
        "step 4, checkpoint'",
        "generation_config.json' holds",
        "an AWS key",
    ):
        assert said in last
    with pytest.raises(ValueError, match=r"generation_config.json' holds what looks like an AWS key"):
        trainer.push_to_hub()
    assert KEY not in caplog.text
    assert not hub.files(REPO)
    trainer.model.generation_config.note = "clean"
    trainer.push_to_hub()
    assert hub.files(REPO).keys() >= MODEL


def test_a_push_in_the_background_says_that_it_failed(tmp_path, hub, caplog):  # noqa: F811
    trainer = make(tmp_path / "run", **RUN, **PUSH, hub_strategy="end")
    trainer.train()
    hub.fail(500, times=10**6, path="/commit/")
    job = trainer.push_to_hub("My words", blocking=False)
    assert isinstance(job.exception(), Exception)
    assert "The push 'My words' failed (" in caplog.text
    assert f"dualspeed push {tmp_path / 'run'} {REPO}" in caplog.text
    hub.failures.clear()
    assert trainer.push_to_hub("Again", blocking=False).result().oid
    assert hub.titles(REPO)[0] == "Again"


def test_what_fails_in_training_is_said_again_at_its_end(tmp_path, hub, caplog):  # noqa: F811
    caplog.set_level(logging.WARNING)
    trainer = make(tmp_path / "run", **RUN, **PUSH, hub_strategy="every_save")
    hub.fail(500, times=10**6, path="/commit/")
    trainer.train()
    last = caplog.messages[-1]
    assert last.startswith("Pushes to the Hub failed: 'Training in progress, step 2' (Cannot push to the Hub repo")
    assert "'Training in progress, step 4'" in last
    assert f"dualspeed push {tmp_path / 'run'} {REPO}" in last


def test_other_ways_of_pushing_look_for_keys_too(tmp_path, hub, capsys, monkeypatch):  # noqa: F811
    """`dualspeed push`, push-pruner, push-metric and space, each through a file of its own."""
    monkeypatch.chdir(tmp_path)
    card = f"## Mine\n\nI use {KEY} here\n"
    hub.put("spaces/tester/anls", {"README.md": f"---\ntitle: a\n---\n{card}"})
    (tmp_path / "results.json").write_text(json.dumps({"note": KEY}))
    (tmp_path / "compare.md").write_text(card)
    run = make(tmp_path / "run", max_steps=1)
    run.train()
    run.save_model()
    (tmp_path / "run/tokenizer_config.json").write_text(json.dumps({"chat_template": f"\n{KEY}"}))
    ways = {
        "tokenizer_config.json": ["push", "run", REPO],
        "README.md": ["push-pruner", "grid", REPO, "--results", "results.json"],
        "README.md'": ["push-metric", "anls", "tester/anls"],
        "compare.md": ["space", "--push", REPO, "--compare", "compare.md"],
    }
    made = set(hub.repos)
    for file, words in ways.items():
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert f"{file.strip(chr(39))}' holds what looks like an AWS key and is not pushed" in error
        assert KEY not in error
    assert set(hub.repos) == made
    hub.put(REPO, {"README.md": card})
    with pytest.raises(ValueError, match="README.md' holds what looks like an AWS key"):
        build("grid", {}).push_to_hub(REPO)
    assert hub.titles(REPO) == ["put", "initial commit"]


def test_the_table_of_a_space_is_no_link(tmp_path, hub, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("private")
    (tmp_path / "compare.md").write_text("| a |")
    for name in ("compare.png", "compare.md"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "private.txt")
        assert cli.main(["space", "--push", REPO, "--compare", "compare.md"]) == 2
        assert f"'{name}' is a link or no regular file" in capsys.readouterr().err
    assert not hub.repos
