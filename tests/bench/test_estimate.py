import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_cases import TINY, tiny_bench
from tiny import IMAGE_SIZE, PATCH_SIZE
from tiny_models import FAMILIES
from tiny_processors import FAMILIES as PROCESSORS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
)

from hf_dualspeed import cli
from hf_dualspeed.bench import estimate as est
from hf_dualspeed.bench import on_paper, repeats, samples
from hf_dualspeed.bench.on_paper import Counts, Steps, empty_model, without_data
from hf_dualspeed.bench.samples import sample_from_config
from hf_dualspeed.bench.shapes import IMAGE_ID, SHAPES, given_batch
from hf_dualspeed.commands import estimate as command
from hf_dualspeed.models.components import freeze_roles
from hf_dualspeed.models.interface import unwrap, visual_token_ids

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SETTINGS = est.Settings((80, 40), 30, 0.5)
STEPS = ("plain", "fast", "slow")
# Of each shape: an edge of the image in pixels that gives few tokens, with little text.
PIXELS = {"llava-1.5": 56, "llava-next": 56, "qwen2.5-vl": 448}


def small_config(**extra) -> LlavaConfig:
    text = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2}
    vision = {**text, "hidden_size": 32, "intermediate_size": 64, "image_size": 56, "patch_size": 14}
    parts = {
        "text_config": {"model_type": "llama", "vocab_size": 128, **text},
        "vision_config": {"model_type": "clip_vision_model", **vision},
    }
    return LlavaConfig(**parts, image_token_index=IMAGE_ID, **extra)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.json"
    path.write_text(json.dumps(small_config().to_dict()))
    return path


@pytest.fixture(scope="module")
def found(config_file):
    """An estimate of a small model."""
    return est.estimate(est.subject_of(str(config_file)), SETTINGS, "full", "on")


# --- against what is measured on real tensors -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "train", "checkpointing"),
    [
        ("llava-1.5", "full", "on"),
        ("llava-next", "full", "off"),
        ("qwen2.5-vl", "lora", "on"),
    ],
)
def test_memory_and_operations_are_those_of_real_steps(tmp_path, shape, train, checkpointing):
    rows, edge = 6, PIXELS[shape]
    options = {**TINY, "image_size": edge if shape == "llava-1.5" else None, "text_tokens": 40, "batch": rows}
    like = None if shape == "llava-1.5" else replace(SHAPES[shape], image_size=edge)  # its size alone is an option
    options |= {"shape": [shape], "pruning_ratio": 0.8, "slow_splits": "auto", "lora": train == "lora"}
    real = tiny_bench(tmp_path, checkpointing, like, pruner="random", **options)
    settings = est.Settings(
        (2 * edge, 2 * edge) if shape == "llava-next" else (edge, edge), 40, 0.8, 0.1, "float32", 128
    )
    subject = est.Subject(shape, real.subject.model.config, None)
    (run,) = est.estimate(subject, settings, train, checkpointing)["runs"]
    parameters = list(real.model.parameters())
    if train == "lora":  # the bench's trains the projector, too
        freeze_roles(unwrap(real.model), train_projector=False)
    gradients = sum(p.nbytes for p in parameters if p.requires_grad)
    assert run["gradients_bytes"] == pytest.approx(gradients, rel=0.15)
    assert run["weights_bytes"] == pytest.approx(sum(p.nbytes for p in parameters), rel=0.15)
    batch = sum(value.nbytes for value in real.batch.values())
    for name in STEPS:
        assert est.activations(run, name, rows) == pytest.approx(real.count_memory(name) + batch, rel=0.15), name
        assert rows * run["flops"][name] == pytest.approx(real.count_flops(name), rel=0.15), name


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_steps_without_data_are_equal_to_steps_with(tmp_path, checkpointing):
    config = small_config()
    sample = sample_from_config(config, 80, 40, 30)
    torch.manual_seed(0)
    real, paper = LlavaForConditionalGeneration(config), empty_model(config, torch.float32)
    both = [Steps(model, sample, str(tmp_path), 0.5, checkpointing == "on") for model in (real, without_data(paper))]
    both[0].need("fast", 1)  # the first step of a process makes what later ones find
    for name in (*STEPS, "fast_recomputed", "slow_recomputed"):
        first, second = (steps.need(name, 3) for steps in both)
        assert first == second, name


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_frozen_blocks_are_counted_once_for_all(tmp_path, name, monkeypatch):
    """The six blocks of a tower do not run in each step, which needs the same as if they had."""
    config, measured, runs, needs = FAMILIES[name].build()[0].config, repeats.measured, [], []
    setattr(config.vision_config, "depth" if name == "qwen2_5_vl" else "num_hidden_layers", 6)
    sample = sample_from_config(config, 64, 48, 30)
    monkeypatch.setattr(repeats, "measured", lambda *args: runs.append(1) or measured(*args))
    for repeat in (repeats.repeat_blocks, lambda model: None):
        monkeypatch.setattr(on_paper, "repeat_blocks", repeat)
        model = empty_model(config, torch.bfloat16)
        freeze_roles(model, train_projector=False)
        steps = Steps(without_data(model), sample, str(tmp_path), 0.5, True, True)
        steps.need("fast", 1)  # the first step of a process makes what later ones find
        needs.append([steps.need(kind, 2) for kind in ("fast", "slow", "plain")])
    assert needs[0] == needs[1]
    assert 0 < len(runs) <= 8


