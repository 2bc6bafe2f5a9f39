"""Pictures of the tokens that a pruner keeps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageEnhance

from ..data.conversations import to_messages
from ..data.media import open_image
from ..pruners import Pruner
from ..pruners.config import MERGE
from ..publishing.plots import describe, figure_of, save_figure
from ..utils.text import one_line
from .generation import prompts
from .pruned_prompts import PrunedPrompts

logger = logging.getLogger(__name__)

PICTURE_NAME = "kept_tokens.png"
EDGE = 448
INCHES = 2.6  # of a picture on a sheet
FRAME = (0, 158, 115)  # Okabe and Ito's green
VEIL = (255, 255, 255)
FADED = 0.62  # of the veil over tokens that are not kept


@dataclass
class View:
    """The places of an image's kept tokens.

    Args:
        image (`PIL.Image.Image`): The image as the model saw it, cropped and scaled by the processor.
        rows, columns (`int`): Size of the token grid.
        kept (`set[tuple[int, int]]`): (row, column) of each kept token.
        elsewhere (`int`): Number of kept tokens in tiles, outside this grid.
    """

    image: Image.Image
    rows: int
    columns: int
    kept: set[tuple[int, int]]
    elsewhere: int = 0


def view_of(calls: list[tuple], inputs: Mapping, image: Image.Image, processor: object) -> View | None:
    """The view of a batch's only image. In models with tiles, it shows the whole image in front of the tiles.

    Args:
        calls (`list[tuple]`): Inputs and outputs of the pruner's calls.
        inputs (`Mapping`): The processor's output.
        image (`PIL.Image.Image`): The processor's input.
        processor (`ProcessorMixin`): The model's processor.

    Returns:
        `View`, or None where each tile is pruned alone and there is no one grid.
    """
    if len(calls) != 1 or len(calls[0][1].lengths) != 1 or calls[0][0].grid is None:
        return None
    tokens, pruned = calls[0]
    # Grid (N, 3) of tile, row and column; tile 0 is the whole image.
    grid = tokens.grid[0].cpu()
    base = grid[grid[:, 0] == 0]
    kept = grid[pruned.positions[0, : pruned.lengths[0]].cpu()]
    shown = kept[kept[:, 0] == 0]
    rows, columns = (base[:, 1:].amax(0) + 1).tolist()
    places = set(map(tuple, shown[:, 1:].tolist()))
    return View(seen(inputs, image, processor), rows, columns, places, len(kept) - len(shown))


def seen(inputs: Mapping, image: Image.Image, processor: object) -> Image.Image:
    """The image as the model saw it, from its pixels; the original where pixels are no image."""
    pixels, reader = inputs.get("pixel_values"), getattr(processor, "image_processor", None)
    while isinstance(pixels, torch.Tensor) and pixels.dim() > 3:
        pixels = pixels[0]
    mean, std = (getattr(reader, name, None) for name in ("image_mean", "image_std"))
    if not isinstance(pixels, torch.Tensor) or pixels.dim() != 3 or len(pixels) != 3 or not mean or not std:
        return image
    # Undo the normalisation of (3, H, W).
    pixels = pixels.float().cpu() * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def draw(view: View, veil: tuple[int, int, int] | None = VEIL) -> Image.Image:
    """Draws kept tokens in colour with a frame, the others grey and faded towards the colour `veil`. None: they are
    see-through, and take the colour of the page, light or dark."""
    width, height = view.image.size
    scale = EDGE / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    colour = view.image.resize(size, Image.Resampling.BICUBIC)
    grey = ImageEnhance.Contrast(colour.convert("L").convert("RGB")).enhance(0.7)
    out = grey if veil is None else Image.blend(grey, Image.new("RGB", size, veil), FADED)
    if veil is None:
        out.putalpha(round(255 * (1 - FADED)))
    pen = ImageDraw.Draw(out)
    for row, column in sorted(view.kept):
        left, right = (round(size[0] * edge / view.columns) for edge in (column, column + 1))
        top, bottom = (round(size[1] * edge / view.rows) for edge in (row, row + 1))
        out.paste(colour.crop((left, top, right, bottom)), (left, top))
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=FRAME, width=2)
    return out


def watch_calls(pruner: Pruner) -> tuple[list[tuple], Callable[[], None]]:
    """A list that gets input and output tokens of each call of the pruner, with grids, and a function that ends it."""
    calls: list[tuple] = []
    needs, pruner.needs = pruner.needs, pruner.needs | {"grid"}
    hook = pruner.register_forward_hook(lambda module, args, output: calls.append((args[0], output)))

    def end() -> None:
        hook.remove()
        pruner.needs = needs

    return calls, end


def draw_images(
    prepare: PrunedPrompts, processor: object, rows: Dataset, path: Path, results: dict | None = None
) -> str | None:
    """Draws the first image of each row, with its kept tokens below, into a PNG file.

    Args:
        prepare ([`PrunedPrompts`]): Prunes the rows' questions.
        processor (`ProcessorMixin`): The model's processor.
        rows (`datasets.Dataset`): Questions about images, as in evaluation.
        path (`Path`): The file to write.
        results (`dict`, *optional*): Those of the run, whose model, hardware and date the picture names.

    Returns:
        `str`: The file's name, or None where tokens lie on no grid, no row has one image alone, an image cannot be read
        or the file cannot be written. That is only logged, because the training that asks for the picture is over.
    """
    model, training, views = prepare.model, prepare.model.training, []
    calls, watch = watch_calls(prepare.pruner)
    model.eval()
    try:
        for row in rows:
            calls.clear()
            inputs, image = prompts(model, processor, [row]), open_image(to_messages(row)["images"][0])
            with torch.no_grad():
                prepare(inputs)
            view = view_of(calls, inputs, image, processor)
            if view is None:
                logger.warning("No picture of kept tokens: those of %s lie on no one grid.", type(model).__name__)
                return None
            views.append(view)
        if not views:
            raise ValueError("no row has one image alone.")
        return draw_sheet(views, prepare.pruner, path, results or {}).name
    except (ValueError, OSError, IndexError) as error:
        logger.warning("No picture of kept tokens: %s", one_line(error))
        return None
    finally:
        watch()
        model.train(training)


def first_images(rows: Dataset, count: int) -> Dataset:
    """The first rows with `count` different images, by bytes or path."""
    seen, chosen = set(), []
    for index, row in enumerate(rows):
        images = to_messages(row)["images"]
        image = images[0] if len(images) == 1 else None
        key = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
        key = key if isinstance(key, (str, bytes)) else id(key)
        if image is not None and key not in seen:
            seen.add(key)
            chosen.append(index)
        if len(chosen) == count:
            break
    return rows.select(chosen)


def draw_sheet(views: list[View], pruner: Pruner, path: Path, results: dict) -> Path:
    """Draws all views side by side, images above and kept tokens below, and says in words what is seen."""
    config = pruner.config
    figure, axes = figure_of(max(7.0, INCHES * len(views)), 2 * INCHES + 1.6, 2, len(views))
    for (above, below), view in zip(axes.T, views, strict=True):
        above.imshow(view.image)
        below.imshow(draw(view))
        words = f"{len(view.kept)} of {view.rows * view.columns} tokens kept"
        below.set_title(words + (f", and {view.elsewhere} in tiles" if view.elsewhere else ""), fontsize=9)
        for axis in (above, below):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("#999999")
    words = "Above: what the model sees. Below: kept tokens in colour, with a green frame; the others are grey."
    if config.dropped_tokens == MERGE:
        words += "\nEach kept token also stands for others, which are averaged into it."
    figure.supxlabel(words, fontsize=9)
    describe(figure, f"Visual tokens of fast steps: {config.pruner_type} removes {config.pruning_ratio:.0%}", results)
    return save_figure(figure, path)
