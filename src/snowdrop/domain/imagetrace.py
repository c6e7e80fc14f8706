"""Image trace: what one start read of an image, in which order. A hint for later starts, and nothing more.

`snowdrop.content.imagetrace` encodes, decodes and keeps it; `snowdrop.policy.replay` makes and uses its extents.
"""

import msgspec

from snowdrop.domain.ids import Digest

TRACE_FORMAT_VERSION = 1
TRACE_EXTENTS_MAX = 65_536
TRACE_BYTES_MAX = 1 << 20
"""Longest encoded trace."""
START_CHARS_MAX = 500
"""Longest name of what was started."""

Stretch = tuple[int, int]
"""Offset and length in bytes."""


class ImageTrace(msgspec.Struct, frozen=True, array_like=True):
    """`extents` are stretches of the image's `data`, each read once or more, in the order of their first reads.

    `start` names what was started: another program in the same image reads something else.
    """

    version: int
    manifest: Digest
    start: str
    recorded_unix_ns: int
    extents: tuple[Stretch, ...]
