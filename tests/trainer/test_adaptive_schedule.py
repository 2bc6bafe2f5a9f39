"""Slow steps that follow the losses: the rule, its bounds, resumption, logs, and ratios that change by plan."""

import math

import pytest
import torch
from training import ADAPTIVE, history, make
from transformers.trainer_callback import TrainerCallback, TrainerState

from hf_dualspeed import DualSpeedTrainingArguments, ModeSchedule
from hf_dualspeed.pruners import AutoPruner, PrunerConfig
from hf_dualspeed.publishing.plots import plot_learning_curve
from hf_dualspeed.trainer.adaptive_schedule import MOST, AdaptiveSchedule
from hf_dualspeed.trainer.callbacks import ModeLosses


class Following:
    """An adaptive schedule that is told the losses of slow steps."""

    def __init__(self, **options):
        self.losses, self.step = ModeLosses(), 0
        options = {"start": 0.1, "bounds": (0.02, 0.4), **options}
        self.schedule = AdaptiveSchedule(self.losses, lambda shares: shares, **options)

    def slow_step(self, full, pruned):
        self.schedule.on_step_begin(None, None, None)
        for _ in range(2):  # micro-batches, each a half of the step's loss
            self.losses.add("slow_loss", torch.tensor(full / 2))
            self.losses.add("pruned_loss", torch.tensor(pruned / 2))
        self.step += 1
        self.schedule.on_step_end(None, TrainerState(global_step=self.step), None)
        return self.schedule.ratio


def test_the_ratio_grows_while_full_tokens_lag_and_shrinks_while_they_lead():
    lagging, leading = Following(), Following()
    assert lagging.slow_step(1.2, 1.0) == 0.1  # read one slow step later
    assert lagging.slow_step(1.2, 1.0) == pytest.approx(0.1 * math.exp(MOST))
    for _ in range(20):
        lagging.slow_step(1.2, 1.0)
        leading.slow_step(0.9, 1.0)
    assert (lagging.schedule.ratio, leading.schedule.ratio) == (0.4, 0.02)


def test_a_gap_that_grows_counts_before_it_is_one():
    rising, falling = Following(), Following()
    for gap in (-0.1, 0.1, 0.0):  # the last is not read yet; the two before it have a mean of 0
        rising.slow_step(1 + gap, 1.0)
        falling.slow_step(1 - gap, 1.0)
    assert rising.schedule.ratios[-1] > rising.schedule.ratios[-2]
    assert falling.schedule.ratios[-1] < falling.schedule.ratios[-2]


def test_only_what_the_step_added_is_measured():
    following = Following()
    following.losses.add("slow_loss", torch.tensor(70.0))
    following.losses.add("pruned_loss", torch.tensor(3.0))
    for _ in range(2):
        following.slow_step(1.0, 1.0)
    assert following.schedule.gap == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("losses", [(0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)])
def test_a_step_that_measures_nothing_changes_nothing(losses):
    following = Following()
    following.slow_step(*losses)
    following.losses.sums = {}  # as a log leaves them
    following.slow_step(1.2, 1.0)
    assert (following.schedule.ratio, following.schedule.gap) == (0.1, None)
    following.slow_step(1.2, 1.0)
    assert following.schedule.ratio == pytest.approx(0.1 * math.exp(MOST))


def test_the_pruning_ratio_moves_within_its_bounds():
    pruner = AutoPruner.from_name("divprune", pruning_ratio=0.9)
    following = Following(pruner=pruner, min_pruning_ratio=0.6)
    for _ in range(20):
        following.slow_step(1.3, 1.0)
    assert pruner.config.pruning_ratio == pytest.approx(0.6)
    assert following.schedule.state()["attributes"]["pruning_ratio"] == pytest.approx(0.6)
    following.schedule.on_train_end(None, None, None)
    assert pruner.config.pruning_ratio == 0.9


