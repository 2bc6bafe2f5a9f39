"""Data sets from files, folders and the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    Json,
    LargeList,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ..utils.validation import check_choice, checked, nearest
from .columns import READ, filled, suspects
from .conversations import (
    EXTRA_COLUMNS,
    SOURCES,
    _as_list,
    check_unicode,
    given_texts,
    located_parts,
    sample_name,
    to_messages,
)
from .easy_vqa import DATASETS, load_easy_vqa
from .files import ROW_FILES, rows_of
from .labels import texts_in
from .media import is_web, located, shown

FILE_TYPES = (*ROW_FILES, ".parquet")

# Accepted answers, and the options of a multiple-choice question.
LIST_COLUMNS = ("answers", "options")
# Columns of a data set from rows of a file; those that are empty are left out.
FEATURES = Features(
    {"messages": List(Json()), "images": List(Value("string")), "tools": Value("string")}
    | dict.fromkeys(EXTRA_COLUMNS, Value("string"))
    | dict.fromkeys(LIST_COLUMNS, List(Value("string")))
)
SOURCE_FILES = sorted(Path(__file__).parent.glob("*.py"))


@checked
def load_examples(
    path_or_name: str,
    split: str = "train",
    image_folder: str | None = None,
    image_column: str | Sequence[str] | None = None,
) -> Dataset:
    """Loads conversations; images stay encoded, and [`VisionLanguageCollator`] decodes them.

    Args:
        path_or_name (`str`): A `.json`, `.jsonl`, `.csv` or `.tsv` file in any layout of [`to_messages`]; a `.parquet`
            file, a folder written by `save_to_disk`, `easy-vqa`, `easy-vqa-color`, or a data set on the Hub. Rows of
            the first four become `messages`, `images` and `tools`, beside `id`, `question`, `answer`, `answers` and
            `options`; other keys are left out. That is done once, into a table on disk that later calls and processes
            share.
        split (`str`, *optional*, defaults to `"train"`): Split of a data set that has splits; a file has none.
        image_folder (`str`, *optional*): Folder that image paths start from; default: the file's own folder.
        image_column (`str` or `list[str]`, *optional*): Columns (JSON: keys) that hold the pictures of a sample, in
            their order; default: `images` or `image`. Other columns of pictures are left out; with `[]` all are.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a sample cannot be read, see [`to_messages`]; a column of pictures is not read; or `image_column`
            names no column. The message names the sample or the column, and the remedy.
    """
    chosen = [image_column] if isinstance(image_column, str) else image_column
    if not path_or_name.strip("/ "):
        raise ValueError(f"`path_or_name` is {path_or_name!r}, which names no data set.")
    path = Path(path_or_name)
    is_file = path.suffix.lower() in FILE_TYPES
    if is_file and not path.is_file():
        raise FileNotFoundError(f"`path_or_name` names a file that does not exist: {str(path)!r}.")
    if path.is_file() and not is_file:
        raise ValueError(
            f"`path_or_name` is the file {str(path)!r}, whose ending is none of {', '.join(FILE_TYPES)}. Save a sheet "
            "as CSV; what `datasets.load_dataset` reads, such as a WebDataset, is saved as a folder by `save_to_disk`."
        )
    if path.suffix.lower() in ROW_FILES:
        return _load_rows(path, image_folder or path.parent, chosen)
    if path_or_name in DATASETS:
        dataset = load_easy_vqa(split, DATASETS[path_or_name])
    elif is_file:
        dataset = load_dataset("parquet", data_files=str(path), split="train")
    elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(str(path))
    else:
        dataset = load_dataset(path_or_name, split=split)
    if isinstance(dataset, DatasetDict):
        check_choice("split", split, list(dataset))
        dataset = dataset[split]
    dataset = _with_class_names(undecoded(dataset))
    if chosen is not None:
        dataset = _only_pictures_of(dataset, chosen)
    else:
        _check_pictures_read(dataset, path_or_name)
    return _with_paths(dataset, image_folder or (path.parent if is_file else None))


def _load_rows(path: Path, image_folder: str | Path, chosen: Sequence[str] | None) -> Dataset:
    """Reads a file once into a table on disk that all processes map into memory: rows in their one layout.

    Arrow refuses LLaVA's `image`, which may be a text, a list or absent, and messages whose keys vary.
    """
    status = path.stat()
    # The table is made anew where the file or the code that reads it has changed.
    stamp = (status.st_size, status.st_mtime_ns, *(source.read_text("utf-8") for source in SOURCE_FILES))
    options = {"path": str(path), "image_folder": str(image_folder), "stamp": Hasher.hash(stamp)}
    # A list would be shared out among processes.
    options["chosen"] = None if chosen is None else tuple(chosen)
    try:
        dataset = Dataset.from_generator(_samples_of, features=FEATURES, gen_kwargs=options)
    except DatasetGenerationError as error:
        # What a row raises stands behind errors of the library.
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise cause from None
    columns = [column for column in FEATURES if column not in ("messages", "images")]
    return dataset.remove_columns([name for name in columns if dataset.data[name].null_count == len(dataset)])


def _samples_of(path: str, image_folder: str, chosen: Sequence[str] | None, stamp: str) -> Iterator[dict]:
    """The rows of a file, in the columns of [`FEATURES`]."""
    name, keys, rows = Path(path).name, set(), rows_of(Path(path))
    for index, row in enumerate(rows):
        keys |= set(row)
        try:
            sample = _sample_of(row, f"row {index} of {name!r}, {sample_name(row)}", image_folder, chosen)
        except ValueError:
            # A column that does not exist may be the reason.
            if not keys.issuperset(chosen or ()):
                _check_chosen(chosen, keys.union(*rows))
            raise
        yield sample
    if not keys:
        raise ValueError(f"{name!r} has no rows.")
    _check_chosen(chosen or (), keys)


def _sample_of(row: dict, name: str, image_folder: str, chosen: Sequence[str] | None) -> dict:
    sample = to_messages(row if chosen is None else _with_pictures_of(row, chosen), name)
    answer = row.get("answer")
    if isinstance(answer, (list, dict)) or answer != answer:  # several, or NaN: the column holds one text
        row = {"answers": answer, **row, "answer": None}
    if sample["videos"]:
        raise ValueError(f"The sample ({name}) names videos, which are not decoded here. Pass a data set of frames.")
    found = {
        # As text, numbers of any size arrive as they are.
        "messages": [json.dumps(message) for message in sample["messages"]],
        "images": [_json_path(image, image_folder, name) for image in sample["images"]],
        "tools": sample["tools"] and json.dumps(sample["tools"]),
        **{key: None if row.get(key) is None else str(row[key]) for key in EXTRA_COLUMNS},
        **{key: None if row.get(key) is None else _texts_or_gap(row[key], key) for key in LIST_COLUMNS},
    }
    for key, text in texts_in(found):
        check_unicode(name, key, text)
    return found


def _texts_or_gap(value: Any, column: str) -> list[str | None]:
    """The texts of a column; of a value that holds something else a gap, which whoever needs the texts refuses."""
    try:
        return given_texts(value, column)
    except ValueError:
        return [None]


def _json_path(image: Any, image_folder: str | Path, name: str) -> str:
    """The path of a picture in JSON, which may be a record with `path`."""
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if not isinstance(path, str):
        raise ValueError(
            f"The sample ({name}) has {shown(image)} under `images`: in JSON, a picture must be a path, or a text such "
            "as data:image/png;base64,... Correct it, or leave the sample out."
        )
    return located(path, image_folder)


def _check_chosen(chosen: Sequence[str], columns: set[str]) -> None:
    for column in chosen:
        if column not in columns:
            raise ValueError(
                f"`image_column` names {column!r}, which is not among the columns {sorted(columns)}."
                f"{nearest(column, sorted(columns))}"
            )


def _with_pictures_of(row: dict, chosen: Sequence[str]) -> dict:
    """A row whose `images` are the pictures of the chosen keys, without other keys of pictures."""
    others = {"image", "images", *chosen, *suspects(row)}
    images = [image for column in chosen for image in _as_list(row.get(column))]
    return {key: value for key, value in row.items() if key not in others} | {"images": images}


def _only_pictures_of(dataset: Dataset, chosen: Sequence[str]) -> Dataset:
    """The data set with the pictures of the chosen columns as `images` (or `image`), without other such columns."""
    _check_chosen(chosen, set(dataset.column_names))
    others = {"image", "images", *suspects(dataset.column_names), *_image_columns(dataset)} - set(chosen)
    dataset = dataset.remove_columns([column for column in dataset.column_names if column in others])
    if not chosen:
        return dataset
    if len(chosen) == 1:
        listed = isinstance(dataset.features[chosen[0]], (List, LargeList))
        name = "images" if listed else "image"
        return dataset if chosen[0] == name else dataset.rename_column(chosen[0], name)
    texts = all(_is_text(_item(dataset.features[column])) for column in chosen)
    features = Features({name: feature for name, feature in dataset.features.items() if name not in chosen})
    features["images"] = List(Value("string") if texts else Image(decode=False))

    def merge(row: dict) -> dict:
        pictures = [image for column in chosen for image in _as_list(row[column])]
        # A record of a missing picture has neither bytes nor path.
        return {"images": [one for one in pictures if not isinstance(one, dict) or any(map(filled, one.values()))]}

    return dataset.map(merge, remove_columns=list(chosen), features=features)


def _check_pictures_read(dataset: Dataset, name: str) -> None:
    """Raises a `ValueError` where a column of pictures is not read, so that a model would be trained blind."""
    pictures = _image_columns(dataset)
    unread = [column for column in pictures if column not in READ]
    if unread:
        choice = pictures if len(pictures) > 1 else pictures[0]
        raise ValueError(
            f"The data set {name!r} has pictures in columns that are not read: {unread}; pictures are in `image` or "
            f"`images`. Pass image_column={choice!r} to load_examples or the recipe, with those that belong to each "
            "sample, or [] to train on text alone; or remove the columns."
        )


def _image_columns(dataset: Dataset) -> list[str]:
    return [name for name, feature in dataset.features.items() if isinstance(_item(feature), Image)]


def _item(feature: Any) -> Any:
    """The feature of a list's items, or the feature itself."""
    return feature.feature if isinstance(feature, (List, LargeList)) else feature


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "").endswith("string")


