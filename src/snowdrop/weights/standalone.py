"""Loading files without the platform: `load_file`, `load_directory`, `safe_open`.

The same calls and results as the safetensors library; what differs is how the bytes come (see `files`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from snowdrop.content.cut import load_order_key
from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError
from snowdrop.weights.adapters.files import weight_files
from snowdrop.weights.diskfile import DiskFile
from snowdrop.weights.files import Backend, FileSource
from snowdrop.weights.plan import LoadPlan, PlannedTensor, Request
from snowdrop.weights.slices import TensorSlice
from snowdrop.weights.stream import as_stored, one_array, one_tensor, plan_of, stream, stream_numpy

if TYPE_CHECKING:
    import torch

Framework = Literal["torch", "numpy"]

INDEX_SUFFIX = ".safetensors.index.json"
INDEX_BYTES_MAX = 256 << 20
_FRAMEWORKS: dict[str, Framework] = {
    "pt": "torch", "torch": "torch", "pytorch": "torch", "np": "numpy", "numpy": "numpy",
}  # fmt: skip


def load_file(
    filename: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    backend: Backend = "auto",
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, by name in the order of the file.

    `backend` "mmap" maps the file, "pread" reads it in parallel past the page cache into memory of its own; "auto"
    takes the first if most of the file is in the page cache. Writing to a tensor never changes the file.
    Raises OSError as `open` does, CorruptContentError naming file and tensor.
    """
    source = FileSource([_look(filename)], backend=backend)
    return _all_tensors(source, plan_of(source, Request()), device)


def load_directory(
    directory: str | os.PathLike[str],
    device: str | int | torch.device = "cpu",
    *,
    backend: Backend = "auto",
) -> dict[str, torch.Tensor]:
    """All tensors of a model that may be in several files, in load order.

    With an index (`*.safetensors.index.json`) these are the files that it names, otherwise all safetensors
    files of the directory itself. Raises NotFoundError if there is none or one that is named is missing,
    CorruptContentError if a file lacks a tensor that the index promises, InvalidInputError if two files have
    one of the same name.
    """
    folder = Path(directory)
    files, promised = _files_of(folder)
    source = FileSource([DiskFile.look(folder / name, name) for name in files], backend=backend)
    plan = plan_of(source, Request())
    _check_promised(plan, promised)
    return _all_tensors(source, plan, device)


class safe_open:  # noqa: N801 -- the name that it stands in for
    """A safetensors file of which tensors and parts of tensors are loaded when they are asked for.

    `framework` is "pt" or "np". A context manager; what it gave stays valid after its end.
    """

    def __init__(
        self,
        filename: str | os.PathLike[str],
        framework: str,
        device: str | int | torch.device = "cpu",
        *,
        backend: Backend = "auto",
    ) -> None:
        self._framework = _framework(framework, device)
        self._device = device
        self._name = os.fspath(filename)
        self._source: FileSource | None = FileSource([_look(filename)], backend=backend)
        header = self._source.header(0)
        self._metadata = header.metadata
        plan = plan_of(self._source, Request())
        self._tensors = {tensor.entry.name: tensor for tensor in plan.tensors}

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._source = None

    def keys(self) -> list[str]:
        """Names, sorted."""
        self._opened()
        return sorted(self._tensors)

    def offset_keys(self) -> list[str]:
        """Names in the order of the file."""
        self._opened()
        return list(self._tensors)

    def metadata(self) -> dict[str, str] | None:
        """The header's free text, None if the header has no place for it."""
        self._opened()
        return None if self._metadata is None else dict(self._metadata)

    def get_tensor(self, name: str) -> Any:
        """One tensor. Raises NotFoundError."""
        return self._load(self._find(name))

    def get_slice(self, name: str) -> TensorSlice:
        """One tensor, of which indexing loads a part. Raises NotFoundError."""
        return TensorSlice(self._find(name), self._load)

    def get_tensors(self) -> dict[str, Any]:
        """All of them, in the order of the file."""
        source, plan = self._opened(), LoadPlan(tensors=tuple(self._tensors.values()))
        if self._framework == "numpy":
            return dict(stream_numpy(source, plan))
        return _all_tensors(source, plan, self._device)

    def _find(self, name: str) -> PlannedTensor:
        self._opened()
        tensor = self._tensors.get(name)
        if tensor is None:
            raise NotFoundError(
                f"file does not contain tensor {name!r}", where=self._name, next_step="see `keys()` for the names"
            )
        return tensor

    def _load(self, tensor: PlannedTensor) -> Any:
        source = self._opened()
        if self._framework == "numpy":
            return one_array(source, tensor)
        from snowdrop.weights.devices.choose import open_device  # noqa: PLC0415 -- only with torch

        return one_tensor(source, tensor, open_device(self._device))

    def _opened(self) -> FileSource:
        if self._source is None:
            raise InvalidInputError("the file is closed", where=self._name, next_step="use it inside of `with`")
        return self._source


