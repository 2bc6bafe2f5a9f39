"""Every family with each of its modalities, and the batch that it is checked with."""

from __future__ import annotations

from hf_dualspeed.conformance import Batch

from . import FAMILIES, MIXED, MIXED_AUDIO, MIXED_BOTH, MIXED_VIDEO, Family, batch

ROWS = {"image": MIXED, "video": MIXED_VIDEO, "audio": MIXED_AUDIO, "image and audio": MIXED_BOTH}
CASES = [
    (family.name, modality)
    for family in FAMILIES.values()
    for modality in ROWS
    if all(getattr(family, f"{kind}s") is not None for kind in modality.split(" and "))
    and (family.prunes_audio or modality != "audio")
]


def batch_of(family: Family, model, modality: str, side: str) -> Batch:
    rows, last = ROWS[modality], len(ROWS[modality]) - 1
    inputs = batch(family, model, rows, side)
    alone = batch(family, model, [rows[last]], side, seeds=[last])
    return Batch(
        inputs,
        alone if family.rows_alone else None,
        last,
        family.masks_tokens,
        family.trains_encoder,
        family.generates,
        modality not in family.no_beams,
        family.position_ids,
    )
