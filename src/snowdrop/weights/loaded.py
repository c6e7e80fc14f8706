"""LoadedModel: a model as user code gets it in `startup`."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from snowdrop.content.cut import load_order_key
from snowdrop.content.paths import parse_tree_path
from snowdrop.content.progress import ProgressReader
from snowdrop.content.safetensors import SUFFIX
from snowdrop.domain.errors import InvalidInputError, NotFoundError, SnowdropError
from snowdrop.weights.area import AreaSource, MappedArea, map_area
from snowdrop.weights.diskfile import DiskFile
from snowdrop.weights.feeds import Source
from snowdrop.weights.files import FileSource
from snowdrop.weights.plan import LoadPlan, Order, Request, Split
from snowdrop.weights.slices import TensorSlice
from snowdrop.weights.stream import floating_to, one_tensor, plan_of, stream, stream_numpy
from snowdrop.wire.replica import ModelHandle

if TYPE_CHECKING:
    import numpy
    import torch

Renew = Callable[[], tuple[ModelHandle, tuple[int, ...]]]
"""Gets a model again; the descriptors belong to the caller."""
Names = str | Sequence[str] | None


class LoadedModel:
    """A model's tensors and files.

    Tensors are views on a private mapping of the node's landing area, handed out in load order, each as soon as
    its bytes are there: nothing is copied, writing to one stays in this process, and the mapping lives as long as
    any of them. Files are in `path`, a directory with all of them: mounted, or else waited for; `file` gives
    small ones without waiting. All methods may be called from any thread.
    """

    def __init__(self, name: str, directory: Path, source: Source, wait_directory: Callable[[], None]) -> None:
        self.name = name
        self._directory = directory
        self._source = source
        self._wait_directory = wait_directory
        self._waiting = threading.Lock()
        self._is_complete = False

    @classmethod
    def from_handle(
        cls,
        handle: ModelHandle,
        fds: tuple[int, ...],
        *,
        wait_directory: Callable[[], None],
        renew: Renew,
        wait_s_max: float,
    ) -> LoadedModel:
        """From what the agent gave the replica.

        `fds` are indexed by the handle and stay the caller's, who may close them at once. `wait_directory` blocks
        until the directory is complete, or raises why it never will be; `renew` gets the model again when the
        data plane that was filling its area is gone. A wait for tensors takes at most `wait_s_max`.
        """
        source: Source = FileSource(())
        if handle.slabs:
            source = AreaSource(
                _mapped(handle, fds),
                is_lazy=handle.lazy,
                wait_s_max=wait_s_max,
                renew=partial(_map_again, renew),
            )
        wait = _nothing_to_wait_for if handle.has_all_files else wait_directory
        return cls(handle.name, Path(handle.directory), source, wait)

    @classmethod
    def from_directory(cls, path: str | Path, *, name: str | None = None) -> LoadedModel:
        """From a directory of files, without the platform. Raises NotFoundError if there is none."""
        directory = Path(path)
        if not directory.is_dir():
            raise NotFoundError(
                f"{directory} is not a directory", where=str(directory), next_step="name a model's directory"
            )
        paths = [found.relative_to(directory).as_posix() for found in directory.rglob("*" + SUFFIX)]
        files = [_look(directory, each) for each in sorted(paths, key=load_order_key)]
        return cls(name or directory.name, directory, FileSource(files), lambda: None)

    def __repr__(self) -> str:
        return f"LoadedModel({self.name!r}, {len(self._source.paths)} tensor files)"

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
        if relpath in self._source.paths:
            return self.path / relpath
        found = self._directory / relpath
        if not found.is_file():
            found = self.path / relpath  # a large one follows behind
        if not found.is_file():
            raise NotFoundError(
                f"model {self.name!r} has no file {relpath!r}",
                where=relpath,
                next_step=f"see its files with `snowdrop model show {self.name}`",
            )
        return found

    def keys(self, *, file: str | None = None) -> list[str]:
        """Names of the tensors in load order. Waits for the files' headers alone."""
        return [tensor.entry.name for tensor in self._plan(file, None).tensors]

    def tensors(
        self,
        *,
        file: str | None = None,
        names: Names = None,
        order: Order = "load",
        rank: int = 0,
        world: int = 1,
        split: Split | None = None,
        dtype: torch.dtype | None = None,
        device: str | int | torch.device = "cpu",
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, each as soon as its bytes are there, while later ones are still on their way.

        `file` and `names` choose, by name or pattern (`"model.layers.0.*"`). They come in load order, or with
        `order` "asked" in the order of `names`. With `world` above 1 each tensor is cut along the dimension
        that `split` says, `{pattern: dimension or None}` or one dimension for all, and rank `rank` gets its
        part: only the chunks that hold its bytes are asked for. `dtype` casts floating-point tensors one by
        one; `device` is where they go.

        Raises InvalidInputError if two files have a tensor of one name, torch lacks a dtype or the split cannot be
        made, NotFoundError for a name that matches nothing, TimedOutError, and why bytes cannot come.
        """
        from snowdrop.weights.devices.choose import open_device  # noqa: PLC0415 -- only with torch

        plan = self._plan(file, names, order=order, rank=rank, world=world, split=split)
        return stream(self._source, plan, open_device(device), floating_to(dtype))

    def state_dict(
        self,
        *,
        file: str | None = None,
        names: Names = None,
        rank: int = 0,
        world: int = 1,
        split: Split | None = None,
        dtype: torch.dtype | None = None,
        device: str | int | torch.device = "cpu",
    ) -> dict[str, torch.Tensor]:
        """`tensors` as a dict."""
        return dict(
            self.tensors(file=file, names=names, rank=rank, world=world, split=split, dtype=dtype, device=device)
        )

    def load_into(
        self,
        module: torch.nn.Module,
        *,
        strict: bool = True,
        file: str | None = None,
        dtype: torch.dtype | Literal["module"] | None = None,
        device: str | int | torch.device = "cpu",
    ) -> Any:
        """Puts the tensors into `module` by name, without copying (`load_state_dict(assign=True)`).

        A module made on the meta device gets real parameters and persistent buffers; buffers that are not part
        of its state dict are its own business. `dtype` casts floating-point tensors while they come, with "module"
        to what the module has. Parameters that the module shares go on being shared, also if the files have only
        one of their names. The module is as it was until all tensors are there.

        Returns what `load_state_dict` returns. Raises ModuleMismatchError, which names every tensor that does not
        fit, before any byte is waited for; and what `tensors` raises.
        """
        from snowdrop.weights.devices.choose import open_device  # noqa: PLC0415 -- only with torch
        from snowdrop.weights.into import assign, check_fit, module_dtypes  # noqa: PLC0415 -- as above

        plan = self._plan(file, None)
        check_fit(module, plan.tensors, strict=strict)
        tensors = stream(self._source, plan, open_device(device), module_dtypes(module, dtype))
        return assign(module, tensors, strict=strict)

    def numpy(self, *, file: str | None = None, names: Names = None) -> dict[str, numpy.ndarray]:
        """The tensors as numpy arrays over the same memory, without torch.

        Raises InvalidInputError naming the tensor for a dtype that numpy lacks, as BF16.
        """
        return dict(stream_numpy(self._source, self._plan(file, names)))

    def get_slice(self, name: str, *, file: str | None = None) -> TensorSlice:
        """One tensor, of which indexing brings a part: `model.get_slice("lm_head.weight")[:1000]`.

        Raises NotFoundError.
        """
        from snowdrop.weights.devices.choose import open_device  # noqa: PLC0415 -- only with torch

        found = [tensor for tensor in self._plan(file, None).tensors if tensor.entry.name == name]
        if not found:
            raise NotFoundError(
                f"model {self.name!r} has no tensor {name!r}", where=name, next_step="see `keys()` for the names"
            )
        (tensor,) = found
        return TensorSlice(tensor, lambda part: one_tensor(self._source, part, open_device("cpu")))

    def wait_complete(self, timeout_s: float) -> None:
        """Blocks until all tensors are on this node, if they are on their way at all (not for a lazy model).

        Raises TimedOutError, and why bytes cannot come.
        """
        if isinstance(self._source, AreaSource) and not self._source.is_lazy:
            self._source.arrive_all(timeout_s)

    def _plan(
        self,
        file: str | None,
        names: Names,
        *,
        order: Order = "load",
        rank: int = 0,
        world: int = 1,
        split: Split | None = None,
    ) -> LoadPlan:
        chosen = (names,) if isinstance(names, str) else None if names is None else tuple(names)
        request = Request(file=file, names=chosen, rank=rank, world=world, split=split, order=order)
        return plan_of(self._source, request)


def _nothing_to_wait_for() -> None:
    """All files are in the directory, or are fetched as they are read."""


def _mapped(handle: ModelHandle, fds: tuple[int, ...]) -> MappedArea:
    reader = ProgressReader(fds[handle.progress_fd], socket.socket(fileno=os.dup(fds[handle.wake_fd])))
    try:
        return map_area(
            handle.area_files,
            handle.area_bytes,
            [fds[slab.fd] for slab in handle.slabs],
            [slab.size for slab in handle.slabs],
            reader,
        )
    except SnowdropError:
        reader.close()
        raise


def _map_again(renew: Renew) -> MappedArea:
    handle, fds = renew()
    try:
        return _mapped(handle, fds)
    finally:
        for fd in fds:
            os.close(fd)


def _look(directory: Path, path: str) -> DiskFile:
    try:
        return DiskFile.look(directory / path, path)
    except OSError as error:
        raise NotFoundError(
            f"{path} cannot be read: {error.strerror}", where=path, next_step="see what the directory holds"
        ) from error
