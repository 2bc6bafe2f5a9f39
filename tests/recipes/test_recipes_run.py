"""Every recipe trains: its own settings, on a tiny LLaVA and pictures of its own, for a fast and a slow step."""

import json

import pytest
import yaml
from PIL import Image
from recipe_cases import ROOT, TINY

from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.recipes.run import run_recipe

# What names a model or files that are not there, and what only a large model or a GPU needs. Weights of 4 bits and
# bfloat16 have tests of their own.
LEFT_OUT = ("model_name_or_path", "dtype", "bf16", "load_in_4bit", "max_pixels", "max_length", "card_images")
LEFT_OUT += ("dataset_split", "eval_split", "eval_limit")
SHORT = {
    "max_steps": 2,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 2,
    "dataloader_num_workers": 0,
}
SHORT |= {"mode_schedule": "periodic", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
SHORT |= {"tiny_llava": TINY, "warmup_steps": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of four questions about pictures beside it."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 90, 30)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "which colour?", "answer": ["red", "blue"][number % 2]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


@pytest.mark.parametrize("path", sorted((ROOT / "trainer_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_trains(path, data, tmp_path):
    keys = yaml.safe_load(path.read_text())
    given = {name: value for name, value in keys.items() if name not in LEFT_OUT}
    given |= {"dataset": str(data), "output_dir": str(tmp_path / "run"), "image_folder": str(data.parent), **SHORT}
    if "eval_dataset" in given:
        given["eval_dataset"] = str(data)
    if "lora" in given:
        given["lora"] = {**given["lora"], "exclude_modules": ".*vision_tower.*"}
    if given["slow_mode_ratio"]:
        given["slow_mode_ratio"] = 0.5
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    results = run_recipe(*parse_recipe(["--config", str(tmp_path / "recipe.yaml")]))
    assert results["steps"] == ({"fast": 1, "slow": 1} if given["slow_mode_ratio"] else {"fast": 2, "slow": 0})
    weights = "adapter_model.safetensors" if "lora" in given else "model.safetensors"
    assert (tmp_path / "run" / weights).is_file()
