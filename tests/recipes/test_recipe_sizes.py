"""The batch of a recipe for one GPU fits into it, by the steps that `dualspeed estimate` measures without data."""

import math
import re
from pathlib import Path

import pytest
import yaml
from recipe_cases import ROOT
from transformers import AutoConfig

from hf_dualspeed.bench import estimate as est
from hf_dualspeed.bench.on_paper import RECOMPUTED, Steps, without_data
from hf_dualspeed.bench.samples import sample_from_config

CONFIGS = ROOT / "docs" / "results" / "configs"
MODELS = {
    "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": "smolvlm2-500m",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2.5-vl-3b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3-vl-8b",
}
CARD = re.compile(r"on one GPU of (\d+) GB")


def head_of(path: Path) -> str:
    """The comment at the head of a recipe, in one line."""
    return " ".join(path.read_text().partition("model_name_or_path")[0].replace("#", " ").split())


ONE_GPU = [path for path in sorted((ROOT / "trainer_configs").glob("*.yaml")) if CARD.search(head_of(path))]
QUICK = ("smolvlm_8gb",)


def longest_sample(keys: dict, config) -> est.Settings:
    """A sample as long as the recipe allows, with a picture as large as it allows."""
    width = math.isqrt(keys.get("max_pixels", 1024 * 768) * 4 // 3)
    size, words = (width, width * 3 // 4), 4
    text = keys["max_length"] - (sample_from_config(config, *size, words)["input_ids"].shape[1] - words)
    return est.Settings(size, text, keys["pruning_ratio"], keys["slow_mode_ratio"], lora_rank=keys["lora"]["r"])


def needed(keys: dict, folder: Path) -> dict[str, float]:
    """GiB that the weights, gradients and optimizer of a recipe take, and with each kind of its steps."""
    config = AutoConfig.from_pretrained(CONFIGS / f"{MODELS[keys['model_name_or_path']]}.json")
    settings = longest_sample(keys, config)
    sample = est.Subject("recipe", config, None).sample(settings)
    train = "qlora" if keys.get("load_in_4bit") else "lora"
    _, held = est.trained_model(config, train, settings)
    rows, kinds, depths = keys["per_device_train_batch_size"], [f"{m}{RECOMPUTED}" for m in ("fast", "slow")], {}
    for depth in est.depths_of(config):
        model, _ = est.trained_model(est.shallow(config, depth), train, settings)
        steps = Steps(without_data(model), sample, str(folder), keys["pruning_ratio"], True, True)
        steps.need("fast", 1)  # tells how long its samples are
        needs = {kind: steps.need(kind, rows) for kind in kinds}
        depths[depth] = {kind: {"encoder": need.encoder, "rest": need.rest} for kind, need in needs.items()}
    peaks = est.deeper(*depths.items(), est.layers_of(config))
    state = sum(held[f"{name}_bytes"] for name in ("weights", "gradients", "optimizer"))
    found = {"held": state, **{kind: state + max(peak.values()) for kind, peak in peaks.items()}}
    return {name: size / est.GIB for name, size in found.items()}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow, id=path.stem) for path in ONE_GPU],
)
def test_a_recipe_fits_into_its_gpu(path, tmp_path):
    keys, card = yaml.safe_load(path.read_text()), float(CARD.search(head_of(path))[1])
    # What is measured is what the recipe sets.
    assert all(keys[name] for name in ("activation_checkpointing", "fast_mode_checkpointing", "bf16"))
    assert keys["slow_mode_splits"] == "auto"
    assert not any(keys[name] for name in ("train_vision_tower", "train_projector"))
    found = needed(keys, tmp_path)
    assert max(found.values()) <= est.USABLE * card, found
    # What its head says of the memory.
    said = re.findall(r"(\d+\.\d) GiB", head_of(path))
    assert [float(number) for number in said[:3]] == pytest.approx(list(found.values()), rel=0.15)
