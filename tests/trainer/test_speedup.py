"""The measured speed-up: what it compares, what it leaves as it was, and when it is left out."""

from __future__ import annotations

import json
import logging
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import DDP, run
from training import ADAPTIVE, history, make

from hf_dualspeed import DualSpeedTrainer, DualSpeedTrainingArguments
from hf_dualspeed.trainer import speedup
from hf_dualspeed.trainer.callbacks import ModeClock
from hf_dualspeed.trainer.run_record import RunRecordMixin
from hf_dualspeed.trainer.speedup import STEPS_PER_ROUND, SpeedupMeter, rotated, summary

ENOUGH = {"speedup_rounds": 1, "max_steps": 10, "slow_mode_ratio": 0.3, "logging_steps": 5}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(speedup, "STEPS_PER_ROUND", 10)


def drawn() -> tuple:
    """The next numbers of all random states."""
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_the_help_says_what_it_costs():
    words = DualSpeedTrainingArguments.__dataclass_fields__["speedup_rounds"].metadata["help"]
    assert "four forward and backward passes" in words
    assert f"fewer than {STEPS_PER_ROUND} optimizer steps per round" in words


def test_measuring_takes_a_small_part_of_the_time():
    """With the quickstart's seconds of each pass, and one more round for warming up."""
    plain, fast, slow = 1.3, 0.4, 1.5
    for rounds in (1, 3, 10):
        measuring = (rounds + 1) * (plain + fast + slow) + rounds * plain
        assert measuring < 0.2 * rounds * STEPS_PER_ROUND * (0.9 * fast + 0.1 * slow)


def test_by_hand():
    seconds = {"plain": 3.0, "fast": 1.0, "slow": 2.0}
    found = summary(seconds, {"fast": 3, "slow": 1}, 5, 16)
    assert found["slow_share"] == 0.25
    assert found["speedup"] == pytest.approx(3.0 / (0.75 * 1.0 + 0.25 * 2.0))
    assert (found["plain_seconds"], found["rounds"], found["samples"]) == (3.0, 5, 16)
    assert summary({"plain": 3.0, "fast": 1.5}, {"fast": 4, "slow": 0}, 1, 1)["speedup"] == 2.0


def test_each_round_begins_with_another_pass():
    assert {rotated(["a", "b", "c"], number)[0] for number in range(3)} == {"a", "b", "c"}
    assert sorted(rotated(["a", "b", "c"], -1)) == ["a", "b", "c"]


@pytest.mark.parametrize("options", [{}, {"pruner": "random", "gradient_accumulation_steps": 2}], ids=str)
def test_training_is_the_same_to_the_bit(tmp_path, options):
    """Weights, logs, later random numbers, buffers, and what a second training does."""
    ends = []
    for rounds in (0, 1):
        trainer = make(tmp_path / str(rounds), **{**ENOUGH, **options, "speedup_rounds": rounds})
        trainer.train()
        assert (trainer.record().get("speedup") is not None) == bool(rounds)
        timed = ("second", "runtime", "data_wait", "speedup")
        logs = [{k: v for k, v in e.items() if not any(word in k for word in timed)} for e in trainer.state.log_history]
        counts = (trainer.clock.steps, trainer.clock.visual_tokens, drawn())
        first = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        modes = {name: module.training for name, module in trainer.model.named_modules()}
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        trainer.train()
        ends.append((logs, counts, first, modes, gradients, trainer.model.state_dict()))
    (*plain, first, modes, gradients, again), (*measured, first_, modes_, gradients_, again_) = ends
    assert plain == measured
    assert modes == modes_
    assert gradients == gradients_ == []
    for one, other in ((first, first_), (again, again_)):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_record(tmp_path):
    trainer = make(tmp_path, **ENOUGH)
    trainer.train()
    trainer.save_model()
    found = json.loads((tmp_path / "results.json").read_text())["speedup"]
    steps = trainer.clock.steps
    share = steps["slow"] / sum(steps.values())
    assert 0 < share < 1
    assert found["slow_share"] == pytest.approx(share, abs=1e-6)
    expected = found["plain_seconds"] / ((1 - share) * found["fast_seconds"] + share * found["slow_seconds"])
    assert found["speedup"] == pytest.approx(expected, rel=1e-2)
    assert (found["rounds"], found["samples"]) == (1, 2)


