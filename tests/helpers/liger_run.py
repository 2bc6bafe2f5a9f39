"""Trains a tiny model with Liger's fused loss, and without; prints losses, weights and how often it was called.

Started by a test, with TRITON_INTERPRET=1, which runs the kernels on the CPU and has to be set before triton loads.
"""

from __future__ import annotations

import json
import sys
import tempfile

from training import history, make

from hf_dualspeed.trainer import fused_loss as head

head.DEVICES = ("cpu", "cuda")
calls, fused_loss = [], head.fused_loss


def counted(*args):
    calls.append(1)
    return fused_loss(*args)


head.fused_loss = counted


def trained(folder: str, choice: str) -> list[float]:
    trainer = make(
        folder,
        fused_head_loss=choice,
        slow_mode_ratio=0.0,
        label_smoothing_factor=0.1,
        max_steps=6,
        optim="sgd",
    )
    trainer.train()
    weights = [p.detach().norm().item() for p in trainer.model.parameters()]
    return [*(number for entry in history(trainer, "loss", "grad_norm") for number in entry), *weights]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        json.dump([trained(folder, "on"), trained(folder, "off"), len(calls)], sys.stdout)
        print()
