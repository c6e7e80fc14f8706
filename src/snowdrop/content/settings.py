"""What the data plane of one node is told when it starts."""

from __future__ import annotations

from typing import Annotated

import msgspec

from snowdrop.content.slabs import BIG_SLAB_BYTES, SLAB_BYTES
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.origin import OriginOptions

Positive = Annotated[int, msgspec.Meta(gt=0)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class DataPlaneSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`ram_bytes_max` bounds landing areas, `disk_bytes_max` landing directories, both pinned ones included.

    `pool_bytes` of memory are kept ready for areas; slabs of two sizes make them up. `keys_directory` holds the
    content keys of the tenants, empty if there is only public content.

    Directories are read again at `scrub_bytes_per_s`, 0 is not at all.

    Bytes per second from the origin are bounded in all and for each tenant; 0 is no bound.
    """

    origin_url: str
    cache_directory: str
    ram_bytes_max: Positive
    disk_bytes_max: Positive
    fetch_threads: Positive = 8
    pool_bytes: NonNegative = 0
    slab_bytes: Positive = SLAB_BYTES
    big_slab_bytes: Positive = BIG_SLAB_BYTES
    keys_directory: str = ""
    scrub_bytes_per_s: NonNegative = 0
    origin: OriginOptions = OriginOptions()
    origin_bytes_per_s_max: NonNegative = 0
    tenant_bytes_per_s_max: NonNegative = 0


def decode_settings(data: bytes) -> DataPlaneSettings:
    """Raises InvalidInputError naming the field."""
    try:
        return msgspec.json.decode(data, type=DataPlaneSettings)
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"data plane settings: {error}", where="settings") from error
