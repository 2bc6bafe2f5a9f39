"""Names that several packages use: files of a run and of a pruner, and choices of options."""

from __future__ import annotations

POSITION_IDS = ("auto", "original", "compact")
VIDEO_BUDGETS = ("clip", "frame")

PRUNER_CONFIG_NAME = "pruner_config.json"
PRUNER_WEIGHTS_NAME = "pruner.safetensors"
CARD_NAME = "README.md"

ISOLATOR_WEIGHTS_NAME = "mode_isolator.safetensors"

RESULTS_NAME = "results.json"
