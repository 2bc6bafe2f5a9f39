"""What only an accelerator can show: `python -m pytest -m gpu`."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import fields
from importlib.util import find_spec

import pytest
import torch
from attention_cases import Layer, key_sizes, repeated
from attention_cases import tensors as states_of
from bench_cases import FLAGS, tiny_bench
from evaluation_cases import evaluate, folder, made, texts  # noqa: F401
from pruner_cases import build, shortens, tokens
from tiny_models import FAMILIES
from training import ADAPTIVE, history, make

from hf_dualspeed import available_pruners, cli
from hf_dualspeed.bench.counters import device_waits, flops_of
from hf_dualspeed.bench.same_memory import Fitted
from hf_dualspeed.pruners import farthest
from hf_dualspeed.trainer.callbacks import DataWait

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on_device(batch):
    """Visual tokens on the accelerator, whose features are known to be finite."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            setattr(batch, field.name, value.cuda())
    batch.generator, batch.defer_checks = torch.Generator("cuda").manual_seed(1), True
    return batch


def never_waiting(function):
    """`function`, with an error where it waits for all that the device has to do."""

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return watched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_sizes_under_each_attention(implementation, dtype):
    """Attention and gradients of few keys with sizes are those of the many that they stand for."""
    if implementation == "flash_attention_2" and (find_spec("flash_attn") is None or dtype == torch.float32):
        pytest.skip("needs flash-attn, and half precision")
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    found = []
    for layer, change in ((Layer(implementation, key_sizes(device="cuda")), lambda x: x), (Layer("sdpa"), repeated)):
        states = [state.cuda().to(dtype).requires_grad_() for state in states_of(4, 64)]
        query, key, value = states
        out = layer(query, change(key), change(value))
        out.float().square().sum().backward()
        found.append((out, *(state.grad for state in states)))
    torch.testing.assert_close(*found, **close)


@pytest.mark.parametrize("name", [name for name in available_pruners() if shortens(name)])
def test_selection_never_waits_for_the_device(name):
    pruner = build(name, pruning_ratio=0.75).cuda()
    batch = on_device(tokens((6, 6), (4, 7)))
    pruner(batch)
    never_waiting(pruner)(batch)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_chooses_also_while_operations_are_counted(dtype, monkeypatch):
    monkeypatch.setattr(farthest, "_broken", [])
    pruner, batch = build("divprune", pruning_ratio=0.75).cuda(), on_device(tokens((12, 12), (9, 12), dtype=dtype))
    chosen = []
    assert flops_of(lambda: chosen.append(pruner(batch).positions))
    assert not farthest._broken
    assert torch.equal(chosen[0], pruner(batch).positions)


def test_large_images_are_chosen_from_without_waiting(monkeypatch):
    monkeypatch.setattr("hf_dualspeed.pruners.farthest.batched.MATRIX_BYTES", 0)  # no room for all similarities
    test_selection_never_waits_for_the_device("divprune")


