"""Example pictures, and pictures as text for HTML."""

from __future__ import annotations

import base64
import io
import shutil
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageDraw

# Photographs by question: the package that brings each, and where it lies there.
PHOTO_QUESTIONS = {
    "what animal is this?": ("gradio", "media_assets/images/lion.jpg"),
    "what building is this?": ("gradio", "media_assets/images/tower.jpg"),
    "what is she wearing?": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
# Colours and shapes of easy-VQA, the quickstart's data set.
SHAPES_DATA = "easy-vqa"
EXAMPLES = (
    ("circle", "blue", "what color is the shape?"),
    ("rectangle", "red", "what color is the rectangle?"),
    ("triangle", "green", "what color is the triangle?"),
)
COLOURS = {"blue": (0, 0, 255), "red": (255, 0, 0), "green": (0, 255, 0)}


def data_url(image: Image.Image) -> str:
    """An image as a data URL, for HTML."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=88)  # small, and transparent where the image is
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_examples(folder: Path, shapes_first: bool) -> list[list[str]]:
    """Writes the examples' pictures: photographs and drawn shapes. Returns rows of file and question."""
    found = {question: photograph(*place) for question, place in PHOTO_QUESTIONS.items()}
    photos, rows = [[shutil.copy(path, folder), question] for question, path in found.items() if path], []
    for index, (shape, colour, question) in enumerate(EXAMPLES):
        path = folder / f"{colour}-{shape}.png"
        drawn_shape(shape, COLOURS[colour], offset=index).save(path)
        rows.append([str(path), question])
    return rows + photos if shapes_first else photos + rows


def photograph(package: str, place: str) -> Path | None:
    """A picture that an installed package brings, which is not imported. None where it came without it."""
    found = find_spec(package)
    path = found and found.origin and Path(found.origin).parent / place
    return path if path and path.is_file() else None


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
