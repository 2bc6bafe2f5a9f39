"""Pictures of every kind become the right RGB pixels, or are refused by name."""

from __future__ import annotations

import base64
import io
import os

import numpy as np
import pytest
from data_cases import picture, talk
from PIL import EpsImagePlugin, Image
from tiny import tiny_llava_processor
from transformers.image_transforms import convert_to_rgb

from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.media import image_size, open_image, open_video, shown

EDGE = 16


def pixels(image, folder: str | None = None) -> np.ndarray:
    opened = open_image(image, folder)
    assert opened.mode == "RGB"
    return np.asarray(opened)


# transparency


def clear(mode: str) -> Image.Image:
    """A picture whose pixels are of every opacity; the transparent ones hide colours."""
    image = picture(EDGE, EDGE).convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(EDGE * EDGE, dtype=np.uint8).reshape(EDGE, EDGE)))
    return image.convert(mode)


def palette(transparency: int | bytes) -> Image.Image:
    image = picture(EDGE, EDGE).quantize(8)
    image.info["transparency"] = transparency
    return image


def written(image: Image.Image, form: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


CLEAR = {
    "RGBA": lambda: clear("RGBA"),
    "LA": lambda: clear("LA"),
    "PNG, RGBA": lambda: Image.open(written(clear("RGBA"), "PNG")),
    "PNG, LA": lambda: Image.open(written(clear("LA"), "PNG")),
    "PNG, palette, one colour": lambda: Image.open(written(palette(3), "PNG", transparency=3)),
    "PNG, palette, tRNS": lambda: Image.open(written(palette(3), "PNG", transparency=bytes([0, 99, 255, 30]))),
    "PNG, RGB, tRNS": lambda: Image.open(written(Image.new("RGB", (4, 4), "red"), "PNG", transparency=(255, 0, 0))),
    "PNG, grey, tRNS": lambda: Image.open(written(Image.new("L", (4, 4), 7), "PNG", transparency=7)),
    "PNG, 1 bit, tRNS": lambda: Image.open(written(Image.new("1", (4, 4)), "PNG", transparency=0)),
    "GIF": lambda: Image.open(written(palette(2), "GIF", transparency=2)),
    "WebP": lambda: Image.open(written(clear("RGBA"), "WEBP", lossless=True, exact=True)),
    "TIFF": lambda: Image.open(written(clear("RGBA"), "TIFF")),
}


@pytest.mark.parametrize("name", CLEAR)
def test_transparency_is_white_as_in_transformers(name):
    image = CLEAR[name]()
    expected = convert_to_rgb(CLEAR[name](), return_numpy=True)
    black = np.asarray(image.convert("RGB"))
    assert not np.array_equal(expected, black), "the case shows nothing"
    assert np.array_equal(pixels(image), expected)


def test_hidden_colours_do_not_show_and_opaque_pixels_stay():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(9, 8, 7, 0), (9, 8, 7, 255), (0, 0, 0, 128)])
    assert pixels(image).tolist() == [[[255, 255, 255], [9, 8, 7], [127, 127, 127]]]
    premultiplied = pixels(image.convert("RGBa")).tolist()[0]
    assert premultiplied[:2] == [[255, 255, 255], [9, 8, 7]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_pillows(mode):
    image = picture(EDGE, EDGE, mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


def test_the_collators_pixels_are_the_processors_own():
    processor, image = tiny_llava_processor(), clear("RGBA")
    batch = VisionLanguageCollator(processor)([talk("q", "a", images=[image])])
    own = processor(images=[image], text="<image>", return_tensors="pt")["pixel_values"]
    assert (batch["pixel_values"] == own).all()


def test_a_turned_transparent_picture(tmp_path):
    image = clear("RGBA").crop((0, 0, 4, EDGE))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = convert_to_rgb(image.transpose(Image.Transpose.ROTATE_270), return_numpy=True)
    assert np.array_equal(pixels(tmp_path / "turned.png"), turned)
    assert image_size(tmp_path / "turned.png") == (4, EDGE)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_the_size_is_that_of_a_picture_turned_by_its_xmp(tmp_path, form):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    picture(4, EDGE).save(tmp_path / "turned", form, xmp=xmp)
    assert image_size(tmp_path / "turned") == open_image(tmp_path / "turned").size[::-1]  # Pillow 10 turns neither


# more than 8 bits

RAMP = np.linspace(0, 1, EDGE * EDGE).reshape(EDGE, EDGE)
GREY = (RAMP * 255).round()

DEEP = {
    "uint16, 16 bits": (RAMP * 65535).astype(np.uint16),
    "uint16, 12 bits": (RAMP * 4095).astype(np.uint16),
    "uint16, 8 bits": (RAMP * 255).round().astype(np.uint16),
    "int32, 16 bits": (RAMP * 65535).astype(np.int32),
    "int32, 31 bits": (RAMP * (2**31 - 1)).astype(np.int32),
    "int32, 20 bits": (RAMP * 2**20).astype(np.int32),
    "float, 0 to 1": RAMP.astype(np.float32),
    "float, 0 to 255": (RAMP * 255).astype(np.float32),
    "float, resized": (RAMP * 1.006).astype(np.float32) - 0.003,
}


FORMS = [(name, form) for name in DEEP for form in ("PIL", "array", "TIFF", "PNG") if form != "PNG" or "uint16" in name]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_deep_pixels_are_scaled_by_their_own_range(name, form):
    array = DEEP[name]
    image = array if form == "array" else Image.fromarray(array)
    if form in ("TIFF", "PNG"):
        image = {"bytes": written(image, form).getvalue(), "path": None}
    grey = pixels(image)
    assert np.abs(grey - GREY[..., None]).max() <= 1.0
    assert (grey.min(), grey.max()) == (0, 255)


def test_big_endian_and_small_files():
    values = (RAMP * 65535).astype(">u2")
    image = Image.frombytes("I;16B", (EDGE, EDGE), values.tobytes())
    assert np.array_equal(pixels(image)[..., 0], (values / 257).round())


def test_a_12_bit_picture_keeps_its_brightness():
    dim = np.full((4, 4), 2048, dtype=np.uint16)
    assert set(pixels(Image.fromarray(dim)).flat) == {128}


def test_a_transparent_value_of_a_deep_picture_is_white():
    image = Image.fromarray(np.array([[0, 40000], [65535, 40000]], dtype=np.uint16))
    image.info["transparency"] = 0
    assert pixels(image)[..., 0].tolist() == [[255, 156], [255, 156]]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[0.0, np.nan]], dtype=np.float32), "NaN or infinite"),
        (np.array([[0.0, np.inf]], dtype=np.float32), "NaN or infinite"),
        (np.array([[-1.0, 1.0]], dtype=np.float32), r"float pixels range from -1 to 1, not from 0 to 1 or to 255"),
        (np.array([[0.0, 5.0]], dtype=np.float32), "range from 0 to 5"),
        (np.array([[0.0, 1000.0]], dtype=np.float32), "range from 0 to 1000"),
        (np.array([[-1024, 3071]], dtype=np.int32), "range from -1024 to 3071, so black is not 0"),
    ],
)
def test_pixels_without_a_known_black_and_white_are_refused_by_name(array, message):
    for image in (Image.fromarray(array), array):
        with pytest.raises(ValueError, match=rf"{message}.*Scale it to whole numbers from 0 to 255"):
            open_image(image)
    collator = VisionLanguageCollator(tiny_llava_processor())
    with pytest.raises(ValueError, match=rf"cannot be read \(sample 0 of the batch, id 'x'\).*{message}"):
        collator([talk("q", "a", images=[Image.fromarray(array)], id="x")])