def test_passes_are_those_of_training_and_of_the_plain_trainer(tmp_path, monkeypatch):
    """Each pass sees a micro-batch of the training, whole or shortened, as its kind demands, and leaves gradients."""
    trainer = make(tmp_path, **ENOUGH, pruning_ratio=0.5, isolator_length=0)
    seen, timed = [], speedup.timed
    width = []
    trainer.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: width.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def watched(trainer, model, run):
        width.clear()
        run()
        grads = sum(p.grad is not None for p in model.parameters())
        seen.append((run.func.__name__, *run.args[3:4], list(width), grads > 0))
        return timed(trainer, model, run)

    monkeypatch.setattr(speedup, "timed", watched)
    trainer.train()
    kinds = {entry[:-2] for entry in map(tuple, seen)}
    assert kinds == {("plain_pass",), ("pass_in_mode", "fast"), ("pass_in_mode", "slow")}
    assert len(seen) == 3 + 1 + 3  # a round for warming up, and one behind an untimed plain pass
    assert seen[3][0] == "plain_pass"
    assert all(entry[-1] for entry in seen)
    for start in (0, 4):  # of one round, on one micro-batch
        widths = {entry[:-2]: entry[-2] for entry in map(tuple, seen[start : start + 3])}
        (plain,), (fast,) = widths["plain_pass",], widths["pass_in_mode", "fast"]
        assert fast < plain
        assert widths["pass_in_mode", "slow"] == [fast, plain]  # the teacher, the student


def test_each_micro_batch_runs_plainly_before_it_is_timed(tmp_path, monkeypatch):
    """And each round times another kind of pass first."""
    order = []

    def noted(trainer, model, run):
        ids = run.args[2]["input_ids"]
        order.append(("plain" if run.func is speedup.plain_pass else run.args[3], ids.data_ptr()))
        return 0.5

    monkeypatch.setattr(speedup, "timed", noted)
    trainer = make(tmp_path, **{**ENOUGH, "speedup_rounds": 3, "max_steps": 30})
    trainer.train()
    rounds = [order[start : start + 4] for start in range(3, len(order), 4)]
    assert len(rounds) == 3
    assert len({ids for (_, ids), *_ in rounds}) == 3
    for warm, *rest in rounds:
        assert warm[0] == "plain"
        assert {kind for kind, _ in rest} == {"plain", "fast", "slow"}
        assert {ids for _, ids in rest} == {warm[1]}
    assert {rest[0][0] for _, *rest in rounds} == {"plain", "fast", "slow"}


@pytest.mark.parametrize(("accumulation", "places"), [(1, [2, 6, 10]), (2, [2, 6, 10])])
def test_micro_batches_come_from_all_over_the_training(tmp_path, monkeypatch, accumulation, places):
    trainer = make(
        tmp_path,
        max_steps=12,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=1,
        speedup_rounds=2,
    )
    aside, on_host = [], speedup.recursively_apply
    monkeypatch.setattr(speedup, "recursively_apply", lambda *given: aside.append(trainer._micro) or on_host(*given))
    trainer.train()
    assert aside == [(step, number % accumulation) for number, step in enumerate(places)]


def test_buffers_and_random_states_come_back(tmp_path):
    """Of a model that draws from each random state, and counts, in every pass."""
    trainer = make(tmp_path)
    trainer.model.register_buffer("passes", torch.zeros(()))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with speedup.untouched(trainer):
        trainer.model.passes += 1
        drawn()
    assert trainer.model.passes == 0
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_only_modes_that_were_run(tmp_path):
    trainer = make(tmp_path, **{**ENOUGH, "slow_mode_ratio": 0.0})
    trainer.train()
    found = trainer.record()["speedup"]
    assert "slow_seconds" not in found
    assert found["slow_share"] == 0.0


def test_fast_passes_prune_as_their_step_did(tmp_path, monkeypatch):
    """An adaptive schedule has moved the ratio, and given back the configured one at the end of training."""
    ratios = []

    def noted(trainer, model, run):
        ratios.append(trainer._pruner.config.pruning_ratio)
        return 0.5

    monkeypatch.setattr(speedup, "timed", noted)
    options = {**ADAPTIVE, "pruning_ratio": 0.75, "min_pruning_ratio": 0.25, "slow_warmup_steps": 20}
    trainer = make(tmp_path, **{**ENOUGH, **options, "speedup_rounds": 2, "max_steps": 20, "logging_steps": 1})
    trainer.train()
    moved = [ratio for (ratio,) in history(trainer, "pruning_ratio")]
    # Steps 3, 10 and 16 of 20, whose logs before them hold their ratios; the last one warms up.
    middle = [moved[step - 1] for step in (16, 3, 10)]
    assert len(set(middle)) > 1
    assert ratios == pytest.approx([middle[0]] * 2 + [middle[1]] * 3 + [middle[2]] * 3, abs=1e-6)
    assert trainer._pruner.config.pruning_ratio == 0.75


