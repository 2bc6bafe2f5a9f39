"""Names that several packages use: files of a run and of a pruner, and choices of options."""

from __future__ import annotations

POSITION_IDS = ("auto", "original", "compact")
VIDEO_BUDGETS = ("clip", "frame")
# What the pruned view depends on beside pruner and isolator.
VIEW_SETTINGS = ("position_ids", "video_budget", "proportional_attention")

PRUNER_CONFIG_NAME = "pruner_config.json"
PRUNER_WEIGHTS_NAME = "pruner.safetensors"
CARD_NAME = "README.md"

ISOLATOR_WEIGHTS_NAME = "mode_isolator.safetensors"

RESULTS_NAME = "results.json"

# Choices for samples whose pictures cannot be read, and for those that are too long.
UNREADABLE_IMAGES = ("raise", "skip")
LONG_SAMPLES = ("truncate", "raise", "skip")
# Of a larger data set, so many samples are looked at before training, evenly spread.
CHECKED_SAMPLES = 10_000

# While files take their places, a folder holds the first, and the second holds those that are still to come.
UNFINISHED_NAME = "_unfinished"
SAVING_NAME = "_saving"

# The exit code of a process that Ctrl-C ended.
INTERRUPTED = 130
