"""`AutoPruner`: pruners by registered name, from a folder or from the Hub."""

from __future__ import annotations

from pathlib import Path

from ..utils.constants import PRUNER_CONFIG_NAME, PRUNER_WEIGHTS_NAME
from ..utils.validation import checked
from .base import Pruner, planned_weights, weights_file
from .config import load_config
from .registry import pruner_class


class AutoPruner:
    """Builds pruners by registered name, from a folder or from the Hub.

    They are in evaluation mode, as models of transformers are that are loaded: those that draw in training draw after
    `train()`, which a trainer calls.
    """

    def __init__(self):
        raise TypeError("AutoPruner is not instantiated: use AutoPruner.from_name or AutoPruner.from_pretrained.")

    @staticmethod
    @checked
    def from_name(name: str, **settings) -> Pruner:
        """`AutoPruner.from_name("divprune", pruning_ratio=0.9)`.

        Raises:
            ValueError: unknown name (the message lists the known ones) or a setting outside its range.
            TypeError: the pruner has no such setting.
        """
        cls = pruner_class(name)
        return cls(cls.config_class(**settings)).eval()

    @staticmethod
    @checked
    def from_pretrained(name: str | Path, *, trust_remote_code: bool = False, **hub) -> Pruner:
        """Loads a pruner from a folder or a Hub repo: `AutoPruner.from_pretrained("user/name", revision="v1")`.

        Only registered names are looked up, and weights come from safetensors alone. If your program has registered
        the pruner's class, no downloaded code runs.

        Args:
            name (`str` or `Path`): an existing folder, else a Hub repo "user/name".
            trust_remote_code (`bool`): run the pruner's own code, from the same commit as its config.
            hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, as everywhere on the Hub.

        Raises:
            FileNotFoundError, EntryNotFoundError: the folder, or the repo, lacks a file.
            RepositoryNotFoundError, RevisionNotFoundError, HfHubHTTPError: the Hub refuses or fails.
            ConnectionError: the Hub cannot be reached and the cache has no copy.
            ValueError: `name` is neither a folder nor a repo, a file has invalid contents, or the pruner needs
                `trust_remote_code`.
        """
        source, config = load_config(name, trust_remote_code, hub)
        cls = pruner_class(config.pruner_type)
        expected = planned_weights(cls, config, f"{PRUNER_CONFIG_NAME} of {source}")
        if not expected:
            return cls(config).eval()
        # Check the file before the pruner takes memory: the file bounds what its config may ask for.
        path = weights_file(source.name if source.local else source.fetch(PRUNER_WEIGHTS_NAME).parent, expected, config)
        pruner = cls(config)
        pruner.load_weights(path.parent)
        return pruner.eval()