@pytest.mark.parametrize(
    "array",
    [
        np.asarray(picture(5, 4)),
        np.asarray(picture(5, 4, "L")),
        np.asarray(picture(5, 4, "L"))[..., None],
        np.asarray(clear("RGBA")),
        np.asarray(picture(5, 4)).astype(np.int64),
        np.eye(4, dtype=bool),
    ],
)
def test_arrays(array):
    flat = array[..., 0] if array.shape[-1:] == (1,) else array
    expected = Image.fromarray(flat.astype(np.uint8) * 255 if flat.dtype == bool else flat.astype(np.uint8))
    assert np.array_equal(pixels(array), pixels(expected))


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(H, W\) or \(H, W, C\).*got \(3, 4, 5\)"):
        open_image(np.zeros((3, 4, 5), dtype=np.uint8))


def test_clips_are_scaled_too():
    clip = np.stack([RAMP, RAMP])[..., None].repeat(3, -1)
    assert np.array_equal(open_video(clip)[0, ..., 0], GREY)


# where pictures are


def test_bytes_urls_and_paths_are_one_picture(tmp_path):
    image = picture(5, 4)
    data = written(image, "PNG").getvalue()
    (tmp_path / "a b.png").write_bytes(data)
    text = base64.b64encode(data).decode()
    kinds = [data, bytearray(data), f"data:image/png;base64,{text}", f"data:;base64,{text}", "a b.png"]
    kinds += [f"file://{tmp_path}/a%20b.png", {"bytes": None, "path": f"data:image;base64,{text}"}]
    for kind in kinds:
        assert np.array_equal(pixels(kind, str(tmp_path)), np.asarray(image))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://x.org/a.png", "'https://x.org/a.png' is on the web.*Download the picture"),
        ("data:image/png;base64,%%%", "holds no base64"),
        ("data:image/png", "no comma"),
        (None, "it is None"),
    ],
)
def test_what_cannot_be_opened_says_why(image, message):
    with pytest.raises(ValueError, match=message):
        open_image(image)


# what is not opened

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("form", ["path", "bytes", "data", "record", "PIL"])
def test_postscript_starts_no_ghostscript(tmp_path, monkeypatch, form):
    def started(*args, **options):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    image = {
        "path": str(tmp_path / "a.png"),
        "bytes": POSTSCRIPT,
        "data": f"data:image/png;base64,{base64.b64encode(POSTSCRIPT).decode()}",
        "record": {"bytes": POSTSCRIPT, "path": "a.png"},
        "PIL": Image.open(io.BytesIO(POSTSCRIPT)),
    }[form]
    for read in (open_image, image_size):
        with pytest.raises((OSError, ValueError), match="can read as one of PNG, JPEG|its format, EPS, is not read"):
            read(image)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "ICO", "PPM", "TGA"])
def test_formats_of_pixels_are_read(tmp_path, form):
    image = picture(16, 16)
    image.save(tmp_path / "a.picture", form)
    assert np.abs(pixels(tmp_path / "a.picture").astype(float) - np.asarray(image)).mean() < 64


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/ptmx")
    elif kind == "folder":
        path.mkdir()
    path = "/dev/ptmx" if kind == "device" else str(path)
    collator = VisionLanguageCollator(tiny_llava_processor())
    with pytest.raises(ValueError, match=r"sample 0 of the batch, id 'x'.*is no regular file"):
        collator([talk("q", "a", images=[path], id="x")])


def test_values_are_shortened():
    assert shown("a") == "'a'"
    long = shown("data:image/png;base64," + "A" * 10**6 + "end")
    assert len(long) == 100
    assert long.startswith("'data:image/png")
    assert long.endswith("end'")
