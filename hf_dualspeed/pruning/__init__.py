"""Prunes a batch: encodes images, selects tokens, shortens inputs and keeps attention proportional."""