def test_steps_of_the_past_keep_their_modes():
    following, plan = Following(), ModeSchedule(0.1, "adaptive", seed=3)
    before = [following.schedule.mode_at(plan, step) for step in range(5)]
    following.step = 5
    for _ in range(10):
        following.slow_step(1.3, 1.0)
    assert [following.schedule.mode_at(plan, step) for step in range(5)] == before
    share = sum(following.schedule.mode_at(plan, step) == "slow" for step in range(1000, 3000)) / 2000
    assert share == pytest.approx(0.4, abs=0.04)


def test_training_logs_and_follows(tmp_path):
    trainer = make(tmp_path, max_steps=12, slow_warmup_steps=2, **ADAPTIVE)
    trainer.train()
    schedule = trainer.adaptive_schedule
    ratios, gaps, pruned = zip(*history(trainer, "slow_mode_ratio", "mode_gap", "pruned_loss"), strict=True)
    assert ratios[0] == 0.5
    assert ratios[-1] != 0.5
    assert gaps[-1] is not None
    modes = [trainer.mode_at(step) for step in range(12)]
    assert modes[:2] == ["slow", "slow"]
    assert [loss is not None for loss in pruned] == [mode == "slow" for mode in modes]
    assert trainer.summary()["steps"] == {mode: modes.count(mode) for mode in ("fast", "slow")}
    assert len(schedule.ratios) == modes.count("slow")
    path = plot_learning_curve(trainer.state.log_history, tmp_path / "curve.png", "run")
    with_panel = path.stat().st_size
    for entry in trainer.state.log_history:
        entry.pop("slow_mode_ratio", None)
    assert plot_learning_curve(trainer.state.log_history, path, "run").stat().st_size < with_panel


