import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import FLAGS, TINY, tiny_bench
from PIL import Image
from tiny_models import FAMILIES
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForImageTextToText

from hf_dualspeed import cli
from hf_dualspeed.bench import growth as bench_growth
from hf_dualspeed.bench import measure as bench
from hf_dualspeed.bench import options as bench_arguments
from hf_dualspeed.bench import report as bench_report
from hf_dualspeed.bench.counters import flops_of, peak_memory
from hf_dualspeed.bench.largest_batch import largest_batch, size_lines
from hf_dualspeed.bench.options import BenchArguments, parse_arguments
from hf_dualspeed.bench.shapes import FIRST_WORD, IMAGE_ID, SHAPES, build_batch, build_config, encoder_ratio
from hf_dualspeed.commands.bench import main
from hf_dualspeed.utils.memory import GIB

FLAGS += ["--shape", "llava-1.5", "--rounds", "2", "--pruning-ratio", "0.9", "--threads", "1"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results" / "bench.json"
    threads = torch.get_num_threads()
    assert cli.main(["bench", *FLAGS, "--batch", "2", "--output", str(path)]) == 0
    assert torch.get_num_threads() == threads
    return path, json.loads(path.read_text())


@pytest.fixture
def tiny(tmp_path):
    return tiny_bench(tmp_path)


# --- results and reports ------------------------------------------------------------------------------------------


def test_results_name_what_was_measured(measured):
    path, results = measured
    assert str(path.parent) not in path.read_text()
    assert results["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert results["machine"]["threads"] == 1
    assert results["settings"]["pruner"] == "divprune"
    assert {"machine", "versions", "date", "seeds", "flop_counting", "memory_counting"} <= results.keys()
    on, off = results["runs"]
    assert (on["checkpointing"], on["slow_splits"], on["slow_parts"]) == ("on", "auto", 2)
    assert (off["checkpointing"], off["slow_splits"], off["slow_parts"]) == ("off", 1, 1)
    for run in results["runs"]:
        assert (run["batch"], run["visual_tokens"], run["text_tokens"], run["supervised_tokens"]) == (2, 16, 12, 6)
        for name in (*bench.STEPS, *bench_report.PARTS):
            summary = run["seconds"][name]
            assert len(run["seconds_by_round"][name]) == results["rounds"] == 2
            assert 0 < summary["q1"] <= summary["median"] <= summary["q3"]
            assert run["memory"][name] > 0
        assert sum(run["flops"][name] for name in ("encoder", "teacher")) < run["flops"]["slow"]
        assert run["gradients_bytes"] < run["weights_bytes"]
        assert run["host_waits"]["selection"] + run["host_waits"]["shortening"] == 1


def test_slow_steps_without_distillation_compute_the_plain_loss(measured):
    for run in measured[1]["runs"]:
        losses = run["losses"]
        tolerance = 1e-2 if torch.cuda.is_available() else 1e-5
        assert losses["slow_without_distillation"] == pytest.approx(losses["plain"], rel=tolerance)
        assert losses["slow"] > losses["slow_without_distillation"]
        assert losses["fast_cached"] == pytest.approx(losses["fast"], rel=tolerance)
        assert losses["fast_discarding"] != pytest.approx(losses["fast"], rel=1e-4)  # another view of the image


def test_distillation_costs_the_teachers_pass_and_nothing_else(measured):
    for run in measured[1]["runs"]:
        flops = run["flops"]
        # No second encoding, and the head at the supervised positions alone: a forward pass of the fast step.
        assert flops["slow"] - flops["slow_without_distillation"] == flops["teacher"]
        assert 3 * flops["teacher"] == pytest.approx(flops["fast"] - flops["encoder"], rel=0.2)


def test_shares_and_speed_ups_are_taken_within_rounds(measured):
    for run in measured[1]["runs"]:
        rounds = {name: torch.tensor(v, dtype=torch.float64) for name, v in run["seconds_by_round"].items()}
        shares = {part: rounds[part] / rounds["fast"] for part in bench_report.FAST_PARTS}
        expected = {f"{part}_share": share for part, share in shares.items()}
        expected["rest_share"] = 1 - sum(shares.values())
        expected["expected_speedup"] = rounds["plain"] / (0.95 * rounds["fast"] + 0.05 * rounds["slow"])
        expected["expected_speedup_cached"] = rounds["plain"] / (0.95 * rounds["fast_cached"] + 0.05 * rounds["slow"])
        limit = run["flops"]["plain"] / (0.95 * run["flops"]["fast"] + 0.05 * run["flops"]["slow"])
        assert run["flop_ratios"]["expected_speedup"] == pytest.approx(limit)
        expected["share_of_limit"] = expected["expected_speedup"] / limit
        for name, values in expected.items():
            assert run["ratios"][name]["median"] == pytest.approx(values.quantile(0.5).item(), abs=1e-9)


def test_report_is_rendered_anew(measured, capsys):
    path, results = measured
    before = path.read_text()
    for suffix in (".md", ".png"):
        path.with_suffix(suffix).unlink()
    assert cli.main(["bench", "--render-only", "--output", str(path)]) == 0
    assert path.read_text() == before
    printed = " ".join(capsys.readouterr().out.split())
    assert "share of it" in printed
    assert "memory, slow / fast" in printed
    page = path.with_suffix(".md").read_text()
    assert "![Step times](bench.png)" in page
    assert bench_report.readme_table(results) in page
    assert page.count("| Trainer | ") == 2
    with Image.open(path.with_suffix(".png")) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0), (86, 180, 233), (153, 153, 153)} <= colours


