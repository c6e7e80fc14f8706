"""Which deployments use a thing that they name, a secret or a volume, and the refusal to remove it meanwhile."""

from __future__ import annotations

from collections.abc import Callable

from snowdrop.control.world import World
from snowdrop.domain.deployment import Revision
from snowdrop.domain.errors import ConflictError
from snowdrop.domain.ids import DeploymentName, TenantId

Names = Callable[[Revision], bool]


def users_of(world: World, tenant: TenantId, names: Names) -> list[DeploymentName]:
    """Deployments of which a revision that serves, or is rolled out or kept, names the thing."""
    return [
        key[1]
        for key, entry in world.deployments.items()
        if key[0] == tenant
        and any(revision is not None and names(revision) for revision in (entry.revision, entry.rival))
    ]


def refuse_in_use(what: str, name: str, users: list[DeploymentName]) -> None:
    """Raises ConflictError if there are users."""
    if users:
        raise ConflictError(
            f"{what} {name!r} is used by {', '.join(users)}",
            where=f"deployment {users[0]}",
            next_step=f"delete the deployment, or deploy it without the {what}, first",
        )
