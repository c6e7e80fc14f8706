"""The device of a name."""

from __future__ import annotations

import torch

from snowdrop.domain.errors import InvalidInputError
from snowdrop.weights.devices.cpu import CpuDevice, PlainDevice
from snowdrop.weights.devices.cuda import CudaDevice
from snowdrop.weights.devices.port import Device
from snowdrop.weights.devices.torch_cuda import TorchCudaRuntime


def open_device(device: str | int | torch.device) -> Device:
    """A device for one stream, who closes it. Raises InvalidInputError if torch has no such device here."""
    try:
        found = torch.device(device)
        if found.type == "cuda" and found.index is None:
            found = torch.device("cuda", torch.cuda.current_device())
        if found.type not in {"cpu", "meta"}:
            torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InvalidInputError(
            f"there is no device {device!r}: {str(error).splitlines()[0]}",
            where="device",
            next_step='use "cpu", or one that torch has on this machine, as "cuda:0"',
        ) from error
    if found.type == "cpu":
        return CpuDevice()
    if found.type == "cuda":
        return CudaDevice(TorchCudaRuntime(found))
    return PlainDevice(found)
