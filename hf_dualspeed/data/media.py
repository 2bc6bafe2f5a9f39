"""Opens the images and videos of a sample."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_transforms import convert_to_rgb


def pattern(width: int, height: int) -> Image.Image:
    """An image of waves of colour: no two patches are alike, which gives pruners something to choose from."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(columns / 17) + np.cos(rows / 23), np.sin(rows * columns / 5e3), np.cos(columns / 41 + rows / 11)]
    return Image.fromarray((np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


# Errors that Pillow raises on broken files: a PNG with a broken chunk gives a SyntaxError, for example.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

DOWNLOAD = "Download the picture and give its path"

# Ranges of integers, as their largest values: 8 bits, 12 bits, as cameras and scanners store them in 16, and 16 bits.
# A picture's range is the smallest that holds its largest value.
DEEP_RANGES = (255, 4095, 65535)
# The largest value of 12 bits, of 16 bits without the lower 8.
TWELVE_OF_SIXTEEN = 4095 >> 8
# A float picture is one from 0 to 1 up to this value (resizing overshoots a little) ...
UNIT_LIMIT = 1.01
# ... and one from 0 to 255 from this value on. Between the two it would turn out black, so it is refused.
BYTE_LIMIT = 16
# A file's name has no more characters than this, as most systems have it.
LONGEST_NAME = 255
# Formats that are read: pictures of pixels, whose decoders start no program. Pillow would hand PostScript to
# Ghostscript. The last, TGA, has no mark at its start.
RASTERS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "PCX", "SGI")
RASTERS += ("TGA",)
# Pillow's modes with premultiplied colours, which it converts to RGB by way of these only.
PREMULTIPLIED = {"RGBa": "RGBA", "La": "LA"}


def shown(value: Any, limit: int = 100) -> str:
    """The value as an error shows it: at most `limit` characters, of which the middle is left out."""
    text = repr(value[:200] + value[-200:] if isinstance(value, (str, bytes)) and len(value) > 400 else value)
    return text if len(text) <= limit else f"{text[: limit - 43]}...{text[-40:]}"


def open_image(image: Any, folder: str | None = None, draft: int | None = None) -> Image.Image:
    """Reads a picture as an upright RGB image of 8 bits, with white in place of transparency.

    Args:
        image: A PIL image, a path, a `data:` URL, the bytes of a file, a `{"bytes", "path"}` record of `datasets`, or
            an array `(H, W)` or `(H, W, C)`, or a tensor `(H, W)` or `(C, H, W)`, with 1, 3 or 4 channels.
        folder (`str`, *optional*): Folder that a relative path starts from.
        draft (`int`, *optional*): Decode a JPEG at a half, a quarter or an eighth of its size as long as no side falls
            below this one, in pixels.

    Raises:
        ValueError: the picture is empty, on the web, no regular file, of a format beside [`RASTERS`], or has values
            that are no brightness: see [`to_rgb`]; or it is in colour with 12 bits in 16, of which Pillow reads the
            upper 8.
        OSError, SyntaxError, EOFError, PIL.Image.DecompressionBombError: the file is missing or damaged.
        TypeError: `image` is none of these.
    """
    given, image = image, opened(image, folder)
    if draft is not None and image.format in ("JPEG", "MPO"):
        shrunk = max(1, min(image.size) // draft)
        image.draft(None, (image.width // shrunk, image.height // shrunk))
    # Pillow's decoders name what they read: "RGB;16B".
    deep = image.mode.startswith("RGB") and any(";16" in str(tile[3]) for tile in getattr(image, "tile", None) or ())
    if deep and 0 < max(high for _, high in image.convert("RGB").getextrema()) <= TWELVE_OF_SIXTEEN:
        raise ValueError("its 16-bit channels hold 12 bits or less, so it would come out black. Save it with 8 bits")
    if image is given:
        return to_rgb(ImageOps.exif_transpose(image))
    # A picture that was opened here is turned in place and, if it is RGB already, not copied.
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and image.info.get("transparency") is None:
        image.load()
        return image
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, 8 bits each, with white in place of transparency, as transformers' processors do it.

    Pictures of more than 8 bits are scaled by their own range, see [`eight_bits`]; Pillow would cut them off at 255.

    Raises:
        ValueError: see [`eight_bits`]; or Pillow cannot convert the mode.
    """
    if image.mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[image.mode])
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # (H, W), as stored.
        pixels = np.asarray(image)
        grey, clear = Image.fromarray(eight_bits(pixels)), image.info.get("transparency")
        if isinstance(clear, int):
            # One value of a deep grey PNG may mean "transparent".
            grey.paste(255, mask=Image.fromarray(pixels == clear))
        return grey.convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return Image.fromarray(convert_to_rgb(image, return_numpy=True))
    return image.convert("RGB")


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any type and shape as 8-bit ones of the same shape.

    The largest value tells the range that becomes 0 to 255. Integers: 0 to 255, 0 to 4095 (12 bits, which are stored in
    16), 0 to 65535, and beyond that 0 to the largest value itself. Floats: 0 to 1, or 0 to 255.

    Raises:
        ValueError: values are negative or not finite, or floats lie in neither range, so that black and white are
            unknown.
    """
    if pixels.dtype == np.uint8 or not pixels.size:
        return pixels.astype(np.uint8)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    remedy = "Scale it to whole numbers from 0 to 255 and save it again"
    if pixels.dtype.kind not in "iuf":
        raise ValueError(f"its pixels are of type {pixels.dtype}. {remedy}")
    low, high = pixels.min().item(), pixels.max().item()
    if not np.isfinite([low, high]).all():
        raise ValueError(f"its pixels hold NaN or infinite values. {remedy}")
    if pixels.dtype.kind == "f":
        top = 1 if high <= UNIT_LIMIT else 255
        # Resizing undershoots as much as it overshoots.
        if low < top * (1 - UNIT_LIMIT) or high > top * UNIT_LIMIT or UNIT_LIMIT < high < BYTE_LIMIT:
            raise ValueError(f"its float pixels range from {low:g} to {high:g}, not from 0 to 1 or to 255. {remedy}")
    else:
        top = next((top for top in DEEP_RANGES if high <= top), high)
        if low < 0:
            raise ValueError(f"its pixels range from {low} to {high}, so black is not 0. {remedy}")
    return (pixels.astype(np.float64) * (255 / top)).round().clip(0, 255).astype(np.uint8)


def image_size(image: Any, folder: str | None = None) -> tuple[int, int]:
    """Height and width of the image that [`open_image`] would return, read from its header."""
    image = opened(image, folder)
    width, height = image.size
    # `getexif` would decode a PNG that has no EXIF data, so look at `info` first. It also reads XMP.
    turned = not image.info.keys().isdisjoint(("exif", "xmp")) and (
        image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    )
    return (width, height) if turned else (height, width)


def opened(image: Any, folder: str | None = None) -> Image.Image:
    """The image as Pillow opens it, not decoded. Arguments and errors are those of [`open_image`]."""
    given, image = image, source_of(image, folder)
    if isinstance(image, str) and os.path.exists(image) and not os.path.isfile(image):
        raise ValueError(f"{shown(image)} is no regular file, but a folder, a device or a pipe. Give a picture's path")
    Image.init()  # fills `Image.OPEN`; which formats it has depends on how Pillow was built
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(image, formats=[name for name in RASTERS if name in Image.OPEN])
    except UnidentifiedImageError:  # of bytes, it tells an address in memory
        known = ", ".join(RASTERS)
        raise UnidentifiedImageError(f"{shown(given)} is no picture that Pillow can read as one of {known}") from None
    if image.format not in (None, *RASTERS):  # opened elsewhere, by `datasets` for example, and not decoded yet
        raise ValueError(f"its format, {image.format}, is not read. Convert it to PNG")
    if 0 in image.size:
        raise ValueError(f"its size is {image.size}")
    return image


def source_of(image: Any, folder: str | None = None) -> Image.Image | io.BytesIO | str:
    """A picture as a PIL image, the bytes of a file, or its path. Arguments and errors are those of [`open_image`]."""
    if isinstance(image, Mapping):
        data = image.get("bytes")
        image = image.get("path") if data is None or not len(data) else data
    if image is None or (isinstance(image, (str, bytes)) and not image):
        raise ValueError(f"it is {image!r}")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
        image = np.moveaxis(image, 0, -1) if image.ndim == 3 else image
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, (str, os.PathLike)):
        image = located(image, folder)
        if not is_data_url(image) and max(map(len, image.split("/"))) > LONGEST_NAME:
            raise ValueError(f"{shown(image)} is no path. If it is base64, write data:image/png;base64, in front of it")
        return _from_data_url(image) if is_data_url(image) else image
    if isinstance(image, (bytes, bytearray)):
        return io.BytesIO(image)
    if not isinstance(image, (Image.Image, io.BytesIO)):
        raise TypeError(
            f"An image must be a PIL image, a path or a dict with 'bytes' or 'path', bytes, or an array, got "
            f"{shown(image)} of {type(image)}."
        )
    return image


def located(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> str:
    """The path of a picture, from `folder` on if it is relative; a `data:` URL stays as it is.

    Raises:
        ValueError: it is on the web.
    """
    path = os.fspath(path)
    if is_web(path):
        raise ValueError(f"{shown(path)} is on the web, and nothing is downloaded while training. {DOWNLOAD}")
    if is_data_url(path):
        return path
    if path.startswith("file://"):
        path = unquote(urlsplit(path).path)
    return os.path.join(folder or "", path)


def is_web(path: Any) -> bool:
    return isinstance(path, str) and path.lower().startswith(("http://", "https://", "ftp://", "s3://", "gs://"))


def is_data_url(path: Any) -> bool:
    return isinstance(path, str) and path[:5].lower() == "data:"


def _from_data_url(url: str) -> io.BytesIO:
    header, comma, data = url.partition(",")
    if not comma:
        raise ValueError(f"{shown(url)} is no data: URL, for it has no comma. Write data:image/png;base64,...")
    if not header.lower().endswith(";base64"):
        return io.BytesIO(unquote_to_bytes(data))
    try:
        return io.BytesIO(base64.b64decode("".join(unquote(data).split()), validate=True))
    except ValueError as error:
        raise ValueError(f"{shown(url)} holds no base64: {error}. Encode the file's bytes again") from None


def _from_array(pixels: np.ndarray) -> Image.Image:
    """An array `(H, W)` or `(H, W, C)` as an image of 8 bits."""
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim != 2 and (pixels.ndim != 3 or pixels.shape[-1] not in (3, 4)):
        raise ValueError(
            f"an array must have the shape (H, W) or (H, W, C) with 1, 3 or 4 channels, got {pixels.shape}"
        )
    return Image.fromarray(eight_bits(pixels))


def open_video(frames: Any, folder: str | None = None) -> np.ndarray:
    """Reads a clip as 8-bit frames `(F, H, W, 3)`, from an array or tensor of that shape or images of one size.

    Raises:
        TypeError: the clip is a file; decoding needs packages that this library does not depend on.
        ValueError: the frames differ in size, or have another shape, or see [`eight_bits`].
    """
    if isinstance(frames, (str, os.PathLike, dict)):
        raise TypeError(
            f"A video must be its frames, got {shown(frames)}. Decode it first, for example with "
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
    return eight_bits(frames)
