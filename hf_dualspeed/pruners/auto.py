"""`AutoPruner`: pruners by registered name, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path

from ..hub_io import CONFIG_NAME, WEIGHTS_NAME, Source, check_numbers, code_file, find_source, load_class, read_json
from .base import (
    AUTO_CLASS,
    Pruner,
    available_pruners,
    is_fetched,
    keep_class,
    known_class,
    planned_weights,
    pruner_class,
    weights_file,
)
from .config import PrunerConfig


class AutoPruner:
    """Builds pruners by registered name, from a folder or from the Hub."""

    def __init__(self):
        raise TypeError("AutoPruner is not instantiated: use AutoPruner.from_name or AutoPruner.from_pretrained.")

    @staticmethod
    def from_name(name: str, **settings) -> Pruner:
        """`AutoPruner.from_name("divprune", pruning_ratio=0.9)`.

        Raises:
            ValueError: unknown name (the message lists the known ones) or a setting outside its range.
            TypeError: a setting that the pruner does not have.
        """
        cls = pruner_class(name)
        return cls(cls.config_class(**settings))

    @staticmethod
    def from_pretrained(name: str | Path, *, trust_remote_code: bool = False, **hub) -> Pruner:
        """Loads a pruner from a folder or a Hub repo: `AutoPruner.from_pretrained("user/name", revision="v1")`.

        Only registered names are looked up, and weights are read from safetensors alone. A pruner whose class this
        program has registered never runs other code.

        Args:
            name (`str` or `Path`): an existing folder, else a Hub repo "user/name".
            trust_remote_code (`bool`): run the code that the pruner brings along, of the commit its config is from.
            hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as everywhere on the Hub.

        Raises:
            FileNotFoundError, EntryNotFoundError: the folder, or the repo, lacks a file.
            RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError: the Hub refuses or fails.
            ConnectionError: it cannot be reached and the cache does not help.
            ValueError: `name` is neither a folder nor a repo, a file holds what it should not, or the pruner needs
                `trust_remote_code`.
        """
        source, config = load_config(name, trust_remote_code, hub)
        cls = pruner_class(config.pruner_type)
        expected = planned_weights(cls, config, f"{CONFIG_NAME} of {source}")
        if not expected:
            return cls(config)
        # Before the pruner takes any memory: the file bounds what its config may ask for.
        path = weights_file(source.name if source.local else source.fetch(WEIGHTS_NAME).parent, expected, config)
        pruner = cls(config)
        pruner.load_weights(path.parent)
        check_numbers(path, pruner.state_dict())
        return pruner


def load_config(name: str | Path, trust_remote_code: bool, hub: dict) -> tuple[Source, PrunerConfig]:
    """The config, its class registered, and where it came from: everything else is read of that very commit."""
    source = find_source(name, available_pruners(), **hub)
    path = source.fetch(CONFIG_NAME)
    source = source.pinned(path)
    values = read_json(path, source)
    cls = _class_of(values, source, trust_remote_code)
    return source, cls.config_class.from_dict(values, f"{CONFIG_NAME} of {source}")


def _class_of(values: dict, source: Source, trust_remote_code: bool) -> type[Pruner]:
    name = values.get("pruner_type")
    auto_map = values.get("auto_map")
    reference = auto_map.get(AUTO_CLASS) if isinstance(auto_map, dict) else auto_map
    known = known_class(name)
    if reference is None or (known is not None and not is_fetched(known)):
        return pruner_class(name)
    file = code_file(reference, source)
    if not trust_remote_code:
        if known is not None and getattr(known, "fetched_from", None) == str(source):  # trusted before
            return known
        pin = "" if source.local else f" and revision={source.commit!r}"
        raise ValueError(
            f"The pruner {name!r} of {source} is code of its own, {file}, which is not run unasked. Read it; to run "
            f"it, load with trust_remote_code=True{pin}. Or import a module of yours that registers {name!r}."
        )
    return _fetched_class(name, reference, source)


def _fetched_class(name: object, reference: str, source: Source) -> type[Pruner]:
    cls = load_class(reference, source)
    is_pruner = isinstance(cls, type) and issubclass(cls, Pruner)
    if not is_pruner or cls.config_class.pruner_type != name:
        raise ValueError(f"{reference} of {source} is no pruner that is registered as {name!r}.")
    cls.fetched_from = str(source)
    keep_class(name, cls)
    return cls
