"""Safetensors files mapped into memory, privately: reading shares pages, writing copies the page written to."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from snowdrop.content.safetensors import read_header
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError
from snowdrop.domain.manifest import TensorEntry
from snowdrop.wire.replica import AreaFile


class MappedFile(NamedTuple):
    """A safetensors file at `offset` of a private, writable mapping; whatever views it keeps the mapping alive."""

    path: str
    buffer: mmap.mmap
    offset: int
    size: int


class MappedTensor(NamedTuple):
    """A tensor's bytes: `entry.length` of them at `offset` of `buffer`."""

    entry: TensorEntry
    buffer: mmap.mmap
    offset: int


def map_area(fd: int, area_bytes: int, files: tuple[AreaFile, ...]) -> list[MappedFile]:
    """The files of a landing area. The caller keeps `fd` and may close it at once."""
    if not files:
        return []
    for file in files:
        if file.offset < 0 or file.size < 0 or file.offset + file.size > area_bytes:
            raise CorruptContentError("file lies outside of its landing area", where=file.path)
    buffer = mmap.mmap(fd, area_bytes, access=mmap.ACCESS_COPY)
    return [MappedFile(file.path, buffer, file.offset, file.size) for file in files]


def map_directory(directory: Path, paths: list[str]) -> list[MappedFile]:
    """The same over files of a directory, each in a mapping of its own."""
    mapped: list[MappedFile] = []
    for path in paths:
        try:
            fd = os.open(directory / path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFoundError(f"{path} cannot be read: {error.strerror}", where=path) from error
        try:
            size = os.fstat(fd).st_size
            if size == 0:
                raise CorruptContentError("file is empty", where=path)
            mapped.append(MappedFile(path, mmap.mmap(fd, size, access=mmap.ACCESS_COPY), 0, size))
        finally:
            os.close(fd)
    return mapped


def tensors_of(file: MappedFile) -> Iterator[MappedTensor]:
    """In offset order. Raises CorruptContentError naming file and tensor."""

    def read(offset: int, length: int) -> bytes:
        return file.buffer[file.offset + offset : file.offset + offset + length]

    for entry in read_header(read, file.size, where=file.path).tensors:
        yield MappedTensor(entry, file.buffer, file.offset + entry.offset)


def unique(name: str, taken: set[str], path: str) -> str:
    """`name`, now taken; raises InvalidInputError if another file had a tensor of this name."""
    if name in taken:
        raise InvalidInputError(
            f"tensor {name!r} is in more than one file of the model",
            where=path,
            next_step="name the file that you mean: tensors(file=...), state_dict(file=...)",
        )
    taken.add(name)
    return name
