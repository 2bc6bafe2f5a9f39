import json

import pytest
import torch
from PIL import Image

from hf_dualspeed import bench, bench_report, cli
from hf_dualspeed.bench import BenchArguments, parse_arguments

# 16 visual tokens: 8 of them stay at a ratio of 0.5.
TINY = {"batch": 2, "image_size": 32, "patch_size": 8, "text_tokens": 12, "hidden_size": 64, "layers": 2}
FLAGS = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results" / "bench.json"
    words = [*FLAGS, "--rounds", "2", "--pruning-ratio", "0.5", "--threads", "1", "--output", str(path)]
    threads = torch.get_num_threads()
    assert cli.main(["bench", *words]) == 0
    assert torch.get_num_threads() == threads
    return path, json.loads(path.read_text())


@pytest.fixture
def tiny(tmp_path):
    return bench.Bench(BenchArguments(**TINY, pruning_ratio=0.5), str(tmp_path))


def test_results_name_what_was_measured(measured):
    path, results = measured
    assert str(path.parent) not in path.read_text()
    assert results["dtype"] == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert results["machine"]["threads"] == 1
    assert results["settings"]["pruner"] == "divprune"
    assert results["shape"]["visual_tokens"] == 16
    assert results["shape"]["supervised_tokens"] == 6
    assert {"machine", "versions", "date", "seeds", "flop_counting"} <= results.keys()
    for name in (*bench.STEPS, *bench_report.PARTS):
        summary = results["seconds"][name]
        assert len(results["seconds_by_round"][name]) == results["rounds"] == 2
        assert 0 < summary["q1"] <= summary["median"] <= summary["q3"]
    for target in results["targets"]:
        assert target["met"] == (target["value"] <= target["limit"])


def test_slow_steps_without_distillation_compute_the_plain_loss(measured):
    losses = measured[1]["losses"]
    tolerance = 1e-2 if torch.cuda.is_available() else 1e-5
    assert losses["slow_without_distillation"] == pytest.approx(losses["plain"], rel=tolerance)
    assert losses["slow"] > losses["slow_without_distillation"]


def test_shares_add_up_in_every_round(measured):
    results = measured[1]
    rounds = {name: torch.tensor(values) for name, values in results["seconds_by_round"].items()}
    shares = {part: rounds[part] / rounds["fast"] for part in bench_report.PARTS}
    rest = 1 - sum(shares.values())
    assert results["ratios"]["rest_share"]["median"] == pytest.approx(rest.quantile(0.5).item(), abs=1e-5)
    for part, share in shares.items():
        assert results["ratios"][f"{part}_share"]["median"] == pytest.approx(share.quantile(0.5).item(), abs=1e-5)


def test_report_is_rendered_anew(measured, capsys):
    path, _ = measured
    before = path.read_text()
    for suffix in (".md", ".png"):
        path.with_suffix(suffix).unlink()
    assert cli.main(["bench", "--render-only", "--output", str(path)]) == 0
    assert path.read_text() == before
    assert "Expected speed-up with 10% slow steps" in " ".join(capsys.readouterr().out.split())
    page = path.with_suffix(".md").read_text()
    assert "![Step times](bench.png)" in page
    assert "| Trainer |" in page
    with Image.open(path.with_suffix(".png")) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0), (86, 180, 233), (153, 153, 153)} <= colours


def test_flops_of_the_plain_step_are_those_of_its_layers(tiny):
    model, rows, visual, sequence = tiny.model, TINY["batch"], 16, 16 + TINY["text_tokens"]
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


def test_attention_is_counted_on_the_cpu(tiny):
    if tiny.device.type != "cpu":
        pytest.skip("the formula is for the CPU's kernel")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        tiny.step("plain")
    rows, sequence, width, layers = (
        TINY["batch"],
        16 + TINY["text_tokens"],
        TINY["hidden_size"],
        TINY["layers"],
    )
    language_attention = 2 * rows * sequence**2 * width * layers * (2 + 5)
    assert tiny.count_flops("plain") - counter.get_total_flops() >= language_attention


def test_steps_compare_as_their_tokens_do(tiny):
    flops = {name: tiny.count_flops(name) for name in bench.STEPS}
    assert flops["fast"] < flops["slow_without_distillation"] < flops["plain"]
    # The teacher runs forward only.
    assert flops["slow_without_distillation"] < flops["slow"] < flops["slow_without_distillation"] + flops["fast"]


def test_steps_leave_no_gradients_and_parts_do_not_disturb_the_model(tiny):
    before = {name: value.clone() for name, value in tiny.trainers["fast"].model.state_dict().items()}
    for name in tiny.variants:
        tiny._time(name)
    model = tiny.trainers["fast"].model
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("pruner", ["random", "avg_pool", "cdpruner", "visionzip", "dynamicvit"])
def test_every_pruner_can_be_measured(tmp_path, pruner):
    tiny = bench.Bench(BenchArguments(**TINY, pruning_ratio=0.5, pruner=pruner), str(tmp_path))
    for name in ("fast", "slow", "encoder", "selection", "shortening"):
        assert tiny._time(name) > 0


def test_every_variant_takes_every_place():
    names = list("abcdefg")
    rounds = [bench.order(names, number) for number in range(14)]
    assert all(sorted(names_of_round) == names for names_of_round in rounds)
    for place in range(7):
        assert {names_of_round[place] for names_of_round in rounds} == set(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], r"`batch` must be in \[1, inf\), got 0\. Use --batch 1 or more"),
        (["--rounds", "1"], r"`rounds` must be in \[2"),
        (["--layers", "0"], r"`layers`"),
        (["--text-tokens", "3"], r"`text_tokens`.*--text-tokens 4"),
        (["--threads", "0"], r"`threads`.*Leave it out"),
        (["--image-size", "100"], r"`image_size` must be a positive multiple of 14, got 100\. Use 98"),
        (["--patch-size", "0"], r"`patch_size`"),
        (["--hidden-size", "100"], r"`hidden_size` must be a positive multiple of 64, got 100\. Use 128"),
        (["--pruning-ratio", "1"], r"`pruning_ratio` must be in \[0, 1\)"),
        (["--slow-ratio", "1.5"], r"`slow_ratio`"),
        (["--pruner", "divprun"], r"`pruner`.*Did you mean 'divprune'"),
        (["--pruner", "fastv"], r"`pruner` is 'fastv', which drops tokens inside the language model"),
        (["--output", "bench.txt"], r"`output` must end in \.json"),
        (["--batch", "many"], r"argument --batch: invalid int value: 'many'"),
        (["--round", "3"], r"Unknown argument `--round`\. Did you mean '--rounds'"),
    ],
)
def test_bad_flags_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(words)


def test_nothing_to_render_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json.*Measure first"):
        bench.main(["--render-only", "--output", str(tmp_path / "none.json")])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--help"])
    assert stop.value.code == 0
    assert "--pruning-ratio" in capsys.readouterr().out
