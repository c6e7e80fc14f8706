"""Pins that people set: which artefacts this node must not evict, in a file of the cache directory."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from snowdrop.content.diskio import translated
from snowdrop.domain.ids import Digest, TenantId, fresh_id

_VERSION = 1
PINS_MAX = 10_000


class DurablePin(msgspec.Struct, frozen=True, kw_only=True):
    """`name` is what the artefact was called when it was pinned."""

    manifest: Digest
    key_domain: str
    tenant: TenantId
    name: str
    pinned_unix_ns: int


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    pins: tuple[DurablePin, ...]


class DurablePins:
    """Read at the start, replaced whole at each change. Calls block; one at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pins: dict[Digest, DurablePin] = {}

    def open(self) -> str:
        """Reads the file. A file that makes no sense is set aside and told: a cache is no reason not to start."""
        self._pins = {}
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return ""
        except (msgspec.DecodeError, OSError) as error:
            return self._set_aside(str(error))
        if found.version != _VERSION:
            return self._set_aside(f"version {found.version}")
        self._pins = {pin.manifest: pin for pin in found.pins}
        return ""

    def all(self) -> list[DurablePin]:
        return list(self._pins.values())

    def get(self, manifest: Digest) -> DurablePin | None:
        return self._pins.get(manifest)

    def add(self, pin: DurablePin) -> None:
        """Durable when it returns. Raises StorageFullError or UnavailableError; then it is not pinned."""
        self._write({**self._pins, pin.manifest: pin})

    def remove(self, manifest: Digest) -> None:
        if manifest in self._pins:
            self._write({other: pin for other, pin in self._pins.items() if other != manifest})

    def _write(self, pins: dict[Digest, DurablePin]) -> None:
        temporary = self._path.with_name(f"{self._path.name}.{fresh_id('new')}")
        try:
            with open(temporary, "xb") as file:
                file.write(msgspec.json.encode(_File(version=_VERSION, pins=tuple(pins.values()))))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise translated(error, self._path) from error
        self._pins = pins

    def _set_aside(self, problem: str) -> str:
        aside = self._path.with_suffix(".bad")
        self._path.replace(aside)
        return f"the node's pins made no sense and are set aside in {aside}: {problem}"[:500]
