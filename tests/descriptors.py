"""The descriptors that this process has open, for tests that nothing is left."""

from __future__ import annotations

import gc
from pathlib import Path


def open_descriptors() -> frozenset[str]:
    """Their numbers. What earlier tests left to the collector is closed first, not in the middle of a test."""
    gc.collect()
    return frozenset(entry.name for entry in Path("/proc/self/fd").iterdir())
