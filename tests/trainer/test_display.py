"""What a run shows: the panel ahead of the first step, lines of the log, the end; and who gets to see it."""

import json
import re
from pathlib import Path

import pytest
import torch
from training import DATA, make
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from hf_dualspeed.publishing import display
from hf_dualspeed.publishing.display import RunDisplay, log_line
from hf_dualspeed.trainer.callbacks import RECENT, DataWait, ModeClock
from hf_dualspeed.trainer.schedule import FAST, SLOW, ModeSchedule, StepsLeft

SHOWN = {"disable_tqdm": False, "slow_mode_ratio": 0.5, "mode_schedule": "periodic"}


@pytest.fixture
def people(monkeypatch):
    """Stdout is read by a person, at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(display, "to_people", lambda: True)


def said(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_files_get_lines_of_json(tmp_path, capsys):
    trainer = make(tmp_path, **SHOWN)
    trainer.train()
    first, *logs, last = said(capsys)
    facts = first["start"]
    assert facts["visual_tokens"]["image"]["full"] == 16
    assert facts["visual_tokens"]["image"]["kept"] == 1
    assert facts["steps"] == {"fast": 2, "slow": 2}
    whole = sum(p.numel() for p in trainer.model.parameters())
    assert facts["parameters"] == {"trained": whole, "frozen": 0}
    assert sum(counts["trained"] for counts in facts["roles"].values()) == whole
    assert facts["weights_bytes"] == 4 * whole
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 4]
    for line, entry in zip(logs[:4], trainer.state.log_history[:4], strict=True):
        assert line == entry
    assert last["end"]["steps"] == {"fast": 2, "slow": 2}
    assert "too few for speedup_rounds=3" in last["end"]["why"]


def test_what_is_said_at_the_end_loses_no_training(tmp_path, capsys, caplog, monkeypatch):
    (tmp_path / "latest").symlink_to(tmp_path / "gone")
    trainer = make(tmp_path, **SHOWN, max_steps=1)
    trainer.train()
    assert said(capsys)[-1]["end"]["steps"] == {"fast": 1, "slow": 0}
    monkeypatch.setattr(trainer, "record", lambda: 1 / 0)
    assert trainer.train().global_step == 1
    assert "cannot be shown: division by zero" in caplog.text


def test_people_get_words_and_no_word_is_cut(tmp_path, capsys, people):
    make(tmp_path, **SHOWN, eval_strategy="epoch").train()
    out = capsys.readouterr().out
    assert "{" not in out
    assert max(map(len, out.splitlines())) <= 80
    words = out.replace("│", " ").split()
    for word in (
        "LlavaForConditionalGeneration,",
        "parameters",
        "speedup_rounds=3,",
        "divprune",
        "isolator",
        "measured",
    ):
        assert word in words
    assert "visual tokens  16 → 1 per image or tile, by divprune + 4 of the isolator" in out
    assert "4 steps of 2 samples: 2 fast, 2 slow" in out
    assert "nothing" in out.split("frozen")[1].splitlines()[0]
    assert "step 1/4" in out
    assert "eval loss" in out
    assert out.index("DualSpeed") < out.index("step 1/4") < out.index("Trained")


def test_the_panel_comes_before_any_weight_moves(tmp_path, monkeypatch):
    order, weights = [], {}

    class Steps(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            order.append("step")

    def noted(value):
        order.append(next(iter(value)))
        weights.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

    monkeypatch.setattr(display, "print_json", noted)
    trainer = make(tmp_path, **SHOWN, max_steps=1, callbacks=[Steps()])
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(trainer.display, "on_log", lambda *given, **kwargs: None)
    monkeypatch.setattr(trainer.display, "shows_end", False)
    trainer.train()
    assert order == ["start", "step"]
    assert all(torch.equal(before[name], weights[name]) for name in before)


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_tokens_are_known_whatever_the_first_mode(tmp_path, capsys, slow):
    make(tmp_path, disable_tqdm=False, slow_mode_ratio=slow, max_steps=1, pruning_ratio=0.75).train()
    found = said(capsys)[0]["start"]["visual_tokens"]["image"]
    assert (found["full"], found["kept"], found["least"], found["most"]) == (16, 4, 16, 16)


@pytest.mark.parametrize(("ratio", "isolator"), [(0.0, 0), (0.5, 4), (1.0, 0)])
def test_the_speed_up_is_bound_by_tokens(tmp_path, capsys, ratio, isolator):
    """Of a batch whose longest row, with two images, is the one that pruning shortens."""
    options = {"slow_mode_ratio": ratio, "isolator_length": isolator, "mode_schedule": "periodic"}
    trainer = make(tmp_path, disable_tqdm=False, pruning_ratio=0.75, data=[DATA[1], DATA[2]], **options)
    sizes = []
    trainer.model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    trainer.train()
    facts = said(capsys)[0]["start"]
    full = next(iter(trainer.get_train_dataloader()))["input_ids"].numel()
    slow = facts["steps"]["slow"] / sum(facts["steps"].values())
    assert facts["speedup_limit"] == pytest.approx(full / ((1 - slow) * sizes[0] + slow * full))
    assert ("speed-up", f"at most {facts['speedup_limit']:.1f} x in the language model, by its tokens") in (
        display.panel_rows(facts)
    )


def test_the_bound_is_not_known_before_a_fast_step(tmp_path, capsys):
    make(tmp_path, disable_tqdm=False, slow_mode_ratio=0.0, slow_warmup_steps=1, max_steps=2).train()
    facts = said(capsys)[0]["start"]
    assert facts["speedup_limit"] is None
    assert "speed-up" not in dict(display.panel_rows(facts))


def test_the_page_shows_the_rows_of_the_panel():
    """Of the quickstart."""
    roles = {"vision_tower": 119_808, "projector": 24_832, "language_model": 660_608, "fast_view": 512}
    facts = {
        "model": "LlavaForConditionalGeneration",
        "parameters": {"trained": sum(roles.values()), "frozen": 0},
        "roles": {role: {"trained": count, "frozen": 0} for role, count in roles.items()},
        **{"weights_bytes": 3_223_040, "adapters": [], "pruner": "divprune", "pruned_in_language_model": False},
        **{"isolator_length": 4, "step": 0, "max_steps": 30, "steps": {"fast": 26, "slow": 4}, "samples": 16},
        **{"processes": 1, "batch": None, "speedup_limit": 3.649},
        "visual_tokens": {"image": {"count": 16, "full": 256.0, "kept": 25.0, "least": 256, "most": 256}},
    }
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    shown = page.partition("╭─ DualSpeed")[2].partition("╰")[0].replace("│", " ").splitlines()[1:]
    rows = [f"{name} {words}" for name, words in display.panel_rows(facts)]
    assert " ".join(" ".join(shown).split()) == " ".join(rows)


def test_images_of_several_sizes_are_told_by_their_means(tmp_path, capsys):
    data = [DATA[1], DATA[3]]
    make(tmp_path, "qwen2_5_vl", disable_tqdm=False, slow_mode_ratio=0.0, max_steps=1, data=data).train()
    facts = said(capsys)[0]["start"]
    found = facts["visual_tokens"]["image"]
    assert found["least"] < found["full"] < found["most"]
    assert found["count"] == 3
    [words] = display.token_words(facts)
    assert f"means of 3, from {found['least']} to {found['most']}" in words


def test_adapters_are_told_apart_from_frozen_weights(tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from tiny_models import FAMILIES

    model = get_peft_model(FAMILIES["llava"].build()[0], LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = make(tmp_path, disable_tqdm=False, max_steps=1, model=model)
    trainer.train()
    facts = said(capsys)[0]["start"]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert facts["parameters"]["trained"] == trained
    assert facts["parameters"]["frozen"] > trained
    assert facts["adapters"] == ["default (LORA)"]


def test_silence(tmp_path, capsys, monkeypatch):
    for options in ({"disable_tqdm": True}, {"disable_tqdm": False, "log_level": "error"}):
        trainer = make(tmp_path, **options)
        trainer.train()
        trainer.evaluate()
    trainer = make(tmp_path, disable_tqdm=False)
    monkeypatch.setattr(type(trainer.args), "process_index", 1)
    assert display.is_silent(trainer.args)
    trainer.train()
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_ones_own_stays(tmp_path, capsys):
    class Own(ProgressCallback):
        pass

    ours = make(tmp_path, disable_tqdm=False, callbacks=[TrainerCallback()])
    kinds = [type(callback) for callback in ours.callback_handler.callbacks]
    assert RunDisplay in kinds
    assert ProgressCallback not in kinds
    assert PrinterCallback not in kinds
    ours.remove_callback(ProgressCallback)  # as one silences a Trainer
    ours.train()
    assert not [line for line in capsys.readouterr().out.splitlines() if "loss" in line]

    for own in (Own(), Own, PrinterCallback):
        trainer = make(tmp_path, disable_tqdm=False, callbacks=[own])
        kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (Own if own is not PrinterCallback else PrinterCallback) in kinds
        assert not trainer.display.lines  # only the panel is ours


def test_an_error_ends_the_bars(tmp_path, monkeypatch):
    class Ends(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("ends here")

    trainer = make(tmp_path, **SHOWN, callbacks=[Ends()])
    with pytest.raises(RuntimeError, match="ends here"):
        trainer.train()
    assert trainer.display._training is None
    assert trainer.display._evaluating is None
    trainer.data_collator = None
    monkeypatch.setattr(trainer, "prediction_step", lambda *given, **kwargs: 1 / 0)
    trainer.display.on_prediction_step(trainer.args, trainer.state, trainer.control)
    with pytest.raises((ZeroDivisionError, TypeError)):
        trainer.evaluate()
    assert trainer.display._evaluating is None


# --- estimates --------------------------------------------------------------------------------------------------------


def clock_of(fast: list[float], slow: list[float]) -> ModeClock:
    clock = ModeClock()
    clock.data = DataWait()
    for mode, times in ((FAST, fast), (SLOW, slow)):
        for taken in times:
            clock.data._note(mode, taken)
    return clock


def test_the_time_left_knows_both_modes():
    # The first step of each mode, which takes longer, does not count once there is another one.
    clock = clock_of([9.0, 1.0, 3.0], [50.0, 8.0])
    # Three fast steps and two slow ones: 22 s, in place of five slow ones.
    clock.steps = {FAST: 3, SLOW: 2}
    found = clock.pace({FAST: 10, SLOW: 2})
    assert found.pop("speedup_over_slow_steps") == round(5 * 8 / 22, 2)
    assert found == {"fast_step_seconds": 2.0, "slow_step_seconds": 8.0, "seconds_left": 36.0}
    # Nothing is said of a mode that has not been timed, but that it takes no less than the others.
    assert clock_of([1.0, 1.0], []).pace({FAST: 10, SLOW: 2}) == {"fast_step_seconds": 1.0, "least_seconds_left": 12.0}
    assert clock_of([1.0, 1.0], []).pace({FAST: 10, SLOW: 0})["seconds_left"] == 10.0
    assert clock_of([], []).pace({FAST: 10, SLOW: 0}) == {}
    assert len(clock_of([1.0] * 500, []).data.recent[FAST]) == RECENT
    clock.visual_tokens = {"full": 200, "kept": 50}
    assert clock.pace({FAST: 0, SLOW: 0})["visual_tokens_saved"] == 0.75


@pytest.mark.parametrize("last", [50, 6000])
def test_steps_to_come_are_those_of_the_schedule(last, monkeypatch):
    monkeypatch.setattr("hf_dualspeed.trainer.schedule.PLANNED", 2000)
    schedule = ModeSchedule(0.1, "random", seed=3, warmup_steps=5, tail_ratio=0.2, total_steps=last)
    left = StepsLeft()
    for step in (0, 7, 7, last // 2, last - 1, last):
        found = left(schedule, step, last)
        slow = sum(schedule.mode_at(s) == SLOW for s in range(step, last))
        assert found[FAST] + found[SLOW] == last - step
        # Of very many, an even sample stands for all.
        assert found[SLOW] == pytest.approx(slow, abs=0 if last == 50 else 0.02 * last)


def test_a_run_that_goes_on_counts_from_where_it_is(tmp_path, capsys, monkeypatch):
    make(tmp_path, **{**SHOWN, "disable_tqdm": True}, save_strategy="steps", save_steps=2).train()
    again, counts, advance = make(tmp_path, **SHOWN, max_steps=8), [], display.Work.advance
    monkeypatch.setattr(display.Work, "advance", lambda bar, *given: (advance(bar, *given), counts.append(bar.done)))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    first, *logs, _ = said(capsys)
    assert (first["start"]["step"], first["start"]["steps"]) == (2, {"fast": 3, "slow": 3})
    assert counts == [3, 4, 5, 6, 7, 8] == [log["step"] for log in logs[:6]]
    assert again.steps_left() == {FAST: 0, SLOW: 0}


def test_an_adaptive_schedule_is_supposed_to_keep_its_ratio(tmp_path):
    trainer = make(tmp_path, mode_schedule="adaptive", slow_mode_ratio=0.25, max_slow_mode_ratio=0.9, max_steps=8)
    trainer.state.max_steps = 8
    assert trainer.steps_left() == {FAST: 6, SLOW: 2}


def test_a_line_is_broken_between_its_parts():
    logs = {"loss": 1.23456, "fast_loss": 1.2, "learning_rate": 1e-3, "a metric of mine": 0.5, "seconds_left": 75.0}
    logs |= {"fast_step_seconds": 0.2, "slow_step_seconds": 0.8, "visual_tokens_saved": 0.9, "data_wait": 0.2}
    logs |= {"speedup_over_slow_steps": 2.5, "eval_runtime": 3.0, "eval_steps_per_second": 3.0}
    line = log_line(logs, 25, 400, 60)
    assert max(map(len, line.splitlines())) <= 60
    assert line.replace("\n ", "").split(" · ") == [
        "step 25/400",
        "0:01:15 left",
        "loss 1.235",
        "fast 1.2",
        "rate 0.001",
        "a metric of mine 0.5",
        "fast step 0.2 s, 0.25 of a slow one's",
        "so far 2.50 x the speed of slow steps",
        "visual tokens saved 90%",
        "20% waiting for data",
    ]
    assert "or more left" in log_line({"least_seconds_left": 9.0}, 1, 4, 80)


def test_one_is_no_plural(tmp_path, capsys, people):
    make(tmp_path, **SHOWN, max_steps=2, per_device_train_batch_size=1).train()
    out = capsys.readouterr().out
    assert "2 steps of 1 sample: 1 fast, 1 slow" in out
    assert re.search(r"1 fast step in [\d.]+ s, 1 slow step in", out)
