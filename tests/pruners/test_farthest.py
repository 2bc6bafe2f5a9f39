"""Farthest-first choice: all ways choose what the rule says, token by token, and the faster ones are taken where they
may be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import farthest_cases
import pytest
import torch
from farthest_cases import CASES, DTYPES, as_lists, expected, given, random
from pruner_cases import build, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from hf_dualspeed import VisualTokens
from hf_dualspeed.pruners import farthest
from hf_dualspeed.pruners.farthest import batched

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_plain_pytorch_follows_the_rule(case, dtype):
    features, valid, counts, keep = given(case, DTYPES[dtype])
    assert as_lists(batched.farthest_first(features, valid, keep), counts, keep) == expected(case, DTYPES[dtype])


@pytest.mark.parametrize("matrix", [0, 4 * 600**2])
@pytest.mark.parametrize("case", ["lengths", "large", "ties"])
def test_large_images_follow_the_rule(case, matrix, monkeypatch):
    monkeypatch.setattr(batched, "MATRIX_BYTES", matrix)  # no matrix at all, or one at a time
    test_plain_pytorch_follows_the_rule(case, "float32")


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """What the kernel chooses in Triton's interpreter."""
    run = subprocess.run(
        [sys.executable, farthest_cases.__file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_follows_the_rule(case, dtype, interpreted):
    assert interpreted[f"{case}-{dtype}"] == expected(case, DTYPES[dtype])


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hf_dualspeed.pruners.farthest.kernel import choose, warps_for

kinds = dict.fromkeys(("matrix", "alone"), "*fp32") | dict.fromkeys(("ranked", "nearest"), "*i64")
kinds |= {"table": "*i32", "count": "i32", "most": "i32", "BLOCK": "constexpr"}
for block in (64, 4096, 16384):
    source = ASTSource(fn=choose, signature=kinds, constexprs={"BLOCK": block})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps_for(block)})
    assert compiled.asm["cubin"]
"""


@needs_triton
def test_the_kernel_compiles_for_a_gpu(tmp_path):
    """No GPU is needed for that."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize(("counts", "lengths", "copies"), [([9, 9], [3, 3], 0), ([9, 7], [3, 3], 1)])
def test_images_that_are_alike_need_no_copy_from_the_host(counts, lengths, copies):
    """A CUDA graph cannot capture one."""
    found = batched.table_of(counts, lengths, torch.device("cpu"))
    assert found.dtype == torch.int32
    assert found.is_contiguous()
    assert found.tolist() == [list(pair) for pair in zip(counts, lengths, strict=True)]
    with Calls() as calls:
        batched.table_of(counts, lengths, torch.device("meta"))
    assert calls.names.count("aten::_to_copy") == copies


class Calls(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name().partition(".")[0])
        return function(*args, **(kwargs or {}))


class Ways:
    """Counts calls of each way, of which the kernel is stood in for by plain PyTorch."""

    def __init__(self, monkeypatch):
        self.taken, plain = [], batched.farthest_first
        self.kernel = SimpleNamespace(farthest_first=self.counted("kernel", lambda f, v, c, k: plain(f, v, k)))
        monkeypatch.setitem(sys.modules, "hf_dualspeed.pruners.farthest.kernel", self.kernel)
        monkeypatch.setattr(farthest, "kernel", self.kernel, raising=False)
        monkeypatch.setattr(batched, "farthest_first", self.counted("batched", plain))
        monkeypatch.setattr(farthest, "_broken", [])
        monkeypatch.setattr(farthest, "find_spec", lambda name: name == "triton")

    def counted(self, name, function):
        def call(*args):
            self.taken.append(name)
            return function(*args)

        return call

    def of(self, pruner, images) -> list[str]:
        self.taken.clear()
        pruner(images)
        return list(self.taken)


def test_each_device_takes_its_fastest_way(monkeypatch):
    ways, pruner = Ways(monkeypatch), build("divprune", pruning_ratio=0.9)
    large = tokens((24, 24), (4, 4))
    assert ways.of(pruner, large) == ["batched"]
    monkeypatch.setattr(farthest, "TRITON_DEVICES", ("cpu",))
    assert ways.of(pruner, large) == ["kernel"]
    # Switched off by the environment or the pruner, missing, or without room for the similarities.
    monkeypatch.setenv(farthest.SWITCH, "0")
    assert ways.of(pruner, large) == ["batched"]
    monkeypatch.setenv(farthest.SWITCH, "1")
    pruner.plain_path = True
    assert ways.of(pruner, large) == ["batched"]
    pruner.plain_path = False
    monkeypatch.setattr(farthest, "find_spec", lambda name: None)
    assert ways.of(pruner, large) == ["batched"]
    monkeypatch.setattr(farthest, "find_spec", lambda name: name)
    monkeypatch.setattr(batched, "MATRIX_BYTES", 4 * 576**2 - 1)
    assert ways.of(pruner, large) == ["batched"]


def test_the_kernel_is_launched_on_the_device_of_the_features(monkeypatch):
    """Triton launches on the current device, which need not be that of a model on the second one."""
    ways, pruner, current = Ways(monkeypatch), build("divprune", pruning_ratio=0.9), []
    monkeypatch.setattr(farthest, "TRITON_DEVICES", ("cpu",))

    @contextmanager
    def device_of(features):
        current.append(features)
        yield
        current.pop()

    images, launched, choose = tokens((24, 24)), [], ways.kernel.farthest_first
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    ways.kernel.farthest_first = lambda *given: (launched.append(current[-1] is given[0]), choose(*given))[1]
    assert ways.of(pruner, images) == ["kernel"]
    assert launched == [True]


def test_a_kernel_that_fails_is_told_once_and_left_out(monkeypatch, caplog):
    ways, pruner = Ways(monkeypatch), build("divprune", pruning_ratio=0.9)
    monkeypatch.setattr(farthest, "TRITON_DEVICES", ("cpu",))

    def failing(*args):
        raise RuntimeError("Failed to find C compiler.")

    ways.kernel.farthest_first = failing
    images = tokens((6, 6))
    assert [ways.of(pruner, images) for _ in range(2)] == [["batched"], ["batched"]]
    assert caplog.text.count("does not run (RuntimeError: Failed to find C compiler.)") == 1
    assert "DUALSPEED_TRITON=0" in caplog.text


def test_memory_that_runs_out_in_the_kernel_is_not_its_failure(monkeypatch):
    ways, pruner = Ways(monkeypatch), build("divprune", pruning_ratio=0.9)
    monkeypatch.setattr(farthest, "TRITON_DEVICES", ("cpu",))

    def full(*args):
        raise torch.OutOfMemoryError("out of memory")

    ways.kernel.farthest_first = full
    with pytest.raises(torch.OutOfMemoryError):
        pruner(tokens((6, 6)))
    assert not farthest._broken


@pytest.mark.parametrize("dropped", ["merge", "discard"])
def test_a_plain_pruner_prunes_alike(dropped):
    fast, plain = (build("divprune", pruning_ratio=0.9, dropped_tokens=dropped) for _ in range(2))
    plain.plain_path = True
    images = tokens((24, 24), (5, 5), (30, 20))
    one, other = fast(images), plain(images)
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.sizes, other.sizes)
    torch.testing.assert_close(one.features, other.features)


def test_large_features_are_finite():
    """One look at least and most, not at sums that overflow."""
    images = VisualTokens(random(600)[None] * 1e37)
    assert build("divprune", pruning_ratio=0.9)(images).finite
