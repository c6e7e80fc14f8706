"""LoadedModel: a model as user code gets it in `startup`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snowdrop.content.cut import load_order_key
from snowdrop.content.paths import parse_tree_path
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.weights.mapped import MappedFile, MappedTensor, map_area, map_directory, tensors_of, unique
from snowdrop.wire.replica import ModelHandle

if TYPE_CHECKING:
    import numpy
    import torch


class LoadedModel:
    """A model's tensors and files.

    Tensors are views on a private mapping of the node's landing area: nothing is copied, writing to one stays
    in this process, and the mapping lives as long as any of them. Files are in `path`, which waits until all of
    them are there; `file` gives small ones without waiting.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        mapped: list[MappedFile],
        wait_directory: Callable[[], None],
    ) -> None:
        self.name = name
        self._directory = directory
        self._mapped = mapped
        self._wait_directory = wait_directory
        self._waiting = threading.Lock()
        self._is_complete = False

    @classmethod
    def from_handle(
        cls, handle: ModelHandle, area_fd: int | None, wait_directory: Callable[[], None]
    ) -> LoadedModel:
        """From what the agent gave the replica.

        `area_fd` stays the caller's, who may close it at once; None without a landing area. `wait_directory`
        blocks until the directory is complete, or raises why it never will be.
        """
        mapped = [] if area_fd is None else map_area(area_fd, handle.area_bytes, handle.area_files)
        return cls(handle.name, Path(handle.directory), mapped, wait_directory)

    @classmethod
    def from_directory(cls, path: str | Path, *, name: str | None = None) -> LoadedModel:
        """From a directory of files, without the platform. Raises NotFoundError if there is none."""
        directory = Path(path)
        if not directory.is_dir():
            raise NotFoundError(
                f"{directory} is not a directory", where=str(directory), next_step="name a model's directory"
            )
        paths = [found.relative_to(directory).as_posix() for found in directory.rglob("*.safetensors")]
        mapped = map_directory(directory, sorted(paths, key=load_order_key))
        return cls(name or directory.name, directory, mapped, lambda: None)

    def __repr__(self) -> str:
        return f"LoadedModel({self.name!r}, {len(self._mapped)} tensor files)"

    @property
    def path(self) -> Path:
        """The directory with every file in it. The first use blocks until it is complete on this node.

        Raises StorageFullError if the node has no room for it, IntegrityError if the origin's bytes are wrong.
        """
        with self._waiting:
            if not self._is_complete:
                self._wait_directory()
                self._is_complete = True
        return self._directory

    def file(self, relpath: str) -> Path:
        """One file. A small one is there at once; for one with tensors this waits as `path` does.

        Raises NotFoundError if the model has no such file.
        """
        parse_tree_path(relpath, error=InvalidInputError)
        if any(file.path == relpath for file in self._mapped):
            return self.path / relpath
        found = self._directory / relpath
        if not found.is_file():
            raise NotFoundError(
                f"model {self.name!r} has no file {relpath!r}",
                where=relpath,
                next_step=f"see its files with `snowdrop model show {self.name}`",
            )
        return found

    def tensors(self, *, file: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and CPU tensors in load order, of one safetensors `file` or of all.

        Raises InvalidInputError if two files have a tensor of one name, or torch lacks a dtype.
        """
        from snowdrop.weights.frameworks import torch_tensor  # noqa: PLC0415 -- only with torch

        for mapped in self._entries(file):
            yield mapped.entry.name, torch_tensor(mapped)

    def state_dict(self, *, file: str | None = None) -> dict[str, torch.Tensor]:
        """`tensors` as a dict."""
        return dict(self.tensors(file=file))

    def load_into(self, module: torch.nn.Module, *, strict: bool = True, file: str | None = None) -> Any:
        """Puts the tensors into `module` by name, without copying (`load_state_dict(assign=True)`).

        A module made on the meta device gets real parameters and persistent buffers; buffers that are not part
        of its state dict are its own business. Returns what `load_state_dict` returns and raises what it raises.
        """
        return module.load_state_dict(self.state_dict(file=file), strict=strict, assign=True)

    def numpy(self, *, file: str | None = None) -> dict[str, numpy.ndarray]:
        """The tensors as numpy arrays over the same memory, without torch.

        Raises InvalidInputError naming the tensor for a dtype that numpy lacks, as BF16.
        """
        from snowdrop.weights.frameworks import numpy_array  # noqa: PLC0415 -- only with numpy

        return {mapped.entry.name: numpy_array(mapped) for mapped in self._entries(file)}

    def _entries(self, file: str | None) -> Iterator[MappedTensor]:
        chosen = [mapped for mapped in self._mapped if file is None or mapped.path == file]
        if file is not None and not chosen:
            raise NotFoundError(
                f"model {self.name!r} has no tensor file {file!r}",
                where=file,
                next_step="it has: " + (", ".join(mapped.path for mapped in self._mapped[:8]) or "none"),
            )
        taken: set[str] = set()
        for mapped in chosen:
            for tensor in tensors_of(mapped):
                unique(tensor.entry.name, taken, mapped.path)
                yield tensor
