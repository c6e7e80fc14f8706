"""The safetensors header: a pure parser that believes nothing.

A file is an 8-byte little-endian length, that many bytes of JSON, then the tensors' bytes without gap. The
parser accepts what the safetensors library accepts and names the file and tensor of whatever it refuses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import cast

import msgspec

from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.manifest import BRACKETS_MAX, COMMAS_MAX, TensorEntry

HEADER_BYTES_MAX = 100_000_000
"""The limit of the safetensors library itself."""
TENSOR_BYTES_MAX = 1 << 53
SHAPE_RANK_MAX = 64
SUFFIX = ".safetensors"

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_LFS_POINTER = b"version https://git-lfs"


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """A parsed header. `data_offset` is where the tensors' bytes begin; `tensors` are in offset order."""

    data_offset: int
    tensors: tuple[TensorEntry, ...]
    metadata: dict[str, str] | None


class _DuplicateKeyError(ValueError):
    pass


def read_header(read: Callable[[int, int], bytes], file_bytes: int, *, where: str) -> Header:
    """The header of a file of `file_bytes` bytes whose bytes `read(offset, length)` gives.

    Raises CorruptContentError, with `where` (the file's path) and the tensor in its place.
    """
    prefix = read(0, min(file_bytes, 64))
    length = _header_length(prefix, file_bytes, where)
    return parse_header(read(8, length), file_bytes, where=where)


def parse_header(raw: bytes, file_bytes: int, *, where: str) -> Header:
    """As `read_header`, from the JSON bytes alone (without the length before them)."""
    table, metadata = _decode(raw, where)
    data_offset = 8 + len(raw)
    tensors = sorted(
        (_tensor(name, entry, data_offset, where) for name, entry in table.items()),
        key=lambda tensor: (tensor.offset, tensor.length, tensor.name),
    )
    _check_cover(tensors, data_offset, file_bytes, where)
    return Header(data_offset=data_offset, tensors=tuple(tensors), metadata=metadata)


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None if the dtype is unknown or its bits do not fill whole bytes."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        return None
    total = math.prod(shape) * bits
    return total // 8 if total % 8 == 0 else None


def _corrupt(message: str, where: str, tensor: str | None = None) -> CorruptContentError:
    place = where if tensor is None else f"{where}: tensor {tensor[:200]!r}"
    return CorruptContentError(
        message, where=place, next_step="fetch the file again from where it came, then push it again"
    )


def _header_length(prefix: bytes, file_bytes: int, where: str) -> int:
    if prefix.startswith(_LFS_POINTER):
        raise CorruptContentError(
            "this is a Git LFS pointer, not the weights",
            where=where,
            next_step="run `git lfs pull`, then push again",
        )
    if len(prefix) < 8:
        raise _corrupt(f"file of {file_bytes} bytes is too short for a safetensors header", where)
    length = int.from_bytes(prefix[:8], "little")
    if length > HEADER_BYTES_MAX:
        raise _corrupt(f"header claims {length} bytes (header_bytes_max={HEADER_BYTES_MAX})", where)
    if 8 + length > file_bytes:
        raise _corrupt(f"header claims {length} bytes, the file has {file_bytes}: truncated", where)
    return length


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return table


def _decode(raw: bytes, where: str) -> tuple[dict[str, object], dict[str, str] | None]:
    # A manifest could not hold more, and without a bound a header would be decoded into twenty times its size.
    brackets, commas = raw.count(b"[") + raw.count(b"{"), raw.count(b",")
    if brackets > BRACKETS_MAX or commas > COMMAS_MAX:
        limits = f"brackets_max={BRACKETS_MAX}, commas_max={COMMAS_MAX}"
        raise _corrupt(f"header has {brackets} brackets and {commas} commas ({limits})", where)
    try:
        decoded: object = json.loads(raw.decode(), object_pairs_hook=_pairs)
    except _DuplicateKeyError as error:
        raise _corrupt("name occurs twice in the header", where, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"header is not JSON: {str(error)[:200]}", where) from error
    if not isinstance(decoded, dict):
        raise _corrupt("header is not a JSON object", where)
    table = cast("dict[str, object]", decoded)
    if "__metadata__" not in table:
        return table, None
    metadata = table.pop("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _corrupt("__metadata__ is not a map of strings", where)
    return table, cast("dict[str, str]", metadata)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= TENSOR_BYTES_MAX


def _tensor(name: str, entry: object, data_offset: int, where: str) -> TensorEntry:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise _corrupt("name is not valid Unicode", where, ascii(name)) from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt("entry needs exactly dtype, shape and data_offsets", where, name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _corrupt(f"dtype {str(dtype)[:40]!r} is unknown", where, name)
    if not isinstance(shape, list) or len(shape) > SHAPE_RANK_MAX or not all(map(_is_count, shape)):
        raise _corrupt("shape is not a list of sizes", where, name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _corrupt("data_offsets is not a pair of offsets", where, name)
    begin, end = cast("list[int]", offsets)
    if begin > end:
        raise _corrupt(f"data_offsets run backwards: {begin} > {end}", where, name)
    extent = tuple(cast("list[int]", shape))
    wanted = tensor_bytes(dtype, extent)
    if wanted != end - begin:
        raise _corrupt(
            f"{dtype} of shape {list(extent)[:8]} needs {wanted} bytes, its extent has {end - begin}", where, name
        )
    return TensorEntry(name=name, dtype=dtype, shape=extent, offset=data_offset + begin, length=end - begin)


def _check_cover(tensors: list[TensorEntry], data_offset: int, file_bytes: int, where: str) -> None:
    cursor = data_offset
    for tensor in tensors:
        if tensor.offset + tensor.length > file_bytes:
            raise _corrupt(
                f"extent ends at byte {tensor.offset + tensor.length} of {file_bytes}: truncated or out of range",
                where,
                tensor.name,
            )
        if tensor.offset < cursor:
            raise _corrupt(f"extent overlaps its neighbour by {cursor - tensor.offset} bytes", where, tensor.name)
        if tensor.offset > cursor:
            raise _corrupt(f"{tensor.offset - cursor} bytes before it belong to no tensor", where, tensor.name)
        cursor += tensor.length
    if cursor != file_bytes:
        raise _corrupt(f"{file_bytes - cursor} bytes at the end belong to no tensor", where)