def test_a_run_that_is_cut_short_leaves_what_it_has(tmp_path, monkeypatch, measured):
    run = bench.Bench.run
    assert [path.name for path in measured[0].parent.glob("*.json")] == [measured[0].name]

    def stopped(own, names):
        if own.checkpointing == "off":
            raise KeyboardInterrupt
        return run(own, names)

    monkeypatch.setattr(bench.Bench, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        main([*FLAGS, "--batch", "2", "--output", str(tmp_path / "bench.json")])
    path = tmp_path / "bench.part.json"
    assert cli.main(["bench", "--render-only", "--output", str(path)]) == 0
    assert [run["checkpointing"] for run in json.loads(path.read_text())["runs"]] == ["on"]
    assert path.with_suffix(".md").read_text().count("| Trainer | ") == 1


def test_waits_for_a_device_are_counted_by_step(measured):
    run = json.loads(measured[0].read_text())["runs"][0]
    waits = {
        "transformers/masking_utils.py:300": 1,
        "hf_dualspeed/pruning/shortening.py:59": 1,
        "pruners/divprune.py:1": 2,
    }
    run["device_waits"] = {name: {} for name in bench.STEPS} | {"fast": waits}
    line = bench_report.waits_line(run)
    assert "; fast 4 (3); " in line
    assert "Trainer 0 (0)" in line


def test_files_of_another_kind_are_named(measured, tmp_path):
    path, results = measured
    with pytest.raises(ValueError, match="holds no `runs`: it was written by an earlier version"):
        bench_report.readme_table({"seconds": {}})
    with pytest.raises(ValueError, match="not 'growth of training steps.*Give --growth"):
        bench_growth.readme_table(results)
    assert cli.main(["bench", "--growth", "--render-only", "--output", str(path)]) == 2


def test_what_else_is_measured_is_shown_without_a_verdict(measured):
    results = measured[1]
    ratios, memory = results["runs"][0]["ratios"], results["runs"][0]["memory"]
    row = bench_report.more_rows(results)[0]
    assert row == (
        "llava-1.5",
        "on",
        f"{memory['slow'] / memory['fast']:.2f}",
        f"{ratios['fast_over_discarding']['median']:.3f}",
        f"{ratios['selection_share']['median']:.1%}",
        f"{ratios['shortening_share']['median']:.1%}",
        "1",
    )
    page = bench_report.markdown(results, "bench.png")
    assert " | ".join(row) in page
    assert not {"targets", "target"} & set(page.lower().split())
    assert not any(mark in page for mark in ("<=", ">=", ", yes", ", NO"))


# --- FLOPs and recomputation --------------------------------------------------------------------------------------


def test_flops_of_the_plain_step_are_those_of_its_layers(tiny):
    model, rows, visual, sequence = tiny.model, 4, 16, 16 + TINY["text_tokens"]
    text, vision = model.config.text_config, model.config.vision_config
    width, tower_width = text.hidden_size, vision.hidden_size
    layer = 4 * width**2 + 3 * width * text.intermediate_size
    # Forward, gradient of the input, gradient of the weight: 2 operations per weight and token each.
    language = 6 * rows * sequence * (text.num_hidden_layers * layer + width * text.vocab_size)
    # No gradient reaches what lies before the projector.
    projector = rows * visual * (4 * tower_width * width + 6 * width**2)
    tower_layer = 4 * tower_width**2 + 2 * tower_width * vision.intermediate_size
    patches = 3 * vision.patch_size**2 * tower_width
    tower = 2 * rows * ((visual + 1) * vision.num_hidden_layers * tower_layer + visual * patches)
    # Scores and their product with the values; backward has twice that, and the scores once more.
    attention = 2 * rows * sequence**2 * width * text.num_hidden_layers * (2 + 5)
    attention += 4 * rows * (visual + 1) ** 2 * tower_width * vision.num_hidden_layers
    expected = language + projector + tower + attention
    assert tiny.count_flops("plain") == pytest.approx(expected, rel=0.01)


def test_products_in_another_type_are_counted():
    """DivPrune's kernel multiplies so on a GPU, and an error there would turn it off for good."""
    rows = torch.empty(2, 8, 4, dtype=torch.bfloat16, device="meta")
    assert flops_of(lambda: torch.bmm(rows, rows.mT, out_dtype=torch.float32)) == 2 * 2 * 8 * 8 * 4
    assert flops_of(lambda: rows @ rows.mT) == 2 * 2 * 8 * 8 * 4


def test_attention_is_counted_on_the_cpu(tiny):
    if tiny.device.type != "cpu":
        pytest.skip("the formula is for the CPU's kernel")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        tiny.step("plain")
    language_attention = 2 * 4 * (16 + TINY["text_tokens"]) ** 2 * TINY["hidden_size"] * TINY["layers"] * (2 + 5)
    assert tiny.count_flops("plain") - counter.get_total_flops() >= language_attention


def test_steps_compare_as_their_tokens_do(tiny):
    flops = {name: tiny.count_flops(name) for name in (*bench.STEPS, "teacher")}
    assert flops["fast"] < flops["slow_without_distillation"] < flops["plain"]
    assert flops["slow"] == pytest.approx(flops["slow_without_distillation"] + flops["teacher"], rel=0.01)
    assert flops["fast_cached"] < flops["fast"]
    assert flops["fast_discarding"] == pytest.approx(flops["fast"], rel=0.01)
    tower = flops["fast"] - flops["fast_cached"]
    assert 0 < tower < tiny.count_flops("encoder")  # the projector is in there, too


def test_runs_that_cannot_cache_leave_that_step_out(measured, tmp_path):
    assert "fast_cached" not in tiny_bench(tmp_path, pruner="cls_attention").steps
    results = json.loads(measured[0].read_text())
    run = results["runs"][0]
    for group in ("seconds_by_round", "flops", "memory", "losses"):
        del run[group]["fast_cached"]
    run |= bench_report.derive(run, 0.1)
    path = tmp_path / "bench.json"
    bench.report(results, path)
    page = path.with_suffix(".md").read_text()
    assert page.count("| fast, cached features |") == 1
    column = bench_report.HEADER.index("with cached features")
    without, cached = (row[column] for row in bench_report.run_rows(results))
    assert without == "n/a"
    assert cached.endswith("] x")


def test_plain_steps_recompute_and_fast_ones_do_not(tmp_path):
    # Little image, much text: the tower, which transformers lets pass gradients under checkpointing, matters little.
    benches = {name: tiny_bench(tmp_path, name, text_tokens=200, batch=8) for name in ("on", "off")}
    runs = {}
    for name, own in benches.items():
        for layer in own.model.model.language_model.layers:
            # Of a submodule: hooks on the layer run once, outside of the checkpoint.
            layer.mlp.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    flops, passes = {}, {}
    for step in bench.STEPS:
        runs.clear()
        flops[step] = {name: own.count_flops(step) for name, own in benches.items()}
        passes[step] = {name: runs[name] / TINY["layers"] for name in benches}
    assert passes["plain"] == {"on": 2, "off": 1}
    assert passes["fast"] == {"on": 1, "off": 1}
    # The head of so small a model is much of its work, and is not recomputed.
    assert flops["plain"]["on"] / flops["plain"]["off"] > 1.15
    assert flops["fast"]["on"] / flops["fast"]["off"] < 1.05
    parts, small = benches["on"].dual._slow_parts(benches["on"].model, benches["on"].batch, benches["on"].items)
    assert passes["slow_without_distillation"] == {"on": parts * (1 if small else 2), "off": 1}


# --- memory -------------------------------------------------------------------------------------------------------


def test_memory_of_a_known_case():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)) for _ in range(6)))
    inputs, loss = torch.randn(1000, 64), 8
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [inputs, *model.parameters(), *(p.grad for p in model.parameters())]

    def run():
        model(inputs).pow(2).sum().backward()

    wide, narrow = 1000 * 256 * 4, 1000 * 64 * 4
    tracker = MemTracker()
    tracker.track_external(model, inputs)
    with tracker:
        run()
    parts = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    activations = parts["_MemRefType.ACT"] + parts["_MemRefType.TEMP"]
    peak = peak_memory(run, known)
    assert abs(peak - activations) <= loss
    # What each layer's backward needs, and the gradients of a ReLU's input and output at the first of them.
    assert abs(peak - (6 * (wide + narrow) + 2 * wide)) <= narrow + loss
    assert peak_memory(lambda: inputs.t().contiguous().add_(1), known) == narrow
    assert peak_memory(lambda: torch.stack([inputs + 1 for _ in range(2)])[:1], known) == 4 * narrow
    assert peak_memory(lambda: [(inputs + 1).sum().item() for _ in range(3)], known) == narrow + 4