def test_blocks_that_learn_or_return_their_input_run_each_time():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, device="meta")

        def forward(self, x):
            calls.append(1)
            return x

    class Other(Same):
        def forward(self, x):
            calls.append(1)
            return self.layer(x)

    for kind, learns, expected in ((Same, False, 3), (Other, True, 3), (Other, False, 1)):
        calls, blocks = [], nn.ModuleList([kind() for _ in range(3)]).requires_grad_(False)
        with FakeTensorMode(allow_non_fake_inputs=True):
            blocks.to_empty(device="cpu")
            x = torch.empty(2, 4)
        known = {}
        for block in blocks:
            block.forward = repeats.repeated(block.forward, repeats.kind_of(block), block.layer.weight, known)
        with Counts([x, *blocks.parameters()]) as counts:
            for block in blocks:
                y = block(x.clone().requires_grad_(learns))
        assert len(calls) == expected
        assert y.shape == (2, 4)
        assert counts.flops == (0 if kind is Same else 3 * 2 * 2 * 4 * 4)


def test_a_gpu_at_7_b_measured_the_same():
    """The published table's activations, against those that the bench measured on an H100."""
    models = json.loads((RESULTS / "memory.json").read_text())["models"]
    (found,) = [found for found in models if found["model"] == "llava-1.5-7b"]
    (run,) = [run for run in found["runs"] if (run["train"], run["checkpointing"]) == ("full", "on")]
    bench = json.loads((RESULTS / "bench_h100_llava_1_5.json").read_text())["runs"]
    (real,) = [run for run in bench if run["checkpointing"] == "on"]
    assert (found["visual_tokens"], found["settings"]["text_tokens"]) == (real["visual_tokens"], real["text_tokens"])
    for name in STEPS:
        assert est.activations(run, name, real["batch"]) == pytest.approx(real["memory"][name], rel=0.15), name
    assert run["weights_bytes"] == pytest.approx(real["weights_bytes"], rel=0.01)
    assert run["gradients_bytes"] == pytest.approx(real["gradients_bytes"], rel=0.01)


# As docs/results/configs/README.md has them, with where each was found.
PUBLISHED = {
    "gemma-3-4b": 4_300_079_472,
    "internvl3-2b": 2_088_957_440,
    "llava-1.5-7b": 7_063_427_072,
    "llava-v1.6-vicuna-7b": 7_063_427_072 + 4096,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
    "smolvlm2-500m": 507_482_304,
}


def test_published_configs_have_the_published_parameters():
    files = sorted((RESULTS / "configs").glob("*.json"))
    counts = {file.stem: sum(est.parameters_of(est.subject_of(str(file)).config).values()) for file in files}
    assert counts == PUBLISHED


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_weights_gradients_and_moments_follow_from_the_parameters(found):
    model = empty_model(small_config(), torch.bfloat16)
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    every = sum(p.numel() for p in model.parameters())
    full, lora, qlora = (est.trained_model(small_config(), train, SETTINGS)[1] for train in est.TRAINS)
    assert full.items() <= found["runs"][0].items()
    assert sum(found["parameters"].values()) == every
    assert found["parameters"]["vision_tower"] == tower
    assert full["trainable"] == every - tower
    assert (full["weights_bytes"], full["gradients_bytes"]) == (2 * every, 2 * (every - tower))
    assert full["optimizer_bytes"] == 2 * full["gradients_bytes"]
    # Rank 16 on the seven linear layers of each of two blocks, in float32.
    adapters = 2 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
    assert lora["trainable"] == qlora["trainable"] == adapters
    assert lora["weights_bytes"] == 2 * every + 4 * adapters
    assert lora["gradients_bytes"] == 4 * adapters
    # Linear layers but the head in 4 bits and their scales; embeddings, head, norms and convolution in float32.
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    linear = sum(m.weight.numel() for m in layers)
    expected = linear * (0.5 + 1 / 64 + 4 / 16384) + 4 * (every - linear) + 4 * adapters
    assert qlora["weights_bytes"] == pytest.approx(expected, abs=1)


