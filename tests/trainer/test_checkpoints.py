"""Checkpoints that are whole, and those that are not: skipped, refused, never kept in place of whole ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from adapter_cases import adapted
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES
from torch.distributed.checkpoint import save
from training import ADAPTIVE, make
from transformers import TrainerCallback

from hf_dualspeed import freeze_roles
from hf_dualspeed.evaluation.checkpoint import find_checkpoint
from hf_dualspeed.publishing.files import check_checkpoint
from hf_dualspeed.trainer.checkpoints import UNFINISHED, last_whole_checkpoint
from hf_dualspeed.utils.constants import SAVING_NAME

SAVING = {"save_strategy": "steps", "save_steps": 1, "speedup_rounds": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three steps with a checkpoint of each, ended within an epoch."""
    folder = tmp_path_factory.mktemp("run")
    make(folder, max_steps=3, **SAVING).train()
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def test_a_finished_run_is_trained_no_further(run, caplog):
    for _ in range(2):
        trainer = make(run, max_steps=3, **SAVING)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 3
        assert sum(trainer.summary()["steps"].values()) == 3
    assert "has trained 3 of 3 steps: nothing is left" in caplog.text
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    trainer = make(run, max_steps=2, **SAVING)  # fewer steps than it has trained
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert trainer.state.global_step == 3
    trainer = make(run, max_steps=4, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_a_checkpoint_knows_the_view_of_its_fast_steps(tmp_path):
    """Whoever answers from its pruned tokens goes by it, though only the run's folder has results."""
    view = {"position_ids": "original", "video_budget": "clip", "proportional_attention": False}
    make(tmp_path, max_steps=1, **view, **SAVING).train()
    assert not (tmp_path / "checkpoint-1" / "results.json").exists()
    assert find_checkpoint(str(tmp_path / "checkpoint-1")).settings() == view


def test_a_run_that_is_resumed_with_another_view_says_so(run, caplog):
    make(run, max_steps=4, position_ids="compact", **SAVING).train(resume_from_checkpoint=True)
    assert (
        "fast steps had position_ids='original', and those of the resumed run have position_ids='compact'"
        in caplog.text
    )
    caplog.clear()
    make(run, max_steps=5, position_ids="compact", **SAVING).train(resume_from_checkpoint=True)
    assert "resumed run" not in caplog.text
    # One of before, when all tokens were renumbered, and no checkpoint said so.
    path = run / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["ModeClock"]["attributes"]["view"]
    path.write_text(json.dumps(state))
    make(run, max_steps=6, **SAVING).train(resume_from_checkpoint=True)
    assert "had position_ids='compact', and those of the resumed run have position_ids='original'" in caplog.text


def test_weights_of_several_types_come_back_to_the_bit(tmp_path):
    """A projector in float32 is trained in a model in bfloat16."""

    def build(**options):
        model = FAMILIES["llava"].build()[0].bfloat16()
        freeze_roles(model, train_language_model=False)
        model.model.multi_modal_projector.float()
        return make(tmp_path, model=model, bf16=True, learning_rate=1e-3, max_steps=1, **SAVING, **options)

    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    trainer = build(**best)
    trainer.train()
    saved = trainer.state.best_model_checkpoint
    resumed = build()
    resumed._load_from_checkpoint(saved)
    projector = {k: v for k, v in load_file(f"{saved}/model.safetensors").items() if "projector" in k}
    assert len(projector) == 4
    for of in (trainer, resumed):
        weights = dict(of.model.named_parameters())
        for name, weight in projector.items():
            own = weights[f"model.{name}"]
            assert own.dtype == torch.float32
            assert torch.equal(own, weight), name


def cut(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def state(value):
    def write(folder):
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": value}))

    return write


DAMAGES = {
    "saving was cut off": lambda folder: (folder / UNFINISHED).touch(),
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json is damaged": cut("trainer_state.json"),
    "`global_step` in trainer_state.json is '-5'": state(-5),
    "`global_step` in trainer_state.json is 'x'": state("x"),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "optimizer.pt is damaged": cut("optimizer.pt"),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "model.safetensors is missing": lambda folder: (folder / "model.safetensors").unlink(),
    "is no whole safetensors file": cut("model.safetensors"),
    "neither config.json nor": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_what_is_not_whole_is_skipped_by_name_and_refused_where_it_is_asked_for(run, said, caplog):
    DAMAGES[said](run / "checkpoint-3")
    assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
    assert f"{run / 'checkpoint-3'} is skipped, because it is no whole checkpoint" in caplog.text
    assert said in caplog.text
    with pytest.raises(ValueError, match="no whole checkpoint") as error:
        make(run, max_steps=4, **SAVING).train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert said in str(error.value)


def test_true_takes_the_last_whole_one(run):
    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trained.append(state.global_step)

    (run / "checkpoint-3" / "optimizer.pt").unlink()
    trained: list[int] = []
    trainer = make(run, max_steps=4, callbacks=[Steps()], **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert trained == [3, 4]
    assert sum("loss" in entry for entry in trainer.state.log_history) == 4
    for folder in run.glob("checkpoint-*"):
        (folder / UNFINISHED).touch()
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        make(run, max_steps=4, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("value", [3, 2.5, ["x"], {"a": 1}])
def test_places_of_another_type_are_named(run, value):
    trainer = make(run, max_steps=3, **SAVING)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` must be a text or True or False or None"):
        trainer.train(resume_from_checkpoint=value)
    with pytest.raises(ValueError, match="`output_dir` must be a text or None"):
        trainer.save_model(value)
    with pytest.raises(ValueError, match="`license` must be a text or None"):
        trainer.create_model_card(license=value)
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is '', .*: the name is empty"):
        trainer.train(resume_from_checkpoint="")
    trainer.train(resume_from_checkpoint=run / "checkpoint-3")  # a path is as good as a text


def test_a_full_disk_leaves_the_last_whole_one(tmp_path, monkeypatch):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path) and "optimizer" in str(path):
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        make(tmp_path, save_total_limit=1, **SAVING).train()
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize("moved", [None, 0, 5], ids=["full disk", "first move", "later move"])
def test_a_save_into_the_output_folder_replaces_a_whole_model_by_a_whole_one(run, monkeypatch, moved):
    trainer = make(run, max_steps=3, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    stale = run / "model-00001-of-00002.safetensors"
    for path in (stale, run / "model.safetensors.index.json", run / "pruner.safetensors", run / "model.txt"):
        path.write_text("{}")
    before = load_file(run / "model.safetensors")
    later = make(run, max_steps=4, **SAVING)
    later.train(resume_from_checkpoint=True)
    save, replace, moves = torch.save, Path.replace, []

    def full(value, path, *args, **kwargs):
        if moved is None:
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    def interrupted(path, target):
        if path.parent.name == SAVING_NAME and path.suffix != ".part":
            moves.append(path)
            if len(moves) - 1 == moved:
                raise OSError(5, "Input/output error")
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(OSError, match="No space left|Input/output"):
            later.save_model()
    if moved is None:  # the earlier model stands as it was
        assert all(torch.equal(value, before[key]) for key, value in load_file(run / "model.safetensors").items())
        assert stale.exists()
        assert not (run / SAVING_NAME).exists()
        find_checkpoint(str(run)).model()
    else:
        for refuses in (find_checkpoint, lambda folder: check_checkpoint(Path(folder))):
            with pytest.raises(ValueError, match=f"its saving was cut off. Its other files are in {SAVING_NAME}"):
                refuses(str(run))
    again = make(run, max_steps=4, **SAVING)
    again.train(resume_from_checkpoint=True)
    again.save_model()
    weights, names = load_file(run / "model.safetensors"), {path.name for path in run.iterdir()}
    expected = load_file(run / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())
    assert any(not torch.equal(value, before[key]) for key, value in weights.items())
    assert {"model.txt", "mode_isolator.safetensors", "results.json", "training_args.bin"} <= names
    assert not names & {stale.name, "model.safetensors.index.json", "pruner.safetensors", UNFINISHED, SAVING_NAME}


def adapters(folder, **options):
    return make(folder, model=adapted()[0], **{"max_steps": 3, **SAVING, **options})


def test_a_whole_model_over_an_earlier_runs_adapters_is_what_is_loaded(tmp_path):
    earlier = adapters(tmp_path)
    earlier.train()
    earlier.save_model()
    later = make(tmp_path, max_steps=3, **SAVING)
    later.train()
    later.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        assert not {"adapter_config.json", "adapter_model.safetensors"} & {path.name for path in folder.iterdir()}
    assert find_checkpoint(str(tmp_path)).base is None
    resumed = make(tmp_path, max_steps=4, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_checkpoint_over_an_earlier_runs_has_nothing_of_it(run):
    """Its optimizer would be taken for that of this run."""
    kept = {"README.md": "mine", "notes.txt": "mine"}
    for name, text in kept.items():
        (run / "checkpoint-3" / name).write_text(text)
    make(run, max_steps=3, save_only_model=True, **SAVING).train()
    names = {path.name for path in (run / "checkpoint-3").iterdir()}
    assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert {name: (run / "checkpoint-3" / name).read_text() for name in kept} == kept
    assert last_whole_checkpoint(run) is None


def test_rotation_keeps_whole_ones_rather_than_halves(run):
    (run / "checkpoint-1" / UNFINISHED).touch()
    (run / "checkpoint-7").mkdir()  # the newest, and nothing in it
    trainer = make(run, max_steps=4, save_total_limit=3, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert not list(run.glob(f"*/{UNFINISHED}"))


def test_a_run_resumed_at_its_end_keeps_no_more_checkpoints_than_it_may(run, tmp_path):
    def left(folder, steps, checkpoint):
        make(folder, max_steps=steps, save_total_limit=1, **SAVING).train(resume_from_checkpoint=checkpoint)
        return sorted(path.name for path in run.glob("checkpoint-*"))

    every = ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert left(tmp_path / "another", 3, str(run / "checkpoint-3")) == every
    assert left(run, 2, str(run / "checkpoint-2")) == every  # there are later ones
    (run / "checkpoint-2" / UNFINISHED).touch()
    assert left(run, 3, True) == ["checkpoint-3"]


def change(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def without_one(tensors):
    del tensors[min(tensors)]


CHANGES = {
    r"lacks tensors of the model: .*\(1\)": ("model.safetensors", without_one),
    r"holds others: model\.foreign": ("model.safetensors", lambda t: t.update({"model.foreign": torch.ones(2)})),
    "an isolator with NaN": ("mode_isolator.safetensors", lambda t: t["prompt"].fill_(float("nan"))),
    "holds no isolator": ("mode_isolator.safetensors", lambda t: t.update({"other": t.pop("prompt")})),
}


@pytest.mark.parametrize("said", CHANGES)
def test_tensors_that_are_missing_foreign_or_broken_are_named(run, said):
    name, edit = CHANGES[said]
    change(run / "checkpoint-3" / name, edit)
    with pytest.raises(ValueError, match=said):
        make(run, max_steps=4, **SAVING).train(resume_from_checkpoint=True)


def test_another_pruner_is_refused(run):
    with pytest.raises(ValueError, match=r"`pruner` is 'random', but the checkpoint .* 'divprune'.*pruner='divprune'"):
        make(run, max_steps=4, pruner="random", **SAVING).train(resume_from_checkpoint=True)


def test_adapters_lack_nothing(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        model = peft.get_peft_model(FAMILIES["llava"].build()[0], peft.LoraConfig(target_modules=["q_proj"]))
        return make(tmp_path, model=model, max_steps=2, **SAVING)

    adapted().train()
    change(tmp_path / "checkpoint-1" / "adapter_model.safetensors", without_one)
    with pytest.raises(ValueError, match=r"lacks tensors of the model: .*lora"):
        adapted().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_model_without_half_of_its_tensors_is_not_evaluated(run):
    find_checkpoint(str(run / "checkpoint-3")).model()
    change(run / "checkpoint-3" / "model.safetensors", without_one)
    with pytest.raises(ValueError, match="lacks tensors of the model"):
        find_checkpoint(str(run / "checkpoint-3")).model()


def dcp(folder, names):
    save({name: torch.ones(300 * number) for number, name in enumerate(names, 1)}, checkpoint_id=folder, no_dist=True)


def sharded(run, kind):
    """Two ranks' checkpoint as FSDP or DeepSpeed writes it, in place of the last one."""
    folder = run / "checkpoint-3"
    for name in ("model.safetensors", "config.json", "optimizer.pt", "rng_state.pth"):
        (folder / name).unlink()
    names = ["rng_state_0.pth", "rng_state_1.pth"]
    if kind == "fsdp":
        for part in ("pytorch_model_fsdp_0", "optimizer_0"):
            dcp(folder / part, ["a", "b"])
    elif kind == "full":
        names += ["pytorch_model_fsdp.bin", "optimizer.bin"]
    elif kind == "local":
        names += [f"{part}_rank{rank}.bin" for part in ("pytorch_model_fsdp_0", "optimizer_0") for rank in (0, 1)]
    else:
        (folder / "latest").write_text("global_step3")
        (folder / "global_step3").mkdir()
        names += [f"global_step3/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)]
        names += ["global_step3/mp_rank_00_model_states.pt", "global_step3/layer_0_expert_0_mp_rank_00_model_states.pt"]
    for name in names:
        torch.save({"x": torch.ones(300)}, folder / name)
    assert last_whole_checkpoint(run) == str(folder)
    return folder


SHARDS = {
    "pytorch_model_fsdp_0/.metadata": "fsdp",
    "pytorch_model_fsdp_0/__0_0.distcp": "fsdp",
    "optimizer_0/__0_0.distcp": "fsdp",
    "pytorch_model_fsdp.bin": "full",
    "optimizer.bin": "full",
    "optimizer_0_rank1.bin": "local",
    "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": "deepspeed",
    "global_step3/mp_rank_00_model_states.pt": "deepspeed",
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_are_missing_or_cut_off_are_named(run, name, caplog):
    folder = sharded(run, SHARDS[name])
    if not name.endswith(".metadata"):
        cut(name)(folder)
        assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
        assert f"{name} is damaged" in caplog.text
    if name != "pytorch_model_fsdp.bin":  # without, nothing tells that it was sharded
        (folder / name).unlink()
        assert last_whole_checkpoint(run) == str(run / "checkpoint-2")
        said = {
            "optimizer.bin": "the optimizer",
            "global_step3/mp_rank_00_model_states.pt": "no weights in global_step3",
        }
        assert said.get(name, Path(name).name) in caplog.text


def test_a_model_is_saved_where_checkpoints_are_shards(tmp_path, monkeypatch):
    trainer = make(tmp_path, max_steps=1)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    trainer.is_fsdp_enabled = True
    trainer.save_model()
    saved = type(trainer.model).from_pretrained(tmp_path)
    assert torch.equal(saved.lm_head.weight, trainer.model.lm_head.weight)
    prompt = load_file(tmp_path / "mode_isolator.safetensors")["prompt"]
    assert torch.equal(prompt, trainer.dual_forward.isolator.prompt)
    trainer._marked = tmp_path / "checkpoint-1"
    trainer.save_model(str(trainer._marked), _internal_call=True)
    assert not trainer._marked.exists()


def test_a_machine_that_did_not_save_the_best_checkpoint_ends_the_training(tmp_path):
    """Where machines share no disk, the Trainer warns there, and says what to set."""
    trainer = make(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_a_checkpoint_of_ray_tune_is_resumed(tmp_path):
    trainer = make(tmp_path, max_steps=6, **ADAPTIVE)
    trainer.train()
    ratios = trainer.adaptive_schedule.ratios
    assert len(ratios) > 1
    trainer._tune_save_checkpoint(str(tmp_path / "tune"))
    resumed = make(tmp_path, max_steps=7, **ADAPTIVE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "tune" / "checkpoint-6"))
    assert sum(resumed.summary()["steps"].values()) == 7
    assert resumed.adaptive_schedule.ratios[: len(ratios)] == ratios