def test_trl_counts_its_tokens_as_without_it(tmp_path):
    pytest.importorskip("trl")
    import sft_training

    ends = []
    for rounds in (0, 1):
        trainer = sft_training.make(tmp_path, sft_training.messages(), **{**ENOUGH, "speedup_rounds": rounds})
        trainer.train()
        assert (trainer.record().get("speedup") is not None) == bool(rounds)
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        ends.append(
            (weights, trainer._token_counts, dict(trainer._metrics["train"]), sft_training.history(trainer, "loss"))
        )
    (first, *plain), (second, *measured) = ends
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert torch.equal(plain[0], measured[0])
    assert str(plain[1:]) == str(measured[1:])


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    from tiny_models import FAMILIES

    model, _ = FAMILIES["llava"].build()
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, lora_dropout=0.5)
    trainer = make(tmp_path, model=peft.get_peft_model(model, config), **ENOUGH)
    trainer.train()
    assert trainer.record()["speedup"]["speedup"] > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"speedup_rounds": 2}, "10 optimizer steps are too few for speedup_rounds=2, which takes 10 for each"),
        ({"speedup_rounds": 0}, None),
    ],
)
def test_left_out(tmp_path, caplog, options, reason):
    caplog.set_level(logging.INFO, logger="hf_dualspeed.trainer.speedup")
    trainer = make(tmp_path, **{**ENOUGH, **options})
    trainer.train()
    assert "speedup" not in trainer.record()
    assert ("not measured" in caplog.text) == (reason is not None)
    assert (reason or "") in caplog.text


def test_what_acts_in_backward_is_not_run_again(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="hf_dualspeed.trainer.speedup")
    trainer = make(tmp_path, **ENOUGH)
    trainer.model.lm_head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    trainer.train()
    assert "speedup" not in trainer.record()
    assert "act in backward" in caplog.text


def test_out_of_memory_costs_nothing_but_the_figure(tmp_path, monkeypatch, caplog):
    def too_large(*args):
        raise torch.OutOfMemoryError("Tried to allocate 80 GiB.\nOf what?")

    monkeypatch.setattr(speedup, "plain_pass", too_large)
    trainer = make(tmp_path, **ENOUGH)
    trainer.train()
    state = drawn()
    assert "speedup" not in trainer.record()
    assert "Speed-up not measured: OutOfMemoryError: Tried to allocate 80 GiB. Of what?" in caplog.text
    assert trainer.optimizer is not None
    monkeypatch.undo()
    other = make(tmp_path, **{**ENOUGH, "speedup_rounds": 0})
    other.train()
    assert drawn() == state


def test_batches_that_did_not_fit_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(speedup, "STEPS_PER_ROUND", 4)

    class Small(DualSpeedTrainer):
        def step_in_mode(self, mode, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 3 and self.state.global_step > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().step_in_mode(mode, model, inputs, *args, **kwargs)

    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 4, "speedup_rounds": 1}
    trainer = make(tmp_path, cls=Small, max_steps=4, slow_mode_ratio=0.0, **options)
    trainer.train()
    record = trainer.record()
    assert record["speedup"]["samples"] == 3
    sizes = {name: record["training"][name] for name in ("global_batch_size", "per_device_train_batch_size")}
    assert sizes == {"global_batch_size": 3, "per_device_train_batch_size": 3}


def test_samples_of_a_step_that_processes_share(tmp_path, monkeypatch):
    trainer = make(tmp_path, gradient_accumulation_steps=3, accelerator_config={"split_batches": True})
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    training = trainer.record()["training"]
    assert (training["global_batch_size"], training["per_device_train_batch_size"]) == (6, 1)