def test_checkpointing_splits_and_pruning_save_memory(tmp_path):
    options = {"text_tokens": 50, "batch": 4, "image_size": 112, "layers": 4, "pruning_ratio": 0.9}
    found = {}
    for name, splits in (("on", "auto"), ("off", "1"), ("off", "auto")):
        own = tiny_bench(tmp_path, name, slow_splits=splits, **options)
        found[name, splits] = {step: own.count_memory(step) for step in bench.STEPS}
        assert all(p.grad is None for p in own.model.parameters())
    assert found["on", "auto"]["plain"] < 0.7 * found["off", "1"]["plain"]
    assert found["off", "1"]["fast"] < 0.8 * found["off", "1"]["plain"]
    assert found["off", "auto"]["slow"] < 0.8 * found["off", "1"]["slow"]


# --- shapes -------------------------------------------------------------------------------------------------------

# Of fewer pixels than the real ones, in the same number of tiles.
FEW_PIXELS = {
    "llava-1.5": ({"image_size": 56}, 16),
    "llava-next": ({"image_size": 56}, 16 + 8 * 9),
    "qwen2.5-vl": ({"image_size": 448}, 256),
    "smolvlm": ({"image_size": 128}, 17 * 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_trains(tmp_path, name):
    pixels, visual = FEW_PIXELS[name]
    shape = replace(SHAPES[name], **pixels)
    options = {"shape": [name], "image_size": None, "batch": 2, "text_tokens": 24, "pruning_ratio": 0.75}
    own = tiny_bench(tmp_path, "on", shape, **options)
    assert own.subject.said["visual_tokens"] == visual == shape.visual_tokens
    assert own.subject.said["text_tokens"] == 24
    for step in own.steps:
        own.variants[step]()
        own._clean(step)
    assert own.losses["slow_without_distillation"] == pytest.approx(own.losses["plain"], rel=1e-3)
    assert own.count_flops("fast") < own.count_flops("plain")
    # Qwen's projector is trained, and is a part of its tower.
    assert ("fast_cached" in own.steps) == (name != "qwen2.5-vl")
    if name == "qwen2.5-vl":
        tower = own.model.model.visual
        assert own.model.config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]
        assert 0 < len(tower.config.fullatt_block_indexes) < len(tower.blocks)


def test_real_shapes_have_the_real_numbers_of_tokens():
    assert {name: shape.visual_tokens for name, shape in SHAPES.items()} == {
        "llava-1.5": 576,
        "llava-next": 2880 + 48,
        "qwen2.5-vl": 1024,
        "smolvlm": 17 * 64,
    }
    ids = build_batch(SHAPES["smolvlm"], SHAPES["smolvlm"].small, 1, 200, seed=0)["input_ids"][0]
    assert len(ids) == 17 * 64 + 200
    _, runs = torch.unique_consecutive(ids == IMAGE_ID, return_counts=True)
    assert runs.tolist()[1:-1] == [64, *[1, 64] * 16]
    assert (ids[ids != IMAGE_ID] >= FIRST_WORD).all()


# What the models' pages on the Hub say they have.
PARAMETERS = {"llava-1.5": 7.06e9, "llava-next": 7.06e9, "qwen2.5-vl": 8.29e9, "smolvlm": 0.507e9}


@pytest.mark.parametrize("name", SHAPES)
def test_sizes_are_the_real_ones_and_small_ones_like_them(name):
    shape, layers = SHAPES[name], {}
    for scale in bench_arguments.SCALES:
        sizes = shape.sizes(scale)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(build_config(shape, sizes, 4096))
        layers[scale] = sum(p.numel() for p in model.get_decoder().layers.parameters())
        if scale == "full":
            assert sum(p.numel() for p in model.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)
    assert layers["small"] == pytest.approx(25e6, rel=0.06)
    assert encoder_ratio(shape, shape.small) == pytest.approx(encoder_ratio(shape, shape.real), rel=0.1)
    heads = {scale: shape.sizes(scale).vocabulary * shape.sizes(scale).hidden / layers[scale] for scale in layers}
    assert heads["small"] == pytest.approx(heads["full"], rel=0.05)


def test_encoder_ratio_is_what_is_counted(tmp_path):
    own = tiny_bench(tmp_path, hidden_size=None, layers=None, image_size=168, text_tokens=100, batch=1)
    shape, flops = own.options.shapes()[0], {name: own.count_flops(name) for name in ("encoder", "plain")}
    sizes, visual, tokens = shape.small, 144, 244
    narrow, wide = sizes.tower_hidden, sizes.hidden
    # The encoder also embeds patches and projects; that has two gradients of its last layer and one of its first.
    tower = flops["encoder"] - 2 * visual * (3 * 14**2 * narrow + narrow * wide + wide**2)
    language = flops["plain"] - flops["encoder"] - visual * (2 * narrow * wide + 4 * wide**2)
    # Of each matrix product there are two gradients; of attention's two, five products.
    product = 2 * tokens * wide * sizes.layers
    language = (language / tokens - 7 * product - 6 * wide * sizes.vocabulary) / 3 + 2 * product
    assert tower / visual / language == pytest.approx(encoder_ratio(shape, sizes), rel=0.05)  # but CLIP's class token


def test_lora_trains_adapters_and_the_projector(tmp_path):
    own = tiny_bench(tmp_path, "on", lora=True)
    names = [name for name, p in own.model.named_parameters() if p.requires_grad]
    projector = [name for name in names if "multi_modal_projector" in name]
    assert len(projector) == 4
    adapters = [name for name in names if "language_model" in name and "lora_" in name]
    assert len(adapters) == 2 * 7 * TINY["layers"]
    assert set(names) - {*projector, *adapters} == {name for name in names if "dualspeed.isolator" in name}
    assert own.count_flops("fast") < own.count_flops("plain")


def test_a_model_of_ones_own_is_measured(tmp_path):
    model, processor = FAMILIES["llava_next"].build()
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    arguments = parse_arguments(f"--model {tmp_path / 'own'} --batch 2 --text-tokens 80 --image-size 30".split())
    assert arguments.shapes() == []
    own = bench.Bench(arguments, None, "off", str(tmp_path))
    said = own.subject.said
    assert (said["shape"], said["like"], said["batch"]) == ("own", "LlavaNextForConditionalGeneration", 2)
    assert said["visual_tokens"] > 16
    assert 60 < said["text_tokens"] < 120
    assert own.count_flops("fast") < own.count_flops("plain")
    assert largest_batch(own) is None  # of a memory that nobody named


@pytest.mark.parametrize("room", [0, 3_000_000])
def test_the_largest_batch_of_a_model_is_told(tmp_path, capsys, room):
    model, processor = FAMILIES["llava"].build()
    model.save_pretrained(tmp_path / "own")
    processor.save_pretrained(tmp_path / "own")
    words = f"--model {tmp_path / 'own'} --batch 2 --text-tokens 30 --image-size 16 --memory-gib {(room or 1e5) / GIB}"
    own = bench.Bench(parse_arguments(words.split()), None, "off", str(tmp_path))
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    found = largest_batch(own)
    (said,) = size_lines({"runs": [{"shape": "own", "checkpointing": "off", "largest_batch": found}]})
    assert all(torch.equal(value, before[name]) for name, value in own.model.state_dict().items())
    if not room:
        assert "not even one sample of" in said
        return
    rows = found["micro_batch"]
    gradients = sum(p.nbytes for p in own.model.parameters() if p.requires_grad)
    held = sum(p.nbytes for p in own.model.parameters()) + 3 * gradients
    # The bench's own count of a batch of so many, and of one more.
    counts = []
    for count in (rows, rows + 1):
        own.batch = {key: torch.cat([value] * count) for key, value in own.subject.sample.items()}
        own.items = (own.batch["labels"] != -100).sum()
        counts.append(held + own.count_memory("fast") + sum(value.nbytes for value in own.batch.values()))
    assert counts[0] <= room < counts[1] + 4096  # counts of steps and buffers, which are not in it
    assert found["fast_bytes"] == pytest.approx(counts[0], rel=0.01)
    assert found["slow_bytes"] <= room
    assert f"has {rows} samples of {found['tokens']} tokens, with slow_mode_splits={found['slow_mode_splits']}" in said


@pytest.mark.parametrize("pruner", ["random", "avg_pool", "cls_attention", "cdpruner", "visionzip", "dynamicvit"])
def test_every_pruner_can_be_measured(tmp_path, pruner):
    own = tiny_bench(tmp_path, pruner=pruner)
    for name in ("fast", "slow", "encoder", "selection", "shortening", "teacher"):
        assert own._time(name) > 0


def test_steps_leave_no_gradients_and_parts_do_not_disturb_the_model(tiny):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    for name in tiny.variants:
        tiny._time(name)
    assert all(parameter.grad is None for parameter in tiny.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())


def test_every_variant_takes_every_place():
    names = list("abcdefg")
    rounds = [bench.order(names, number) for number in range(14)]
    assert all(sorted(names_of_round) == names for names_of_round in rounds)
    for place in range(7):
        assert {names_of_round[place] for names_of_round in rounds} == set(names)


# --- growth -------------------------------------------------------------------------------------------------------


def test_growth(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_arguments, "GROWTH_TOKENS", (4, 16, 64))
    path = tmp_path / "growth.json"
    flags = ["--growth", "--text-tokens", "12", "--hidden-size", "64", "--layers", "2", "--rounds", "2"]
    assert cli.main(["bench", *flags, "--output", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [run["visual_tokens"] for run in results["runs"]] == [4, 16, 64]
    assert {run["checkpointing"] for run in results["runs"]} == {"on"}
    lines = results["growth"]
    assert lines["fitted_from"] == 16
    for run, point in zip(results["runs"], lines["memory"]["plain"]["points"], strict=True):
        assert point == {"visual_tokens": run["visual_tokens"], "median": run["memory"]["plain"]}
    last = results["runs"][-1]["memory"]["plain"] / results["runs"][-2]["memory"]["plain"]
    assert lines["memory"]["plain"]["exponent"] == pytest.approx(math.log(last) / math.log(4))
    for run in results["runs"]:
        rounds = {name: torch.tensor(values) for name, values in run["seconds_by_round"].items()}
        mix = 0.95 * rounds["fast"] + 0.05 * rounds["slow"]
        assert run["seconds"]["mix"]["median"] == pytest.approx(mix.quantile(0.5).item(), rel=1e-4)
    page = path.with_suffix(".md").read_text()
    assert bench_growth.readme_table(results) in page
    with Image.open(path.with_suffix(".png")) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0), (86, 180, 233), (153, 153, 153)} <= colours


def test_exponents_are_slopes_of_logarithms():
    points = [{"visual_tokens": n, "median": 3e-5 * n**1.7} for n in (144, 576, 2304)]
    assert bench_growth.exponent(points) == pytest.approx(1.7)
    runs = [
        {
            "checkpointing": "on",
            "visual_tokens": n,
            "seconds": {name: {"median": 5.0 + n**2} for name in ("plain", "fast", "mix")},
            "memory": dict.fromkeys(("plain", "fast", "slow"), n),
        }
        for n in (1, 1000, 4000)
    ]
    found = bench_growth.growth(runs)  # the first point, where a constant counts, is left out
    assert found["seconds"]["fast"]["exponent"] == pytest.approx(2, abs=1e-4)
    assert found["memory"]["slow"]["exponent"] == pytest.approx(1)


# --- the command line ---------------------------------------------------------------------------------------------


def test_defaults_follow_the_kind_of_measurement():
    usual, growth = parse_arguments([]), parse_arguments(["--growth"])
    assert usual.shape == ["llava-1.5", "llava-next"]
    assert usual.checkpointing == ["on", "off"]
    assert usual.output == "docs/results/bench.json"
    assert [usual.splits(name) for name in usual.checkpointing] == ["auto", 1]
    assert growth.checkpointing == ["on"]
    assert growth.output == "docs/results/bench_growth.json"
    assert [(shape.visual_tokens, growth.rows(shape)) for shape in growth.shapes()] == [
        (144, 1),
        (576, 1),
        (2304, 1),
        (9216, 1),
    ]
    given = parse_arguments(["--slow-splits", "3", "--checkpointing", "off"])
    assert [given.splits(name) for name in given.checkpointing] == [3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], r"`batch` must be in \[1, inf\), got 0\. Use --batch 1 or more"),
        (["--rounds", "1"], r"`rounds` must be in \[2"),
        (["--layers", "0"], r"`layers`"),
        (["--text-tokens", "3"], r"`text_tokens`.*--text-tokens 4"),
        (["--shape", "smolvlm", "--text-tokens", "12"], r"`text_tokens` is 12.*smolvlm has 16.*--text-tokens 20"),
        (["--threads", "0"], r"`threads`.*Leave it out"),
        (["--shape", "llava-1.5", "--image-size", "100"], r"`image_size` must be a positive multiple of 14.*Use 98"),
        (["--image-size", "98"], r"`image_size` is 98, but of llava-1\.5, llava-next.*--shape llava-1\.5"),
        (["--hidden-size", "100"], r"`hidden_size` must be a positive multiple of 64, got 100\. Use 128"),
        (["--pruning-ratio", "1"], r"`pruning_ratio` must be in \[0, 1\)"),
        (["--slow-ratio", "1.5"], r"`slow_ratio`"),
        (["--slow-splits", "many"], r"`slow_splits`.*or 'auto', got 'many'"),
        (["--pruner", "divprun"], r"`pruner`.*Did you mean 'divprune'"),
        (["--shape", "llava-1.6"], r"`shape`.*Did you mean 'llava-1\.5'"),
        (["--checkpointing", "yes"], r"`checkpointing` must be one of 'on', 'off'"),
        (["--scale", "large"], r"`scale` must be one of 'small', 'full'"),
        (["--model", "own", "--shape", "smolvlm"], r"`model` is 'own', which brings its own sizes.*or --model"),
        (["--growth", "--shape", "llava-next"], r"`growth` is measured on llava-1\.5"),
        (["--loader", "--image-size", "672"], r"`image_size` is 672, but --loader does not read it"),
        (["--loader", "--batch", "6"], r"`batch` must be a positive multiple of 4, got 6\. Use 8"),
        (["--loader", "--slow-ratio", "0.2"], r"`slow_ratio` is 0\.2, but --loader does not read it"),
        (["--profile", "--checkpointing", "on"], r"`checkpointing` is \['on'\], but --profile does not read it"),
        (["--selection", "--slow-splits", "2"], r"`slow_splits` is '2', but --selection does not read it"),
        (["--lengths", "--checkpointing", "on", "off"], r"`lengths` is measured with one setting of checkpointing"),
        (["--pruner", "fastv"], r"`pruner` is 'fastv', which drops tokens inside the language model"),
        (["--output", "bench.txt"], r"`output` must end in \.json"),
        (["--batch", "many"], r"argument --batch: invalid int value: 'many'"),
        (["--round", "3"], r"Unknown argument `--round`\. Did you mean '--rounds'"),
    ],
)
def test_bad_flags_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_real_sizes_need_a_gpu_or_few_layers(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="`scale` is 'full', but PyTorch finds no GPU.*or give --layers 2"):
        bench.measure(parse_arguments(["--scale", "full"]))


