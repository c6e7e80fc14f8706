"""Which gateway holds which task until when, on this process's own clock. Memory only, made from the store."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from snowdrop.domain.errors import ConflictError
from snowdrop.domain.ids import TaskId, TenantId
from snowdrop.domain.task import Task
from snowdrop.state.tasks import DeploymentKey
from snowdrop.wire.tasks import LeaseName

GONE_S = 3.0
"""What a gateway whose connection broke gets to come back before its tasks go to others."""
Name = tuple[TenantId, TaskId]


class Held(msgspec.Struct):
    """One lease."""

    holder: str
    generation: int
    key: DeploymentKey
    ends_s: float


class Leases:
    """The table, and what each gateway must still hear of leases that it holds no more."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._held: dict[Name, Held] = {}
        self._revoked: dict[str, list[LeaseName]] = {}

    def __contains__(self, name: Name) -> bool:
        return name in self._held

    def hold(self, task: Task) -> None:
        """A task that is leased in the store has its whole time from now on."""
        key, ends_s = (task.tenant, task.deployment), self._clock() + self._lease_s
        self._held[task.tenant, task.id] = Held(task.holder, task.generation, key, ends_s)

    def keep(self, holder: str, names: tuple[LeaseName, ...]) -> tuple[LeaseName, ...]:
        """The holder lives; those of the names that it does not hold in truth."""
        lost: list[LeaseName] = []
        for name in names:
            held = self._held.get((name.tenant, name.task))
            if held is None or (held.holder, held.generation) != (holder, name.generation):
                lost.append(name)
            else:
                held.ends_s = self._clock() + self._lease_s
        return tuple(lost)

    def end(self, name: Name, generation: int, *, tell: bool) -> None:
        """The lease is over, if a later one has not taken its place; with `tell` its holder does not know."""
        held = self._held.get(name)
        if held is None or held.generation > generation:
            return
        del self._held[name]
        if tell:
            lease = LeaseName(tenant=name[0], task=name[1], generation=held.generation)
            self._revoked.setdefault(held.holder, []).append(lease)

    def check(self, name: LeaseName) -> None:
        """ConflictError if this lease has ended: before a body is taken in for nothing."""
        held = self._held.get((name.tenant, name.task))
        if held is None or held.generation != name.generation:
            raise ConflictError(
                f"generation {name.generation} of task {name.task} has ended", where=f"task {name.task}"
            )

    def gateway_gone(self, holder: str) -> None:
        """Its connection broke: it must be back soon, or its tasks go to others."""
        self._revoked.pop(holder, None)
        for held in self._held.values():
            if held.holder == holder:
                held.ends_s = min(held.ends_s, self._clock() + GONE_S)

    def over(self) -> list[tuple[Name, Held]]:
        """Those whose time has run out."""
        now_s = self._clock()
        return [(name, held) for name, held in self._held.items() if held.ends_s <= now_s]

    def has_news(self, holder: str) -> bool:
        return bool(self._revoked.get(holder))

    def take_news(self, holder: str) -> tuple[LeaseName, ...]:
        """What the holder must stop; told once."""
        return tuple(self._revoked.pop(holder, ()))

    def counts(self) -> dict[DeploymentKey, int]:
        """Leases by deployment."""
        found: dict[DeploymentKey, int] = {}
        for held in self._held.values():
            found[held.key] = found.get(held.key, 0) + 1
        return found
