"""Registry of pruners by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import nn

from ..utils.validation import check_choice, checked, shortened
from .tokens import NEEDS

if TYPE_CHECKING:
    from .base import Pruner


_REGISTRY: dict[str, type[Pruner]] = {}


@checked
def register_pruner(name: str) -> Callable[[type[Pruner]], type[Pruner]]:
    """Class decorator that registers a pruner under `name` for configs, arguments and the command line.

    Raises:
        ValueError: `name` is no word, another class has it, the class is no `Pruner`, or its `needs` names an unknown
            input.
    """
    if re.fullmatch(r"\w[\w.-]*", name) is None:
        raise ValueError(f"`name` must be a word of letters, digits, '_', '-' and '.', got {shortened(name)}.")

    def register(cls: type[Pruner]) -> type[Pruner]:
        if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "needs")):
            raise ValueError(f"The pruner {name!r} must be a subclass of Pruner, got {shortened(cls)}.")
        known = _REGISTRY.get(name)
        # A class of the same qualified name replaces itself: a notebook cell may run twice. Code from the Hub is
        # replaced too: two revisions may be loaded.
        if known is not None and not is_twin(known, cls) and not is_fetched(known):
            raise ValueError(f"`name` {name!r} is taken by {known.__qualname__}. Choose another name.")
        unknown = sorted(cls.needs - NEEDS)
        if unknown:
            raise ValueError(f"`needs` of {cls.__name__} must be among {sorted(NEEDS)}, got {unknown}.")
        # Each pruner gets its own config class, because the class holds the name; pickle finds it by `__qualname__`.
        known_as = {"pruner_type": name, "merges": cls.merges}
        known_as |= {"__module__": cls.__module__, "__doc__": cls.config_class.__doc__}
        config = type(f"{cls.__name__}Config", (cls.config_class,), known_as)
        config.__qualname__ = f"{cls.__qualname__}.config_class"
        cls.config_class = dataclass(config)
        _REGISTRY[name] = cls
        return cls

    return register


def available_pruners() -> list[str]:
    """Sorted names of the registered pruners."""
    return sorted(_REGISTRY)


def pruner_class(name: str) -> type[Pruner]:
    """The class registered under `name`; a `ValueError` lists the known names."""
    check_choice("pruner", name, available_pruners())
    return _REGISTRY[name]


def known_class(name: object) -> type[Pruner] | None:
    """The class registered under `name`, or None."""
    return _REGISTRY.get(name) if isinstance(name, str) else None


def keep_class(name: str, cls: type[Pruner]) -> None:
    """Registers a fetched class and replaces an earlier one of that name."""
    _REGISTRY[name] = cls


def is_twin(known: type[Pruner], cls: type[Pruner]) -> bool:
    """Whether two classes are the same, or stand at the same place."""
    return (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__)


def check_name(cls: type[Pruner], name: str) -> None:
    """Raises a `ValueError` if the config of a pruner of class `cls` has no `name`, or that of another class.

    Nobody could load what is saved with it, or would get that one.
    """
    known = known_class(name)
    of_other = known is not None and not is_twin(known, cls) and not is_fetched(known)
    if of_other or not name:
        result = f"gets {known.__name__} in its place" if of_other else "would find nothing"
        raise ValueError(
            f"The config of a {cls.__name__} has the name {name!r}, so that whoever loads it {result}. Put "
            "@register_pruner(...) above the class, with a name of its own, and build the pruner by "
            "AutoPruner.from_name."
        )


def is_own(cls: type[Pruner]) -> bool:
    """Whether the class belongs to this library."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def is_fetched(cls: type[Pruner]) -> bool:
    """Whether the class was loaded from code beside a config, not registered by the user's program."""
    return cls.__module__.startswith("transformers_modules.")


def kind_of(cls) -> str:
    """How a class of pruners differs from those that select tokens by a fixed rule, in words."""
    learned = "hidden_size" in {f.name for f in fields(cls.config_class)}
    kinds = {"learned": learned, "merges": cls.merges, "in the LLM": cls.in_language_model}
    return ", ".join(kind for kind, is_so in kinds.items() if is_so) or "selects"
