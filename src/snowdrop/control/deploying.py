"""Changes that people make: models, deployments, scale. Each is one fenced write, then the loop is told."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import msgspec

from snowdrop.control import rollouts
from snowdrop.control.loop import ControlLoop
from snowdrop.control.origin_roots import OriginRoots
from snowdrop.domain.deployment import BoundModel, Deployment, ModelRecord, Revision
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError
from snowdrop.domain.ids import DeploymentName, ModelName, RevisionId, TenantId, fresh_id, parse_name
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.rollout import Rollout, RolloutPhase, RolloutSpec
from snowdrop.domain.scale import Scale, ScaleBounds
from snowdrop.domain.service import ServiceSpec
from snowdrop.policy import rollout
from snowdrop.wire.api import Deploy, PutModel, SetScale

ATTEMPTS_MAX = 5


class Deploying:
    """The write side of the API."""

    def __init__(self, loop: ControlLoop, roots: OriginRoots) -> None:
        self._loop = loop
        self._state = loop.state
        self._roots = roots

    async def put_model(self, tenant: TenantId, name: str, body: PutModel) -> ModelRecord:
        """Points a model's name at content. Raises as `OriginRoots.publish`."""
        model = ModelName(parse_name(name, what="model name"))
        async with self._roots.changing:
            return await self._roots.publish(tenant, model, body)

    async def delete_model(self, tenant: TenantId, name: str) -> None:
        """Raises ConflictError while a deployment's current revision uses it."""
        for key, entry in self._loop.world.deployments.items():
            models = (*entry.revision.models, *(entry.rival.models if entry.rival is not None else ()))
            if key[0] == tenant and any(bound.name == name for bound in models):
                raise ConflictError(
                    f"model {name!r} is used by deployment {key[1]!r}",
                    where=f"deployment {key[1]}",
                    next_step=f"`snowdrop delete {key[1]}` first",
                )
        async with self._roots.changing:
            record = await self._state.get_model(tenant, ModelName(name))
            if record is None:
                raise unknown_model(name)
            # The ref first: without it the model can still be removed; a ref without its model would stay.
            await self._roots.unpublish(record)
            await self._state.delete_model(tenant, ModelName(name))

    async def deploy(self, tenant: TenantId, name: str, body: Deploy) -> tuple[Revision, bool]:
        """A new revision of a deployment, which is made if it is not there. The flag says whether it was made."""
        deployment_name = DeploymentName(parse_name(name, what="deployment name"))
        # Until the revision names its content, nobody may take stock of what is named: see collection.md.
        async with self._roots.changing:
            revision = await self._make_revision(tenant, deployment_name, body)
        for _ in range(ATTEMPTS_MAX):
            stored = await self._state.get_deployment(tenant, deployment_name)
            generation = stored.generation if stored else 0
            if stored is None or stored.deleting:
                deployment = Deployment(
                    tenant=tenant,
                    name=deployment_name,
                    revision=revision.id,
                    generation=generation + 1,
                    # Later than the one that is being deleted, even if the clock was set back meanwhile.
                    created_unix_ns=max(revision.created_unix_ns, stored.created_unix_ns + 1 if stored else 0),
                )
            else:
                deployment = self.rolling(stored, revision.id, revision.spec.rollout, revision.created_unix_ns)
                deployment = msgspec.structs.replace(deployment, generation=generation + 1, scale=None)
            try:
                await self._state.put_deployment(deployment, expected_generation=generation)
            except ConflictError:
                continue
            await self._loop.set_deployment(deployment)
            return revision, stored is None
        raise ConflictError(f"deployment {name!r} is being changed by others", next_step="try again")

    async def check(self, tenant: TenantId, spec: ServiceSpec) -> None:
        """Raises for what its replicas could not be given: a secret nobody set, a volume that is not there."""
        if self._loop.secrets is not None:
            await self._loop.secrets.check(tenant, spec.secrets)
        if self._loop.volumes is not None:
            await self._loop.volumes.check(tenant, spec.volumes)

    async def restart(self, tenant: TenantId, name: str) -> RevisionId:
        """A rollout of the same again: a new revision like the current one, whose replicas start afresh."""
        deployment = DeploymentName(name)
        stored = await self._state.get_deployment(tenant, deployment)
        current = None
        if stored is not None:
            current = await self._state.get_revision(tenant, deployment, stored.revision)
        if current is None:
            raise unknown_deployment(name)
        await self.check(tenant, current.spec)
        again = msgspec.structs.replace(current, id=RevisionId(fresh_id("rev")), created_unix_ns=time.time_ns())
        async with self._roots.changing:
            await self._state.put_revision(again)

        async def restarted(now: Deployment) -> Deployment:
            return self.rolling(now, again.id, again.spec.rollout, again.created_unix_ns)

        await self.change(tenant, name, restarted)
        return again.id

    def rolling(
        self, stored: Deployment, candidate: RevisionId, spec: RolloutSpec, now_unix_ns: int
    ) -> Deployment:
        """The deployment with the rollout of a revision begun. One that is under way is superseded; its revision
        is what is gone back to only if it serves already.
        """
        before, stable, ended = stored.rollout, stored.revision, stored.rollouts
        if before is not None:
            if before.phase is RolloutPhase.PROVING and not self._is_ready(stored, before.candidate):
                stable = before.stable
            reason = f"revision {candidate} came after it"
            gone = rollout.ended(before, RolloutPhase.SUPERSEDED, reason, now_unix_ns)
            ended = (gone, *ended)[: rollouts.ENDED_KEPT_MAX]
        if stable == candidate:  # back to what still has, or had, all traffic
            return msgspec.structs.replace(stored, revision=stable, rollout=None, rollouts=ended)
        begun = Rollout(candidate=candidate, stable=stable, spec=spec, began_unix_ns=now_unix_ns)
        return msgspec.structs.replace(stored, revision=stable, rollout=begun, rollouts=ended)

    def _is_ready(self, stored: Deployment, revision: RevisionId) -> bool:
        replicas = self._loop.world.replicas_of((stored.tenant, stored.name))
        return any(
            r.revision == revision and r.state is ReplicaState.READY and not r.draining for _, r in replicas
        )

    async def _make_revision(self, tenant: TenantId, deployment_name: DeploymentName, body: Deploy) -> Revision:
        models: list[BoundModel] = []
        for model in body.spec.models:
            record = await self._state.get_model(tenant, ModelName(model.name))
            if record is None:
                raise unknown_model(model.name)
            if record.artefact.kind != "model":
                raise InvalidInputError(
                    f"{model.name!r} is an {record.artefact.kind}, not a model",
                    where=f"model {model.name}",
                    next_step="name a model that `snowdrop model ls` lists",
                )
            models.append(
                BoundModel(name=record.name, param=model.param, artefact=record.artefact, lazy=model.lazy)
            )
        revision = Revision(
            id=RevisionId(fresh_id("rev")),
            tenant=tenant,
            deployment=deployment_name,
            created_unix_ns=time.time_ns(),
            spec=body.spec,
            code=body.code,
            models=tuple(models),
        )
        await self.check(tenant, body.spec)
        await self._roots.check_push(body.lease)
        await self._roots.publish_roots([revision.code, *(bound.artefact for bound in models)])
        await self._state.put_revision(revision)
        return revision

    async def scale(self, tenant: TenantId, name: str, body: SetScale) -> Scale:
        """Overrides the revision's scale; also gives a crash-looping revision another chance."""
        if body.revision is not None:
            return await self._bound_revision(tenant, name, body.revision, body)
        changes = {k: v for k, v in msgspec.structs.asdict(body).items() if v is not None}
        wanted = Scale()

        async def scaled(stored: Deployment) -> Deployment:
            nonlocal wanted
            before = await self._scale_of(stored)
            if "min" in changes and "max" not in changes and changes["min"] > before.max:
                changes["max"] = changes["min"]
            wanted = msgspec.structs.replace(before, **changes)
            return msgspec.structs.replace(stored, scale=wanted)

        await self.change(tenant, name, scaled)
        return wanted

    async def _bound_revision(self, tenant: TenantId, name: str, revision: RevisionId, body: SetScale) -> Scale:
        """Bounds of one revision; without any, those it had are taken away."""
        others = (body.idle_s, body.buffer, body.idle, body.wait_price, body.target, body.schedules)
        if any(other is not None for other in others):
            raise InvalidInputError(
                "a revision has only a minimum and a maximum of its own",
                where=f"revision {revision}",
                next_step="give the rest without a revision: it holds for the whole deployment",
            )
        if await self._state.get_revision(tenant, DeploymentName(name), revision) is None:
            raise NotFoundError(
                f"{name!r} has no revision {revision!r}",
                where="revision",
                next_step=f"`snowdrop revisions {name}` lists them",
            )
        wanted = Scale()

        async def bounded(stored: Deployment) -> Deployment:
            nonlocal wanted
            wanted = await self._scale_of(stored)
            bounds = {known: kept for known, kept in stored.revision_bounds.items() if known != revision}
            if body.min is not None or body.max is not None:
                bounds[revision] = ScaleBounds(min=body.min, max=body.max)
            return msgspec.structs.replace(stored, revision_bounds=bounds)

        await self.change(tenant, name, bounded)
        return wanted

    async def _scale_of(self, stored: Deployment) -> Scale:
        if stored.scale is not None:
            return stored.scale
        revision = await self._state.get_revision(stored.tenant, stored.name, stored.revision)
        return revision.spec.scale if revision is not None else Scale()

    async def delete(self, tenant: TenantId, name: str) -> None:
        """Replicas drain first; the deployment is gone when the last one has ended."""

        async def deleted(stored: Deployment) -> Deployment:
            return msgspec.structs.replace(stored, deleting=True)

        await self.change(tenant, name, deleted)

    async def change(
        self, tenant: TenantId, name: str, change: Callable[[Deployment], Awaitable[Deployment]]
    ) -> None:
        """Reads, changes and writes under the fence; somebody else's write in between means to read again."""
        for _ in range(ATTEMPTS_MAX):
            stored = await self._state.get_deployment(tenant, DeploymentName(name))
            if stored is None:
                raise unknown_deployment(name)
            changed = msgspec.structs.replace(await change(stored), generation=stored.generation + 1)
            try:
                await self._state.put_deployment(changed, expected_generation=stored.generation)
            except ConflictError:
                continue
            await self._loop.set_deployment(changed)
            return
        raise ConflictError(f"deployment {name!r} is being changed by others", next_step="try again")


def unknown_model(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no model {name!r}",
        where="model name",
        next_step=f"`snowdrop model push {name} DIRECTORY` first; `snowdrop model ls` lists what is there",
    )


def unknown_deployment(name: str) -> NotFoundError:
    return NotFoundError(
        f"there is no deployment {name!r}", where="deployment name", next_step="`snowdrop ps` lists them"
    )
