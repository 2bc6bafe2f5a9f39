"""How long steps wait for their batches: in the log, the record and the card, on a clock that the tests set."""

import logging
from types import SimpleNamespace

import pytest
import torch
from training import history, make
from transformers import TrainerCallback

from hf_dualspeed.publishing.model_card import model_card
from hf_dualspeed.publishing.results import read_results
from hf_dualspeed.trainer import callbacks
from hf_dualspeed.trainer.callbacks import HINT_AFTER, DataWait, ModeClock
from hf_dualspeed.trainer.trainer import DualSpeedMixin


@pytest.fixture
def clock(monkeypatch):
    """The host's seconds, which only the tests move."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def steps(data, clock, count, wait, work, micro_batches=1):
    """Steps of so many micro-batches, each of which arrives after `wait` seconds and takes `work` more."""

    def loader():
        while True:
            clock.seconds += wait
            yield "batch"

    for _ in range(count):
        arriving = data.batches(loader())
        batches = [next(arriving) for _ in range(micro_batches)]
        clock.seconds += work * len(batches)
        data.end_step()
        clock.seconds += 100  # an evaluation, which is none of it


def test_waits_for_all_micro_batches_over_the_time_of_steps(clock):
    data = DataWait()
    assert data.shares() == (0, 0)
    steps(data, clock, 3, wait=1, work=3, micro_batches=2)
    assert data.shares() == pytest.approx((0.25, 0.25))
    data.logged()
    steps(data, clock, 3, wait=1, work=1, micro_batches=2)
    assert data.shares() == pytest.approx((0.5, 12 / 36))  # since the log, and of all steps
    assert data.sums == pytest.approx({"waited": 12, "seconds": 36})


def test_a_resumed_run_goes_on_with_the_sums(clock):
    clock_before = ModeClock("fast")
    clock_before.data = DataWait(waited=2.0, seconds=4.0)
    saved = clock_before.state()
    resumed = ModeClock()
    state = SimpleNamespace(
        stateful_callbacks={"ModeClock": saved}, global_step=1, is_world_process_zero=True, max_steps=2
    )
    resumed.on_train_begin(SimpleNamespace(device="cpu"), state, None)
    assert resumed.data.shares() == (0, 0.5)


@pytest.mark.parametrize(
    ("before", "wait", "hinted"), [(HINT_AFTER, 1, True), (HINT_AFTER, 0.05, False), (9, 1, False)]
)
def test_one_hint_names_the_remedies_in_their_order(clock, caplog, before, wait, hinted):
    data = DataWait()
    steps(data, clock, before, wait=wait, work=1)
    with caplog.at_level(logging.WARNING):
        data.hint(*data.shares(), 0)
        data.hint(*data.shares(), 0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == hinted
    if hinted:
        order = [said[0].index(name) for name in ("dataloader_num_workers", "jpeg_draft", "max_pixels")]
        assert "50%" in said[0]
        assert order == sorted(order)


def test_a_slow_start_alone_is_no_reason_for_a_hint(clock, caplog):
    data = DataWait()
    steps(data, clock, 1, wait=1000, work=1)
    data.logged()
    steps(data, clock, HINT_AFTER, wait=0, work=1)
    data.hint(*data.shares(), 2)
    assert not caplog.records


def test_events_of_the_device_are_read_when_they_are_past():
    class Event:
        past = False

        def query(self):
            return self.past

        def elapsed_time(self, end):
            return 250.0

    data, begun, ended = DataWait(), Event(), Event()
    data._spans = [("waited", begun, ended), ("seconds", begun, ended)]
    assert data.shares() == (0, 0)
    ended.past = True
    assert data.shares() == (1, 1)
    assert data.sums == {"waited": 0.25, "seconds": 0.25}


def test_a_mode_has_the_time_that_the_device_worked_for_it(monkeypatch):
    """The host is ahead of the device, and waits for a step's work only in the middle of the next one."""
    device = SimpleNamespace(seconds=0.0, done=False)

    class Event:
        def __init__(self):
            self.at = device.seconds

        def query(self):
            return device.done

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(DataWait, "_mark", lambda data: Event())
    clock = ModeClock()
    for mode, work in (("fast", 1), ("slow", 10), ("fast", 2)):
        next(clock.data.batches(iter("b")))
        clock.on_step_begin(None, None, None)
        clock.count(mode, 1, 0, 0)
        device.seconds += work
        clock.on_optimizer_step(None, None, None)
        device.seconds += 100  # an evaluation
        clock.on_step_end(None, None, None)
    assert clock.seconds == {"fast": 0, "slow": 0}
    device.done = True
    clock.pass_time()
    assert clock.seconds == pytest.approx({"fast": 3, "slow": 10})
    assert clock.state()["attributes"]["seconds"] == clock.seconds


def test_what_callbacks_do_behind_a_step_is_none_of_its_time(tmp_path, clock):
    class Slow(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            clock.seconds += 2

        def on_step_end(self, *args, **kwargs):
            clock.seconds += 100

    trainer = make(tmp_path, callbacks=[Slow()], slow_mode_ratio=0.0, max_steps=3)
    trainer.train()
    assert trainer.clock.seconds == pytest.approx({"fast": 6, "slow": 0})
    assert trainer.pace()["fast_step_seconds"] == 2
    assert trainer.clock.total_seconds >= 306


def test_of_several_processes_the_one_that_waits_longest_counts(clock):
    mine = DataWait(waited=1.0, seconds=10.0)
    other = torch.tensor([[0.5, 0.05]])
    trainer = SimpleNamespace(
        clock=SimpleNamespace(data=mine),
        accelerator=SimpleNamespace(num_processes=2, gather=lambda own: torch.cat([own, other])),
        args=SimpleNamespace(device="cpu"),
    )
    assert DualSpeedMixin.longest_data_wait(trainer) == pytest.approx((0.5, 0.1))
    assert trainer.clock.data_wait == pytest.approx(0.1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_logs_record_and_card_tell_the_share(tmp_path, accumulation):
    trainer = make(tmp_path, gradient_accumulation_steps=accumulation, max_steps=3)
    trainer.train()
    logged = [share for (share,) in history(trainer, "data_wait")]
    assert len(logged) == 3
    assert all(0 < share < 1 for share in logged)
    trainer.create_model_card()
    share = read_results(tmp_path)["data_wait"]
    assert min(logged) <= share <= max(logged)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert f"Steps waited {share:.1%} of their time for their batches." in text
    results = read_results(tmp_path)
    results["training"]["processes"] = 2
    assert "for their batches, in the process that waited longest." in model_card(results)
