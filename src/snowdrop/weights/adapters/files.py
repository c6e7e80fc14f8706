"""Which safetensors files of a model's directory are its weights, by the conventions of the hubs."""

from __future__ import annotations

from pathlib import Path

import msgspec

from snowdrop.domain.errors import CorruptContentError, NotFoundError

INDEX = "model.safetensors.index.json"
INDEX_BYTES_MAX = 64 << 20
_DUPLICATE_PREFIX = "consolidated"
"""Mistral's repositories hold the same weights a second time, under other names."""


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def weight_files(directory: Path) -> list[str]:
    """Their names, ascending: those of the index if there is one, else those at the top of the directory.

    Raises NotFoundError if there are none, CorruptContentError if the index is broken.
    """
    index = directory / INDEX
    present = sorted(path.name for path in directory.glob("*.safetensors"))
    if index.is_file():
        if index.stat().st_size > INDEX_BYTES_MAX:
            raise CorruptContentError(f"has more than {INDEX_BYTES_MAX} bytes", where=str(index))
        try:
            decoded = msgspec.json.decode(index.read_bytes(), type=_Index)
        except msgspec.DecodeError as error:
            raise CorruptContentError(f"not an index of files: {error}", where=str(index)) from error
        named = sorted(set(decoded.weight_map.values()))
        missing = [name for name in named if name not in present]
        if missing:
            raise CorruptContentError(f"it names {missing[0]!r}, which is not there", where=str(index))
        return named
    own = [name for name in present if not name.startswith(_DUPLICATE_PREFIX)]
    if not present:
        raise NotFoundError(
            "no safetensors files",
            where=str(directory),
            next_step="convert the weights to safetensors, or use the framework's own loader on the path",
        )
    return own or present
