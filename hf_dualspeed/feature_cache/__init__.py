"""Features of a frozen vision tower, kept on disk across epochs."""
