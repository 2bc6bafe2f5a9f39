"""Short trainings of many kinds, whose losses, gradient norms and weights should not change when code is moved.

    python tests/helpers/fingerprint.py before.json          # ahead of a change
    python tests/helpers/fingerprint.py after.json --like before.json

Bits differ between processors and versions of torch, so both runs belong on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import training
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from training import Collator, history, make

LORA = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "r": 2, "init_lora_weights": False}
LOGGED = ("loss", "grad_norm", "fast_loss", "slow_loss", "distillation_loss", "pruner_loss", "pruned_loss")


class Packed(Collator):
    """The samples of a batch in one row, told apart by their positions."""

    def __call__(self, examples):
        samples = [super(Packed, self).__call__([example]) for example in examples]
        row = {"position_ids": torch.cat([torch.arange(s["input_ids"].shape[1])[None] for s in samples], -1)}
        for key in {key for sample in samples for key in sample} - {"attention_mask"}:
            parts = [sample[key] for sample in samples if key in sample]
            row[key] = torch.cat(parts, dim=0 if key == "pixel_values" else 1)
        return row


RUNS = {
    "llava": {},
    "llava_next": {"family": "llava_next"},
    "qwen2_5_vl": {"family": "qwen2_5_vl"},
    "compact": {"family": "qwen2_5_vl", "position_ids": "compact"},
    "paper": {"proportional_attention": False, "pruner_kwargs": {"dropped_tokens": "discard"}},
    "learned": {"pruner": "token_learner"},
    "dynamicvit": {"pruner": "dynamicvit", "family": "llava_next"},
    "auxiliary_loss": {
        "pruner": "dynamicvit",
        "pruner_kwargs": {"ratio_weight": 2.0},
        "gradient_accumulation_steps": 2,
    },
    "layers": {"pruner": "pyramiddrop"},
    "layers_schedule": {
        "pruner": "fastv",
        "pruner_kwargs": {"pruning_schedule": "cosine", "initial_pruning_ratio": 0.1, "layer": 1},
    },
    "instruction": {"pruner": "cdpruner"},
    "random": {"pruner": "random", "gradient_accumulation_steps": 2},
    "tower_attention": {"pruner": "visionzip"},
    "cached": {"vision_feature_cache": "features", "max_steps": 8},
    "splits": {"slow_mode_splits": 2, "per_device_train_batch_size": 4},
    "checkpointing": {"activation_checkpointing": True, "slow_mode_splits": "auto"},
    "adaptive": {"mode_schedule": "adaptive", "max_slow_mode_ratio": 0.9},
    "adaptive_pruning": {"mode_schedule": "adaptive", "max_slow_mode_ratio": 0.9, "min_pruning_ratio": 0.2},
    "pruning_schedule": {"pruner_kwargs": {"pruning_schedule": "linear", "initial_pruning_ratio": 0.2}},
    "plain_path": {"plain_path": True},
    "lora": {"lora": True},
    "packed": {"packed": True},
}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names and bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def trained(folder: Path, resume: bool = False, **options) -> dict:
    """Log and weights of a run."""
    family = options.pop("family", "llava")
    packed = options.pop("packed", False)
    if options.get("vision_feature_cache"):
        options["vision_feature_cache"] = str(folder / "features")
    options = {"max_steps": 6, "slow_mode_ratio": 0.5, "pruning_ratio": 0.5, "seed": 1, "speedup_rounds": 0} | options
    model, _ = FAMILIES[family].build()
    if options.get("vision_feature_cache"):
        model.get_encoder(modality="image").requires_grad_(False)
    if options.pop("lora", False):
        model = get_peft_model(model, LoraConfig(**LORA))
    with patch.object(training, "Collator", Packed if packed else Collator):
        trainer = make(folder, family, model=model, **options)
    if family == "qwen2_5_vl":
        trainer.processing_class = None  # its video part is missing
    trainer.train(resume_from_checkpoint=resume or None)
    evaluated = {} if packed else {"eval_loss": trainer.evaluate()["eval_loss"]}
    return {"log": history(trainer, *LOGGED), "weights": digest(dict(trainer.model.named_parameters())), **evaluated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--like", type=Path, help="fail where the result differs from this one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run, settings in RUNS.items():
            found[run] = trained(folder / run, **settings)
        saving = {"save_strategy": "steps", "save_steps": 3}
        trained(folder / "resumed", max_steps=3, **saving)
        found["resumed"] = trained(folder / "resumed", resume=True, **saving)
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += ["trainer_configs/accelerate/cpu_ddp.yaml", "--main_process_port", "0"]
        script = Path(__file__).with_name("distributed_run.py")
        (folder / "two").mkdir()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [*command, str(script), "--out", str(folder / "two"), "--batch", "1"], env=environment, check=True
        )
        report = json.loads((folder / "two" / "rank0.json").read_text())
        weights = hashlib.sha256((folder / "two" / "rank0.safetensors").read_bytes()).hexdigest()
        found["two processes"] = {"log": report["history"], "weights": weights}
    options.output.write_text(json.dumps(found, indent=1))
    if options.like:
        expected = json.loads(options.like.read_text())
        different = [run for run in found if found[run] != expected.get(run)]
        if different:
            sys.exit(f"Other losses, gradient norms or weights than before: {', '.join(different)}.")
        print(f"Equal to the bit: {', '.join(found)}.")


if __name__ == "__main__":
    main()
