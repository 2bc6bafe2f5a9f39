"""A small vision tower that reads letters, trained in seconds on a GPU and in minutes on a CPU.

Of the pretrained ones that can be brought along, none reads. As in a ViT, its states tell where a patch stands.

Shapes: B images, H patches in a row (24), D features (384).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_dualspeed.recipes.assemble import IMAGENET_MEAN, IMAGENET_STD

from .language import prefix_of, save_whole
from .worlds import Scene, World

FEATURES, PATCH = 384, 14
SIGHT = 8  # pixels of a patch that the tower sees
# Width, stride and dilation of each 3 x 3 convolution.
CONVOLUTIONS = ((32, 2, 1), (64, 2, 1), (128, 2, 1), (256, 1, 2))
WAVELENGTHS = 10_000  # the longest of the positions' waves in the shortest
BATCH, LEARNING_RATE = 16, 1e-3
DRAWN = 4000  # scenes at most that it is trained with, over and over


def pixel_values(scenes: list[Scene], device: torch.device) -> torch.Tensor:
    """Images of scenes, normalised, `(B, 3, height, width)`."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    # Pixels (B, height, width, 3) in bytes to (B, 3, height, width).
    images = torch.from_numpy(np.stack([np.array(scene.image()) for scene in scenes]))
    return (images.to(device).movedim(-1, 1) / 255 - mean) / std


class LetterTower(nn.Module):
    """Convolutions whose field of view is six patches, with a normed state for each patch of 14 pixels."""

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
        states = self.states(seen(pixel_values))
        # Their mean stands in front, in place of a class token.
        return BaseModelOutput(last_hidden_state=torch.cat([states.mean(1, keepdim=True), states], 1))

    def states(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normed states `(B, H^2, D)` of what the tower sees, `(B, 3, 8 H, 8 H)`."""
        states = self.layers(pixels).flatten(2).mT
        return self.norm(states + positions(pixels.shape[-1] // SIGHT).to(states))


@cache
def positions(side: int) -> torch.Tensor:
    """Sines and cosines of the row and the column of each patch, `(H^2, D)`, at wavelengths of 2 pi to 20,000 pi."""
    frequencies = WAVELENGTHS ** -torch.linspace(0, 1, FEATURES // 4)
    angles = torch.arange(side)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)  # (H, D / 2)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def seen(pixel_values: torch.Tensor) -> torch.Tensor:
    """What the tower sees of images `(B, 3, 14 H, 14 H)`: 8 pixels a patch, `(B, 3, 8 H, 8 H)`."""
    return F.adaptive_avg_pool2d(pixel_values, SIGHT * pixel_values.shape[-1] // PATCH)


def letter_tower(world: World, folder: Path, steps: int) -> LetterTower:
    """The tower, from `folder`, or trained for so many steps to tell what is at each patch and stored there."""
    path, tower = folder / f"{prefix_of(world)}tower-{steps}.safetensors", LetterTower()
    if not path.is_file():
        _train(tower, world, steps)
        save_whole({name: weight.cpu() for name, weight in tower.state_dict().items()}, path)
    tower.load_state_dict(load_file(path))
    return tower.eval().requires_grad_(False)


@torch.enable_grad()
def _train(tower: LetterTower, world: World, steps: int) -> None:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d) else None)
        head = nn.Linear(FEATURES, world.codes)
    both = nn.ModuleList([tower, head]).to(device).train()
    optimizer = torch.optim.AdamW(both.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, max(2, steps))
    side = world.pixels // PATCH
    made = world.scenes("train", min(DRAWN, steps * BATCH))

    @cache
    def drawn(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A scene as the tower sees it, `(3, 8 H, 8 H)` in float16, and what is at each patch, `(H^2,)`."""
        scene = made[number]
        pixels = seen(pixel_values([scene], torch.device("cpu")))[0]
        return pixels.half(), torch.from_numpy(scene.patches(side)).flatten()

    for step in track(range(steps), description="training the tower"):
        numbers = [number % len(made) for number in range(step * BATCH, (step + 1) * BATCH)]
        # Pixels (B, 3, 8 H, 8 H) and signs (B, H^2).
        pixels, signs = (torch.stack(tensors).to(device) for tensors in zip(*map(drawn, numbers), strict=True))
        with torch.autocast(device.type, torch.bfloat16):
            told = head(tower.states(pixels.float()))
            loss = F.cross_entropy(told.flatten(0, 1).float(), signs.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    tower.cpu()
