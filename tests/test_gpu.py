"""What only an accelerator can show: `python -m pytest -m gpu`."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from pruner_cases import build, shortens, tokens
from test_bench import FLAGS

from hf_dualspeed import available_pruners, cli

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def on_device(batch):
    """Visual tokens on the accelerator, whose features are known to be finite."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            setattr(batch, field.name, value.cuda())
    batch.generator, batch.checked_later = torch.Generator("cuda").manual_seed(1), True
    return batch


@pytest.mark.parametrize("name", [name for name in available_pruners() if shortens(name)])
def test_selection_never_waits_for_the_device(name):
    pruner = build(name, pruning_ratio=0.75).cuda()
    batch = on_device(tokens((6, 6), (4, 7)))
    pruner(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pruner(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_divprune_is_captured_as_a_graph():
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


@pytest.mark.parametrize("kind", [[], ["--profile"], ["--lengths", "--steps", "4"]], ids=str)
def test_the_bench_runs(tmp_path, kind):
    assert cli.main(["bench", *kind, *FLAGS, "--batch", "2", "--output", str(tmp_path / "out.json")]) == 0
