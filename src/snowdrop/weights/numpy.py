"""`load_file` for numpy, without torch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from snowdrop.weights.files import Backend
from snowdrop.weights.standalone import safe_open

if TYPE_CHECKING:
    import numpy


def load_file(filename: str | os.PathLike[str], *, backend: Backend = "auto") -> dict[str, numpy.ndarray]:
    """All tensors of a safetensors file as writable arrays; see `snowdrop.weights.load_file`.

    Raises InvalidInputError naming the tensor for a dtype that numpy lacks, as BF16.
    """
    with safe_open(filename, "np", backend=backend) as file:
        return file.get_tensors()
