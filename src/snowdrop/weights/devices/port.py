"""The port of a device. `tests/contract/test_device.py` is what an implementation must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from snowdrop.weights.feeds import Feed
from snowdrop.weights.plan import PlannedTensor

if TYPE_CHECKING:
    import torch


class Device(Protocol):
    """Takes the tensors of one stream, one after the other, from one thread."""

    @property
    def name(self) -> str:
        """As torch names it, for example `cuda:0`."""
        ...

    def place(self, tensor: PlannedTensor, feed: Feed, dtype: torch.dtype | None) -> torch.Tensor:
        """The tensor on the device, in `dtype` if given, safe to use by the caller's next operation.

        Blocks until its bytes have come from `feed`, but not until they are copied: what the caller queues on
        the device runs after the copy. It owns its memory or keeps it alive. Raises DeviceError naming device
        and tensor.
        """
        ...

    def close(self) -> None:
        """Waits for the copies that are under way and gives back what it holds of the host's memory.

        May be called again.
        """
        ...