def test_a_fast_step_waits_where_a_tensor_needs_a_size(tmp_path):
    own = tiny_bench(tmp_path)
    waits = own.count_syncs("fast", device_waits)
    print(waits)  # those of transformers too
    ours = Counter()
    for place, count in waits.items():
        parent, file = place.split(":")[0].split("/")
        ours.update({file: count} if parent in ("hf_dualspeed", "pruners") else {})
    # The length of the shortened batch, and the supervised positions.
    assert ours == {"shortening.py": 1, "dual_forward.py": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_agrees_with_the_cpu(tmp_path, family, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # of the towers' convolutions, which it rounds
    runs = {}
    for device in ("cpu", "cuda"):
        settings = {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "optim": "sgd", "use_cpu": device == "cpu"}
        trainer = make(tmp_path, family, **settings)
        trainer.train()
        assert next(trainer.model.parameters()).device.type == device
        runs[device] = torch.tensor(history(trainer, "loss", "grad_norm"))
    torch.testing.assert_close(runs["cuda"], runs["cpu"], rtol=1e-3, atol=1e-4)


def test_steps_too_large_for_the_card_do_not_fit(tmp_path):
    own = tiny_bench(tmp_path, same_memory=True, batch=4)
    fitted, before = Fitted(own, "adamw", 2**50), torch.cuda.memory_allocated()
    step = fitted.step

    def too_large(*args):
        step(*args)
        torch.empty(2**50, device="cuda")

    fitted.step = too_large
    assert not fitted.fits("plain", 2)
    fitted.step = step
    assert fitted.fits("plain", 2)
    assert torch.cuda.memory_allocated() <= before + 2**20


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_ligers_kernel_trains_alike(tmp_path):
    runs = {}
    for choice in ("on", "off"):
        settings = {"slow_mode_ratio": 0.5, "mode_schedule": "periodic", "optim": "sgd", "label_smoothing_factor": 0.1}
        trainer = make(tmp_path, **settings, fused_head_loss=choice, use_cpu=False)
        trainer.train()
        runs[choice] = torch.tensor(history(trainer, "loss", "grad_norm"))
        assert choice == "off" or trainer.dual_forward.fused_head.applies
    torch.testing.assert_close(runs["on"], runs["off"], rtol=1e-3, atol=1e-4)


def test_divprune_is_captured_as_a_graph(monkeypatch):
    monkeypatch.setattr(farthest, "_broken", [])  # that the kernel runs where there is triton
    pruner, batch = build("divprune", pruning_ratio=0.75).cuda(), on_device(tokens((12, 12), (12, 12)))
    expected = pruner(batch).positions
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        pruner(batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pruner(batch).positions
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)
    assert not farthest._broken


MEMORY = ["--same-memory", "--memory-gib", "0.25"]
KERNELS = [*MEMORY, "--optimizer", "adamw", "--checkpointing", "on", "--kernels", "off", "on"]


@pytest.mark.parametrize("kind", [[], ["--profile"], ["--lengths", "--steps", "4"], MEMORY, KERNELS], ids=str)
def test_the_bench_runs(tmp_path, kind):
    path = tmp_path / "out.json"
    assert cli.main(["bench", *kind, *FLAGS, "--batch", "2", "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    assert (results["device"], results["dtype"]) == ("cuda", "bfloat16")
    if not kind:
        assert all(run["device_waits"]["fast"] for run in results["runs"])
        assert "Waits for the device, and in brackets" in path.with_suffix(".md").read_text()


def test_an_adaptive_schedule_follows_losses_without_waiting(tmp_path, monkeypatch):
    schedules = {}
    for device in ("cpu", "cuda"):
        trainer = make(tmp_path, max_steps=12, optim="sgd", use_cpu=device == "cpu", **ADAPTIVE)
        schedule = schedules[device] = trainer.adaptive_schedule
        monkeypatch.setattr(schedule, "on_step_end", never_waiting(schedule.on_step_end))
        trainer.train()
    assert len(schedules["cuda"].ratios) > 3
    assert schedules["cuda"].steps == schedules["cpu"].steps
    assert schedules["cuda"].ratios == pytest.approx(schedules["cpu"].ratios, rel=1e-2)


def test_evaluation_answers_as_on_the_cpu(folder, monkeypatch):  # noqa: F811
    answers, words = {}, ["--pruner", "divprune", "--pruning_ratio", "0.5", "--overwrite"]
    for device in ("cuda", "cpu"):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda device=device: device == "cuda")
        assert evaluate(*words) == 0
        answers[device] = [texts(view) for view in ("full", "divprune-0.5")]
    assert answers["cuda"] == answers["cpu"]


def test_a_wait_that_the_device_does_not_notice_is_none():
    """Both times the host waits as long, once while the device is at work and once while it is not."""
    data = DataWait()
    data.device = torch.device("cuda", torch.cuda.current_device())

    def late():
        time.sleep(0.1)
        yield "batch"

    waited = []
    for cycles in (4_000_000_000, 0):
        torch.cuda.synchronize()
        if cycles:
            torch.cuda._sleep(cycles)
        next(data.batches(late()))
        data.end_step()
        torch.cuda.synchronize()
        data.shares()
        waited.append(data.sums["waited"] - sum(waited))
    hidden, seen = waited
    assert hidden < 0.5 * seen
