"""Which deployments speak OpenAI's dialect, as control says: what is listed, and who is not to be woken."""

from __future__ import annotations

from collections.abc import Iterable

from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.ids import DeploymentName, TenantId
from snowdrop.wire.control import DeploymentRoute
from snowdrop.wire.slots import Speaker

Key = tuple[TenantId, DeploymentName]


class Speaking:
    """Kept by the owner of the queues beside them."""

    def __init__(self) -> None:
        self._paths: dict[Key, tuple[str, ...]] = {}
        self._created_unix_s: dict[Key, int] = {}

    def set_routes(self, routes: Iterable[DeploymentRoute]) -> None:
        self._paths.clear()
        self._created_unix_s.clear()
        for route in routes:
            self.change((route.tenant, route.deployment), route)

    def change(self, key: Key, route: DeploymentRoute | None) -> None:
        self._paths.pop(key, None)
        self._created_unix_s.pop(key, None)
        if route is not None:
            self._paths[key] = route.openai
            self._created_unix_s[key] = route.created_unix_s

    def of(self, tenant: TenantId) -> tuple[Speaker, ...]:
        """The tenant's deployments that speak any of it, by name."""
        return tuple(
            Speaker(tenant=key[0], deployment=key[1], paths=paths, created_unix_s=self._created_unix_s[key])
            for key, paths in sorted(self._paths.items())
            if key[0] == tenant and paths
        )

    def check(self, tenant: TenantId, deployment: DeploymentName, path: str) -> None:
        """Raises NotFoundError for a deployment that is there and does not serve `path`."""
        paths = self._paths.get((tenant, deployment))
        if paths is not None and path not in paths:
            raise not_spoken(deployment, path, paths)


def not_spoken(deployment: DeploymentName, path: str, paths: tuple[str, ...]) -> NotFoundError:
    """Of a deployment that serves only `paths`."""
    others = f"it serves {', '.join(paths)}" if paths else "GET /v1/models lists those that do"
    return NotFoundError(
        f"the model {deployment!r} does not serve {path}", where="model", next_step=f"use another: {others}"
    )
