"""DeepSpeed's ZeRO on the CPU, against plain training in one process on the same global batches.

Fast steps alone update the isolator, slow ones do not move it by a bit: `assert_same_training` compares that, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
import yaml
from evaluation_cases import COLOURS, SIZES, write_rows
from launching import DDP, ROOT, ZERO3, assert_same_training, launched, run
from PIL import Image
from safetensors.torch import load_file
from training import make
from transformers import AutoModelForImageTextToText

from hf_dualspeed import DualSpeedTrainer
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed: make test-deepspeed")
WHOLE, ISOLATOR = "model.safetensors", "mode_isolator.safetensors"


def zero(stage: int, **settings) -> tuple[str, str]:
    """Options of a training. Parameters as small as a tiny model's are not partitioned otherwise."""
    partitioned = {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return "--zero", json.dumps({"stage": stage, **(partitioned if stage == 3 else {}), **settings})


ON_HOST = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.distributed
@needs_deepspeed
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_equals_one_process_saves_and_resumes(tmp_path, stage):
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "2", "--images", "--evaluate")
    options = ("--batch", "1", "--images", "--evaluate", *zero(stage))
    ranks = run(two, *options, config=DDP)
    assert [report["sharded"] for report in ranks] == [stage == 3] * 2
    assert_same_training(one, two, alone, ranks)
    trained = load_file(two / "rank0.safetensors")
    for name in (two / ISOLATOR, two / "checkpoint-6" / ISOLATOR):
        assert torch.equal(load_file(name)["prompt"], trained["dualspeed.isolator.prompt"])
    model, info = AutoModelForImageTextToText.from_pretrained(two, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())

    (two / "checkpoint-6").rename(two / "finished")
    resumed = run(two, *options, "--resume", config=DDP)
    assert [len(report["moved"]) for report in resumed] == [3, 3]
    assert_same_training(one, two, alone, resumed)


@pytest.mark.slow
@pytest.mark.distributed
@needs_deepspeed
@pytest.mark.parametrize(
    "options",
    [
        ("--images", *zero(1)),
        ("--images", "--checkpointing", "--pruner", "pyramiddrop", *zero(3)),
        ("--images", "--family", "qwen2_5_vl", *zero(3)),
        ("--images", "--family", "llava_next", *zero(3)),
        ("--images", "--adapters", *zero(2)),
        ("--images", "--adapters", *zero(3)),
        ("--images", "--fast-only", "*layers.0*", "--slow-only", "*projector*", *zero(2)),
        ("--images", "--fast-only", "*layers.0*", "--slow-only", "*projector*", *zero(3)),
        ("--images", *zero(2, **ON_HOST)),
        ("--images", *zero(3, **ON_HOST, offload_param={"device": "cpu"})),
        ("--images", "--fast-only", "*layers.0*", *zero(3, **ON_HOST)),
        # One rank's micro-batch has no image, so that its gradients come in another order.
        zero(2),
        ("--pruner", "token_learner", *zero(2)),
        ("--adapters", *zero(1)),
    ],
    ids=lambda options: " ".join(options).replace('"', ""),
)
def test_more_ways_that_equal_one_process(tmp_path, options):
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "2", *options[:-2])
    assert_same_training(one, two, alone, run(two, "--batch", "1", *options, config=DDP))


@pytest.mark.slow
@pytest.mark.distributed
@needs_deepspeed
def test_without_zero_the_engine_trains_alike(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "2", "--images")
    ranks = run(two, "--batch", "1", "--images", *zero(0), config=DDP)
    for report in (alone, *ranks):
        for entry in report["history"]:
            entry[1] = None  # there it reports no norm of the gradients
    assert_same_training(one, two, alone, ranks)


