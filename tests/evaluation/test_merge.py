"""`dualspeed merge`: adapters become part of an ordinary checkpoint."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from adapter_cases import adapted, lora, run
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, batch
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from hf_dualspeed import cli
from hf_dualspeed.evaluation.checkpoint import find_checkpoint
from hf_dualspeed.evaluation.merge import merge
from hf_dualspeed.publishing.push import push


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a base model, and one with the adapter, isolator, results and card of a run over it."""
    place = tmp_path_factory.mktemp("merge")
    base, processor = FAMILIES["llava"].build()
    base.save_pretrained(place / "base")
    processor.save_pretrained(place / "base")
    model = type(base).from_pretrained(place / "base")
    trainer = run(place / "run", get_peft_model(model, lora()), max_steps=2)
    trainer.facts |= {"accuracy": 0.5, "n": 2}
    trainer.save_model()
    trainer.create_model_card()
    with (place / "run" / "README.md").open("a") as card:
        card.write("\n## By hand\n\nMine.\n")
    return place, trainer


@torch.no_grad()
def logits(model, processor):
    return model.eval()(**batch(FAMILIES["llava"], processor)).logits


def test_a_run_becomes_an_ordinary_checkpoint(trained, tmp_path, capsys):
    place, trainer = trained
    assert cli.main(["merge", str(place / "run"), str(tmp_path / "merged")]) == 0
    assert "dualspeed evaluate" in capsys.readouterr().out
    merged, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, processor), logits(trainer.model, processor), rtol=1e-4, atol=1e-5)
    # What the run left beside the adapter goes along, but not the scores of other weights.
    assert (tmp_path / "merged" / "mode_isolator.safetensors").read_bytes() == (
        place / "run" / "mode_isolator.safetensors"
    ).read_bytes()
    results = json.loads((tmp_path / "merged" / "results.json").read_text())
    assert (results["adapter"], results["base_model"], "accuracy" in results) == (False, "base", False)
    assert results["steps"] == json.loads((place / "run" / "results.json").read_text())["steps"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "PeftModel" not in card
    assert "## By hand\n\nMine." in card
    assert str(place) not in card + json.dumps(results)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]


def test_the_view_of_a_checkpoint_goes_along(trained, tmp_path):
    folder = shutil.copytree(trained[0] / "run", tmp_path / "checkpoint-2")
    (folder / "results.json").unlink()
    view = {"position_ids": "original", "proportional_attention": False}
    state = {"stateful_callbacks": {"ModeClock": {"attributes": {"view": view}}}}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    merge(str(folder), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "results.json").read_text())["settings"] == view


def test_a_merged_folder_is_pushed_as_it_is(trained, tmp_path, hub):
    hub.user = "user"
    merge(str(trained[0] / "run"), tmp_path / "merged")
    push(tmp_path / "merged", "user/merged")
    assert "adapter_config.json" not in hub.files("user/merged")


def test_a_base_in_four_bits_is_unpacked_first(tmp_path):
    pytest.importorskip("bitsandbytes")
    base, processor = FAMILIES["llava"].build()
    base.save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    packed = type(base).from_pretrained(tmp_path / "whole", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    processor.save_pretrained(tmp_path / "packed")
    get_peft_model(packed, lora()).save_pretrained(tmp_path / "adapter")
    merge(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "packed"), dtype="float32")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert not getattr(merged, "is_quantized", False)
    assert merged.dtype == torch.float32
    unpacked = type(base).from_pretrained(tmp_path / "packed").dequantize().float()
    expected = PeftModel.from_pretrained(unpacked, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(logits(merged, processor), logits(expected, processor), rtol=0, atol=1e-6)


def test_what_cannot_be_merged_is_refused(trained, tmp_path, capsys):
    place, _ = trained
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    cases = {
        (str(place / "base"), str(tmp_path / "new")): "holds no adapter but a whole model",
        (str(place / "run"), str(tmp_path / "full")): "`output` is .* which is not empty",
        (str(tmp_path / "nothing"), str(tmp_path / "new")): "neither a folder nor a Hub repo",
        (str(place / "run"), str(tmp_path / "new"), "--base", str(tmp_path / "full")): "full",
    }
    for words, message in cases.items():
        assert cli.main(["merge", *words]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert re.search(message, error), error
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    model, processor, _ = adapted()
    base, _ = FAMILIES["llava"].build()
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="NaN"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged", base=str(tmp_path / "base"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("change", ["lacks tensors", "holds others"])
def test_half_an_adapter_and_a_foreign_one_are_refused(trained, tmp_path, change):
    """PEFT warns of them alone, and goes on with tensors as they begin."""
    place, _ = trained
    shutil.copytree(place / "run", tmp_path / "run")
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    names = sorted(weights)
    kept = {key.replace("q_proj", "k_proj") if change == "holds others" else key: weights[key] for key in names[1:]}
    save_file(kept, tmp_path / "run" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=change):
        merge(str(tmp_path / "run"), tmp_path / "merged")
    with pytest.raises(ValueError, match=change):
        find_checkpoint(str(tmp_path / "run")).model()
    assert not (tmp_path / "merged").exists()


def test_names_with_brackets_are_no_markup(trained, tmp_path, capsys):
    (tmp_path / "[").mkdir()
    shutil.copytree(trained[0] / "run", tmp_path / "[" / "b]")
    assert cli.main(["merge", str(tmp_path / "[" / "b]"), str(tmp_path / "[" / "red]")]) == 0
    assert "[/red]" in "".join(capsys.readouterr().out.split())


def test_an_adapter_on_the_hub(trained, tmp_path, hub):
    hub.user = "user"
    place, trainer = trained
    push(place / "run", "user/adapter")
    config = json.loads((place / "run" / "pruner_config.json").read_text())
    config["auto_map"] = {"AutoPruner": "first.First"}
    hub.put("user/adapter", {"pruner_config.json": json.dumps(config), "first.py": "import os"})
    merge("user/adapter", tmp_path / "merged", base=str(place / "base"))
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, processor), logits(trainer.model, processor), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "merged" / "mode_isolator.safetensors").is_file()
    # What a person wrote, the pictures of the card and the pruner's code come along as from a folder.
    assert "## By hand\n\nMine." in (tmp_path / "merged" / "README.md").read_text()
    assert (tmp_path / "merged" / "learning_curve.png").is_file()
    assert (tmp_path / "merged" / "first.py").read_text() == "import os"


def test_the_code_of_a_pruner_comes_along(trained, tmp_path):
    shutil.copytree(trained[0] / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "pruner_config.json").read_text())
    config["auto_map"] = {"AutoPruner": "first.First"}
    (tmp_path / "run" / "pruner_config.json").write_text(json.dumps(config))
    for name, text in (("first", "from .helper import x"), ("helper", "x = 1"), ("private", "")):
        (tmp_path / "run" / f"{name}.py").write_text(text)
    merge(str(tmp_path / "run"), tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").glob("*.py")} == {"first.py", "helper.py"}
