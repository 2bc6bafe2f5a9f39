"""Pictures that come several times are read, decoded and processed once, and nothing else changes."""

import io
import os
import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from data_cases import PROCESSORS, picture, talk
from PIL import Image
from tiny_processors import FAMILIES

from hf_dualspeed.data.collators import VisionLanguageCollator
from hf_dualspeed.data.media import open_image
from hf_dualspeed.data.pictures import MIB, Pictures

MORE = sorted(set(FAMILIES) - set(PROCESSORS))


def processor_of(name):
    if name in PROCESSORS:
        return PROCESSORS[name][0]()
    missing = [package for package in FAMILIES[name].needs if find_spec(package) is None]
    if missing:
        pytest.skip(f"{name}'s processor needs {', '.join(missing)}")
    return FAMILIES[name].build()


def jpeg(path, width=60, height=40, quality=95):
    """A smooth picture as a JPEG, which loses little."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 200], -1).astype(np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=quality)
    return path


def questions(*images_of_each):
    """Samples with a question and an answer about each list of pictures."""
    return [
        talk(f"question {number}", f"answer {number}", images=list(images))
        for number, images in enumerate(images_of_each)
    ]


def without_repeats(samples):
    """The same samples, with pictures that are different objects."""
    return [{**sample, "images": [image.copy() for image in sample["images"]]} for sample in samples]


def skip_without_one_shape(name):
    """Skips families whose own processor cannot batch pictures of several shapes."""
    if name == "perception_lm":
        pytest.skip(f"{name} stacks the tiles of a batch, which must be as many for each picture")


class Counting:
    """An image processor that counts the pictures it is given."""

    def __init__(self, image_processor):
        self.image_processor, self.given = image_processor, []

    def __call__(self, images, *args, **options):
        self.given.append(sum(len(row) if isinstance(row, list) else 1 for row in images))
        return self.image_processor(images, *args, **options)

    def __getattr__(self, name):
        return getattr(self.image_processor, name)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", [*PROCESSORS, *MORE])
def test_a_batch_is_the_same_to_the_bit(name, several):
    """With one picture in each sample, and with several in some; the first batch and later ones, of other pictures."""
    processor = processor_of(name)
    skip_without_one_shape(name)
    if several and name in FAMILIES and 2 not in FAMILIES[name].images:
        pytest.skip(f"{name} takes one picture for each sample")
    collator, expected = VisionLanguageCollator(processor), VisionLanguageCollator(processor)
    for width in (20, 33):
        one, two, three = picture(width), picture(9, width), picture(width, width)
        rows = [[one], [two], [one], [three], [one]]
        samples = questions(*([[one, two], [two], [one, one], [three]] if several else rows))
        batch, plain = collator(samples), expected(without_repeats(samples))
        assert batch.keys() == plain.keys()
        for key, value in plain.items():
            assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_sees_each_picture_once(name, several):
    processor = processor_of(name)
    collator, one, two = VisionLanguageCollator(processor), picture(), picture(30, 20)
    processor.image_processor = Counting(processor.image_processor)
    samples = questions(*([[one, two], [one], [two, two]] if several else [[one], [one], [two], [one]]))
    collator(samples)
    assert sorted(processor.image_processor.given) == [2, 5 if several else 4]  # once both ways
    processor.image_processor.given.clear()
    collator(samples)
    assert processor.image_processor.given == [2]
    processor.image_processor.given.clear()
    collator(questions([one], [two]))
    assert processor.image_processor.given == [2]


def test_a_processor_that_looks_at_its_neighbours_is_left_alone():
    """Here, pixels depend on how many pictures there are."""

    class Neighbours(Counting):
        def __call__(self, images, *args, **options):
            output = super().__call__(images, *args, **options)
            return {**output, "pixel_values": output["pixel_values"] + len(images)}

    processor = processor_of("llava")
    processor.image_processor = Neighbours(processor.image_processor)
    collator, one = VisionLanguageCollator(processor), picture()
    first, second = (collator(questions([one], [one])) for _ in range(2))
    assert torch.equal(first["pixel_values"], second["pixel_values"])
    plain = VisionLanguageCollator(processor)(questions([one], [one.copy()]))
    assert torch.equal(first["pixel_values"], plain["pixel_values"])
    assert processor.image_processor.given == [2, 1, 2, 2]


# reading


@pytest.mark.parametrize("kind", ["path", "bytes", "record", "record of a path", "object", "relative"])
def test_a_batch_reads_a_picture_once(tmp_path, kind):
    path = jpeg(tmp_path / "a.jpg")
    given = {
        "path": lambda: str(path),
        "bytes": path.read_bytes,
        "record": lambda: {"bytes": path.read_bytes(), "path": None},
        "record of a path": lambda: {"bytes": None, "path": str(path)},
        "relative": lambda: "a.jpg",
    }
    same = Image.open(path)
    collator = VisionLanguageCollator(processor_of("llava"), image_folder=str(tmp_path))
    batch = collator(questions(*([given.get(kind, lambda: same)()] for _ in range(3))))
    assert collator.pictures.decoded == 1
    plain = VisionLanguageCollator(processor_of("llava"))(questions(*([open_image(path)] for _ in range(3))))
    assert torch.equal(batch["pixel_values"], plain["pixel_values"])


def test_later_batches_find_the_last_pictures_within_the_bound(tmp_path):
    paths = [jpeg(tmp_path / f"{number}.jpg") for number in range(3)]  # 7,200 bytes each
    pictures = Pictures(mib=2 * 7200 / MIB)

    def opens(*which):
        pictures.begin_batch()
        before = pictures.decoded
        for number in which:
            pictures.open(str(paths[number]))
        return pictures.decoded - before

    assert [opens(0, 1, 0), opens(0, 1), opens(2), opens(1), opens(0)] == [2, 0, 1, 0, 1]
    assert pictures._held <= pictures.bound
    # A batch that is larger than the bound still reads each picture once.
    assert opens(0, 1, 2, 0, 1, 2) <= 3


def test_a_changed_file_is_read_again(tmp_path):
    path, pictures = jpeg(tmp_path / "a.jpg"), Pictures(mib=1)
    before = pictures.open(str(path))
    jpeg(path, 30, 30)
    os.utime(path, ns=(1, 1))
    pictures.begin_batch()
    assert pictures.open(str(path)).size == (30, 30)
    assert before.size == (60, 40)


def test_an_object_that_was_changed_in_place_is_read_again():
    pixels, pictures = np.zeros((8, 8, 3), np.uint8), Pictures(mib=1)
    assert pictures.open(pixels).getpixel((0, 0)) == (0, 0, 0)
    pixels[:] = 255
    pictures.begin_batch()
    assert pictures.open(pixels).getpixel((0, 0)) == (255, 255, 255)


def test_nothing_is_kept_without_a_bound_and_none_travels_to_workers(tmp_path):
    path = str(jpeg(tmp_path / "a.jpg"))
    pictures = Pictures(mib=0)
    for _ in range(2):
        pictures.begin_batch()
        pictures.open(path)
    assert pictures.decoded == 2
    full = Pictures(mib=1)
    full.open(path)
    assert len(pickle.dumps(full)) < 1000


@pytest.mark.parametrize("value", [-1, "64", None])
def test_a_wrong_bound_is_refused(value):
    said = "Use 0" if value == -1 else "must be a finite number"
    with pytest.raises(ValueError, match=f"image_cache_mib.*{said}"):
        VisionLanguageCollator(processor_of("llava"), image_cache_mib=value)


@pytest.mark.parametrize("broken", ["missing.jpg", b"no picture"])
def test_a_broken_picture_is_told_each_time(broken):
    collator = VisionLanguageCollator(processor_of("llava"), unreadable_images="skip")
    collator(questions([broken], [picture()], [broken]))
    assert collator.skipped == 2


# drafts


def test_drafts_are_no_smaller_than_twice_what_the_processor_makes(tmp_path):
    processor = processor_of("llava")
    edge = max(v for v in dict(processor.image_processor.size).values() if v)
    path = jpeg(tmp_path / "a.jpg", 24 * edge, 17 * edge)
    whole, drafted = VisionLanguageCollator(processor), VisionLanguageCollator(processor, jpeg_draft=True)
    assert Pictures(0, drafted.pictures.draft).open(str(path)).size == (3 * edge, 17 * edge // 8 + (17 * edge % 8 > 0))
    # Both show the same, which a picture of another brightness would not.
    plain, close = (c(questions([str(path)]))["pixel_values"] for c in (whole, drafted))
    assert plain.shape == close.shape
    assert (plain - close).abs().mean() < 0.1 * plain.std()
    # Pictures that are small enough, and other formats, are read as ever.
    small, png = jpeg(tmp_path / "b.jpg", 2 * edge + 1, 3 * edge), io.BytesIO()
    open_image(path).save(png, "PNG")
    for image in (str(small), png.getvalue()):
        assert Pictures(0, drafted.pictures.draft).open(image).tobytes() == open_image(image).tobytes()


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "idefics3", "internvl", "aya_vision"])
def test_drafts_are_refused_where_a_picture_s_size_decides_on_its_tokens(name):
    with pytest.raises(ValueError, match="jpeg_draft.*Leave it out"):
        VisionLanguageCollator(processor_of(name), jpeg_draft=True)


# shrinking


@pytest.mark.parametrize("size", [(300, 200), (201, 333), (97, 512), (250, 250), (30, 20)])
@pytest.mark.parametrize("name", [*PROCESSORS, *MORE])
def test_shrinking_ahead_changes_no_value(name, size):
    """Large pictures that come first, later, and among small ones."""
    processor = processor_of(name)
    skip_without_one_shape(name)
    collator, plain = VisionLanguageCollator(processor), VisionLanguageCollator(processor)
    plain.pictures.shrunk = None
    for samples in (questions([picture(260, 190)]), questions([picture(*size)], [picture(20, 12)])):
        batch, expected = collator(samples), plain(samples)
        for key, value in expected.items():
            assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value
    if name == "llava":  # which is the one that it is for
        assert collator.pictures.shrunk.works
        assert min(collator.pictures.open(picture(260, 190)).size) == 16
    if name in ("llava_next", "qwen2_5_vl"):  # they say how large a picture was
        assert collator.pictures.open(picture(260, 190)).size == (260, 190)


def test_a_processor_that_sees_the_difference_gets_pictures_as_they_are():
    class Sizes(Counting):
        def __call__(self, images, *args, **options):
            output = super().__call__(images, *args, **options)
            first = images[0][0] if isinstance(images[0], list) else images[0]
            return {**output, "pixel_values": output["pixel_values"] + first.width}

    processor = processor_of("llava")
    processor.image_processor = Sizes(processor.image_processor)
    collator = VisionLanguageCollator(processor)
    assert [collator.pictures.open(picture(*size)).size for size in ((90, 90), (90, 80), (90, 90))] == [
        (90, 90),
        (90, 80),
        (90, 90),
    ]
    assert collator.pictures.shrunk.works is False
    assert processor.image_processor.given == [1, 1]


def test_a_picture_of_one_colour_tells_nothing_of_the_processor():
    class Sharp(Counting):
        def __call__(self, images, *args, **options):
            output = super().__call__(images, *args, **options)
            first = images[0][0] if isinstance(images[0], list) else images[0]
            blank = all(low == high for low, high in first.getextrema())
            return {**output, "pixel_values": output["pixel_values"] + (0 if blank else first.width)}

    processor = processor_of("llava")
    processor.image_processor = Sharp(processor.image_processor)
    pictures = VisionLanguageCollator(processor).pictures
    assert pictures.open(Image.new("RGB", (90, 80), "white")).size == (90, 80)
    assert pictures.open(picture(90, 80)).size == (90, 80)
    assert pictures.shrunk.works is False


def test_shrinking_follows_a_processor_that_is_changed_later(tmp_path):
    picture(260, 190).save(tmp_path / "a.png")
    processor = processor_of("llava")
    pictures = VisionLanguageCollator(processor).pictures
    for edge in (16, 32):
        processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=edge)
        pictures.begin_batch()
        for image in (picture(260, 190), str(tmp_path / "a.png")):
            assert min(pictures.open(image).size) == edge
