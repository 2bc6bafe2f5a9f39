"""Silences lines of other packages that a user can do nothing about."""

from __future__ import annotations

import logging


def quiet() -> None:
    """Runs before the library loads these packages."""
    # PEFT imports bitsandbytes, which looks for a kernel for 4-bit weights on CPUs and warns where there is none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
