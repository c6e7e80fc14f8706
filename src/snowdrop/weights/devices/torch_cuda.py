"""CUDA as torch has it. Written by the documentation of torch 2.13 and CUDA 12; not yet run on real hardware."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

from snowdrop.weights.feeds import Region

_REGISTER_PORTABLE = 0x01
_REGISTER_READ_ONLY = 0x08
"""The area is mapped for reading alone. Where the driver lacks this, it refuses, and the pinned ring is used."""


class TorchCudaRuntime:
    """`device` with its index. Raises RuntimeError as torch does, if CUDA cannot be set up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    @property
    def name(self) -> str:
        return str(self._device)

    def register(self, region: Region) -> bool:
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(
                region.address, region.length, _REGISTER_PORTABLE | _REGISTER_READ_ONLY
            )
        if int(status) == 0:
            return True
        _forget_error()
        return False

    def unregister(self, region: Region) -> None:
        torch.cuda.cudart().cudaHostUnregister(region.address)

    def pinned(self, length: int) -> memoryview:
        return memoryview(torch.empty(length, dtype=torch.uint8, pin_memory=True).numpy())

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=self._device)
        # The memory may have belonged to a tensor that the caller's stream still works on; and it must not be
        # given to another one while a copy is under way, if the caller drops it early.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        made.record_stream(self._copies)
        return made

    def copy(self, target: torch.Tensor, offset: int, source: memoryview) -> None:
        bytes_of = target.reshape(-1).view(torch.uint8)
        with torch.cuda.stream(self._copies):
            bytes_of[offset : offset + len(source)].copy_(
                torch.frombuffer(source, dtype=torch.uint8), non_blocking=True
            )

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._copies)
        return event

    def is_done(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def synchronise(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def order(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)


def _forget_error() -> None:
    """A refused call leaves its error behind, which torch would report at its next kernel."""
    major = (torch.version.cuda or "12").partition(".")[0]
    with suppress(OSError, AttributeError):  # linked in statically: nothing to forget it with
        ctypes.CDLL(f"libcudart.so.{major}").cudaGetLastError()
