"""QLoRA: adapters over 4-bit weights, through the trainer and through a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from adapter_cases import PROMPT, TARGETS, changed, run, snapshot
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from recipe_cases import ROOT, TINY
from tiny_models import FAMILIES, batch
from training import history, make
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from hf_dualspeed import AutoPruner, ModeIsolator, prune_inputs
from hf_dualspeed.models.adapters import four_bit
from hf_dualspeed.recipes.arguments import parse_recipe
from hf_dualspeed.recipes.run import load_model, prepare_model, run_recipe
from hf_dualspeed.recipes.tiny_llava import build_tiny_llava

bnb = pytest.importorskip("bitsandbytes")
CHECKPOINTING = {"activation_checkpointing": True}


def base_in_four_bits(folder, family="llava"):
    base, _ = FAMILIES[family].build()
    if not folder.exists():
        base.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return type(base).from_pretrained(folder, dtype="bfloat16", quantization_config=config)


def quantized(folder, family="llava", checkpointing=False):
    """A model whose base lies in `folder`, with adapters over its 4-bit weights."""
    model = base_in_four_bits(folder, family)
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False))


@torch.no_grad()
def logits(model, inputs):
    """In training mode, where nothing is random here: in evaluation, bitsandbytes packs a CPU's weights another way."""
    return model.train()(**inputs).logits


def codes(model):
    """The 4-bit weights with what decodes them."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    return {name: (m.weight.detach().clone(), m.weight.quant_state.absmax.clone()) for name, m in layers.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, CHECKPOINTING], ids=["", "checkpointing"])
def test_only_adapters_and_isolator_move(tmp_path, family, options):
    model = quantized(tmp_path / "base", family, bool(options))
    # This pruner reads queries and keys of the quantized tower.
    options = {"slow_mode_ratio": 0.5, "bf16": True, "pruner": "cls_attention", **options}
    trainer = make(tmp_path / "out", family, model=model, **options)
    assert {trainer.mode_at(step) for step in range(4)} == {"fast", "slow"}
    before, packed = snapshot(model), codes(model)
    assert len(packed) > 10
    trainer.train()
    moved = changed(model, before)
    assert moved == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in moved - {PROMPT})
    for name, (weight, absmax) in codes(model).items():
        assert weight.dtype == torch.uint8
        assert torch.equal(weight, packed[name][0])
        assert torch.equal(absmax, packed[name][1])
    assert trainer.dual_forward.isolator.prompt.dtype == torch.float32  # as the adapters


def test_saved_merged_and_resumed(tmp_path):
    model = quantized(tmp_path / "base")
    trainer = run(tmp_path / "out", model, save_strategy="steps", save_steps=3)
    trainer.save_model()
    inputs = batch(FAMILIES["llava"], FAMILIES["llava"].build()[1])
    expected = logits(model, inputs)
    # Merged into the weights that the 4 bits stand for, the model is the trained one, and plain.
    base = base_in_four_bits(tmp_path / "base").dequantize().float()
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    # Merged into those it was quantized from, as one deploys it, it is a plain checkpoint.
    base, _ = FAMILIES["llava"].build()
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    _, info = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values()), info
    rest = run(tmp_path / "rest", quantized(tmp_path / "base"), resume=str(tmp_path / "out" / "checkpoint-3"))
    assert history(rest, "loss", "grad_norm")[-3:] == history(trainer, "loss", "grad_norm")[-3:]
    assert torch.equal(logits(rest.model, inputs), expected)


def test_generation_from_pruned_inputs(tmp_path):
    model = quantized(tmp_path / "base").train()
    inputs = batch(FAMILIES["llava"], FAMILIES["llava"].build("left")[1], labels=False)
    pruned = prune_inputs(model, inputs, AutoPruner.from_name("divprune", pruning_ratio=0.5))
    short = pruned["input_ids"].shape[1]
    assert short < inputs["input_ids"].shape[1]
    assert model.generate(**pruned, min_new_tokens=2, max_new_tokens=2).shape == (3, short + 2)


def test_an_isolator_beside_quantized_embeddings():
    model, _ = FAMILIES["llava"].build()
    codes = torch.randint(0, 255, model.get_input_embeddings().weight.shape, dtype=torch.uint8)
    model.requires_grad_(False).get_input_embeddings().weight = torch.nn.Parameter(codes, requires_grad=False)
    prompt = ModeIsolator.for_model(model, 64).prompt
    assert prompt.dtype == torch.float32
    assert prompt.std() < 0.1


# --- the recipe ---------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    """Parses a recipe of QLoRA over a tiny LLaVA in a folder."""
    model, processor = build_tiny_llava(
        ["What colour is the shape ?", "red"], **{**TINY, "vision_hidden_size": 64, "hidden_size": 64}
    )
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")

    def parse(**keys):
        given = yaml.safe_load((ROOT / "trainer_configs" / "qwen2_5_vl_qlora.yaml").read_text())
        local = {"model_name_or_path": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "use_cpu": True}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**given, **local, "max_length": 512, "max_pixels": None, **keys}))
        return parse_recipe(["--config", str(path)])

    return parse


def test_the_recipe_of_qlora_runs(recipe, tmp_path):
    pytest.importorskip("easy_vqa")
    short = {"max_steps": 4, "slow_mode_ratio": 0.5, "mode_schedule": "periodic", "gradient_accumulation_steps": 1}
    data = {"dataset": "easy-vqa", "eval_dataset": "easy-vqa", "eval_limit": 4, "image_folder": None}
    results = run_recipe(*recipe(**short, **data, dataloader_num_workers=0))
    assert results["steps"] == {"fast": 2, "slow": 2}
    # As users load it: adapters over the model they were trained on.
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    AutoProcessor.from_pretrained(tmp_path / "run")
    assert "library_name: peft" in Path(tmp_path / "run" / "README.md").read_text()


def test_what_is_quantized(recipe):
    arguments, _ = recipe()
    model, _ = load_model(arguments, None, 0)
    config = model.quantization_config if hasattr(model, "quantization_config") else model.config.quantization_config
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert config.bnb_4bit_use_double_quant
    assert isinstance(model.model.multi_modal_projector.linear_1, bnb.nn.Linear4bit)
    assert not isinstance(model.lm_head, bnb.nn.Linear4bit)


def test_modules_that_are_trained_whole_are_not_quantized(recipe):
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    arguments, _ = recipe(lora=lora, train_projector=True)
    model, _ = load_model(arguments, None, 0)
    assert not isinstance(model.model.multi_modal_projector.linear_1, bnb.nn.Linear4bit)
    assert not isinstance(model.lm_head, bnb.nn.Linear4bit)
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, bnb.nn.Linear4bit)
    trained = {n for n, p in prepare_model(model, arguments).named_parameters() if p.requires_grad}
    assert any("multi_modal_projector.modules_to_save" in n for n in trained)


def test_bitsandbytes_missing(monkeypatch):
    monkeypatch.setattr("hf_dualspeed.models.adapters.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match=r'pip install "hf-dualspeed\[qlora\]"'):
        four_bit("bfloat16", {})
