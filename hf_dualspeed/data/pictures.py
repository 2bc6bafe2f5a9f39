"""Pictures that come several times, as with several questions about one: read, decoded and processed once."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

from .media import is_data_url, located, open_image

MIB = 2**20
SEVERAL = [[100, 120], [600, 800], [3000, 4000], [3000, 1000], [500, 2500]]  # sizes of pictures: height, width
WORTH = 4  # a picture is shrunk ahead if it has so many times the pixels


class Pictures:
    """Opens pictures as [`open_image`] does, and keeps them: all of a batch, and the last ones within a bound.

    A picture is the same if it is the same object, has the same bytes, or is a file that has not changed since. A copy
    in a data loader's worker begins empty.

    Args:
        mib (`float`): The most MiB of decoded pictures to keep beyond a batch; 0 keeps none.
        draft (`int`, *optional*): Decode JPEGs at a half, a quarter or an eighth of their size as long as no side falls
            below this one, in pixels.
        shrunk ([`Shrunk`], *optional*): Shrinks pictures ahead of the processor.
    """

    def __init__(self, mib: float, draft: int | None = None, shrunk: Shrunk | None = None):
        self.bound, self.draft, self.shrunk = int(mib * MIB), draft, shrunk
        self._clear()

    def _clear(self) -> None:
        self.decoded = 0  # pictures that were read, for tests and benches
        self._held = 0
        self._kept: OrderedDict[Hashable, Image.Image] = OrderedDict()
        self._batch: dict[Hashable, Image.Image] = {}
        self._given: list[Any] = []  # keeps objects alive as long as their ids are keys

    def __getstate__(self) -> dict:
        return {"bound": self.bound, "draft": self.draft, "shrunk": self.shrunk}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._clear()

    def begin_batch(self) -> None:
        """Forgets the last batch, but for pictures within the bound, which were shrunk as they would be now."""
        self._batch, self._given = {}, []
        if self.shrunk is not None and self.shrunk.renewed():
            self._held = 0
            self._kept.clear()

    def open(self, image: Any, folder: str | None = None) -> Image.Image:
        """The picture in RGB, which is not to be changed; see [`open_image`] for arguments and errors."""
        key, lasts = key_of(image, folder)
        found = self._batch.get(key) or (self._kept.get(key) if lasts else None)
        if found is None:
            found, self.decoded = open_image(image, folder, self.draft), self.decoded + 1
            found = found if self.shrunk is None else self.shrunk(found)
        self._batch[key] = found
        if lasts:
            self._keep(key, found)
        else:
            self._given.append(image)
        return found

    def _keep(self, key: Hashable, image: Image.Image) -> None:
        """Puts a picture last among those that are kept, and drops the first ones beyond the bound."""
        if key not in self._kept:
            self._held += bytes_of(key, image)
        self._kept[key] = image
        self._kept.move_to_end(key)
        while self._held > self.bound:
            self._held -= bytes_of(*self._kept.popitem(last=False))


def bytes_of(key: Hashable, image: Image.Image) -> int:
    """The memory of a decoded picture and its key, which may hold the file's bytes."""
    return image.width * image.height * len(image.getbands()) + (len(key) if isinstance(key, (bytes, str)) else 0)


def key_of(image: Any, folder: str | None) -> tuple[Hashable, bool]:
    """What tells a picture apart, and whether that holds beyond a batch: objects may be changed in place."""
    if isinstance(image, Mapping):
        data = image.get("bytes")
        image = image.get("path") if data is None or not len(data) else data
    if isinstance(image, bytes) or is_data_url(image):
        return image, True
    if isinstance(image, (str, os.PathLike)):
        try:
            path = os.path.abspath(located(image, folder))
            status = os.stat(path)
        except (OSError, ValueError):  # which opening it will raise again, with what there is to say
            return os.fspath(image), False
        return (path, status.st_mtime_ns, status.st_size, status.st_ino), True
    return id(image), False


class Shrunk:
    """Brings large pictures to the size that the processor makes of all of them, as it would itself.

    Processors of transformers turn a picture into an array and back before they resize it, which takes longer at many
    megapixels than all else, and a small picture is cheaper to keep. The first large picture of several colours is
    processed both ways: where that makes a difference to a single value, pictures are left as they are.
    """

    def __init__(self, processor: ProcessorMixin):
        self.processor, self._settings = processor, None
        self.renewed()

    def renewed(self) -> bool:
        """Looks at the processor again if it has changed, and says whether it has."""
        settings = settings_of(self.processor)
        if settings == self._settings:
            return False
        self._settings, self.size = settings, fixed_size(self.processor)
        self.works: bool | None = None if self.size else False
        return True

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.works is False:
            return image
        size = self.size_of(image)
        if image.width * image.height < WORTH * size[0] * size[1] or (self.works is None and tells_nothing(image)):
            return image
        small = image.resize(size, self.processor.image_processor.resample)
        if self.works is None:
            self.works = self.processed(image, small)
        return small if self.works else image

    def size_of(self, image: Image.Image) -> tuple[int, int]:
        """Width and height that the processor makes of a picture before it crops."""
        if "shortest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        edge, (short, long) = self.size["shortest_edge"], sorted(image.size)
        other = int(edge * long / short)
        return (edge, other) if image.width <= image.height else (other, edge)

    def processed(self, image: Image.Image, small: Image.Image) -> bool:
        """Whether both come out the same."""
        try:
            one, other = (self.processor.image_processor([i], return_tensors="pt") for i in (image, small))
        except Exception:  # what a processor cannot take, it says in the batch
            return False
        return same(one, other)


