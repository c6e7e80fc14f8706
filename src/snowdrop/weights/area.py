"""A landing area as a source: tensors are handed out while later bytes are still on their way.

The area is mapped twice. The private mapping is what tensors are views of: writing to one copies the page. The
shared one can only be read and is what devices copy from: registering pinned memory would copy every page of a
private one.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from snowdrop.content.mapping import map_slabs
from snowdrop.content.placement import AREA_ALIGNMENT
from snowdrop.content.progress import FillState, ProgressReader
from snowdrop.content.safetensors import Header, read_header
from snowdrop.domain.errors import CorruptContentError, PlatformDownError
from snowdrop.weights.feeds import PIECE_BYTES_MAX, Feed, Loan, Piece, Region
from snowdrop.weights.plan import LoadPlan, PlannedTensor
from snowdrop.wire.replica import AreaFile

RENEWALS_MAX = 5
"""How often one wait may find that the data plane is gone."""
REGION_BYTES = 256 << 20
"""What is registered with a device at a time, so that the first copy need not wait for all of it."""
ASK_BYTES = 512 << 20
"""A feed asks for between this and twice as much ahead of what it hands out."""


class MappedArea(NamedTuple):
    """One landing area in this process. Without `reader` all of it is there."""

    files: tuple[AreaFile, ...]
    private: memoryview
    shared: memoryview
    shared_address: int
    reader: ProgressReader | None


def map_area(
    files: tuple[AreaFile, ...],
    area_bytes: int,
    slab_fds: Sequence[int],
    slab_bytes: Sequence[int],
    reader: ProgressReader | None,
) -> MappedArea:
    """The caller keeps the descriptors and may close them at once; `reader` is taken over.

    Raises CorruptContentError if a file lies outside of the area, or the area outside of its slabs.
    """
    for file in files:
        if file.offset < 0 or file.size < 0 or file.offset + file.size > area_bytes:
            raise CorruptContentError("file lies outside of its landing area", where=file.path)
    if sum(slab_bytes) < area_bytes:
        raise CorruptContentError("the landing area is larger than its slabs", where=f"{area_bytes} bytes")
    private = map_slabs(slab_fds, slab_bytes)
    shared = map_slabs(slab_fds, slab_bytes, is_private=False)
    address = ctypes.addressof(ctypes.c_char.from_buffer(shared)) if shared else 0
    return MappedArea(files, private, shared, address, reader)


class AreaSource:
    """The tensor files of a landing area. Safe for threads; `renew` gives a new area when the data plane is
    gone.
    """

    def __init__(
        self,
        area: MappedArea,
        *,
        is_lazy: bool = False,
        wait_s_max: float,
        renew: Callable[[], MappedArea] | None = None,
    ) -> None:
        self.area = area
        self._is_lazy = is_lazy
        self._wait_s_max = wait_s_max
        self._renew = renew
        self._renewing = threading.Lock()
        self._headers: dict[int, Header] = {}
        _close_with(self, area.reader)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.area.files)

    @property
    def is_lazy(self) -> bool:
        """Whether only what is asked for comes."""
        return self._is_lazy

    def header(self, file: int) -> Header:
        header = self._headers.get(file)
        if header is None:
            placed = self.area.files[file]

            def read(offset: int, length: int) -> bytes:
                area = self.arrive(placed.offset + offset, length)
                return bytes(area.private[placed.offset + offset :][:length])

            header = self._headers[file] = read_header(read, placed.size, where=placed.path)
        return header

    def open(self, plan: LoadPlan) -> Feed:
        return _AreaFeed(self, plan)

    def arrive(self, offset: int, length: int) -> MappedArea:
        """Blocks until these bytes of the area are there and gives the mapping in which they are.

        Raises TimedOutError, PlatformDownError, or why the area cannot be filled.
        """
        return self._wait(lambda reader: reader.wait(offset, length, self._wait_s_max))

    def arrive_all(self, timeout_s: float) -> None:
        """Blocks until the whole area is there. Raises as `arrive`."""
        self._wait(lambda reader: reader.wait_all(timeout_s))

    def ask(self, stretches: Iterator[tuple[int, int]]) -> None:
        """Says what will be waited for, most urgent first."""
        reader = self.area.reader
        if reader is not None and reader.state is FillState.FILLING:
            reader.ask(stretches)

    def _wait(self, wait: Callable[[ProgressReader], None]) -> MappedArea:
        for left in range(RENEWALS_MAX, -1, -1):
            area = self.area
            if area.reader is None:
                return area
            try:
                wait(area.reader)
            except PlatformDownError:
                if left == 0 or self._renew is None:
                    raise
                self._replace(area)
            else:
                return area
        raise AssertionError("the loop returns or raises")

    def _replace(self, gone: MappedArea) -> None:
        """Another area of the same artefact, unless another thread has got one."""
        with self._renewing:
            if self.area is not gone:
                return
            assert self._renew is not None
            new = self._renew()
            _close_with(self, new.reader)
            if [(f.path, f.size) for f in new.files] != [(f.path, f.size) for f in gone.files]:
                raise CorruptContentError("the model changed while it was loaded", where=", ".join(self.paths[:8]))
            self.area = new


def _close_with(source: AreaSource, reader: ProgressReader | None) -> None:
    """Closes the reader when the source is collected; until then another thread may still look at it."""
    if reader is not None:
        weakref.finalize(source, reader.close)


class _AreaFeed:
    def __init__(self, source: AreaSource, plan: LoadPlan) -> None:
        self._source = source
        self._plan = plan
        self._place = 0
        self._asked_bytes = 0
        self._covered = _covered(plan) if source.is_lazy else {}
        self._ask(0)

    def whole(self, tensor: PlannedTensor) -> Loan:
        self._advance(tensor.length)
        area = self._arrived(tensor)
        copies = False
        if tensor.length and tensor.is_run:
            area, copies = self._edges(tensor, area)
        begin = area.files[tensor.file].offset + tensor.entry.offset
        return Loan(area.private[begin : begin + tensor.entry.length], copies)

    def _arrived(self, tensor: PlannedTensor) -> MappedArea:
        """The mapping in which all bytes of the tensor are: all in the same, also if it was renewed in between."""
        while True:  # each round but the last meets another area, and `arrive` bounds how many there are
            area = self._source.area
            base = area.files[tensor.file].offset
            places = [self._source.arrive(base + offset, length) for offset, length in tensor.spans()]
            if all(place is area for place in places):
                return area

    def pieces(self, tensor: PlannedTensor) -> Iterator[Piece]:
        self._advance(tensor.length)
        base = self._source.area.files[tensor.file].offset
        for offset, length in tensor.spans(0):
            at, end = base + offset, base + offset + length
            while at < end:
                border = at - at % REGION_BYTES + REGION_BYTES
                stop = min(end, at + PIECE_BYTES_MAX, border)
                area = self._source.arrive(at, stop - at)
                region = Region(
                    area.shared_address + border - REGION_BYTES,
                    min(REGION_BYTES, len(area.shared) - (border - REGION_BYTES)),
                )
                yield Piece(area.shared[at:stop], region)
                at = stop

    def close(self) -> None:
        """What was asked for comes all the same: others may want it."""

    def _edges(self, tensor: PlannedTensor, area: MappedArea) -> tuple[MappedArea, bool]:
        """Sees to the first and last page of a tensor, which its neighbours share.

        A page that is written to becomes this process's own and gets no more bytes from the data plane. So all
        of it must be there before the tensor is given out; or the tensor gets memory of its own, if nobody asks
        for those bytes.
        """
        ((offset, length),) = tensor.spans(0)
        base = area.files[tensor.file].offset
        size = area.files[tensor.file].size
        start = offset - offset % AREA_ALIGNMENT
        end = min(size, -(-(offset + length) // AREA_ALIGNMENT) * AREA_ALIGNMENT)
        if area.reader is None or area.reader.is_filled(base + start, end - start):
            return area, False
        if self._source.is_lazy:
            sides = [(low, high) for low, high in ((start, offset), (offset + length, end)) if low < high]
            for low, high in sides:
                if not self._covers(tensor.file, low, high) and not area.reader.is_filled(base + low, high - low):
                    return area, True
        return self._source.arrive(base + start, end - start), False

    def _covers(self, file: int, begin: int, end: int) -> bool:
        """Whether the plan brings these bytes."""
        covered = self._covered.get(file, [])
        at = bisect_right(covered, (begin, 1 << 62)) - 1
        return at >= 0 and covered[at][1] >= end

    def _advance(self, taken_bytes: int) -> None:
        self._place += 1
        self._asked_bytes -= taken_bytes
        if self._asked_bytes < ASK_BYTES:
            self._ask(self._place - 1)

    def _ask(self, place: int) -> None:
        self._source.ask(self._stretches(self._plan.tensors[place:]))
        self._asked_bytes = 2 * ASK_BYTES

    def _stretches(self, tensors: Sequence[PlannedTensor]) -> Iterator[tuple[int, int]]:
        files = self._source.area.files
        left = 2 * ASK_BYTES
        for tensor in tensors:
            for offset, length in tensor.spans():
                yield files[tensor.file].offset + offset, length
                left -= length
            if left <= 0:
                return


def _covered(plan: LoadPlan) -> dict[int, list[tuple[int, int]]]:
    """By file, what the plan brings: ascending (begin, end) that do not touch."""
    stretches: dict[int, list[tuple[int, int]]] = {}
    for extent in sorted(plan.extents()):
        found = stretches.setdefault(extent.file, [])
        if found and found[-1][1] >= extent.offset:
            found[-1] = (found[-1][0], extent.offset + extent.length)
        else:
            found.append((extent.offset, extent.offset + extent.length))
    return stretches
