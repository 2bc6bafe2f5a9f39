"""Adapters on tiny models, and what of a model has changed."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from training import make

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
PROMPT = "dualspeed.isolator.prompt"


def lora(**options):
    return LoraConfig(**{"target_modules": TARGETS, "r": 2, "init_lora_weights": False, **options})


def adapted(family="llava", **options):
    model, processor = FAMILIES[family].build()
    config = lora(**options)
    return get_peft_model(model, config), processor, config


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def run(tmp_path, model, resume=None, family="llava", **options):
    """A trained trainer, whose processor can be saved."""
    trainer = make(tmp_path, family, model=model, **{"slow_mode_ratio": 0.5, "max_steps": 6, **options})
    if family.startswith("qwen"):
        trainer.processing_class = None  # Qwen's tiny processor lacks a video part, which saving asks for
    trainer.train(resume_from_checkpoint=resume)
    return trainer
