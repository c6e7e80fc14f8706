"""Runs a plan: tensors one after the other, each as soon as its bytes are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from snowdrop.domain.errors import InvalidInputError
from snowdrop.weights.feeds import Source
from snowdrop.weights.frameworks import check_numpy, numpy_array, torch_dtype
from snowdrop.weights.plan import FileTable, LoadPlan, PlannedTensor, Request, plan_load, wants_file

if TYPE_CHECKING:
    import numpy
    import torch

    from snowdrop.weights.devices.port import Device

    Dtypes = Callable[[PlannedTensor], torch.dtype | None]


def plan_of(source: Source, request: Request) -> LoadPlan:
    """Blocks until the headers of the files that are asked for are there. Raises as `plan_load`."""
    return plan_load(
        [
            FileTable(path=path, tensors=source.header(i).tensors if wants_file(path, request) else ())
            for i, path in enumerate(source.paths)
        ],
        request,
    )


def stream(source: Source, plan: LoadPlan, device: Device, dtypes: Dtypes) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors in the order of the plan; closes the device at its end.

    `dtypes` says what a tensor is cast to, None for as it is. Raises InvalidInputError before anything is read if
    torch lacks a dtype.
    """
    with closing(device):
        for tensor in plan.tensors:
            torch_dtype(tensor)
        with closing(source.open(plan)) as feed, closing(device):  # the device first: it may still read the feed's
            for tensor in plan.tensors:
                yield tensor.entry.name, device.place(tensor, feed, dtypes(tensor))


def stream_numpy(source: Source, plan: LoadPlan) -> Iterator[tuple[str, numpy.ndarray]]:
    """The same as numpy arrays in memory, without torch."""
    for tensor in plan.tensors:
        check_numpy(tensor)
    with closing(source.open(plan)) as feed:
        for tensor in plan.tensors:
            loan = feed.whole(tensor)
            yield tensor.entry.name, numpy_array(loan.view, tensor, copies=loan.copies)


def as_stored(_tensor: PlannedTensor) -> torch.dtype | None:
    """No cast."""
    return None


def floating_to(dtype: torch.dtype | None) -> Dtypes:
    """Casts floating-point tensors to `dtype`, as `torch.nn.Module.to` does, and leaves others alone."""
    if dtype is None:
        return as_stored
    if not dtype.is_floating_point:
        raise InvalidInputError(
            f"weights are not cast to {dtype}",
            where="dtype",
            next_step="name a floating-point dtype, as in dtype=torch.bfloat16",
        )

    def dtypes(tensor: PlannedTensor) -> torch.dtype | None:
        stored = torch_dtype(tensor)
        return dtype if stored.is_floating_point and stored is not dtype else None

    return dtypes


def one_tensor(source: Source, tensor: PlannedTensor, device: Device) -> torch.Tensor:
    """A stream of one."""
    ((_, placed),) = stream(source, LoadPlan(tensors=(tensor,)), device, as_stored)
    return placed


def one_array(source: Source, tensor: PlannedTensor) -> numpy.ndarray:
    """A stream of one, for numpy."""
    ((_, array),) = stream_numpy(source, LoadPlan(tensors=(tensor,)))
    return array
