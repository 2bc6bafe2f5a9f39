"""For `dualspeed bench`: a batch whose vision features a warm cache has.

What is timed is the step alone, with features that lie on the device. Hashing the pixels, reading the features from
disk and copying them to the device are not in it; data loader workers do the first two, beside the steps.
"""

from __future__ import annotations

from functools import partial

import torch

from hf_dualspeed.encoding import encode
from hf_dualspeed.feature_cache import FeatureCache
from hf_dualspeed.feature_store import UNITS, units_of
from hf_dualspeed.trainer import DualSpeedTrainer

ROOM = 8.0  # GiB, more than the features of any batch


def cached_batch(trainer: DualSpeedTrainer, batch: dict, folder: str) -> dict | None:
    """The batch with its features, as a data loader hands them over in a second epoch, and a cache for the trainer.

    None where they cannot be cached: the tower is trained in part, say, or the pruner reads its attention.
    """
    cache = FeatureCache(folder, ROOM, trainer.mode_pass.pruner, trainer.accelerator.mixed_precision)
    try:
        cache.begin(trainer.model)
        with torch.no_grad():
            encode(trainer.model, batch, served=partial(cache.serving, units_of(batch, cache.store)))
    except ValueError:
        return None
    cache.flush()
    trainer.feature_cache = cache
    return {**batch, UNITS: units_of(batch, cache.store).to(trainer.args.device)}
