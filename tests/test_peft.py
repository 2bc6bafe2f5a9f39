"""LoRA through the trainer, and an adapter that only the fast view uses."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_trainer import make
from tiny_models import FAMILIES, batch
from transformers import TrainerCallback


def adapted(family="llava"):
    model, processor = FAMILIES[family].build()
    config = LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    return get_peft_model(model, config), processor, config


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_isolator_move(tmp_path, family):
    model, processor, _ = adapted(family)
    trainer = make(tmp_path, family, model=model, slow_mode_ratio=0.5, max_steps=6)
    assert trainer.slow_mode_ratio == 0.5
    before = snapshot(model)
    trainer.train()
    moved = changed(model, before)
    assert "dualspeed.isolator.prompt" in moved
    assert all("lora_" in name for name in moved - {"dualspeed.isolator.prompt"})
    assert len(moved) > 1
    trainer.processing_class = None  # Qwen's tiny processor lacks a video part, which saving asks for
    trainer.save_model()
    base, _ = FAMILIES[family].build()
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    inputs = batch(FAMILIES[family], processor)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-3, atol=1e-4)


def test_an_adapter_for_the_fast_view_alone(tmp_path):
    model, processor, config = adapted()
    model.add_adapter("fast", config)
    model.base_model.set_adapter(["default", "fast"])
    inputs = batch(FAMILIES["llava"], processor)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.before = snapshot(model)

        def on_step_end(self, args, state, control, **kwargs):
            moved = changed(model, self.before)
            seen.append((any(".fast." in n for n in moved), any(".default." in n for n in moved)))

    trainer = make(
        tmp_path,
        model=model,
        slow_mode_ratio=0.5,
        max_steps=8,
        fast_only_parameters=["*.fast.*"],
        callbacks=[Watch()],
    )
    trainer.train()
    modes = [trainer.mode_at(step) for step in range(8)]
    assert {"fast", "slow"} == set(modes)
    assert seen == [(mode == "fast", True) for mode in modes]
    # Outside of training the fast adapter is off: the plain forward is that of the default adapter alone.
    with torch.no_grad():
        trained = model.eval()(**inputs).logits
        model.base_model.set_adapter("default")
        torch.testing.assert_close(model(**inputs).logits, trained)
        model.base_model.set_adapter(["default", "fast"])
        assert not torch.allclose(model(**inputs).logits, trained)