def test_an_interruption_ends_the_measurement_alone(tmp_path, monkeypatch, caplog):
    """Ctrl-C behind the last step, ahead of a script's `save_model()`."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speedup, "plain_pass", interrupted)
    trainer = make(tmp_path, **ENOUGH)
    assert trainer.train().global_step == ENOUGH["max_steps"]
    assert "speedup" not in trainer.record()
    assert "Speed-up not measured: KeyboardInterrupt" in caplog.text


def test_bad_options_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"`speedup_rounds` must be in \[0, inf\), got -1\. Use 0 not to measure"):
        DualSpeedTrainingArguments(str(tmp_path), speedup_rounds=-1, use_cpu=True)


def test_micro_batches_are_kept_as_they_were():
    inputs = {"input_ids": torch.arange(3), "labels": torch.arange(3)}
    meter = SpeedupMeter(1)
    meter.observe(inputs, 0, 1, 0, 1)
    inputs.pop("labels")  # as the Trainer's label smoothing does
    assert meter.batches[0][0].keys() == {"input_ids", "labels"}


# --- visual tokens, time and memory -------------------------------------------------------------------------------


def test_visual_tokens_are_counted_and_resumed(tmp_path):
    batches, options = [], {"pruning_ratio": 0.75, "slow_mode_ratio": 0.5, "mode_schedule": "periodic", "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3}
    trainer = make(tmp_path, **options)
    seen = trainer.step_in_mode

    def watched(mode, model, inputs, *more):
        if mode == "fast":
            batches.append((inputs["input_ids"] == model.config.image_token_id).sum().item())
        return seen(mode, model, inputs, *more)

    trainer.step_in_mode = watched
    trainer.train()
    assert len(batches) == 3
    full = sum(batches)
    assert trainer.clock.visual_tokens == {"full": full, "kept": full // 4}
    assert trainer.record()["visual_tokens"] == {"full": full, "kept": full // 4}
    again = make(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.clock.visual_tokens == trainer.clock.visual_tokens
    assert again.clock.total_seconds > sum(again.clock.seconds.values()) > 0
    assert again.record()["seconds"]["total"] >= trainer.clock.seconds["fast"] / 2


def test_tensor_parallel_ranks_count_their_batch_once():
    """Also behind the sum of an earlier part of the run, with which the first rank goes on."""
    given = []
    ranks = [
        SimpleNamespace(
            args=SimpleNamespace(device=torch.device("cpu"), process_index=rank),
            clock=ModeClock(),
            get_tp_size=lambda: 2,
            longest_data_wait=lambda: None,
            accelerator=SimpleNamespace(num_processes=2, gather=lambda held: held, reduce=None),
        )
        for rank in range(2)
    ]
    for rank, earlier in zip(ranks, (100, 0), strict=True):
        rank.clock.visual_tokens = {"full": earlier + 8, "kept": earlier // 10 + 2}
        rank.accelerator.reduce = lambda own, how: given.append(own.clone()) or own
        RunRecordMixin.add_up(rank)
    for rank in ranks:
        rank.accelerator.reduce = lambda own, how: sum(given)
        RunRecordMixin.add_up(rank)
        assert rank.clock.all_visual_tokens == {"full": 108, "kept": 12}


def test_memory_is_that_of_the_process(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    memory = trainer.record()["peak_memory"]
    assert memory["of"] == "process"
    assert 2**26 < memory["bytes"] < 2**40


def test_memory_on_a_device_is_that_of_the_training(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr("hf_dualspeed.trainer.run_record.reset_peak_memory", begun.append)
    trainer = make(tmp_path)
    assert not begun
    trainer.train()
    assert begun == [trainer.args.device]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_add_up_and_measure_together(tmp_path):
    """Tokens are those of one process, also after resuming; both ranks agree on the speed-up."""
    one, two = tmp_path / "one", tmp_path / "two"
    (alone,) = run(one, "--batch", "2", "--max-steps", "10")
    ranks = run(two, "--batch", "1", "--max-steps", "10", "--speedup-rounds", "1", config=DDP)
    records = [rank["record"] for rank in ranks]
    tokens = alone["record"]["visual_tokens"]
    assert tokens["full"] > tokens["kept"] > 0
    assert [record["visual_tokens"] for record in records] == [tokens, tokens]
    assert records[0]["speedup"] == records[1]["speedup"]
    assert records[0]["speedup"]["samples"] == 1
    assert records[0]["peak_memory"] == records[1]["peak_memory"]
    (two / "checkpoint-10").rename(two / "finished")
    resumed = run(two, "--batch", "1", "--max-steps", "10", "--resume", config=DDP)
    assert [rank["record"]["visual_tokens"] for rank in resumed] == [tokens, tokens]
    assert resumed[0]["record"]["speedup"] == records[0]["speedup"]