def _all_tensors(source: FileSource, plan: LoadPlan, device: str | int | torch.device) -> dict[str, torch.Tensor]:
    from snowdrop.weights.devices.choose import open_device  # noqa: PLC0415 -- only with torch

    return dict(stream(source, plan, open_device(device), as_stored))


def _look(filename: str | os.PathLike[str]) -> DiskFile:
    return DiskFile.look(Path(filename), os.fspath(filename))


def _framework(framework: str, device: object) -> Framework:
    found = _FRAMEWORKS.get(framework)
    if found is None:
        raise InvalidInputError(
            f"framework {framework!r} is unknown",
            where="safe_open(framework)",
            next_step='use "pt" or "np"',
        )
    if found == "numpy" and str(device) != "cpu":
        raise InvalidInputError(
            f"numpy has no device {device!r}", where="safe_open(device)", next_step='leave it out, or use "pt"'
        )
    return found


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def _files_of(folder: Path) -> tuple[list[str], dict[str, str]]:
    """The tensor files in load order, and for each tensor of an index the file that must have it."""
    if not folder.is_dir():
        raise NotFoundError(
            f"{folder} is not a directory", where=str(folder), next_step="name a model's directory"
        )
    indices = sorted(found.name for found in folder.glob("*" + INDEX_SUFFIX))
    if len(indices) > 1:
        raise InvalidInputError(
            f"there are several indices: {', '.join(indices)}",
            where=str(folder),
            next_step="load the files of one with load_file",
        )
    if not indices:
        return sorted(weight_files(folder), key=load_order_key), {}
    promised = _read_index(folder / indices[0])
    names = sorted(set(promised.values()), key=load_order_key)
    _check_present(folder, indices[0], names)
    return names, promised


def _read_index(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            raw = file.read(INDEX_BYTES_MAX + 1)
        if len(raw) > INDEX_BYTES_MAX:
            raise CorruptContentError(f"the index is too long ({INDEX_BYTES_MAX=})", where=path.name)
        promised = msgspec.json.decode(raw, type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptContentError(
            f"the index is not valid: {error}", where=path.name, next_step="fetch it again from where it came"
        ) from error
    for name in promised.values():
        parse_tree_path(name, error=CorruptContentError)
    return promised


def _check_present(folder: Path, index: str, names: Iterable[str]) -> None:
    for name in names:
        if not (folder / name).is_file():
            raise NotFoundError(
                f"{name} is named by {index} and is not there",
                where=str(folder / name),
                next_step="fetch the missing file from where the model came",
            )


def _check_promised(plan: LoadPlan, promised: dict[str, str]) -> None:
    there = {tensor.entry.name: tensor.path for tensor in plan.tensors}
    for name, file in promised.items():
        if there.get(name) != file:
            raise CorruptContentError(
                "the index promises a tensor that the file does not have",
                where=f"{file}: tensor {name!r}",
                next_step="fetch the model again from where it came",
            )
