"""Opens the images and videos of a sample."""

from __future__ import annotations

import io
import os
from typing import Any

import numpy as np
from PIL import ExifTags, Image
from transformers.image_utils import load_image


def pattern(width: int, height: int) -> Image.Image:
    """An image of waves of colour: no two patches are alike, which gives pruners something to choose from."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(columns / 17) + np.cos(rows / 23), np.sin(rows * columns / 5e3), np.cos(columns / 41 + rows / 11)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


UNREADABLE_IMAGES = ("raise", "skip")

# Errors that Pillow raises on broken files: a PNG with a broken chunk gives a SyntaxError, for example.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def open_image(image: Any, folder: str | None = None) -> Image.Image:
    """Reads a PIL image, a path, or a `{"bytes", "path"}` record of `datasets` as an upright RGB image."""
    return load_image(opened(image, folder))


def image_size(image: Any, folder: str | None = None) -> tuple[int, int]:
    """Height and width of the image that [`open_image`] would return, read from its header."""
    image = opened(image, folder)
    width, height = image.size
    # `getexif` would decode a PNG that has no EXIF data, so look at `info` first.
    turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if turned else (height, width)


def opened(image: Any, folder: str | None = None) -> Image.Image:
    """The image as Pillow opens it, not decoded."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(image, (str, os.PathLike)):
        image = os.path.join(folder or "", image)
    if image is None:
        raise ValueError("it is None")
    if not isinstance(image, (Image.Image, str, io.BytesIO)):
        raise TypeError(f"An image must be a PIL image, a path or a dict with 'bytes' or 'path', got {type(image)}.")
    image = image if isinstance(image, Image.Image) else Image.open(image)
    if 0 in image.size:
        raise ValueError(f"its size is {image.size}")
    return image


def open_video(frames: Any, folder: str | None = None) -> np.ndarray:
    """Reads a clip as frames `(F, H, W, 3)`, from an array or tensor of that shape or a list of images of one size.

    Raises:
        TypeError: the clip is a file; decoding needs packages that this library does not depend on.
        ValueError: the frames differ in size, or have another shape.
    """
    if isinstance(frames, (str, os.PathLike, dict)):
        raise TypeError(
            f"A video must be its frames, got {frames!r}. Decode it first, for example with "
            "transformers.video_utils.load_video(path, num_frames=8)[0], which needs the package torchcodec or av."
        )
    if isinstance(frames, (list, tuple)):
        frames = [np.asarray(open_image(frame, folder)) for frame in frames]
        if len({frame.shape for frame in frames}) != 1:
            raise ValueError(f"the frames of a video must have one size, got {[frame.shape[:2] for frame in frames]}")
        frames = np.stack(frames)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"the frames of a video must have the shape (F, H, W, 3), got {frames.shape}")
    return frames
