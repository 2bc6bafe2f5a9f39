"""A recipe small enough for a test."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = {
    "image_size": 16,
    "vision_hidden_size": 8,
    "vision_layers": 1,
    "hidden_size": 16,
    "layers": 1,
    "heads": 2,
}
