"""Which steps are slow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import hf_dualspeed
from hf_dualspeed import ModeSchedule

PACKAGE = Path(hf_dualspeed.__file__).parent


def test_random_schedule_depends_on_seed_and_step_alone():
    modes = [ModeSchedule(0.1, seed=5).mode_at(s) for s in range(5000)]
    backwards = ModeSchedule(0.1, seed=5)
    assert [backwards.mode_at(s) for s in reversed(range(5000))] == modes[::-1]
    share = modes.count("slow") / 5000
    assert abs(share - 0.1) < 3 * math.sqrt(0.09 / 5000)
    assert modes != [ModeSchedule(0.1, seed=6).mode_at(s) for s in range(5000)]
    # Pinned: a changed generator would change what a resumed run does.
    assert [s for s in range(60) if ModeSchedule(0.1, seed=0).mode_at(s) == "slow"] == [
        14,
        15,
        21,
        28,
        33,
        35,
        51,
        57,
    ]


def test_periodic_warmup_and_tail():
    slow = lambda schedule, n: [s for s in range(n) if schedule.mode_at(s) == "slow"]  # noqa: E731
    assert slow(ModeSchedule(0.1, "periodic"), 40) == [9, 19, 29, 39]
    assert slow(ModeSchedule(0.34, "periodic"), 9) == [2, 5, 8]
    assert slow(ModeSchedule(0.0, "periodic"), 100) == slow(ModeSchedule(0.0), 100) == []
    assert slow(ModeSchedule(1.0, "periodic"), 5) == slow(ModeSchedule(1.0), 5) == [0, 1, 2, 3, 4]
    assert slow(ModeSchedule(0.0, warmup_steps=2, tail_ratio=0.3, total_steps=10), 10) == [0, 1, 7, 8, 9]
    assert slow(ModeSchedule(0.25, "periodic", tail_ratio=0.2, total_steps=10), 10) == [3, 7, 8, 9]


def test_periodic_ratio_that_is_no_fraction_of_one_warns(caplog):
    ModeSchedule(0.1, "periodic")
    assert not caplog.text
    ModeSchedule(0.7, "periodic")
    assert "slow every 1 step(s), a ratio of 1.00" in caplog.text


def test_a_changing_ratio_that_would_go_above_one_warns(caplog):
    for ratio, kind in ((0.5, "growing"), (0.9, "random")):
        ModeSchedule(ratio, kind, total_steps=10)
    assert not caplog.text
    ModeSchedule(0.8, "shrinking", total_steps=10)
    assert "A shrinking schedule of ratio 0.8 goes to twice that, more than 1" in caplog.text


def test_bad_schedules_are_named():
    with pytest.raises(ValueError, match=r"`ratio` must be in \[0, 1\], got 1.5"):
        ModeSchedule(1.5)
    with pytest.raises(ValueError, match="`kind` must be one of 'random', 'periodic', 'growing', .*, got 'often'"):
        ModeSchedule(kind="often")
    with pytest.raises(ValueError, match="`tail_ratio` needs `total_steps`"):
        ModeSchedule(tail_ratio=0.1)
