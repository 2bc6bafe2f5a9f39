"""Short trainings of tiny models over TRL's trainer."""

from __future__ import annotations

import torch
from datasets import Dataset
from tiny_models import FAMILIES, picture

from hf_dualspeed import DualSpeedSFTConfig, DualSpeedSFTTrainer

QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
FAST = {"logging_steps": 1, "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant"}


def turn(role, text):
    return {"role": role, "content": text}


def messages(images=lambda index: 1):
    """TRL's conversational format, with `images(i)` images in sample i."""
    return Dataset.from_list(
        [
            {
                "messages": [turn("user", "what is it?" + "?" * i), turn("assistant", f"a thing {i}")],
                "images": [picture(seed=10 * i + j) for j in range(images(i))],
            }
            for i in range(8)
        ]
    )


def completions():
    """TRL's prompt-completion format."""
    return Dataset.from_list(
        [
            {
                "prompt": [turn("user", "what is it?" + "?" * i)],
                "completion": [turn("assistant", f"a thing {i}")],
                "images": [picture(seed=i)],
            }
            for i in range(8)
        ]
    )


DATA = {"messages": messages, "completions": completions}


def make(tmp_path, data, cls=DualSpeedSFTTrainer, config=None, model=None, processor=None, family="llava", **options):
    """A trainer of `cls`, and its arguments where `config` is their class or None."""
    built, its_processor = FAMILIES[family].build()
    given = {key: options.pop(key) for key in ("peft_config", "data_collator", "compute_loss_func") if key in options}
    config = config or DualSpeedSFTConfig
    return cls(
        model=built if model is None else model,
        args=config(str(tmp_path), **{**QUIET, **FAST, **options}),
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor or its_processor,
        **given,
    )


def history(trainer, *keys):
    return torch.tensor([[log.get(key, -1.0) for key in keys] for log in trainer.state.log_history if "loss" in log])


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