def test_pruned_tokens_are_told(found):
    assert (found["visual_tokens"], found["kept_tokens"]) == (16, 8)
    assert found["tokens"] == 46
    assert found["sample_from"] == "config"


def test_the_largest_batch_is_the_last_that_fits(found):
    run = found["runs"][0]
    for way in est.ways(run):
        gib = est.needed(run, way, 37) / est.USABLE / est.GIB
        assert est.largest(run, way, gib * 1.0001) == 37
        assert est.largest(run, way, gib * 0.9999) == 36
    assert est.largest(run, "plain", 1e-6) == 0
    assert est.samples(est.largest(run, "plain", 1e6)) == "1024+"


def test_activations_lie_on_lines():
    run = {"activation_bytes": {"fast": {"1": 10, "8": 80}, "slow": {"1": 10, "3": 50, "12": 140}}}
    run |= {"tokens": 776, "fast_tokens": 262}
    assert [est.activations(run, "fast", rows) for rows in (1, 2, 8, 24)] == [10, 20, 80, 240]
    # Parts of one sample up to four, of three in batches of eight, of four in batches of twelve.
    assert [est.part_rows(run, rows) for rows in (1, 2, 3, 4, 8, 12, 24)] == [1, 1, 1, 1, 3, 4, 8]
    assert [est.activations(run, "slow", rows) for rows in (1, 2, 3, 4, 8, 12, 24)] == [10, 30, 50, 50, 110, 140, 260]


def test_parts_are_those_of_the_trainer(tmp_path):
    own = tiny_bench(tmp_path, "on", slow_splits="auto", pruner="random", pruning_ratio=0.9)
    clock, length = own.dual.clock, own.batch["input_ids"].shape[1]
    per_sample = clock.fast_tokens // len(own.batch["input_ids"])
    run = {"tokens": length, "fast_tokens": per_sample}
    for rows in range(1, 20):
        clock.fast_tokens = rows * per_sample
        batch = {key: value[:1].repeat(rows, 1) for key, value in own.batch.items() if key != "pixel_values"}
        parts, small = own.dual._slow_parts(own.model, batch, own.items)
        assert est.part_rows(run, rows) == -(-rows // parts)
        assert small == (rows >= est.few_rows(run))


def test_two_shallow_models_stand_for_a_deep_one(tmp_path):
    config = small_config()
    config.text_config.num_hidden_layers = 9
    settings = replace(SETTINGS, dtype="float32")
    assert est.depths_of(config) == (3, 6)
    (quick,) = est.estimate(est.Subject("deep", config, None), settings, "full", "off")["runs"]
    model, _ = est.trained_model(config, "full", settings)
    sample = sample_from_config(config, 80, 40, 30)
    steps = Steps(without_data(model), sample, str(tmp_path), 0.5, False)
    for name in ("plain", "fast"):
        need = steps.need(name, 8)
        assert quick["activation_bytes"][name]["8"] == pytest.approx(need.bytes, rel=0.02)
        assert quick["flops"][name] == pytest.approx(need.flops / 8, rel=1e-6)


def test_a_tower_s_peak_does_not_hide_the_layers(tmp_path):
    """With few layers encoding needs most, with all of them they do."""
    config = small_config()
    config.text_config.num_hidden_layers = 24
    config.vision_config.image_size, config.vision_config.intermediate_size = 112, 2048
    settings = replace(SETTINGS, image_size=(112, 112), text_tokens=8, pruning_ratio=0.9, dtype="float32")
    (quick,) = est.estimate(est.Subject("deep", config, None), settings, "full", "off")["runs"]
    needs = []
    for layers in (6, 24):
        model, _ = est.trained_model(est.shallow(config, layers), "full", settings)
        sample = sample_from_config(config, 112, 112, 8)
        needs.append(Steps(without_data(model), sample, str(tmp_path), 0.9, False).need("fast", 8))
    assert needs[0].bytes == needs[0].encoder > needs[0].rest
    assert needs[1].bytes == needs[1].rest > needs[1].encoder
    assert quick["activation_bytes"]["fast"]["8"] == pytest.approx(needs[1].bytes, rel=0.02)


def test_models_of_unlike_layers_are_measured_whole():
    config = Gemma3Config(text_config={"num_hidden_layers": 26})
    assert est.depths_of(config) == (6, 12)  # five layers of sliding attention, one of full
    assert est.shallow(config, 6).text_config.layer_types == config.text_config.layer_types[:6]
    assert config.text_config.num_hidden_layers == 26
    assert est.depths_of(small_config()) == (2,)


def test_expected_speed_ups_are_what_a_gpu_reached_of_the_limit(found):
    folder = Path(__file__).parents[2] / "docs/results"
    runs = [run for path in folder.glob("bench_h100_llava_*.json") for run in json.loads(path.read_text())["runs"]]
    shares = [run["ratios"]["share_of_limit"]["median"] for run in runs]
    assert est.REACHED == (round(min(shares), 2), round(max(shares), 2))
    (run, *_) = found["runs"]
    low, high = (float(word) for word in est.expected(run, 0.05).removesuffix(" x").split(" to "))
    limit = est.speedup(run, "ours", 0.05)
    assert (low / limit, high / limit) == pytest.approx(est.REACHED, abs=0.05)


def test_fewer_operations_are_the_limit(found):
    run = found["runs"][0]
    flops = run["flops"]
    assert est.speedup(run, "ours", 0.25) == flops["plain"] / (0.75 * flops["fast"] + 0.25 * flops["slow"])
    assert est.speedup(run, "recomputed", 0.0) == flops["plain"] / flops["fast_recomputed"]
    assert flops["fast"] < flops["fast_recomputed"] < flops["plain"]


# --- samples ----------------------------------------------------------------------------------------------------------

SQUARE = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}


