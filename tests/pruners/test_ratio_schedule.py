"""A pruning ratio that changes over training, as the trainer runs it."""

from __future__ import annotations

import pytest
import torch
from training import make

from hf_dualspeed import AutoPruner, DualSpeedTrainingArguments, prune_inputs
from hf_dualspeed.pruners import budget
from hf_dualspeed.trainer.setup import resolve_pruner

RISING = {"pruning_schedule": "linear", "initial_pruning_ratio": 0.25}
STEPS = 5


def run(folder, **options):
    """Trains with fast steps only; what the pruner kept of each image of 16 tokens, step by step."""
    options = {"slow_mode_ratio": 0.0, "max_steps": STEPS, "pruning_ratio": 0.75, "pruner_kwargs": RISING, **options}
    resume = options.pop("resume", None)
    trainer = make(folder, **options)
    kept = []

    def note(module, args, out):
        kept.append((trainer.state.global_step, out.lengths[0]))

    trainer._pruner.register_forward_hook(note)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, dict(kept)


def test_the_ratio_follows_the_steps_and_survives_resuming(tmp_path):
    whole, kept = run(tmp_path / "whole", save_strategy="steps", save_steps=2)
    expected = {step: budget(16, 0.25 + 0.5 * step / (STEPS - 1)) for step in range(STEPS)}
    assert kept == expected
    assert sorted(set(kept.values())) == [4, 6, 8, 10, 12]
    resumed, later = run(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert later == {step: keep for step, keep in expected.items() if step >= 2}
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, dict(whole.model.named_parameters())[name]), name


def test_the_published_config_holds_the_schedule_and_prunes_by_its_end(tmp_path):
    trainer, _ = run(tmp_path)
    trainer.save_model()
    pruner = AutoPruner.from_pretrained(tmp_path)
    assert pruner.config.to_dict().items() >= {**RISING, "pruning_ratio": 0.75}.items()
    assert pruner.pruning_ratio == trainer._pruner.pruning_ratio == 0.75


def test_a_saved_pruner_takes_further_settings(tmp_path):
    AutoPruner.from_name("grid", pruning_ratio=0.5).save_pretrained(tmp_path / "pruner")
    trainer = make(
        tmp_path,
        pruner=str(tmp_path / "pruner"),
        pruner_kwargs='{"pruning_schedule": "cosine", "initial_pruning_ratio": 0.1}',
    )
    assert trainer._pruner.config.to_dict() == {
        "pruner_type": "grid",
        "pruning_ratio": 0.5,
        "pruning_schedule": "cosine",
        "initial_pruning_ratio": 0.1,
        "dropped_tokens": "merge",
    }
    with pytest.raises(ValueError, match="`pruner_kwargs` has an unknown key 'pruning_shedule'. Did you mean"):
        make(tmp_path, pruner_kwargs={"pruning_shedule": "linear"})
    with pytest.raises(ValueError, match="`pruner_kwargs` has an unknown key 'layers'"):
        make(tmp_path, pruner=str(tmp_path / "pruner"), pruner_kwargs={"layers": 2})
    with pytest.raises(ValueError, match="`pruner_kwargs` must be a JSON mapping"):
        DualSpeedTrainingArguments(output_dir=str(tmp_path), pruner_kwargs="linear")


@pytest.mark.parametrize("saved", [False, True])
def test_one_ratio_is_given(tmp_path, saved):
    pruner = "grid"
    if saved:
        pruner = str(tmp_path / "pruner")
        AutoPruner.from_name("grid", pruning_ratio=0.5).save_pretrained(pruner)
    given = {"pruner": pruner, "pruner_kwargs": {"pruning_ratio": 0.25}}
    with pytest.raises(ValueError, match="`pruning_ratio` is 0.75, but `pruner_kwargs` has 0.25 for it"):
        make(tmp_path, pruning_ratio=0.75, **given)
    assert make(tmp_path, **given)._pruner.pruning_ratio == 0.25  # the other is left alone
    assert make(tmp_path, pruning_ratio=0.25, **given)._pruner.pruning_ratio == 0.25


def test_a_revision_of_no_repo_is_refused(tmp_path):
    saved = AutoPruner.from_name("grid")
    saved.save_pretrained(tmp_path)
    for name, given, said in (
        ("grid", None, "'grid'"),
        (str(tmp_path), None, "'/.*'"),
        ("grid", saved, "a GridPruner"),
    ):
        args = DualSpeedTrainingArguments(str(tmp_path), use_cpu=True, pruner=name, pruner_revision="v1")
        with pytest.raises(
            ValueError, match=f"`pruner_revision` is 'v1', but `pruner` is {said}.*no.* from a Hub repo"
        ):
            resolve_pruner(given, args, None)


def test_evaluation_in_between_prunes_by_the_end_of_the_schedule(tmp_path):
    trainer, _ = run(tmp_path)
    kept = []
    trainer._pruner.register_forward_hook(lambda module, args, out: kept.append((args[0].lengths, out.lengths)))
    short = prune_inputs(trainer.model, next(iter(trainer.get_eval_dataloader())), trainer._pruner)
    assert short["input_ids"].shape[1]
    ((full, left),) = kept
    assert left == [budget(count, 0.75) for count in full]


def test_settings_that_do_not_fit_learned_weights_are_named(tmp_path):
    AutoPruner.from_name("dynamicvit", hidden_size=32, scorer_size=16).save_pretrained(tmp_path / "pruner")
    with pytest.raises(ValueError, match="do not fit the weights"):
        make(tmp_path, pruner=str(tmp_path / "pruner"), pruner_kwargs={"scorer_size": 32})


def test_a_second_stage_goes_on_with_the_learned_pruner_of_the_first(tmp_path):
    options = {"pruner": "dynamicvit", "pruner_kwargs": {"scorer_size": 16}, "slow_mode_ratio": 0.0}
    first = make(tmp_path / "one", **options)
    first.train()
    first.save_model()
    base = type(first.model).from_pretrained(tmp_path / "one")
    second = make(tmp_path / "two", model=base, **options)
    for name, weight in second._pruner.state_dict().items():
        assert torch.equal(weight, first._pruner.state_dict()[name])
    other = make(tmp_path / "three", model=type(first.model).from_pretrained(tmp_path / "one"))
    assert other._pruner.config.pruner_type == "divprune"


def test_draws_differ_between_micro_batches_ranks_and_seeds(tmp_path, monkeypatch):
    trainer = make(tmp_path, pruner="random")

    def draw(micro=(0, 0), rank=0):
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        trainer._micro = micro
        return float(torch.rand(1, generator=trainer._step_generator()))

    draws = [draw(), draw((0, 1)), draw((1, 0)), draw(rank=1)]
    assert len(set(draws)) == 4
    assert draw() == draws[0]


def test_tensor_parallel_ranks_draw_alike(tmp_path, monkeypatch):
    """They receive the same batch: with tokens of their own each, layers would add up parts of different sequences."""
    trainer = make(tmp_path, pruner="random")
    monkeypatch.setattr(trainer, "get_tp_size", lambda: 2)
    draws = []
    for rank in range(4):
        monkeypatch.setattr(type(trainer.args), "process_index", rank)
        draws.append(float(torch.rand(1, generator=trainer._step_generator())))
    assert draws[0] == draws[1] != draws[2] == draws[3]
