"""Pictures: the kept tokens over what the model saw, and the examples."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageEnhance

EDGE = 448
FRAME = (0, 158, 115)  # Okabe and Ito's green
VEIL = (255, 255, 255)
# Colours and shapes as in easy-VQA, on which the quickstart trains.
EXAMPLES = (
    ("circle", "blue", "what color is the shape?"),
    ("rectangle", "red", "what is the color of the rectangle?"),
    ("triangle", "green", "what color is the triangle?"),
)
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0), "green": (0, 255, 0)}


@dataclass
class View:
    """Where the kept tokens of an image lie.

    Args:
        image (`PIL.Image.Image`): what the model saw: cut and scaled by its processor.
        rows, columns (`int`): the grid of its tokens.
        kept (`set[tuple[int, int]]`): (row, column) of the kept ones.
        elsewhere (`int`): kept tokens that lie in tiles, and not on this grid.
    """

    image: Image.Image
    rows: int
    columns: int
    kept: set[tuple[int, int]]
    elsewhere: int = 0


def view_of(calls: list[tuple], inputs: Mapping, image: Image.Image, processor: object) -> View | None:
    """The view of the one image of a batch, for models of tiles that of the whole image in front of them.

    Args:
        calls (`list[tuple]`): what the pruner got and gave.
        inputs (`Mapping`): the processor's output.
        image (`PIL.Image.Image`): what the processor got.
        processor: the model's.

    Returns:
        `View`, or None where tiles are pruned each by itself, so that there is no one grid.
    """
    if len(calls) != 1 or len(calls[0][1].lengths) != 1 or calls[0][0].grid is None:
        return None
    tokens, pruned = calls[0]
    grid = tokens.grid[0].cpu()
    base = grid[grid[:, 0] == 0]
    kept = grid[pruned.positions[0, : pruned.lengths[0]].cpu()]
    shown = kept[kept[:, 0] == 0]
    rows, columns = (base[:, 1:].amax(0) + 1).tolist()
    places = set(map(tuple, shown[:, 1:].tolist()))
    return View(seen(inputs, image, processor), rows, columns, places, len(kept) - len(shown))


def seen(inputs: Mapping, image: Image.Image, processor: object) -> Image.Image:
    """What the model saw: its pixels, where the processor gives an image, else the image as it was."""
    pixels, reader = inputs.get("pixel_values"), getattr(processor, "image_processor", None)
    while isinstance(pixels, torch.Tensor) and pixels.dim() > 3:
        pixels = pixels[0]
    mean, std = (getattr(reader, name, None) for name in ("image_mean", "image_std"))
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 3 or len(pixels) != 3 or not mean or not std:
        return image
    pixels = pixels.float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def draw(view: View) -> Image.Image:
    """The kept tokens in colour and framed, the others grey and veiled."""
    width, height = view.image.size
    scale = EDGE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    colour = view.image.resize(size, Image.Resampling.BICUBIC)
    grey = ImageEnhance.Contrast(colour.convert("L").convert("RGB")).enhance(0.7)
    out = Image.blend(grey, Image.new("RGB", size, VEIL), 0.62)
    pen = ImageDraw.Draw(out)
    for row, column in sorted(view.kept):
        left, right = (round(size[0] * edge / view.columns) for edge in (column, column + 1))
        top, bottom = (round(size[1] * edge / view.rows) for edge in (row, row + 1))
        out.paste(colour.crop((left, top, right, bottom)), (left, top))
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=FRAME, width=2)
    return out


def data_url(image: Image.Image) -> str:
    """An image as text, to stand in HTML."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)  # frames stay sharp, photos small
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_examples(folder: Path) -> list[list[str]]:
    """Draws the examples as PNG files; rows of file and question."""
    rows = []
    for index, (shape, colour, question) in enumerate(EXAMPLES):
        path = folder / f"{colour}-{shape}.png"
        drawn_shape(shape, COLOURS[colour], offset=index).save(path)
        rows.append([str(path), question])
    return rows


def drawn_shape(shape: str, colour: tuple[int, int, int], offset: int = 0) -> Image.Image:
    """One coloured shape on a light ground."""
    image = Image.new("RGB", (256, 256), (230 + 4 * offset, 233, 240 - 4 * offset))
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = 52 + 12 * offset, 60 - 8 * offset, 196 + 12 * offset, 204 - 8 * offset
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "rectangle":
        pen.rectangle((left - 20, top + 32, right, bottom - 12), fill=colour)
    else:
        pen.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill=colour)
    return image
