"""A tensor's bytes as a torch tensor or a numpy array. Each framework is imported by the call that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.manifest import TensorEntry
from snowdrop.weights.plan import PlannedTensor, stored_shape

if TYPE_CHECKING:
    import numpy
    import torch

_TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64",
    "F64": "float64", "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_NUMPY_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64", "F64": "float64",
    "C64": "complex64",
}  # fmt: skip


def torch_dtype(tensor: PlannedTensor) -> torch.dtype:
    """Raises InvalidInputError naming file and tensor if torch has no such dtype."""
    import torch  # noqa: PLC0415 -- user code without torch must be able to import LoadedModel

    dtype = getattr(torch, _TORCH_DTYPES.get(tensor.entry.dtype, ""), None)
    if not isinstance(dtype, torch.dtype) or not _is_whole(tensor.entry):
        raise _unsupported(tensor, "torch", "update torch, or convert the weights")
    return dtype


def check_numpy(tensor: PlannedTensor) -> None:
    """Raises InvalidInputError naming file and tensor if numpy has no such dtype."""
    if tensor.entry.dtype not in _NUMPY_DTYPES:
        raise _unsupported(tensor, "numpy", "use tensors() or state_dict(), which give torch tensors")


def torch_tensor(view: memoryview, tensor: PlannedTensor, *, copies: bool = False) -> torch.Tensor:
    """A contiguous CPU tensor over `view`, the writable bytes of the whole tensor in its file, which it keeps
    alive.

    Bytes are copied only if `copies`, if the file misaligns them, or if a part is no single run; then the tensor
    has memory of its own. Only the bytes of the part are touched.
    """
    import torch  # noqa: PLC0415 -- as above

    dtype = torch_dtype(tensor)
    if tensor.length == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    raw = torch.frombuffer(view, dtype=torch.uint8)
    if raw.data_ptr() % dtype.itemsize:
        # Cut as bytes, with the bytes of an element as one more dimension, then copied to where it is aligned.
        whole = raw.view((*stored_shape(tensor.entry), dtype.itemsize))
        part = whole if tensor.index is None else whole[tensor.index]
        return part.contiguous().clone().view(dtype).view(tensor.shape)
    whole = raw.view(dtype).view(stored_shape(tensor.entry))
    part = whole if tensor.index is None else whole[tensor.index]
    return part.clone(memory_format=torch.contiguous_format) if copies else part.contiguous()


def numpy_array(view: memoryview, tensor: PlannedTensor, *, copies: bool = False) -> numpy.ndarray:
    """The same as a writable numpy array."""
    import numpy as np  # noqa: PLC0415 -- as above

    check_numpy(tensor)
    dtype = np.dtype(_NUMPY_DTYPES[tensor.entry.dtype])
    if tensor.length == 0:
        return np.empty(tensor.shape, dtype=dtype)
    whole = np.frombuffer(view, dtype=dtype).reshape(stored_shape(tensor.entry))
    part = np.asarray(whole if tensor.index is None else whole[tensor.index])
    return part.copy() if copies or not part.flags.aligned else np.ascontiguousarray(part).reshape(tensor.shape)


def _is_whole(entry: TensorEntry) -> bool:
    return entry.dtype != "F4" or (bool(entry.shape) and entry.shape[-1] % 2 == 0)


def _unsupported(tensor: PlannedTensor, framework: str, next_step: str) -> InvalidInputError:
    return InvalidInputError(
        f"{framework} has no dtype for {tensor.entry.dtype}", where=tensor.where, next_step=next_step
    )
