"""Tiny random-weight models of many families, built from their configs alone, and mixed batches for them."""

from .audio_models import FAMILIES as AUDIO_FAMILIES
from .base import MIXED, MIXED_AUDIO, MIXED_BOTH, MIXED_VIDEO, Family, batch
from .image_models import FAMILIES as IMAGE_FAMILIES
from .mrope_models import FAMILIES as MROPE_FAMILIES
from .other_models import FAMILIES as OTHER_FAMILIES
from .related_models import FAMILIES as RELATED_FAMILIES

FAMILIES = {
    family.name: family
    for family in (*IMAGE_FAMILIES, *MROPE_FAMILIES, *OTHER_FAMILIES, *RELATED_FAMILIES, *AUDIO_FAMILIES)
}

__all__ = ["FAMILIES", "MIXED", "MIXED_AUDIO", "MIXED_BOTH", "MIXED_VIDEO", "Family", "batch"]
