"""What the CUDA device needs of CUDA, and no more: `torch_cuda` is the real one, `sim` the one of the tests."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from snowdrop.weights.feeds import Region


class CudaRuntime(Protocol):
    """One device with one stream of its own for copies. Calls raise RuntimeError as torch does.

    An event is whatever `record` gave; it is done when all copies queued before it are.
    """

    @property
    def name(self) -> str: ...

    def register(self, region: Region) -> bool:
        """Page-locks memory that is only read, so that copies from it need the CPU for nothing. False if
        refused.
        """
        ...

    def unregister(self, region: Region) -> None: ...

    def pinned(self, length: int) -> memoryview:
        """Page-locked memory of the process, given back when the view goes."""
        ...

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory on the device, which copies queued from now on may write to."""
        ...

    def copy(self, target: torch.Tensor, offset: int, source: memoryview) -> None:
        """Queues a copy to byte `offset` of `target`. `source` is registered or pinned and stays until it is
        done.
        """
        ...

    def record(self) -> Any:
        """An event behind all copies queued so far."""
        ...

    def is_done(self, event: Any) -> bool: ...

    def synchronise(self, event: Any) -> None:
        """Blocks until it is done."""
        ...

    def order(self, event: Any) -> None:
        """What the calling thread queues on the device from now on runs behind `event`."""
        ...
