"""`dualspeed bench --profile`: the parts of a fast step add up to it, and are where they are said to be."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import pytest
from bench_cases import FLAGS, tiny_bench
from torch.autograd import DeviceType
from torch.profiler import record_function

from hf_dualspeed import cli
from hf_dualspeed.bench import profile
from hf_dualspeed.bench.options import BenchArguments
from hf_dualspeed.bench.profile import IDLE, OPERATORS, PHASES, REST, kind_of, marked, profiled_step, read_profile
from hf_dualspeed.commands.bench import main

PAUSE = 1e6  # seconds that are said, not taken


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("profile") / "profile.json"
    assert cli.main(["bench", "--profile", *FLAGS, "--batch", "2", "--output", str(path)]) == 0
    return path, json.loads(path.read_text())


def test_parts_add_up_to_the_step(measured):
    path, results = measured
    (run,) = results["runs"]
    assert list(run["phases"]) == [*PHASES, REST]
    assert list(run["operators"]) == [*OPERATORS, IDLE]
    whole = run["seconds"]["median"]
    for parts in ("phases", "operators"):
        values = [value["median"] for value in run[parts].values()]
        assert min(values) >= 0
        assert sum(values) == pytest.approx(whole, rel=0.5)  # sums of medians, on a machine that may be busy
    assert min(run["phases"][name]["median"] for name in ("bench.backward", "dualspeed.select")) > 0
    assert run["calls"]["matrix products"] > 20
    page = path.with_suffix(".md").read_text()
    assert "| vision encoder |" in page
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_files_of_another_kind_are_named(measured):
    path, _ = measured
    assert cli.main(["bench", "--profile", "--render-only", "--output", str(path)]) == 0
    with pytest.raises(ValueError, match="holds 'profile of a fast step', not 'training steps.*Give .*--profile"):
        main(["--render-only", "--output", str(path)])


@pytest.mark.parametrize("phase", ["dualspeed.encode", "dualspeed.select", "bench.language_model", "bench.head"])
def test_time_is_found_where_it_goes(tmp_path, monkeypatch, phase):
    tiny = tiny_bench(tmp_path)
    model = tiny.model
    place = {
        "dualspeed.encode": model.get_encoder(modality="image"),
        "dualspeed.select": tiny.dual.dual_forward.pruner,
        "bench.language_model": model.get_decoder().layers[0],
        "bench.head": model.get_output_embeddings(),
    }[phase]
    forward = place.forward

    def slow(*args, **kwargs):
        with record_function("pause"):
            return forward(*args, **kwargs)

    def paused(profiler, on_device):
        """What the profiler would say if `slow` took longer: so would each range around it."""
        host = [event for event in profiler.events() if event.device_type == DeviceType.CPU]
        (event,), around = (event for event in host if event.name == "pause"), Counter()
        while event is not None:
            around[event.name] += 1
            event = event.cpu_parent
        averages = profiler.key_averages()
        for average in averages:
            if average.device_type == DeviceType.CPU:
                average.cpu_time_total += around[average.key] * PAUSE * 1e6
        return read_profile(SimpleNamespace(key_averages=lambda: averages), on_device)

    place.forward = slow
    monkeypatch.setattr(profile, "read_profile", paused)
    with marked(tiny):
        step = profiled_step(tiny)
    assert PAUSE <= step["phases"].pop(phase) < 1.1 * PAUSE
    assert all(0 <= seconds < 0.1 * PAUSE for seconds in step["phases"].values())
    assert step["operators"][IDLE] >= PAUSE
    assert "backward" not in vars(tiny.dual.accelerator)


def test_ranges_that_an_accelerator_shows_twice_count_on_the_host():
    def event(key, kind, host, device=0.0):
        times = {"cpu_time_total": host, "self_cpu_time_total": host, "self_device_time_total": device}
        return SimpleNamespace(key=key, device_type=kind, count=1, **times)

    host, device = DeviceType.CPU, DeviceType.CUDA
    events = [event("bench.step", host, 5e6), event("bench.step", device, 0.0)]
    events += [event("bench.backward", host, 3e6), event("bench.backward", device, 0.0)]
    events += [event("aten::mm", host, 1e5, 4e6)]
    found = read_profile(SimpleNamespace(key_averages=lambda: events), on_device=True)
    assert (found["seconds"], found["phases"]["bench.backward"], found["phases"][REST]) == (5.0, 3.0, 2.0)
    assert (found["operators"]["matrix products"], found["operators"][IDLE]) == (4.0, 1.0)


def test_kinds_of_operators():
    names = {
        "aten::addmm": "matrix products",
        "aten::mkldnn_convolution": "matrix products",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "aten::transpose": "views and allocation",
        "aten::index_select": "copies and indices",
        "aten::mul": "element-wise and reductions",
    }
    assert {name: kind_of(name) for name in names} == names


def test_one_kind_at_a_time():
    with pytest.raises(ValueError, match="`growth` and `profile` are measured one at a time"):
        BenchArguments(growth=True, profile=True)
    assert BenchArguments(profile=True).output.endswith("bench_profile.json")
