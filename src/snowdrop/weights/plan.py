"""Which bytes a request needs, in which order, and how each tensor is made of them. Pure.

A plan is a list of tensors in the order in which they are handed out. Each knows the stretches of its file that it
needs: all of it, or, for a slice, the runs of bytes that lie inside of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import islice, product
from typing import Literal, NamedTuple

import msgspec

from snowdrop.content.safetensors import DTYPE_BITS
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.manifest import TensorEntry

GAP_BYTES = 64 << 10
"""Runs that lie closer together than this are brought as one: fewer, larger reads."""

NAMES_SHOWN_MAX = 8

Order = Literal["load", "asked"]
Split = int | Mapping[str, int | None]
Index = tuple[int | slice, ...]


class FileTable(msgspec.Struct, frozen=True, kw_only=True):
    """A safetensors file of a model; `tensors` are in offset order."""

    path: str
    tensors: tuple[TensorEntry, ...]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a model.

    `file` and `names` are exact or patterns with `*`, `?`, `[...]`. With `world` above 1, tensors are cut along
    the dimension that `split` gives (for all that have it, or by name pattern, the first that matches; None or
    no match is the whole tensor) as evenly as it goes, the first ranks getting one more, and `rank` gets its
    part. `order` "asked" hands tensors out in the order of `names` rather than in load order.
    """

    file: str | None = None
    names: tuple[str, ...] | None = None
    rank: int = 0
    world: int = 1
    split: Split | None = None
    order: Order = "load"


class Extent(NamedTuple):
    """`length` bytes at `offset` of file number `file`."""

    file: int
    offset: int
    length: int


class PlannedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor, or with `index` (one int or slice with all of start, stop and step per dimension) a part of it."""

    file: int
    path: str
    entry: TensorEntry
    index: Index | None = None

    @property
    def where(self) -> str:
        """The place for errors: file and tensor."""
        return f"{self.path}: tensor {self.entry.name!r}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is handed out, in stored elements (see `stored_shape`)."""
        if self.index is None:
            return stored_shape(self.entry)
        return tuple(len(range(*_bounds(each))) for each in self.index if isinstance(each, slice))

    @property
    def length(self) -> int:
        """Bytes of what is handed out."""
        if self.index is None:
            return self.entry.length
        return math.prod(self.shape) * stored_itemsize(self.entry)

    @property
    def is_run(self) -> bool:
        """Whether it lies in its file as one run of bytes."""
        return self.index is None or len(list(islice(self.spans(0), 2))) <= 1

    def spans(self, gap_bytes: int = GAP_BYTES) -> Iterator[tuple[int, int]]:
        """Offset in the file and length of each run of bytes needed, ascending.

        Runs with at most `gap_bytes` between them are one; with 0 these are exactly the bytes of the tensor.
        """
        if self.length == 0:
            return
        if self.index is None:
            yield self.entry.offset, self.entry.length
            return
        yield from _merged(_runs(self.entry, self.index, gap_bytes), gap_bytes)


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Tensors in the order in which they are handed out."""

    tensors: tuple[PlannedTensor, ...]

    def extents(self, gap_bytes: int = GAP_BYTES) -> Iterator[Extent]:
        """The bytes to bring, in order; neighbours in the same file become one extent. No byte is in two."""
        last: Extent | None = None
        for tensor in self.tensors:
            for offset, length in tensor.spans(gap_bytes):
                if last is not None and last.file == tensor.file and last.offset + last.length == offset:
                    last = last._replace(length=last.length + length)
                    continue
                if last is not None:
                    yield last
                last = Extent(tensor.file, offset, length)
        if last is not None:
            yield last


def plan_load(files: Sequence[FileTable], request: Request) -> LoadPlan:
    """The plan of a request over the files of a model, which are in load order.

    Raises NotFoundError for a file or name that matches nothing, InvalidInputError if two of the files have a
    tensor of the same name, or for a split that cannot be made.
    """
    _check_ranks(request)
    taken: dict[str, str] = {}
    planned: list[PlannedTensor] = []
    for number in _chosen_files(files, request.file):
        table = files[number]
        for entry in table.tensors:
            if request.names is not None and not _is_asked(entry.name, request.names):
                continue
            if entry.name in taken:
                raise InvalidInputError(
                    f"tensor {entry.name!r} is in more than one file of the model",
                    where=f"{taken[entry.name]}, {table.path}",
                    next_step='name the file that you mean: tensors(file="...")',
                )
            taken[entry.name] = table.path
            index = _part(entry, request, table.path)
            planned.append(PlannedTensor(file=number, path=table.path, entry=entry, index=index))
    if request.names is not None:
        _check_found(request.names, taken)
        if request.order == "asked":
            names = request.names
            planned.sort(key=lambda tensor: _first_match(tensor.entry.name, names))
    return LoadPlan(tensors=tuple(planned))


def wants_file(path: str, request: Request) -> bool:
    """Whether the request concerns this file, so that its header is needed."""
    return request.file is None or _matches(path, request.file)


def stored_shape(entry: TensorEntry) -> tuple[int, ...]:
    """The shape in elements as they are stored: F4 packs two values of the last dimension in one byte."""
    if entry.dtype == "F4" and entry.shape and entry.shape[-1] % 2 == 0:
        return (*entry.shape[:-1], entry.shape[-1] // 2)
    return entry.shape


def stored_itemsize(entry: TensorEntry) -> int:
    """Bytes of one stored element; raises InvalidInputError for a dtype whose elements cross bytes."""
    bits = DTYPE_BITS[entry.dtype]
    if entry.dtype == "F4" and entry.shape and entry.shape[-1] % 2 == 0:
        return 1
    if bits % 8:
        raise InvalidInputError(
            f"a tensor of dtype {entry.dtype} cannot be cut",
            where=f"tensor {entry.name!r}",
            next_step="ask for the whole tensor",
        )
    return bits // 8


def normalise_index(shape: tuple[int, ...], index: object) -> Index | None:
    """`index` with one entry per dimension, as numpy understands it.

    None for what is no basic index with positive steps (lists, masks, None, steps backwards). Raises IndexError.
    """
    parts = index if isinstance(index, tuple) else (index,)
    if any(not _is_basic(part) for part in parts) or sum(part is Ellipsis for part in parts) > 1:
        return None
    given = [part for part in parts if part is not Ellipsis]
    if len(given) > len(shape):
        raise IndexError(f"too many indices for tensor of dimension {len(shape)}")
    rest = [slice(None)] * (len(shape) - len(given))
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    full = [*given[:at], *rest, *given[at:]]
    return tuple(_normal(part, size, dim) for dim, (part, size) in enumerate(zip(full, shape, strict=True)))


def part_of(size: int, rank: int, world: int) -> tuple[int, int]:
    """Start and stop of a rank's part of `size` elements: as even as it goes, the first ranks get one more."""
    each, more = divmod(size, world)
    start = rank * each + min(rank, more)
    return start, start + each + (rank < more)


def _is_basic(part: object) -> bool:
    if isinstance(part, slice):
        return part.step is None or (isinstance(part.step, int) and part.step > 0)
    return part is Ellipsis or (isinstance(part, int) and not isinstance(part, bool))


def _normal(part: object, size: int, dim: int) -> int | slice:
    if isinstance(part, slice):
        return slice(*part.indices(size))
    assert isinstance(part, int), "checked by _is_basic"
    if not -size <= part < size:
        raise IndexError(f"index {part} is out of bounds for dimension {dim} with size {size}")
    return part % size


def _bounds(part: int | slice) -> tuple[int, int, int]:
    if isinstance(part, slice):
        return part.start, part.stop, part.step
    return part, part + 1, 1


