"""Where an image comes from, behind one port: a registry, an OCI layout, a docker archive."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec

from snowdrop.domain.errors import IntegrityError
from snowdrop.domain.image import ImageConfig

Read = Callable[[int], bytes]
"""Gives up to so many bytes; empty only at the end."""


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """A layer as its source names it. `digest` is of its stored bytes and `size` their number, empty and -1 if the
    source does not say; `diff_id` is of its plain bytes. At least one of the two digests is there.
    """

    key: str
    digest: str
    size: int
    diff_id: str


class SourceImage(msgspec.Struct, frozen=True, kw_only=True):
    """`digest` is that of the manifest or, in a docker archive, of the config."""

    config: ImageConfig
    layers: tuple[Layer, ...]
    digest: str


class ImageSource(Protocol):
    """One image somewhere. Methods block; `read_layer` may be used by several threads at once."""

    @property
    def name(self) -> str:
        """As a person would write it; kept with the image."""

    def image(self) -> SourceImage:
        """Raises NotFoundError if it is not there, CorruptContentError if its documents are damaged."""

    def read_layer(self, layer: Layer, offset: int) -> AbstractContextManager[Read]:
        """The stored bytes from `offset` on; whoever reads them compares the digests."""

    def close(self) -> None:
        """May be called twice."""


class Digested:
    """Passes bytes on and hashes them."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._hash = hashlib.sha256()
        self.count = 0

    def read(self, most: int) -> bytes:
        data = self._read(most)
        self._hash.update(data)
        self.count += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass

    def check(self, digest: str, *, where: str, what: str) -> None:
        """Raises IntegrityError if `digest` is given and is another one."""
        got = f"sha256:{self._hash.hexdigest()}"
        if digest and got != digest:
            raise IntegrityError(
                f"{what} is not what its name says: {got[:26]}, not {digest[:26]}",
                where=where,
                next_step="push again; if it stays so, the image is damaged there",
            )
