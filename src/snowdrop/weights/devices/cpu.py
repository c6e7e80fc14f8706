"""The CPU: a tensor is a view of the memory that its bytes came in. Other devices of torch: a copy of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowdrop.domain.errors import DeviceError
from snowdrop.weights.feeds import Feed
from snowdrop.weights.frameworks import torch_tensor
from snowdrop.weights.plan import PlannedTensor

if TYPE_CHECKING:
    import torch


class CpuDevice:
    """Nothing is copied but what is cast, cut across rows, misaligned by its file or still beside unfilled
    bytes.
    """

    name = "cpu"

    def place(self, tensor: PlannedTensor, feed: Feed, dtype: torch.dtype | None) -> torch.Tensor:
        loan = feed.whole(tensor)
        placed = torch_tensor(loan.view, tensor, copies=loan.copies and dtype is None)
        return placed if dtype is None else placed.to(dtype)

    def close(self) -> None:
        """It holds nothing."""


class PlainDevice:
    """Any device that torch knows, without streaming: each tensor is copied when it is there."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = CpuDevice()

    @property
    def name(self) -> str:
        return str(self._device)

    def place(self, tensor: PlannedTensor, feed: Feed, dtype: torch.dtype | None) -> torch.Tensor:
        placed = self._host.place(tensor, feed, None)
        try:
            return placed.to(device=self._device, dtype=dtype)
        except (RuntimeError, NotImplementedError) as error:
            raise DeviceError(
                f"{self.name} did not take it: {error}",
                where=tensor.where,
                next_step="free memory on the device, or choose another",
            ) from error

    def close(self) -> None:
        """It holds nothing: its copies are done when they return."""
