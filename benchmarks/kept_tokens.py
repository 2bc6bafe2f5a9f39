"""docs/pruners.md's picture: what pruners keep of three photographs. `python -m benchmarks.kept_tokens`

Features and attention are those of the last layer but one, as in LLaVA, of the DINOv2-small that `dualspeed assemble`
reads from PyPI. Photographs come with gradio and matplotlib.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from hf_dualspeed import AutoPruner
from hf_dualspeed.commands.space import source_folder
from hf_dualspeed.evaluation.visualize import View, draw
from hf_dualspeed.pruners.tokens import VisualTokens
from hf_dualspeed.publishing.plots import describe, figure_of, save_figure
from hf_dualspeed.recipes.assemble import IMAGENET_MEAN, IMAGENET_STD, VISION
from hf_dualspeed.recipes.dinov2_onnx import read_vision_tower
from hf_dualspeed.recipes.wheels import default_cache, fetch
from hf_dualspeed.utils.environment import machine
from hf_dualspeed.utils.text import in_thousands
from hf_dualspeed.utils.writing import write_file

from .common import small

PICTURE = Path("docs/images/kept_tokens.png")
PRUNERS = ("divprune", "cls_attention", "vispruner", "holov", "random")
RATIO, SIDE, PATCH = 0.9, 24, 14


def photographs() -> list[Image.Image]:
    """The Space's photographs, cut to squares.

    Raises:
        FileNotFoundError: a package that brings them is not installed.
    """
    sys.path.insert(0, str(source_folder()))
    from overlay import PHOTO_QUESTIONS, photograph

    paths = [photograph(*place) for place in PHOTO_QUESTIONS.values()]
    if None in paths:
        raise FileNotFoundError('The photographs come with gradio and matplotlib: pip install "hf-dualspeed[demo]"')
    return [ImageOps.fit(Image.open(path).convert("RGB"), (SIDE * PATCH, SIDE * PATCH)) for path in paths]


@torch.no_grad()
def main(path: Path = PICTURE) -> Path:
    """Draws the picture."""
    tower, images = read_vision_tower(fetch(VISION, default_cache())), photographs()
    tower.set_attn_implementation("eager")
    # Pixels (B, 3, H, W) to states (B, 1 + N, D) and attention (B, heads, 1 + N, 1 + N) of the last layer but one.
    pixels = (np.stack([np.asarray(image) for image in images]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    output = tower.eval()(
        torch.from_numpy(pixels).float().permute(0, 3, 1, 2), output_attentions=True, output_hidden_states=True
    )
    places = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(SIDE), torch.arange(SIDE))
    tokens = VisualTokens(
        features=output.hidden_states[-2][:, 1:],
        grid=places.expand(len(images), -1, -1),
        attention=output.attentions[-2][:, :, 0, 1:].mean(1),
        generator=torch.Generator().manual_seed(0),
    )
    figure, axes = figure_of(2.1 * (1 + len(PRUNERS)), 2.1 * len(images) + 1, len(images), 1 + len(PRUNERS))
    columns = {"photograph": None, **{name: AutoPruner.from_name(name, pruning_ratio=RATIO).eval() for name in PRUNERS}}
    for column, (name, pruner) in zip(axes.T, columns.items(), strict=True):
        pruned = pruner and pruner(tokens)
        column[0].set_title(name, fontsize=11)
        for row, (axis, image) in enumerate(zip(column, images, strict=True)):
            shown = image
            if pruned is not None:
                own = places[pruned.positions[row, : pruned.lengths[row]], 1:].tolist()
                shown = draw(View(image, SIDE, SIDE, set(map(tuple, own))))
            axis.imshow(shown)
            axis.set_axis_off()
    size = in_thousands(sum(weight.numel() for weight in tower.parameters()))
    figure.supxlabel(
        f"In colour with a green frame: places of the {pruned.lengths[0]} tokens that are kept of {SIDE**2}; "
        "the others, grey, are averaged into them.",
        fontsize=10,
    )
    facts = {"machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    describe(figure, f"Pruners that remove {RATIO:.0%} of the visual tokens", facts, f"DINOv2-small, {size} parameters")
    save_figure(figure, path, dpi=100)
    return write_file(path, small(path.read_bytes()))


if __name__ == "__main__":
    print(main())