def tells_nothing(image: Image.Image) -> bool:
    """Whether a picture looks alike however it is resized, or whether its proportions are kept or not."""
    return image.width == image.height or all(low == high for low, high in image.getextrema())


class ProcessedOnce:
    """Lets a processor process each picture of a batch once, and repeats the outcome.

    The first batch with pictures that come again is processed both ways. Where that makes a difference to a single
    value, or the outcome has no rows for each picture, all pictures are processed from then on.
    """

    def __init__(self):
        self.works: dict[bool, bool] = {}  # of samples with one picture each, and of others

    def around(self, processor: ProcessorMixin, images: list[list[Image.Image]]) -> ProcessorMixin:
        """The processor for a batch with these pictures: itself where there is none that comes again."""
        flat = [id(image) for row in images for image in row]
        single = all(len(row) == 1 for row in images)
        image_processor = getattr(processor, "image_processor", None)
        if len(set(flat)) == len(flat) or image_processor is None or self.works.get(single) is False:
            return processor
        stand_in = copy.copy(processor)
        stand_in.image_processor = DistinctImages(image_processor, self.works, single)
        return stand_in


class DistinctImages:
    """An image processor that is given each picture once."""

    def __init__(self, image_processor: Any, works: dict[bool, bool], single: bool):
        self.image_processor, self.works, self.single = image_processor, works, single

    def __call__(self, images: Any, *args: Any, **options: Any) -> Any:
        flat = flattened(images)
        order: dict[int, int] = {}
        for image in flat:
            order.setdefault(id(image), len(order))
        distinct = list({id(image): image for image in flat}.values())
        places = [order[id(image)] for image in flat]
        whole = None
        if self.single not in self.works:
            whole = self.image_processor(images, *args, **options)
        if self.works.get(self.single, True) and len(distinct) < len(flat):
            nested = isinstance(images[0], (list, tuple))
            output = self.image_processor([[image] for image in distinct] if nested else distinct, *args, **options)
            output = repeated(output, places, len(distinct))
            if whole is not None:
                self.works[self.single] = output is not None and same(whole, output)
            if self.works[self.single] and output is not None:
                return output
        return self.image_processor(images, *args, **options) if whole is None else whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image_processor, name)


def flattened(images: Any) -> list:
    """Pictures in lists of lists, in order."""
    return [one for item in images for one in flattened(item)] if isinstance(images, (list, tuple)) else [images]


def repeated(output: Any, places: list[int], count: int) -> Any | None:
    """The output for `count` pictures as one for those of `places`; None if it has no rows for each picture.

    Rows are one for each picture, or as many as its grid or its number of patches says.
    """
    grid, patches = output.get("image_grid_thw"), output.get("num_patches")
    sizes = [int(np.prod(row)) for row in torch.as_tensor(grid).tolist()] if grid is not None else patches
    sizes = [int(size) for size in sizes] if sizes is not None else [1] * count
    ends = np.cumsum([0, *sizes]).tolist()
    made = copy.copy(output)
    for key, value in output.items():
        if not isinstance(value, list) and np.ndim(value) == 0:  # of all pictures, such as the most tiles of one
            continue
        rows = len(value)
        if key.startswith("pixel_values") and rows == ends[-1] and len(sizes) == count:
            parts = [value[ends[place] : ends[place + 1]] for place in places]
        elif rows == count:
            parts = [value[place : place + 1] for place in places]
        else:
            return None
        if isinstance(value, (list, tuple)):
            made[key] = [row for part in parts for row in part]
        else:
            made[key] = (torch.cat if isinstance(value, torch.Tensor) else np.concatenate)(parts)
    return made


def same(one: Any, other: Any) -> bool:
    """Whether two outputs of a processor are equal to the bit."""
    if isinstance(one, (Mapping, BatchFeature)):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return np.array_equal(one, other)


def settings_of(processor: ProcessorMixin) -> tuple:
    """What decides on the size that the processor makes of a picture."""
    found = getattr(processor, "image_processor", None)
    return tuple(str(getattr(found, name, None)) for name in ("size", "resample", "do_resize", "do_pad"))


def fixed_size(processor: ProcessorMixin) -> dict[str, int] | None:
    """The size to which the processor brings all pictures: `shortest_edge`, or `height` and `width`.

    None where it follows from each picture's own, and with it the number of its tokens.
    """
    found = getattr(processor, "image_processor", None)
    own = ("image_grid_pinpoints", "max_pixels", "max_image_tiles", "crop_to_patches", "do_image_splitting")
    if not getattr(found, "do_resize", False) or any(getattr(found, name, None) for name in own):
        return None
    size = {key: value for key, value in dict(getattr(found, "size", None) or {}).items() if value}
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        return None
    # Some processors ask for tiles of large or long pictures by themselves.
    try:
        counts = processor._get_num_multimodal_tokens(image_sizes=SEVERAL).num_image_tokens
    except Exception:  # it tells nothing, or needs what is not there
        return None
    return size if len(set(counts)) == 1 else None


def draft_edge(processor: ProcessorMixin) -> int | None:
    """The least side, in pixels, of pictures that lose nothing visible if JPEGs are decoded at a reduced size.

    That is twice the size that the processor shrinks all of them to; None where there is no such size.
    """
    size = fixed_size(processor)
    return 2 * max(size.values()) if size else None
