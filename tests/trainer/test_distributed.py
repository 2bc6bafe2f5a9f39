"""Two processes on the CPU, started by `accelerate launch`, against one process on the same global batches."""

from __future__ import annotations

import pytest
import torch
from launching import DDP, FSDP2, assert_same_training, launched, run
from loopback_hub import USER, hub  # noqa: F401
from safetensors.torch import load_file
from transformers.utils import is_accelerate_available

from hf_dualspeed.trainer.setup import KEEPS_ALL_TRAINED


@pytest.mark.distributed
def test_an_adaptive_schedule_is_the_same_on_all_ranks(tmp_path):
    options = ("--adaptive", "--max-steps", "10")
    (alone,) = run(tmp_path / "one", "--batch", "2", *options)
    ranks = run(tmp_path / "two", "--batch", "1", *options, config=DDP)
    assert len(set(alone["ratios"])) > 2
    assert ranks[0]["ratios"] == ranks[1]["ratios"] == pytest.approx(alone["ratios"], rel=1e-3)
    assert ranks[0]["modes"] == ranks[1]["modes"] == alone["modes"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "options",
    [
        # Checkpointing turns DDP's search for unused parameters off.
        ("--family", "llava", "--checkpointing", "--evaluate"),
        # A tower whose last layer no pass uses, and that one rank alone may use.
        ("--family", "llava", "--tower", "--checkpointing", "--all-used"),
        pytest.param(("--family", "llava", "--tower"), marks=pytest.mark.slow),
        pytest.param(("--family", "llava"), marks=pytest.mark.slow),
        pytest.param(("--family", "qwen2_5_vl"), marks=pytest.mark.slow),
        pytest.param(("--family", "llava_next"), marks=pytest.mark.slow),
        pytest.param(("--family", "llava", "--checkpointing", "--pruner", "pyramiddrop"), marks=pytest.mark.slow),
    ],
)
def test_ddp_equals_one_process(tmp_path, options):
    # One sample is text only, so that one rank's micro-batch reaches neither the projector nor the isolator.
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "2", *options)
    assert_same_training(one, two, alone, run(two, "--batch", "1", *options, config=DDP))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_steps_of_text_alone_do_not_move_what_sees(tmp_path, config):
    # Weight decay would, with a gradient of zeros.
    options = ("--texts", "--tower", "--batch", "1", "--checkpointing", "--max-steps")
    weights = []
    for steps in ("1", "4"):
        ranks = run(tmp_path / steps, *options, steps, config=config)
        weights.append(load_file(tmp_path / steps / "rank0.safetensors"))
    assert {"fast", "slow"} == set(ranks[0]["modes"][1:])
    moved = {name for name, weight in weights[1].items() if not torch.equal(weight, weights[0][name])}
    assert moved == {name for name in weights[1] if "language_model" in name or "lm_head" in name}


@pytest.mark.distributed
def test_ddp_by_length_equals_one_process_and_resumes_within_an_epoch(tmp_path):
    # Of 8 samples, 4 to a step: the save at step 3 lies within the second epoch.
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--by-length", "--checkpointing")
    (alone,) = run(one, "--batch", "2", *options)
    assert_same_training(one, two, alone, run(two, "--batch", "1", *options, config=DDP))
    (two / "checkpoint-6").rename(two / "finished")
    resumed = run(two, "--batch", "1", *options, "--resume", config=DDP)
    assert [len(report["moved"]) for report in resumed] == [3, 3]
    assert_same_training(one, two, alone, resumed)


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_with_the_head_in_the_loss(tmp_path):
    # DDP looks for the head's weight behind what forward returns, where it is not.
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "2", "--evaluate")
    assert_same_training(one, two, alone, run(two, "--batch", "1", "--evaluate", "--fused", config=DDP))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("options", [("--pruner", "pyramiddrop"), ("--adapters",)], ids=["between_layers", "adapters"])
def test_fsdp2_with_what_fast_steps_alone_have(tmp_path, options):
    if "--adapters" in options and not is_accelerate_available(KEEPS_ALL_TRAINED):
        pytest.skip("refused with this accelerate")
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--images", *options)
    (alone,) = run(one, "--batch", "2", *options)
    ranks = run(two, "--batch", "1", *options, config=FSDP2)
    assert all(report["sharded"] for report in ranks)
    assert_same_training(one, two, alone, ranks)


