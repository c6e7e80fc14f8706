"""A tensor of which only the asked part is brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from snowdrop.weights.plan import PlannedTensor, normalise_index, stored_shape


class TensorSlice:
    """Indexing it gives the part as a tensor (or a numpy array, if it was opened for numpy).

    Integers, slices with a positive step and `...` bring only the bytes of the part; any other index brings the
    whole tensor first. Errors are those of the framework or IndexError.
    """

    def __init__(self, tensor: PlannedTensor, load: Callable[[PlannedTensor], Any]) -> None:
        self._tensor = tensor
        self._load = load

    def __repr__(self) -> str:
        return f"TensorSlice({self._tensor.entry.name!r}, {self.get_dtype()}, {self.get_shape()})"

    def get_shape(self) -> list[int]:
        """As in the file's header."""
        return list(self._tensor.entry.shape)

    def get_dtype(self) -> str:
        """As in the file's header, for example `BF16`."""
        return self._tensor.entry.dtype

    def __getitem__(self, index: object) -> Any:
        shape = stored_shape(self._tensor.entry)
        part = normalise_index(shape, index)
        if part is None:
            return self._load(self._tensor)[index]
        whole = all(
            isinstance(each, slice) and each == slice(0, n, 1) for each, n in zip(part, shape, strict=True)
        )
        return self._load(self._tensor if whole else msgspec.structs.replace(self._tensor, index=part))
