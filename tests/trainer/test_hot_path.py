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
from torch._dynamo.utils import counters as graphs
from training import history, make

from hf_dualspeed import AutoPruner, DualSpeedTrainingArguments, available_pruners, prune_inputs
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
    torch._dynamo.reset()
    graphs.clear()
    compiled.compile(backend="aot_eager", fullgraph=True)
    expected, actual = (prune_inputs(model, inputs, pruner) for pruner in (plain, compiled))
    assert torch.equal(actual["input_ids"], expected["input_ids"])
    assert graphs["stats"]["unique_graphs"] == 1
    runs = []
    for compiled in (False, True):
        trainer = make(tmp_path, slow_mode_ratio=0.5, mode_schedule="periodic")
        graphs.clear()
        if compiled:
            trainer.dual_forward.pruner.compile(backend="aot_eager", dynamic=True)
        trainer.train()
        assert bool(graphs["stats"]["unique_graphs"]) == compiled
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


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("position_ids", ["compact", "original"])
def test_lengths_are_rounded_up_and_nothing_else_changes(family, position_ids, tmp_path):
    runs, options = [], {"slow_mode_ratio": 0.5, "pruning_ratio": 0.5, "position_ids": position_ids, "max_steps": 6}
    for multiple in (1, 16):
        trainer = make(tmp_path, family, fast_length_multiple=multiple, **options)
        trainer.processing_class = None
        lengths, supervised = [], trainer.dual_forward._supervised

        def noted(inputs, lengths=lengths, supervised=supervised):
            lengths.append(inputs["labels"].shape[1])
            return supervised(inputs)

        trainer.dual_forward._supervised = noted
        trainer.train()
        # Fast steps and the teacher's passes, but not whole batches.
        runs.append((history(trainer, "loss", "grad_norm", "distillation_loss"), lengths))
    (plain, before), (rounded, after) = runs
    whole = [b == a for b, a in zip(before, after, strict=True)]
    assert 0 < sum(whole) < len(whole)
    assert all(same or (a % 16 == 0 and b < a < b + 16) for b, a, same in zip(before, after, whole, strict=True))
    for before, after in zip(plain, rounded, strict=True):
        numbers = [None if number is None else pytest.approx(number, rel=1e-4, abs=1e-6) for number in before]
        assert after == numbers


def test_batches_without_images_are_rounded_up_too(tmp_path):
    trainer = make(tmp_path, fast_length_multiple=32, slow_mode_ratio=0.0, data=[{"index": 2}], max_steps=2)
    trainer.train()
    assert trainer.clock.fast_tokens == 32


def test_packed_samples_are_not_padded(tmp_path):
    model, processor = FAMILIES["llava"].build()
    inputs = batch(FAMILIES["llava"], processor)
    rows = inputs["input_ids"][:1]
    packed = {"input_ids": rows, "labels": rows, "position_ids": torch.arange(rows.shape[1])[None]}
    trainer = make(tmp_path, model=model, fast_length_multiple=8)
    with (
        pytest.raises(ValueError, match="`fast_length_multiple` is 8, but the batch holds packed samples"),
        trainer.dual_forward.in_mode("fast"),
    ):
        trainer.model(**packed)


def test_compiled_regions_train_alike(tmp_path):
    runs = []
    for backend in (None, "eager"):
        torch._dynamo.reset()
        trainer = make(
            tmp_path,
            compile_regions=backend,
            fast_length_multiple=64,
            slow_mode_ratio=0.5,
            mode_schedule="periodic",
            max_steps=2,
        )
        layers = trainer.model.get_decoder().layers
        assert all((layer._compiled_call_impl is not None) == (backend is not None) for layer in layers)
        trainer.train()
        runs.append(history(trainer, "loss", "grad_norm"))
    assert runs[1] == [pytest.approx(entry, rel=1e-4) for entry in runs[0]]


def test_regions_that_cannot_be_compiled(tmp_path):
    with pytest.raises(ValueError, match="`compile_regions` is 'eager', but the pruner 'fastv' works between"):
        make(tmp_path, compile_regions="eager", pruner="fastv", pruner_kwargs={"layer": 1})
    with pytest.raises(ValueError, match="`compile_regions` is 'eager' and `torch_compile` is True"):
        make(tmp_path, compile_regions="eager", torch_compile=True)
    with pytest.raises(ValueError, match="`compile_regions` must be one of .*, got 'nothing'"):
        make(tmp_path, compile_regions="nothing")
    # The pruner reads the tower's attention, which compiled layers do not show.
    trainer = make(tmp_path, compile_regions="eager", pruner="visionzip")
    assert all(layer._compiled_call_impl is None for layer in trainer.model.get_encoder(modality="image").modules())
    assert all(layer._compiled_call_impl is not None for layer in trainer.model.get_decoder().layers)


def test_batches_in_pinned_memory_are_not_waited_for(tmp_path, monkeypatch):
    def chosen(**options) -> bool:
        return DualSpeedTrainingArguments(str(tmp_path), report_to="none", **options).accelerator_config.non_blocking

    assert not chosen(use_cpu=True)  # nothing is pinned
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert chosen()
    assert chosen(accelerator_config={"split_batches": False})
    assert not chosen(dataloader_pin_memory=False)
    assert not chosen(accelerator_config={"non_blocking": False})
