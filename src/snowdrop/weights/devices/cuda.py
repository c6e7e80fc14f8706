"""A CUDA device: copies run on a stream of their own while later bytes are still on the wire.

Pieces of the landing area are copied from where they lie, registered stretch by stretch; what cannot be registered
goes through a ring of pinned buffers. How much may be in flight is bounded. Not yet run on real hardware.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch

from snowdrop.domain.errors import DeviceError
from snowdrop.weights.devices.runtime import CudaRuntime
from snowdrop.weights.feeds import PIECE_BYTES_MAX, Feed, Piece, Region, cut_pieces
from snowdrop.weights.frameworks import torch_dtype, torch_tensor
from snowdrop.weights.plan import PlannedTensor

IN_FLIGHT_BYTES_MAX = 256 << 20
RING_SLOTS = 8
"""Pinned buffers of PIECE_BYTES_MAX, made when they are needed first."""

T = TypeVar("T")


class _Flight(NamedTuple):
    """A copy that is not known to be done. It keeps its source."""

    event: Any
    source: memoryview
    slot: memoryview | None


class _Registered(NamedTuple):
    """Whether the runtime took a region. The view keeps its mapping: no other may get its address meanwhile."""

    is_accepted: bool
    keeps: memoryview


class CudaDevice:
    """The device of one stream of tensors."""

    def __init__(
        self,
        runtime: CudaRuntime,
        *,
        in_flight_bytes_max: int = IN_FLIGHT_BYTES_MAX,
        ring_slots: int = RING_SLOTS,
    ) -> None:
        self._runtime = runtime
        self._in_flight_bytes_max = in_flight_bytes_max
        self._slots_left = ring_slots
        self._free_slots: list[memoryview] = []
        self._flights: deque[_Flight] = deque()
        self._in_flight_bytes = 0
        self._regions: dict[Region, _Registered] = {}

    @property
    def name(self) -> str:
        return self._runtime.name

    def place(self, tensor: PlannedTensor, feed: Feed, dtype: torch.dtype | None) -> torch.Tensor:
        stored = torch_dtype(tensor)
        target = self._told(tensor, lambda: self._runtime.allocate(tensor.shape, stored))
        offset = 0
        for piece in self._pieces(tensor, feed):
            self._told(tensor, lambda piece=piece, offset=offset: self._queue(target, offset, piece))  # type: ignore[misc]
            offset += len(piece.view)
        return self._told(tensor, lambda: self._finished(target, dtype))

    def close(self) -> None:
        """May be called again. Copies are done and pages are free when it returns, or the device itself has
        failed.
        """
        try:
            while self._flights:
                self._land()
        finally:
            self._flights.clear()
            self._in_flight_bytes = 0
            for region, registered in self._regions.items():
                if registered.is_accepted:
                    with suppress(RuntimeError):  # the error that made the device fail comes back at every call
                        self._runtime.unregister(region)
            self._regions.clear()
            self._free_slots.clear()

    def _pieces(self, tensor: PlannedTensor, feed: Feed) -> Iterator[Piece]:
        if tensor.is_run:
            return feed.pieces(tensor)
        # Cut across rows: put together in host memory first.
        part = torch_tensor(feed.whole(tensor).view, tensor)
        return cut_pieces(memoryview(part.reshape(-1).view(torch.uint8).numpy()))

    def _queue(self, target: torch.Tensor, offset: int, piece: Piece) -> None:
        length = len(piece.view)
        while self._flights and (
            self._in_flight_bytes + length > self._in_flight_bytes_max
            or self._runtime.is_done(self._flights[0].event)
        ):
            self._land()
        slot = None if self._is_registered(piece) else self._free_slot()
        source = piece.view
        if slot is not None:
            source = slot[:length]
            source[:] = piece.view
        self._runtime.copy(target, offset, source)
        self._flights.append(_Flight(self._runtime.record(), source, slot))
        self._in_flight_bytes += length

    def _finished(self, target: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        self._runtime.order(self._runtime.record())
        return target if dtype is None else target.to(dtype)

    def _is_registered(self, piece: Piece) -> bool:
        if piece.region is None:
            return False
        if piece.region not in self._regions:
            self._regions[piece.region] = _Registered(self._runtime.register(piece.region), piece.view)
        return self._regions[piece.region].is_accepted

    def _free_slot(self) -> memoryview:
        if not self._free_slots and self._slots_left:
            self._slots_left -= 1
            self._free_slots.append(self._runtime.pinned(PIECE_BYTES_MAX))
        while not self._free_slots:
            self._land()
        return self._free_slots.pop()

    def _land(self) -> None:
        """Waits for the oldest copy."""
        flight = self._flights.popleft()
        self._in_flight_bytes -= len(flight.source)
        self._runtime.synchronise(flight.event)
        if flight.slot is not None:
            self._free_slots.append(flight.slot)

    def _told(self, tensor: PlannedTensor, call: Callable[[], T]) -> T:
        try:
            return call()
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"{self.name} has no memory for {tensor.length} bytes",
                where=f"{self.name}, {tensor.where}",
                next_step="free memory on the device, load fewer tensors on it, or cast them to a smaller dtype",
            ) from error
        except RuntimeError as error:
            raise DeviceError(
                f"{self.name} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
                where=f"{self.name}, {tensor.where}",
                next_step="see the device's own log (nvidia-smi, dmesg); start the replica again",
            ) from error
