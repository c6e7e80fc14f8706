"""The newest ref of each name, in a file: what a reader without control's state remembers against rollbacks."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from snowdrop.domain.errors import CorruptContentError
from snowdrop.domain.ids import ModelName, TenantId, fresh_id
from snowdrop.domain.ref import Ref, Seen

_VERSION = 1


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: int
    refs: dict[str, Seen]


class SeenFile:
    """Replaced whole at each change, durable before `remember` returns. For one process at a time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refs = self._read()

    def newest(self, tenant: TenantId, name: ModelName) -> Seen | None:
        return self._refs.get(f"{tenant}/{name}")

    def remember(self, ref: Ref) -> None:
        if self._refs.get(f"{ref.tenant}/{ref.name}") == ref.seen:
            return
        self._refs[f"{ref.tenant}/{ref.name}"] = ref.seen
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = self._path.with_name(f"{self._path.name}.{fresh_id('new')}")
        try:
            with open(temporary, "xb") as file:
                file.write(msgspec.json.encode(_File(version=_VERSION, refs=self._refs)))
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _read(self) -> dict[str, Seen]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            found = msgspec.json.decode(data, type=_File)
        except msgspec.DecodeError as error:
            raise self._bad(str(error)) from error
        if found.version != _VERSION:
            raise self._bad(f"version {found.version}")
        return found.refs

    def _bad(self, problem: str) -> CorruptContentError:
        # Not taken for an empty one: whoever damaged it may want an old ref believed.
        return CorruptContentError(
            f"the record of seen refs makes no sense: {problem}"[:500],
            where=str(self._path),
            next_step="remove it if you are sure that the origin's refs are the current ones",
        )
