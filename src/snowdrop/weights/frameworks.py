"""Mapped tensors as torch tensors and numpy arrays. Each framework is imported by the call that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowdrop.domain.errors import InvalidInputError
from snowdrop.weights.mapped import MappedTensor

if TYPE_CHECKING:
    import numpy
    import torch

_TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64",
    "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_NUMPY_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip


def _unsupported(tensor: MappedTensor, framework: str, next_step: str) -> InvalidInputError:
    return InvalidInputError(
        f"{framework} has no dtype for {tensor.entry.dtype}",
        where=f"tensor {tensor.entry.name!r}",
        next_step=next_step,
    )


def torch_tensor(mapped: MappedTensor) -> torch.Tensor:
    """A CPU tensor over the mapping, which it keeps alive; no bytes are copied unless the file misaligns it."""
    import torch  # noqa: PLC0415 -- user code without torch must be able to import LoadedModel

    entry = mapped.entry
    dtype = getattr(torch, _TORCH_DTYPES.get(entry.dtype, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise _unsupported(mapped, "torch", "update torch, or convert the weights")
    if entry.length == 0:
        return torch.empty(entry.shape, dtype=dtype)
    raw = torch.frombuffer(mapped.buffer, dtype=torch.uint8, count=entry.length, offset=mapped.offset)
    if mapped.offset % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).reshape(entry.shape)


def numpy_array(mapped: MappedTensor) -> numpy.ndarray:
    """A writable array over the mapping, which it keeps alive."""
    import numpy as np  # noqa: PLC0415 -- as above

    entry = mapped.entry
    name = _NUMPY_DTYPES.get(entry.dtype)
    if name is None:
        raise _unsupported(mapped, "numpy", "use tensors() or state_dict(), which give torch tensors")
    dtype = np.dtype(name)
    if entry.length == 0:
        return np.empty(entry.shape, dtype=dtype)
    count = entry.length // dtype.itemsize
    return np.frombuffer(mapped.buffer, dtype=dtype, count=count, offset=mapped.offset).reshape(entry.shape)