def test_memory_that_runs_out_is_named(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no room.")

    monkeypatch.setattr(bench.Bench, "step", full)
    with pytest.raises(ValueError, match="llava-1.5 with a batch of 1 and checkpointing on.*no room.*smaller --batch"):
        bench.measure(BenchArguments(**TINY, shape=["llava-1.5"], batch=1))


def test_nothing_to_render_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json.*Measure first"):
        main(["--render-only", "--output", str(tmp_path / "none.json")])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--pruning-ratio" in out
    assert "a round of llava-1.5 takes" in out


def test_make_measures_what_the_result_files_hold(monkeypatch):
    """`make bench` and `make bench-gpu` regenerate them; older files differ in the ratio of slow steps."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").replace("$(GPU)", "h100")
    variables = dict(re.findall(r"^(\w+) := (.*)$", text, re.MULTILINE))
    for name in ("BENCH_LENGTHS", "BENCH_GPU"):
        text = text.replace(f"$({name})", variables[name])
    monkeypatch.chdir(ROOT)
    measured = set()
    for line in re.findall(r"^\t\$\(BIN\)/dualspeed bench (.*)", text, re.MULTILINE):
        options = parse_arguments(line.split())
        results = json.loads(Path(options.output).read_text())
        assert results["rounds"] == options.rounds, line
        assert results["runs"][0]["shape"] == options.shape[0]
        if options.kind != "loader":
            told = {key: value for key, value in results["settings"].items() if key != "slow_ratio"}
            assert told.items() <= options.recorded().items(), line
            assert {run["batch"] for run in results["runs"]} == {options.rows(shape) for shape in options.shapes()}
        measured.add(Path(options.output).name)
    kept = {path.name for path in (ROOT / "docs/results").glob("bench*.json")}
    assert kept - measured == {"bench_same_memory.json", "bench_h100_profile.json"}  # by commands that pages name