def config_like(name: str, processor):
    """A configuration for a tiny processor."""
    if name in FAMILIES:
        return FAMILIES[name].build()[0].config
    token = processor.tokenizer.convert_tokens_to_ids
    if name == "gemma3":
        marks = {"boi_token_index": token("<start_of_image>"), "eoi_token_index": token("<end_of_image>")}
        return Gemma3Config(
            vision_config=SQUARE, image_token_index=token("<image_soft_token>"), mm_tokens_per_image=4, **marks
        )
    if name == "internvl":
        processor.image_processor.max_patches = 12
        edges = {key: [value] * 2 for key, value in SQUARE.items()}
        return InternVLConfig(vision_config=edges, image_token_id=token("<IMG_CONTEXT>"), image_seq_length=4)
    return Idefics3Config(vision_config=SQUARE, image_token_id=token("<image>"), scale_factor=2)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3", "idefics3", "internvl"])
def test_a_configuration_alone_gives_what_the_processor_gives(name, monkeypatch):
    monkeypatch.setattr(samples, "QWEN2_PIXELS", (8 * 8, 32 * 32))
    monkeypatch.setattr(samples, "IDEFICS_EDGE", 2)
    processor = FAMILIES[name].processor() if name in FAMILIES else PROCESSORS[name].build("right")
    config = config_like(name, processor)
    for width, height in ((40, 24), (16, 16), (20, 44)):
        made = given_batch(processor, 1, 20, width, height)
        alone = sample_from_config(config, width, height, 20)
        assert alone.keys() == made.keys()
        ids = torch.tensor(visual_token_ids(config))
        visual = [torch.isin(batch["input_ids"], ids).sum() for batch in (alone, made)]
        assert visual[0] == visual[1]
        for key in alone.keys() - {"input_ids", "attention_mask", "labels", *samples.TYPE_IDS.values()}:
            assert alone[key].shape == made[key].shape, key
        assert (alone["labels"] != -100).sum() == 10


