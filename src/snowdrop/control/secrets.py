"""Secrets in control: set, listed, removed, rotated, and opened for one start of a replica that names them."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec

from snowdrop.control.uses import refuse_in_use, users_of
from snowdrop.control.world import World
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.ids import DeploymentName, TenantId, parse_name
from snowdrop.domain.secret import KEYS_VARIABLE, SECRET_BYTES_MAX, SecretRecord, SecretValue
from snowdrop.policy import restart
from snowdrop.state.port import StateStore
from snowdrop.tenancy.secrets import PlatformKeys, rewrap, seal, unseal
from snowdrop.wire.api import Rotated, SecretView
from snowdrop.wire.control import StartReplica

TOTAL_BYTES_MAX = 2 * SECRET_BYTES_MAX
"""Of one service together: they travel in one packet."""


class Secrets:
    """`world` is asked who uses what. No method gives a value away but `complete`."""

    def __init__(self, state: StateStore, keys: PlatformKeys, world: World) -> None:
        self._state = state
        self._keys = keys
        self._world = world
        self._changing = anyio.Lock()

    @classmethod
    async def open(cls, state: StateStore, folder: Path, world: World) -> Secrets:
        """With the platform's keys of the environment, or of the folder. Raises SnowdropError for bad ones."""
        keys = PlatformKeys(folder, os.environ.get(KEYS_VARIABLE, ""))
        await anyio.to_thread.run_sync(keys.load)
        return cls(state, keys, world)

    async def set(self, tenant: TenantId, name: str, value: str) -> SecretView:
        """A new version; running replicas keep what they have. Raises InvalidInputError."""
        parse_name(name, what="secret name")
        now = time.time_ns()
        async with self._changing:
            before = await self._state.secrets.get(tenant, name)
            empty = SecretRecord(
                tenant=tenant,
                name=name,
                version=0,
                key_id="",
                wrapped=b"",
                sealed=b"",
                created_unix_ns=now,
                changed_unix_ns=now,
            )
            record = seal(self._keys, value, before, empty)
            await self._state.secrets.put(record, expected=before)
        for deployment in self._users(tenant, name):
            # What failed for want of it, or of the right one, is tried again at once.
            self._world.deployments[tenant, deployment].starts = restart.StartHistory()
        return self._view(record)

    async def listed(self, tenant: TenantId) -> list[SecretView]:
        return [self._view(record) for record in await self._state.secrets.listed(tenant)]

    async def delete(self, tenant: TenantId, name: str) -> None:
        """Raises ConflictError while a deployment names it, NotFoundError."""
        refuse_in_use("secret", name, self._users(tenant, name))
        async with self._changing:
            if not await self._state.secrets.delete(tenant, name):
                raise unknown_secret(name)

    async def rotate(self) -> Rotated:
        """All secrets of all tenants under a new platform key; the old ones are removed when none needs them.

        Broken off, it is done again: each record says which key it is wrapped with.
        """
        async with self._changing:
            if not self._keys.from_environment:
                await anyio.to_thread.run_sync(self._keys.add)
            count = 0
            for record in await self._state.secrets.listed(None):
                if record.key_id != self._keys.current:
                    await self._state.secrets.put(rewrap(self._keys, record), expected=record)
                    count += 1
            removed = await anyio.to_thread.run_sync(self._keys.drop_others)
        return Rotated(key_id=self._keys.current, rewrapped=count, removed=removed)

    async def check(self, tenant: TenantId, names: dict[str, str]) -> None:
        """Raises NotFoundError for a secret that a service names and nobody has set."""
        for name in names.values():
            if await self._state.secrets.get(tenant, name) is None:
                raise unknown_secret(name)

    async def complete(self, order: StartReplica) -> StartReplica:
        """The order with the secrets that its revision names. Raises why there is one that cannot be opened."""
        names = order.revision.spec.secrets
        if not names:
            return order
        values: dict[str, SecretValue] = {}
        for variable, name in names.items():
            record = await self._state.secrets.get(order.key.tenant, name)
            if record is None:
                raise unknown_secret(name)
            values[variable] = unseal(self._keys, record)
        if sum(len(value.text.encode()) for value in values.values()) > TOTAL_BYTES_MAX:
            raise InvalidInputError(
                "the secrets of this service are too large together", where=f"at most {TOTAL_BYTES_MAX} bytes"
            )
        return msgspec.structs.replace(order, secrets=values)

    def _view(self, record: SecretRecord) -> SecretView:
        return SecretView(
            name=record.name,
            version=record.version,
            created_unix_ns=record.created_unix_ns,
            changed_unix_ns=record.changed_unix_ns,
            used_by=tuple(self._users(record.tenant, record.name)),
        )

    def _users(self, tenant: TenantId, name: str) -> list[DeploymentName]:
        return users_of(self._world, tenant, lambda revision: name in revision.spec.secrets.values())


def unknown_secret(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no secret {name!r}",
        where="secret name",
        next_step=f"`snowdrop secret set {name}` first; `snowdrop secret ls` lists what is there",
    )
