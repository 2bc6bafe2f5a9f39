"""A small vision tower for letters, trained in seconds on a GPU, where no pretrained one can be brought along.

Shapes: B images, H patches in a row (24), D features (384).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_dualspeed.recipes.assemble import IMAGENET_MEAN, IMAGENET_STD

from .fashion_grid import SIDE
from .language import save_whole
from .letters import LETTERS, NAMES
from .worlds import Scene

FEATURES, PATCH = 384, 14
# Width, stride and dilation of each 3 x 3 convolution.
CONVOLUTIONS = ((32, 1, 1), (64, 2, 1), (128, 2, 1), (256, 1, 2))
BATCH, LEARNING_RATE = 16, 1e-3


def pixel_values(scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """Images of scenes, normalised, `(B, 3, height, width)`."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    # Pixels (B, height, width, 3) in bytes to (B, 3, height, width).
    images = torch.from_numpy(np.stack([np.array(scene.image()) for scene in scenes]))
    return (images.to(device).movedim(-1, 1) / 255 - mean) / std


class LetterTower(nn.Module):
    """Convolutions whose field of view is about a tile, with a normed state for each patch of 14 pixels."""

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for wider, stride, dilation in CONVOLUTIONS:
            convolution = nn.Conv2d(width, wider, 3, stride, dilation, dilation, bias=False)
            layers += [convolution, nn.GroupNorm(8, wider), nn.ReLU()]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, FEATURES, 1))
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        """States `(B, 1 + H^2, D)` of images `(B, 3, 14 H, 14 H)`; the first is their mean."""
        # Images with 4 pixels a patch, (B, 3, 4 H, 4 H), to states (B, D, H, H).
        small = F.adaptive_avg_pool2d(pixel_values, 4 * pixel_values.shape[-1] // PATCH)
        # Normed states (B, H^2, D), with their mean in front, in place of a class token.
        states = self.norm(self.layers(small).flatten(2).mT)
        return BaseModelOutput(last_hidden_state=torch.cat([states.mean(1, keepdim=True), states], 1))


def letter_tower(folder: Path, steps: int) -> LetterTower:
    """The tower, from `folder`, or trained for so many steps to tell the letter of each patch and stored there."""
    path, tower = folder / f"letter-tower-{steps}.safetensors", LetterTower()
    if not path.is_file():
        _train(tower, steps)
        save_whole({name: weight.cpu() for name, weight in tower.state_dict().items()}, path)
    tower.load_state_dict(load_file(path))
    return tower.eval().requires_grad_(False)


@torch.enable_grad()
def _train(tower: LetterTower, steps: int) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d) else None)
        head = nn.Linear(FEATURES, len(NAMES))
    both = nn.ModuleList([tower, head]).to(device).train()
    optimizer = torch.optim.AdamW(both.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(2, steps))
    side = LETTERS.pixels // PATCH
    made = LETTERS.scenes("train", steps * BATCH)
    for first in range(0, len(made), BATCH):
        scenes = made[first : first + BATCH]
        # The letter of each patch: (B, H^2).
        letters = torch.tensor([scene.items for scene in scenes], device=device).view(-1, 1, SIDE, SIDE).float()
        letters = F.interpolate(letters, (side, side)).long().flatten(1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(
                head(tower(pixel_values(scenes, device)).last_hidden_state[:, 1:]).flatten(0, 1), letters.flatten()
            )
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tower.cpu()