@pytest.mark.slow
@pytest.mark.distributed
@needs_deepspeed
def test_learned_pruners(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--images", "--pruner", "token_learner")
    (alone,) = run(one, "--batch", "2", *options)
    assert_same_training(one, two, alone, run(two, "--batch", "1", *options, *zero(3), config=DDP))
    expected, focus = (load_file(f / "rank0.safetensors")["dualspeed.pruner.focus"] for f in (one, two))
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(focus, expected, rtol=1e-3, atol=1e-9)
    assert torch.equal(load_file(two / "pruner.safetensors")["focus"], focus)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("settings", [{}, {"--slow-only": "*projector*"}], ids=["shared", "slow projector"])
def test_zero_3_with_steps_that_do_not_reach_the_tower(tmp_path, settings):
    # In one process, where no other gathers the tower meanwhile. DeepSpeed would repeat an earlier step's gradients.
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--batch", "1", *(word for pair in settings.items() for word in pair))
    (alone,) = run(one, *options)
    assert_same_training(one, two, alone, run(two, *options, *zero(3)), world=1)


@pytest.mark.slow
@needs_deepspeed
def test_gradients_that_offloading_loses_are_an_error(tmp_path):
    done = launched(tmp_path, "--batch", "1", *zero(3, **ON_HOST))
    assert done.returncode
    assert "A micro-batch has no images." in done.stderr


@pytest.mark.slow
@needs_deepspeed
def test_weights_that_are_not_gathered_and_an_isolator_of_another_length(tmp_path):
    options = ("--batch", "2", "--images", *zero(3, stage3_gather_16bit_weights_on_model_save=False))
    run(tmp_path, *options)
    assert not (tmp_path / WHOLE).exists()
    expected = load_file(tmp_path / "rank0.safetensors")["dualspeed.isolator.prompt"]
    for folder in (tmp_path, tmp_path / "checkpoint-6"):
        assert torch.equal(load_file(folder / ISOLATOR)["prompt"], expected)
    done = launched(tmp_path, *options, "--isolator-length", "2", "--resume")
    assert done.returncode
    assert "`isolator_length` is 2, but the checkpoint" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@needs_deepspeed
def test_a_recipe_whose_weights_are_partitioned_as_they_are_read(tmp_path):
    texts = ["which colour is it ?", " ".join(COLOURS)]
    model, processor = build_tiny_llava(texts, **SIZES)
    with torch.no_grad():  # at whose scale the isolator starts
        model.get_input_embeddings().weight.mul_(5)
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    for colour in COLOURS:
        Image.new("RGB", (20, 16), colour).save(tmp_path / f"{colour}.png")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": texts[0]}]}
    rows = [
        {
            "messages": [asked, {"role": "assistant", "content": colour}],
            "images": [str(tmp_path / f"{colour}.png")],
            "question": texts[0],
            "answer": colour,
        }
        for colour in (*COLOURS, COLOURS[0])  # whole batches
    ]
    write_rows(tmp_path / "data.json", rows)
    recipe = {"model_name_or_path": str(tmp_path / "base"), "dtype": "float32", "use_cpu": True, "report_to": "none"}
    recipe |= {"dataset": str(tmp_path / "data.json"), "eval_dataset": str(tmp_path / "data.json")}
    recipe |= {"max_steps": 4, "mode_schedule": "periodic", "slow_mode_ratio": 0.5, "eval_strategy": "no"}
    recipe |= {"adam_epsilon": 1.0, "learning_rate": 0.1, "save_strategy": "no"}
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", str(ZERO3), "--main_process_port", "0"]
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    for name, launcher, batch in (("one", [], 4), ("two", accelerate, 2)):
        own = {"output_dir": str(tmp_path / name), "per_device_train_batch_size": batch}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**recipe, **own}))
        done = subprocess.run(
            [sys.executable, *launcher, "train.py", "--config", str(path)],
            env={**os.environ, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-12000:]
    for name in (WHOLE, ISOLATOR):  # by the published names
        weights, expected = (load_file(tmp_path / folder / name) for folder in ("two", "one"))
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-5)
    answers = [json.loads((tmp_path / folder / "results.json").read_text())["n"] for folder in ("one", "two")]
    assert answers == [len(rows)] * 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": True}}}, "super_offload"),
        ({"optimizer": {"type": "Muon"}}, "optimizer.type='Muon'"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type='OneBitAdam'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_would_move_parameters_of_the_other_mode(settings, named):
    def check(names, settings):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings))
        trainer = SimpleNamespace(
            mode_parameters=SimpleNamespace(names={"fast": names, "slow": set()}),
            is_deepspeed_enabled=True,
            accelerator=SimpleNamespace(state=state),
        )
        DualSpeedTrainer.check_deepspeed(trainer)

    with pytest.raises(ValueError, match=named) as error:
        check({"dualspeed.isolator.prompt"}, settings)
    assert "dualspeed.isolator.prompt" in str(error.value)
    check(set(), settings)
    check({"dualspeed.isolator.prompt"}, {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}})


def test_an_optimizer_of_a_scripts_own_is_split_by_modes(tmp_path):
    """Which would otherwise lack what its step asks for."""

    class Own(DualSpeedTrainer):
        def create_optimizer(self):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = make(tmp_path, cls=Own)
    trainer.create_optimizer()
    trainer.is_deepspeed_enabled = True
    for _ in range(2):
        trainer._wrap_model(trainer.model)  # as the Trainer does next
    groups = {group["modes"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    assert groups == {"fast": 1, "both": len(list(trainer.model.parameters())) - 1}