def undecoded(dataset: Dataset) -> Dataset:
    """Turns image decoding off, within messages too: the collator, not the loader, handles unreadable images."""
    for column, feature in dataset.features.items():
        plain = _undecoded(feature)
        if plain != feature:
            dataset = dataset.cast_column(column, plain)
    return dataset


def _undecoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {key: _undecoded(value) for key, value in feature.items()}
    return feature


def _with_class_names(dataset: Dataset) -> Dataset:
    """The data set with the names of classes, which are stored as numbers, in columns that are read as texts."""
    for column in ("question", "answer", "prompt", "completion", *LIST_COLUMNS):
        kind = _item(dataset.features.get(column))
        if isinstance(kind, ClassLabel):
            names = [_names(kind, value) for value in dataset[column]]
            text = List(Value("string")) if kind != dataset.features[column] else Value("string")
            dataset = dataset.remove_columns(column).add_column(column, names, feature=text)
    return dataset


def _names(kind: ClassLabel, value: Any) -> Any:
    if isinstance(value, list):
        return [_names(kind, item) for item in value]
    return None if value is None or value < 0 else kind.int2str(value)


def _with_paths(dataset: Dataset, image_folder: str | Path | None) -> Dataset:
    """Paths of pictures, in columns and in parts of messages, from `image_folder` on."""
    if image_folder is None:
        return dataset
    columns = [name for name in ("image", "images") if _is_text(_item(dataset.features.get(name)))]
    talks = [name for name in ("messages", "conversations") if _may_hold_paths(dataset.features.get(name))]
    # A prompt that is a text is no conversation.
    sides = [name for name in ("prompt", "completion") if isinstance(dataset.features.get(name), (List, LargeList))]
    talks += [name for name in sides if _may_hold_paths(dataset.features[name])]
    locate = _locator(image_folder)
    if columns:
        # Told, because the first rows may all be text alone, of which `datasets` would infer another type.
        features = Features({**dataset.features, **dict.fromkeys(columns, List(Value("string")))})
        dataset = dataset.map(
            lambda row: {name: [locate(path) for path in _as_list(row[name])] for name in columns}, features=features
        )
    records = [name for name in ("image", "images") if _has_bare_paths(dataset, name)]
    if records:
        features = dataset.features
        dataset = dataset.map(lambda row: {name: _in_folder(row[name], locate) for name in records}, features=features)
    if talks:
        features = dataset.features
        dataset = dataset.map(lambda row: {name: located_parts(row[name], locate) for name in talks}, features=features)
    return dataset


