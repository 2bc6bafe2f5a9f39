"""Files of the feature cache, made by hand."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from hf_dualspeed.feature_cache.store import LEDGER, MARKER, FeatureStore


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def named(text: str) -> str:
    """A word as 32 hexadecimal digits, which fingerprints are."""
    return text.encode().hex().ljust(32, "0")


def key(number: int) -> str:
    return f"{number:02x}" * 16


def unit(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"last_hidden_state": torch.full((1, 256), float(seed))}  # a KB and its header


def opened(folder: Path, tower: str = "tower", bound: int = 10_000) -> FeatureStore:
    store = FeatureStore(str(folder), named(tower), bound)
    store.open()
    return store


def aged(store: FeatureStore, seconds: float) -> None:
    """Puts the last use of a tower so far back."""
    os.utime(store.folder / MARKER, (time.time() - seconds,) * 2)


def numbered(*numbers: int) -> dict:
    return {key(n): unit(n) for n in numbers}


def stored(folder: Path) -> int:
    """Bytes of all files, as the ledger has them."""
    total = sum(path.stat().st_size for path in files(folder))
    assert int((folder / LEDGER).read_text()) == total
    return total


def folders(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def towers(*names: str) -> set[str]:
    return {f"tower-{named(name)}" for name in names}