def _runs(entry: TensorEntry, index: Index, gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Runs of bytes, ascending, of a part that is not empty; inner ones are merged before they are counted out."""
    stride = block = stored_itemsize(entry)
    first = entry.offset
    hops: list[range] = []
    for size, part in zip(reversed(stored_shape(entry)), reversed(index), strict=True):
        start, stop, step = _bounds(part)
        count = len(range(start, stop, step))
        first += start * stride
        hop = step * stride
        if not hops and (count == 1 or hop - block <= gap_bytes):
            block += hop * (count - 1)
        elif count > 1:
            hops.append(range(0, hop * count, hop))
        stride *= size
    for steps in product(*reversed(hops)):
        yield first + sum(steps), block


def _merged(runs: Iterator[tuple[int, int]], gap_bytes: int) -> Iterator[tuple[int, int]]:
    begin = end = -1
    for offset, length in runs:
        if begin >= 0 and offset - end <= gap_bytes:
            end = offset + length
            continue
        if begin >= 0:
            yield begin, end - begin
        begin, end = offset, offset + length
    if begin >= 0:
        yield begin, end - begin


def _is_asked(name: str, patterns: Sequence[str]) -> bool:
    return any(_matches(name, pattern) for pattern in patterns)


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatchcase(name, pattern)


def _first_match(name: str, patterns: Sequence[str]) -> int:
    return next(i for i, pattern in enumerate(patterns) if _matches(name, pattern))


def _chosen_files(files: Sequence[FileTable], file: str | None) -> list[int]:
    chosen = [i for i, table in enumerate(files) if file is None or _matches(table.path, file)]
    if file is not None and not chosen:
        raise NotFoundError(
            f"there is no tensor file {file!r}",
            where=file,
            next_step="there are: " + (", ".join(table.path for table in files[:NAMES_SHOWN_MAX]) or "none"),
        )
    return chosen


def _check_found(names: Sequence[str], taken: Mapping[str, str]) -> None:
    for pattern in names:
        if pattern not in taken and not any(fnmatchcase(name, pattern) for name in taken):
            shown = ", ".join(list(taken)[:NAMES_SHOWN_MAX])
            raise NotFoundError(
                f"there is no tensor {pattern!r}",
                where=pattern,
                next_step=f"see `keys()` for the names{'; found were: ' + shown if shown else ''}",
            )


def _check_ranks(request: Request) -> None:
    if request.world < 1 or not 0 <= request.rank < request.world:
        raise InvalidInputError(
            f"rank {request.rank} of {request.world} does not exist",
            where="tensors(rank, world)",
            next_step="ranks count from 0 to world - 1",
        )
    if request.world > 1 and request.split is None:
        raise InvalidInputError(
            "world is given without split",
            where="tensors(split)",
            next_step='say along which dimension: split=0, or by name: split={"*.q_proj.weight": 0}',
        )


def _part(entry: TensorEntry, request: Request, path: str) -> Index | None:
    shape = stored_shape(entry)
    dim = _split_dim(entry.name, len(shape), request.split)
    if request.world == 1 or dim is None:
        return None
    if not -len(shape) <= dim < len(shape):
        raise InvalidInputError(
            f"it has no dimension {dim}: its shape is {list(shape)}",
            where=f"{path}: tensor {entry.name!r}",
            next_step="correct `split`",
        )
    dim %= len(shape)
    stored_itemsize(entry)  # a dtype that cannot be cut is refused here
    start, stop = part_of(shape[dim], request.rank, request.world)
    return tuple(slice(start, stop, 1) if d == dim else slice(0, size, 1) for d, size in enumerate(shape))


def _split_dim(name: str, rank: int, split: Split | None) -> int | None:
    if split is None:
        return None
    if isinstance(split, int):
        return split if -rank <= split < rank else None
    return next((dim for pattern, dim in split.items() if _matches(name, pattern)), None)
