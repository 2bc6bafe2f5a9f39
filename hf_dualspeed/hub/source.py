"""Finds published files in a folder or a Hub repo, and checks them before they are read."""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module

from ..utils.constants import CARD_NAME, ISOLATOR_WEIGHTS_NAME, PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME
from ..utils.text import parse_json
from ..utils.validation import check_fields, nearest
from .errors import explained

logger = logging.getLogger(__name__)

# The only files that are read, and their largest size in bytes. The largest learned pruners have about 100 MB.
LIMITS = {PRUNER_CONFIG_NAME: 2**20, PRUNER_WEIGHTS_NAME: 2**30, CARD_NAME: 2**20, ISOLATOR_WEIGHTS_NAME: 2**25}
CODE_NAME, CODE_LIMIT = re.compile(r"[A-Za-z_]\w*\.py", re.ASCII), 2**20
REFERENCE = re.compile(r"([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
# Names of dtypes in safetensors. A floating-point weight may have another precision; all others need their own dtype.
FLOATS = ("F64", "F32", "F16", "BF16")
OTHERS = {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class Source:
    """A folder, or a Hub repo at a revision. Once `commit` is set, every file comes from it.

    Args:
        name (`str`): the folder, or the repo as "user/name".
        local (`bool`): whether it is a folder.
        revision, token, cache_dir, force_download, local_files_only: those of [`~huggingface_hub.hf_hub_download`].
        commit (`str`, *optional*): the commit's hash.
        hurried (`bool`): whether to ask the Hub only once.
        space (`bool`): whether the repo is a Space, not a model.
    """

    name: str
    local: bool
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    commit: str | None = None
    hurried: bool = False
    space: bool = False

    def __post_init__(self):
        check_fields(self)

    def __str__(self) -> str:
        if self.local:
            return f"the folder {self.name!r}"
        kind, revision = "Space" if self.space else "Hub repo", self.commit or self.revision or "main"
        return f"the {kind} {self.name!r} at revision {revision!r}"

    def fetch(self, filename: str) -> Path:
        """The path of a file, downloaded if needed; its size is checked first.

        Raises:
            FileNotFoundError, EntryNotFoundError: the folder, or the repo, has no such file.
            RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError: the Hub refuses or fails.
            ConnectionError: the Hub cannot be reached, or breaks off, and the cache has no such file.
            ValueError: the name is not among those that are read, or the file is too large.
        """
        limit = CODE_LIMIT if CODE_NAME.fullmatch(filename) else LIMITS.get(filename)
        if limit is None:
            raise ValueError(f"{filename!r} is no file of a pruner: only {', '.join(LIMITS)} and its code are read.")
        path = self._in_folder(filename) if self.local else self._in_repo(filename, limit)
        check_size(filename, path.stat().st_size, limit, self)
        return path

    def pinned(self, path: Path) -> Source:
        """This source at the commit that the downloaded `path` came from."""
        return self if self.local else replace(self, commit=path.parent.name)

    @property
    def _kind(self) -> str:
        return "space" if self.space else "model"

    def _in_folder(self, filename: str) -> Path:
        path = Path(self.name) / filename
        if not path.is_file():
            raise FileNotFoundError(f"No {filename} in {self.name!r}: save one with `pruner.save_pretrained`.")
        return path

    def _in_repo(self, filename: str, limit: int) -> Path:
        revision = self.commit or self.revision
        cached = try_to_load_from_cache(self.name, filename, self.cache_dir, revision, self._kind)
        cached = Path(cached) if isinstance(cached, str) and not self.force_download else None
        # A cached file of a commit is never outdated.
        if cached is not None and (self.local_files_only or COMMIT.fullmatch(revision or "")):
            return cached
        try:
            with explained("load", str(self), filename):
                return self._download(filename, limit, hurried=self.hurried or cached is not None)
        except (RevisionNotFoundError, EntryNotFoundError):
            raise
        except OSError as error:
            if cached is None:
                raise
            logger.warning("%s Using the copy of commit %s in the cache.", error, cached.parent.name)
            return cached

    def _download(self, filename: str, limit: int, hurried: bool) -> Path:
        there = {"repo_type": self._kind, "revision": self.commit or self.revision}
        options = {"token": self.token, "cache_dir": self.cache_dir, **there}
        if not self.local_files_only:
            url = hf_hub_url(self.name, filename, **there)
            size = get_hf_file_metadata(url, token=self.token, retry_on_errors=not hurried).size
            check_size(filename, size or 0, limit, self)
            options["force_download"] = self.force_download
        return Path(hf_hub_download(self.name, filename, local_files_only=self.local_files_only, **options))


def find_source(name: str | Path, registered: list[str], **options) -> Source:
    """The source of a pruner's files: an existing folder, else a Hub repo "user/name".

    Raises:
        ValueError: `name` is neither; the message lists the allowed values and the nearest registered name.
    """
    if Path(name).is_dir():
        return Source(str(name), local=True)
    if isinstance(name, str) and is_repo_id(name):
        return Source(name, local=False, **options)
    if name in registered:
        raise ValueError(f"`pruner` {name!r} is a registered name: build it by AutoPruner.from_name({name!r}).")
    raise ValueError(
        f"`pruner` must be one of the registered names {', '.join(map(repr, registered))}, an existing folder with a "
        f"{PRUNER_CONFIG_NAME}, or a Hub repo 'user/name', got {str(name)!r}.{nearest(str(name), registered)}"
    )


def is_repo_id(name: str) -> bool:
    """Whether `name` can be a Hub repo "user/name"; never true for absolute paths and paths such as "../x"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def check_size(filename: str, size: int, limit: int, source: Source) -> None:
    if size > limit:
        raise ValueError(f"{filename} of {source} has {size} bytes; at most {limit} are read. Is it a pruner's?")


def read_json(path: Path, source: Source) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: the file holds something else, or a number that is not finite.
    """
    problem = "a JSON object"
    try:
        values = parse_json(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        values, problem = None, f"a JSON object: {error}"
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} of {source} is not {problem}. Save it with `save_pretrained`.")
    return values


def check_weights(path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Compares names, shapes and dtypes in a safetensors file with `expected`; reads the header only.

    Args:
        path (`Path`): the file.
        expected (`dict[str, torch.Tensor]`): tensors on any device, "meta" too. Floating-point ones may be stored in
            another precision, others only in their own dtype.

    Raises:
        ValueError: the file is not a safetensors file, or its weights differ from `expected`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no whole safetensors file: {error}. Save or download it again.") from None
    remedy = "Save both together by `pruner.save_pretrained`."
    for name in sorted(found.keys() | expected.keys()):
        shape, kind = found.get(name, ("missing", None))
        wanted = expected.get(name)
        if wanted is None or shape != tuple(wanted.shape):
            raise ValueError(
                f"{str(path)!r} does not fit its {PRUNER_CONFIG_NAME}: {name!r} is {shape} there and "
                f"{'nothing' if wanted is None else tuple(wanted.shape)} in the pruner. {remedy}"
            )
        if kind not in (FLOATS if wanted.is_floating_point() else [OTHERS.get(wanted.dtype)]):
            raise ValueError(f"{str(path)!r} holds {name!r} as {kind}, but the pruner's is {wanted.dtype}. {remedy}")


def check_numbers(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Raises a `ValueError` if one of the tensors read from `path` holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name!r} in {str(path)!r} holds NaN or infinity: the training that wrote it diverged. Use an earlier "
                "checkpoint."
            )


def save_code(part: object, kind: str, folder: Path) -> dict:
    """Copies the module that defines `part` into `folder` and returns the `auto_map` for the config.

    Returns {} for classes of `__main__`, a notebook or a function: others cannot import them.
    """
    cls = type(part)
    if not lies_in_module(cls):
        logger.info("%s lies in no module: whoever loads it from %s must register it first.", cls.__name__, folder)
        return {}
    # Its own `auto_map` has two entries for a class with "Tokenizer" in its name.
    custom_object_save(part, folder)
    return {"auto_map": {kind: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"}}


def lies_in_module(cls: type) -> bool:
    """Whether a class stands at the top of a file `name.py` of its own module, which others can import.

    A script is none: it would run wherever it is imported. Nor is a notebook, or the `__init__.py` of a package.
    """
    module, name = sys.modules.get(cls.__module__), cls.__module__.rpartition(".")[2]
    file = Path(getattr(module, "__file__", None) or "")
    at_top = name != "__main__" and getattr(module, cls.__name__, None) is cls
    return at_top and file.name == f"{name}.py" and CODE_NAME.fullmatch(file.name) is not None and file.is_file()


def code_file(reference: object, source: Source) -> str:
    """The Python file of "file.ClassName", beside the config.

    Raises:
        ValueError: the reference has another form, for example names another repo or a package.
    """
    match = REFERENCE.fullmatch(reference) if isinstance(reference, str) else None
    if match is None:
        raise ValueError(
            f"`auto_map` in {PRUNER_CONFIG_NAME} of {source} must name 'file.ClassName', a class in a file beside it, "
            f"got {reference!r}. It is not loaded."
        )
    return f"{match[1]}.py"


def load_class(reference: str, source: Source) -> type:
    """Runs the code of "file.ClassName" at the source's commit. The user must trust the source."""
    file = source.fetch(code_file(reference, source))
    if source.local:
        return get_class_from_dynamic_module(reference, str(file.parent.resolve()))
    with explained("load", str(source), file.name):
        return get_class_from_dynamic_module(
            reference,
            source.name,
            revision=source.commit,
            token=source.token,
            cache_dir=source.cache_dir,
            local_files_only=source.local_files_only,
        )