def test_other_families_are_refused_with_the_remedy(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PaliGemmaConfig().to_dict()))
    assert cli.main(["estimate", str(path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "no processor beside the config of this 'paligemma' model" in said
    assert "Put the processor's files" in said


def test_a_folder_s_processor_makes_the_sample(tmp_path):
    model, processor = FAMILIES["llava"].build()
    model.config.save_pretrained(tmp_path)
    assert est.subject_of(str(tmp_path)).processor is None
    processor.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")  # nothing reads them
    subject = est.subject_of(str(tmp_path))
    settings = est.Settings((30, 20), 20, 0.5, 0.1)
    found = est.estimate(subject, settings, "full", "off")
    assert found["sample_from"] == "processor"
    assert found["visual_tokens"] == (IMAGE_SIZE // PATCH_SIZE) ** 2
    assert found["kept_tokens"] == found["visual_tokens"] // 2
    assert list(est.ways(found["runs"][0])) == ["plain", "ours"]


# --- the command ------------------------------------------------------------------------------------------------------

FLAGS = [
    "--image_size",
    "80x40",
    "--text_tokens",
    "30",
    "--pruning_ratio",
    "0.5",
    "--train",
    "full",
    "--gpu",
    "1gb",
    "2",
]


@pytest.fixture
def measured_before(found, monkeypatch):
    """The command finds what another estimate has found."""
    seen = []

    def estimate(subject, settings, train, checkpointing, say):
        seen.append((subject.name, settings, train, checkpointing))
        run = {**found["runs"][0], "train": train, "checkpointing": checkpointing}
        return {**found, "model": subject.name, "settings": est.as_json(settings), "runs": [run]}

    monkeypatch.setattr(command, "estimate", estimate)
    return seen


def test_tables_results_and_page(measured_before, config_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path, page = tmp_path / "memory.json", tmp_path / "page.md"
    other = tmp_path / "other.json"
    shutil.copy(config_file, other)
    page.write_text("Before\n<!-- memory-table-start -->\nold\n<!-- memory-table-end -->\nAfter\n")
    assert cli.main(["estimate", str(config_file), *FLAGS, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "16 visual tokens, 8 after pruning 50%" in " ".join(printed.split())
    assert re.search(r"full, [\d.]+ k", printed)
    assert cli.main(["estimate", str(other), *FLAGS, "--json", str(path), "--page", str(page)]) == 0
    results = json.loads(path.read_text())
    assert [found["model"] for found in results["models"]] == ["other", "small"]
    assert [len(found["runs"]) for found in results["models"]] == [1, 1]
    assert results["gpus"] == [1.0, 2.0]
    assert str(tmp_path) not in path.read_text()
    assert page.read_text() == (
        f"Before\n<!-- memory-table-start -->\n{est.readme_table(results)}\n<!-- memory-table-end -->\nAfter\n"
    )
    row = re.search(r"\| small, .*", page.read_text())[0]
    assert "| 80 x 40 | 16 → 8 | full, 0 M | 0.0 | 0.0 |" in row


def test_a_table_says_what_holds_for_all_of_its_rows(monkeypatch):
    for name in ("batches", "limits"):
        monkeypatch.setattr(est, name, lambda *given: "1")
    run = {"train": "full", "trainable": 10, "weights_bytes": 1, "gradients_bytes": 1, "optimizer_bytes": 1}
    runs = [{**run, "checkpointing": setting} for setting in ("on", "off")]
    model = {"model": "a", "parameters": {"projector": 10}, "visual_tokens": 8, "kept_tokens": 4, "runs": runs}
    models = [
        {**model, "versions": {"torch": torch, "transformers": "5"}, "settings": {**est.as_json(SETTINGS), **other}}
        for torch, other in (("2", {}), ("2", {"image_size": [8, 8]}), ("3", {"text_tokens": 500}))
    ]
    table = est.readme_table({"models": models[:2], "gpus": [24.0]})
    assert "activation checkpointing on and off, 30 text tokens" in table
    assert [table.count(f"| full, 0 M, checkpointing {setting} |") for setting in ("on", "off")] == [2, 2]
    with pytest.raises(ValueError, match="The estimates differ in torch, text_tokens, which stand above the table"):
        est.readme_table({"models": models, "gpus": [24.0]})


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"models": [1]}', '{"models": [{"model": "a"}]}'])
def test_a_file_of_something_else_is_named_before_anything_is_read(tmp_path, capsys, text):
    path = tmp_path / "memory.json"
    path.write_text(text)
    assert cli.main(["estimate", "no/model", "--json", str(path)]) == 2
    assert "holds no results of `dualspeed estimate`" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == text


def test_json_alone_is_printed(measured_before, config_file, capsys):
    assert cli.main(["estimate", str(config_file), *FLAGS, "--checkpointing", "off", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert (found["model"], found["kind"]) == ("small", "llava")
    assert measured_before == [("small", SETTINGS, "full", "off")]


def test_further_ways_to_train_join_those_in_the_file(found):
    runs = [{**found["runs"][0], "train": train} for train in est.TRAINS]
    first, second, third = ({**found, "runs": [run]} for run in runs)
    (both,) = command.joined(command.joined([], third), first)
    assert [run["train"] for run in both["runs"]] == ["full", "qlora"]
    assert (
        command.joined([both], {**second, "settings": {**found["settings"], "lora_rank": 8}})[1]["runs"]
        == second["runs"]
    )
    assert command.joined([both], third) == [both]


def test_ways_to_train_keep_the_versions_that_made_them(found):
    """So that `--resume` measures each of them anew."""
    runs = [{**found["runs"][0], "train": train} for train in est.TRAINS]
    models = [{**found, "versions": {**found["versions"], "torch": "0"}, "runs": runs}]
    for number, run in enumerate(runs):
        models = command.joined(models, {**found, "runs": [run]})
        made = {run["train"]: model["versions"]["torch"] for model in models for run in model["runs"]}
        new = [train for train, torch in made.items() if torch != "0"]
        assert sorted(new) == sorted(est.TRAINS[: number + 1])
        assert made.keys() == set(est.TRAINS)
    assert models == [{**found, "runs": runs}]


def test_a_call_goes_on_where_another_ended(measured_before, config_file, tmp_path):
    path = str(tmp_path / "memory.json")
    words = ["estimate", str(config_file), *FLAGS, "--json", path]
    for further in ([], ["--resume"], ["--checkpointing", "on", "off", "--resume"], ["--lora_rank", "8", "--resume"]):
        assert cli.main([*words, *further]) == 0
    assert [seen[3] for seen in measured_before] == ["on", "off", "on"]
    results = json.loads(Path(path).read_text())
    results["models"][0]["versions"]["torch"] = "0"
    Path(path).write_text(json.dumps(results))
    assert cli.main([*words, "--resume"]) == 0
    assert len(measured_before) == 4  # of other versions


def test_calls_at_the_same_time_share_a_file(config_file, tmp_path, monkeypatch):
    common = {"parameters": {}, "versions": {}}
    path, other = tmp_path / "memory.json", {"model": "other", "settings": {}, "runs": [], **common}

    def estimate(subject, settings, train, checkpointing, say):
        path.write_text(json.dumps({"models": [other], "gpus": [1.0]}))  # another call ends meanwhile
        run = {"train": train, "checkpointing": checkpointing}
        return {"model": subject.name, "settings": est.as_json(settings), "runs": [run], **common}

    monkeypatch.setattr(command, "estimate", estimate)
    monkeypatch.setattr(command, "show", lambda *shown: None)
    assert cli.main(["estimate", str(config_file), *FLAGS, "--json", str(path)]) == 0
    assert [found["model"] for found in json.loads(path.read_text())["models"]] == ["other", "small"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--resume"], r"`resume` needs a --json file"),
        ([], r"`model` is missing. Name a Hub id"),
        (["--page", "page.md"], r"--page needs a --json file"),
        (["m", "--gpu", "big"], r"`gpu` must be sizes such as 24gb, got 'big'"),
        (["m", "--image_size", "0x3"], r"`image_size` must be pixels such as 1024x768, got '0x3'"),
        (["m", "--pruning_ratio", "1"], r"`pruning_ratio` must be in \[0, 1\)"),
        (["m", "--slow_mode_ratio", "2"], r"`slow_mode_ratio` must be in \[0, 1\]"),
        (["m", "--text_tokens", "2"], r"`text_tokens` must be in \[4"),
        (["m", "--lora_rank", "0"], r"`lora_rank` must be in \[1"),
        (["m", "--train", "dora"], r"argument --train: invalid choice: 'dora'"),
        (["m", "--ratio", "2"], r"unrecognized arguments: --ratio"),
    ],
)
def test_bad_flags_are_named(words, message, capsys):
    assert cli.main(["estimate", *words]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_a_page_without_a_place_is_an_error(tmp_path):
    (tmp_path / "memory.json").write_text(json.dumps({"models": [], "gpus": []}))
    (tmp_path / "page.md").write_text("nothing")
    words = ["--json", str(tmp_path / "memory.json"), "--page", str(tmp_path / "page.md")]
    assert cli.main(["estimate", *words]) == 2
