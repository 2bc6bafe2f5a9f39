"""From data sets to batches: conversations, images and videos, collators and labels."""

from .checking import check_samples
from .collators import MaskVisualLabels, VisionLanguageCollator
from .conversations import to_messages
from .loading import load_examples

__all__ = ["MaskVisualLabels", "VisionLanguageCollator", "check_samples", "load_examples", "to_messages"]
