"""Nothing in a fast step grows on the host: no Python per token, no value read off the device but for sizes."""

from __future__ import annotations

import sys
import warnings
from collections import Counter

import pytest
import torch
from operator_calls import calls_of_step
from packaging.version import Version
from pruner_cases import build, shortens, tokens
from tiny_models import FAMILIES, batch
from training import history, make

from hf_dualspeed import AutoPruner, available_pruners, prune_inputs
from hf_dualspeed.bench.counters import device_waits
from hf_dualspeed.bench.measure import Bench
from hf_dualspeed.bench.options import BenchArguments

IN_FRONT = [name for name in available_pruners() if shortens(name)]


def python_calls(run) -> Counter:
    """How often each Python function of the library is entered."""
    calls: Counter = Counter()

    def count(frame, event, _):
        if event == "call" and "hf_dualspeed" in frame.f_code.co_filename:
            calls[frame.f_code.co_qualname] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.parametrize("name", IN_FRONT)
def test_python_does_not_grow_with_the_tokens(name):
    # The same number of kept tokens of 8 x 8 and of 16 x 16.
    few, many = (build(name, pruning_ratio=ratio) for ratio in (0.75, 0.9375))
    small, large = tokens((8, 8), (8, 8)), tokens((16, 16), (16, 16))
    assert few(small).lengths == many(large).lengths == [16, 16]
    before, after = python_calls(lambda: few(small)), python_calls(lambda: many(large))
    if name == "tome":  # in twice as many rounds, each of which merges half of the tokens at most
        assert sum(before.values()) < sum(after.values()) <= 2 * sum(before.values())
    elif name == "vispruner":
        assert after["nearest"] <= 72  # rounds, of however many tokens
    else:
        assert after == before


def test_python_of_a_fast_step_does_not_grow_with_tokens_or_text(tmp_path):
    def calls(image_size: int, text_tokens: int) -> Counter:
        # 9 tokens are kept of 36, and of 144.
        ratio = 0.75 if image_size == 84 else 0.9375
        options = BenchArguments(
            shape=["llava-1.5"], image_size=image_size, text_tokens=text_tokens, hidden_size=64, layers=2, batch=2,
            pruning_ratio=ratio,
        )  # fmt: skip
        bench = Bench(options, options.shapes()[0], "off", str(tmp_path))
        bench.step("fast")
        return python_calls(lambda: bench.step("fast"))

    base = calls(84, 12)
    assert base["shorten_inputs"] == 1
    assert calls(168, 12) == base
    assert calls(84, 120) == base


# The calls of one fast step outside the model, before tensors of tokens were shortened together and the loss was cut
# into slices of a size rather than of a number.
EARLIER_CALLS = {"llava": 312, "llava_next": 371, "qwen2_5_vl": 337}


@pytest.mark.parametrize("family", EARLIER_CALLS)
def test_a_fast_step_calls_less_than_half_of_the_operators_that_it_did(family, tmp_path):
    trainer = make(tmp_path, family)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    calls = calls_of_step(trainer, inputs).calls
    assert calls["pruning.shortening.plan_shortening"] > 0  # it does count
    assert 2 * calls.total() < EARLIER_CALLS[family], calls.most_common()


@pytest.mark.parametrize("name", IN_FRONT)
def test_selection_is_one_graph(name):
    # A graph breaks where Python asks for a value; one that does not can be compiled whole, and captured.
    if name == "random":
        pytest.skip("PyTorch does not trace generators")
    if name == "prumerge" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("PyTorch's quantile reads its q, on a CPU")
    images = tokens((6, 6), (4, 7))
    images.defer_checks = True  # that all features are finite
    torch._dynamo.reset()  # what it compiled of other pruners counts against a limit
    pruner = build(name, pruning_ratio=0.75)
    expected = pruner(images)
    out = torch.compile(pruner, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(out.features, expected.features)
    assert torch.equal(out.positions, expected.positions)


def test_a_compiled_pruner_prunes_and_trains_alike(tmp_path):
    model, processor = FAMILIES["llava"].build()
    inputs = batch(FAMILIES["llava"], processor)
    plain, compiled = (AutoPruner.from_name("divprune", pruning_ratio=0.5) for _ in range(2))
    compiled.compile(backend="aot_eager", fullgraph=True)
    expected, actual = (prune_inputs(model, inputs, pruner) for pruner in (plain, compiled))
    assert torch.equal(actual["input_ids"], expected["input_ids"])
    runs = []
    for compiled in (False, True):
        trainer = make(tmp_path, slow_mode_ratio=0.5, mode_schedule="periodic")
        if compiled:
            trainer.dual_forward.pruner.compile(backend="aot_eager", dynamic=True)
        trainer.train()
        runs.append((history(trainer, "loss", "distillation_loss"), trainer.clock.visual_tokens))
    assert runs[0] == runs[1]


def test_waits_for_a_device_are_told_by_their_places(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(2):  # each time anew
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at a.cpp:1.)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with device_waits() as places:
        run()
        assert modes[-1] == "warn"
    assert modes[-1] == "default"
    line = run.__code__.co_firstlineno + 2
    assert places == [f"trainer/test_hot_path.py:{line}"] * 2
