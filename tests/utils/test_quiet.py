"""Lines of other packages that a user can do nothing about."""

from __future__ import annotations

import logging

from hf_dualspeed.utils.quiet import quiet


def test_a_missing_kernel_of_bitsandbytes_is_not_told(monkeypatch):
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not logger.isEnabledFor(logging.WARNING)  # the import of the library is enough
    monkeypatch.setattr(logger, "level", logger.level)  # brought back afterwards
    logger.setLevel(logging.NOTSET)
    quiet()
    assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)
