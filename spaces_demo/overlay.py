"""Example pictures, and pictures as text for HTML."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw

PHOTO_QUESTIONS = ("what is the woman wearing?", "what is behind the woman?")
# Colours and shapes of easy-VQA, the quickstart's data set.
SHAPES_DATA = "easy-vqa"
EXAMPLES = (
    ("circle", "blue", "what color is the shape?"),
    ("rectangle", "red", "what is the color of the rectangle?"),
    ("triangle", "green", "what color is the triangle?"),
)
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0), "green": (0, 255, 0)}


def data_url(image: Image.Image) -> str:
    """An image as a data URL, for HTML."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)  # small, and transparent where the image is
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_examples(folder: Path, shapes_first: bool) -> list[list[str]]:
    """Writes the examples' pictures: a photograph and drawn shapes. Returns rows of file and question."""
    photo, rows = write_photo(folder / "photograph.jpg"), []
    photos = [[str(photo), question] for question in PHOTO_QUESTIONS] if photo else []
    for index, (shape, colour, question) in enumerate(EXAMPLES):
        path = folder / f"{colour}-{shape}.png"
        drawn_shape(shape, COLOURS[colour], offset=index).save(path)
        rows.append([str(path), question])
    return rows + photos if shapes_first else photos + rows


def write_photo(path: Path) -> Path | None:
    """The portrait of Grace Hopper, in the public domain, that matplotlib brings. None where it was packaged
    without its sample data."""
    try:
        with get_sample_data("grace_hopper.jpg") as file:
            Image.open(file).save(path, quality=95)
    except FileNotFoundError:
        return None
    return path


def drawn_shape(shape: str, colour: tuple[int, int, int], offset: int = 0) -> Image.Image:
    """A coloured shape on a light background."""
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
