"""From data sets to batches: conversations, images and videos, collators and labels."""

from .collators import MaskVisualLabels, VisionLanguageCollator
from .conversations import to_messages
from .loading import load_examples

__all__ = ["MaskVisualLabels", "VisionLanguageCollator", "load_examples", "to_messages"]