def test_a_resumed_run_equals_the_unbroken_one(tmp_path):
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 5, "min_pruning_ratio": 0.2, **ADAPTIVE}
    unbroken = make(tmp_path / "a", **options)
    unbroken.train()
    resumed = make(tmp_path / "b", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    ours, theirs = resumed.adaptive_schedule, unbroken.adaptive_schedule
    assert (ours.steps, ours.ratios, ours.gap) == (theirs.steps, theirs.ratios, theirs.gap)
    assert [resumed.mode_at(step) for step in range(12)] == [unbroken.mode_at(step) for step in range(12)]
    keys = ("loss", "slow_mode_ratio", "pruning_ratio")
    assert history(resumed, *keys) == history(unbroken, *keys)


def test_an_interrupted_run_keeps_its_ratio_and_goes_on_within_other_bounds(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                raise KeyboardInterrupt

    options = {**ADAPTIVE, "min_pruning_ratio": 0.25, "pruning_ratio": 0.75, "slow_warmup_steps": 3}
    trainer = make(tmp_path, callbacks=[Stop()], save_strategy="steps", save_steps=3, **options)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert 0.25 < history(trainer, "pruning_ratio")[-1][0] < 0.75
    assert trainer.summary()["pruning_ratio"] == PrunerConfig.from_pretrained(tmp_path / "checkpoint-3").pruning_ratio
    assert trainer.summary()["pruning_ratio"] == 0.75
    assert trainer.record()["settings"]["min_pruning_ratio"] == 0.25
    # A run with other bounds keeps to them from its first step on.
    other = {"pruning_ratio": 0.5, "max_slow_mode_ratio": 0.5, "min_pruning_ratio": 0.4}
    trainer = make(tmp_path / "b", **{**options, **other})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert trainer.adaptive_schedule.ratios[-2] > 0.5
    assert history(trainer, "slow_mode_ratio", "pruning_ratio")[-1] == [0.5, 0.5]


def test_a_run_of_another_schedule_goes_on_adaptively(tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "pruning_ratio": 0.5, "slow_mode_ratio": 0.5}
    make(tmp_path, **saving).train()
    trainer = make(tmp_path, **{**saving, **ADAPTIVE, "max_steps": 6})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sum(trainer.clock.steps.values()) == 6
    state = TrainerState.load_from_json(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert state.stateful_callbacks["AdaptiveSchedule"]["attributes"]["ratios"] == trainer.adaptive_schedule.ratios


def test_a_second_training_starts_anew(tmp_path):
    trainer = make(tmp_path, max_steps=6, **ADAPTIVE)
    trainer.train()
    first = list(trainer.adaptive_schedule.ratios)
    trainer.train()
    assert trainer.adaptive_schedule.ratios[0] == first[0] == 0.5
    assert len(trainer.adaptive_schedule.ratios) <= len(first) + 2


@pytest.mark.parametrize(
    ("options", "like"),
    [
        ({"gradient_accumulation_steps": 2}, {"per_device_train_batch_size": 4}),
        ({"slow_mode_splits": 2}, {}),
        ({"plain_path": True}, {}),
    ],
)
def test_all_ways_to_run_a_slow_step_measure_it(tmp_path, options, like):
    given = {**ADAPTIVE, "max_steps": 4, "slow_warmup_steps": 4, "optim": "sgd"}
    ours, plain = (make(tmp_path, **given, **own) for own in (options, like))
    for trainer in (ours, plain):
        trainer.train()
    assert len(ours.adaptive_schedule.ratios) == 4
    assert ours.adaptive_schedule.ratios == pytest.approx(plain.adaptive_schedule.ratios, rel=1e-4)
    assert ours.adaptive_schedule.gap == pytest.approx(plain.adaptive_schedule.gap, rel=1e-2, abs=1e-4)


def test_what_cannot_be_followed_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="`mode_schedule` is 'adaptive', but train_sampling_strategy='group_by_length'"
    ):
        make(tmp_path, train_sampling_strategy="group_by_length", **ADAPTIVE)
    with pytest.raises(ValueError, match="`min_pruning_ratio` is 0.8, but the pruner has pruning_ratio=0.5"):
        make(tmp_path, min_pruning_ratio=0.8, **ADAPTIVE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slow_mode_ratio": 0.0}, "`slow_mode_ratio` is 0.0, but .* between min_slow_mode_ratio=0.02"),
        ({"slow_mode_ratio": 0.5}, "max_slow_mode_ratio=0.2"),
        ({"distillation_weight": 0.0}, "`distillation_weight` is 0, but mode_schedule='adaptive'"),
        ({"min_slow_mode_ratio": 0.0}, "`min_slow_mode_ratio` must be in"),
        ({"min_pruning_ratio": 1.0}, "`min_pruning_ratio` must be in"),
    ],
)
def test_wrong_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        DualSpeedTrainingArguments(output_dir=str(tmp_path), **{"mode_schedule": "adaptive", **options})


def test_a_least_pruning_ratio_that_nothing_follows_is_named(tmp_path, caplog):
    DualSpeedTrainingArguments(output_dir=str(tmp_path), min_pruning_ratio=0.5)
    assert "`min_pruning_ratio` is 0.5, but `mode_schedule` is 'random'" in caplog.text
    caplog.clear()
    DualSpeedTrainingArguments(output_dir=str(tmp_path), min_pruning_ratio=0.5, mode_schedule="adaptive")
    assert not caplog.text


@pytest.mark.parametrize("kind", ["growing", "shrinking"])
def test_changing_ratios_have_the_mean_that_was_asked_for(kind):
    schedule = ModeSchedule(0.2, kind, total_steps=4000)
    modes = [schedule.mode_at(step) for step in range(4000)]
    first, second = modes[:2000].count("slow") / 2000, modes[2000:].count("slow") / 2000
    if kind == "shrinking":
        first, second = second, first
    assert (first, second) == (pytest.approx(0.1, abs=0.03), pytest.approx(0.3, abs=0.03))
    with pytest.raises(ValueError, match="needs `total_steps`"):
        ModeSchedule(0.2, kind)


def test_changing_ratios_count_the_steps_of_the_epochs(tmp_path):
    trainer = make(tmp_path, max_steps=-1, num_train_epochs=2, mode_schedule="growing", slow_mode_ratio=0.5)
    schedule = ModeSchedule(0.5, "growing", trainer.args.seed, total_steps=8)
    modes = [schedule.mode_at(step) for step in range(8)]
    assert [trainer.mode_at(step) for step in range(8)] == modes
    trainer.train()
    assert trainer.summary()["steps"]["slow"] == modes.count("slow")