def _has_bare_paths(dataset: Dataset, column: str) -> bool:
    """Whether a column holds records of `bytes` and `path`, and one of them a path alone."""
    feature = dataset.features.get(column)
    item = _item(feature)
    if not (isinstance(item, Image) or (isinstance(item, dict) and set(item) == {"bytes", "path"})):
        return False
    for chunk in dataset.data.column(column).chunks:
        records = chunk if item == feature else chunk.flatten()
        if pc.any(pc.and_(pc.is_null(records.field("bytes")), pc.is_valid(records.field("path")))).as_py():
            return True
    return False


def _in_folder(images: Any, locate: Callable[[str], str]) -> Any:
    """Records of pictures, one or a list, with paths that `locate` has changed where there are no bytes."""
    if isinstance(images, list):
        return [_in_folder(image, locate) for image in images]
    bare = images is not None and not images["bytes"] and images["path"]
    return {**images, "path": locate(images["path"])} if bare else images


def _may_hold_paths(feature: Any) -> bool:
    """Whether a conversation's feature has room for paths of pictures: JSON text, or a part's `image`, `path`, ..."""
    if isinstance(feature, (List, LargeList)):
        return _may_hold_paths(feature.feature)
    if not isinstance(feature, dict):
        return _is_text(feature)
    parts = [_item(feature[key]) for key in ("content", "value") if key in feature]
    return any(isinstance(part, dict) and set(SOURCES["image"]) & set(part) for part in parts)


def _locator(image_folder: str | Path) -> Callable[[str], str]:
    """Joins a relative path to the folder; what is no path stays, for the sample's reader to refuse by name."""

    def locate(path: str) -> str:
        return located(path, image_folder) if isinstance(path, str) and not is_web(path) else path

    return locate
