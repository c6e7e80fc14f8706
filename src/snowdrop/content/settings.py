"""What the data plane of one node is told when it starts."""

from __future__ import annotations

from typing import Annotated

import msgspec

from snowdrop.domain.errors import InvalidInputError

Positive = Annotated[int, msgspec.Meta(gt=0)]


class DataPlaneSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`ram_bytes_max` bounds landing areas, `disk_bytes_max` landing directories, both pinned ones included."""

    origin_url: str
    cache_directory: str
    ram_bytes_max: Positive
    disk_bytes_max: Positive
    fetch_threads: Positive = 8


def decode_settings(data: bytes) -> DataPlaneSettings:
    """Raises InvalidInputError naming the field."""
    try:
        return msgspec.json.decode(data, type=DataPlaneSettings)
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"data plane settings: {error}", where="settings") from error