@pytest.mark.slow
@pytest.mark.distributed
def test_ddp_with_slow_steps_in_parts(tmp_path):
    # Parts of a sample each: some of text alone, so that no part, one or both of a rank reach tower and projector.
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--tower", "--slow-mode-splits")
    (alone,) = run(one, "--batch", "4", *options, "1")
    assert_same_training(one, two, alone, run(two, "--batch", "2", *options, "2", config=DDP))


@pytest.mark.distributed
def test_fsdp2_equals_one_process_saves_and_resumes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("--images", "--evaluate", "--slow-warmup", "2", "--max-steps", "12")
    (alone,) = run(one, "--batch", "2", *options)
    assert alone["modes"][:4] == ["slow"] * 4
    assert alone["modes"][8:] == ["fast", "slow"] * 2
    ranks = run(two, "--batch", "1", *options, config=FSDP2)
    assert all(report["sharded"] for report in ranks)
    assert_same_training(one, two, alone, ranks)
    saved, trained = load_file(two / "mode_isolator.safetensors"), load_file(two / "rank0.safetensors")
    assert torch.equal(saved["prompt"], trained["dualspeed.isolator.prompt"])

    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(two, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())

    # From behind a fast step, and from before the first, where the optimizer has no state of the isolator yet.
    for last, later in ((9, [12]), (3, [6, 9, 12])):
        for step in later:
            (two / f"checkpoint-{step}").rename(tmp_path / f"{step}-beyond-{last}")
        resumed = run(two, "--batch", "1", *options, "--resume", config=FSDP2)
        assert [len(report["moved"]) for report in resumed] == [12 - last] * 2
        assert resumed[0]["history"] == ranks[0]["history"]
        again = load_file(two / "rank0.safetensors")
        assert all(torch.equal(weight, trained[name]) for name, weight in again.items())
        assert_same_training(one, two, alone, resumed)


@pytest.mark.slow
@pytest.mark.distributed
def test_fsdp2_saves_a_whole_model_beside_checkpoints_in_shards(tmp_path):
    from transformers import AutoModelForImageTextToText

    options = ("--batch", "1", "--images", "--shards", "--max-steps", "2", "--save-steps")
    ranks = run(tmp_path, *options, "1", config=FSDP2)
    trained = load_file(tmp_path / "rank0.safetensors")
    assert not list(tmp_path.glob("checkpoint-*/*.safetensors"))
    saved = load_file(tmp_path / "mode_isolator.safetensors")
    assert torch.equal(saved["prompt"], trained["dualspeed.isolator.prompt"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())
    (tmp_path / "checkpoint-2").rename(tmp_path / "later")
    resumed = run(tmp_path, *options, "1", "--resume", config=FSDP2)
    assert [len(report["moved"]) for report in resumed] == [1, 1]
    assert resumed[0]["history"] == ranks[0]["history"]
    again = load_file(tmp_path / "rank0.safetensors")
    assert all(torch.equal(weight, trained[name]) for name, weight in again.items())


@pytest.mark.distributed
def test_fsdp2_refuses_batches_with_and_without_images(tmp_path):
    """The rank with an image would wait for the other's shards for ever."""
    done = launched(tmp_path, "--batch", "1", config=FSDP2)
    assert done.returncode
    assert "ranks differ in the kinds of media of their batches: ranks [" in done.stderr
    assert "use DDP or ZeRO-2" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_one_of_two_processes_pushes_at_each_save(tmp_path, hub):  # noqa: F811
    ranks = run(tmp_path / "run", "--batch", "1", "--push", f"{USER}/thing", config=DDP)
    assert [rank["steps"] for rank in ranks] == [ranks[0]["steps"]] * 2
    pushes = [title for title in hub.titles(f"{USER}/thing") if title != "initial commit"]
    assert pushes[::-1] == ["Training in progress, step 3", "Training in progress, step 6", "Model save"]
    files = hub.files(f"{USER}/thing")
    assert files.keys() >= {"model.safetensors", "mode_isolator.safetensors", "results.json", "README.md"}
    assert files["mode_isolator.safetensors"] == (tmp_path / "run/mode_isolator.safetensors").read_bytes()
    tokens = ranks[0]["record"]["visual_tokens"]
    assert f"kept {tokens['kept']:,} of {tokens['full']:,}" in files["README.md"].decode()
