"""The part of control's API that rollouts are steered with. Each change is one fenced write of the deployment."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from aiohttp import web

from snowdrop.control import rollouts
from snowdrop.control.deploying import Deploying, unknown_deployment
from snowdrop.control.http import answer, body_of, key_of
from snowdrop.control.loop import ControlLoop
from snowdrop.control.world import DeploymentEntry, DeploymentKey
from snowdrop.domain.deployment import Deployment
from snowdrop.domain.errors import ConflictError, NotFoundError
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.rollout import Rollout, RolloutPhase
from snowdrop.policy import rollout
from snowdrop.wire.api import RevisionView, Rival, Rollback, RolloutView

Change = Callable[[Rollout, int], Rollout]


class RolloutApi:
    """Handlers below `/v1/deployments/{name}`: `rollout`, `rollback`, `revisions`."""

    def __init__(self, loop: ControlLoop, deploying: Deploying) -> None:
        self._loop = loop
        self._state = loop.state
        self._deploying = deploying

    def routes(self) -> list[web.RouteDef]:
        base = "/v1/deployments/{name}"
        return [
            web.get(base + "/rollout", self._status),
            web.post(base + "/rollout/{verb}", self._steer),
            web.post(base + "/rollback", self._rollback),
            web.post(base + "/restart", self._restart),
            web.get(base + "/revisions", self._revisions),
        ]

    async def _status(self, request: web.Request) -> web.Response:
        return answer(self._view(key_of(request)))

    async def _steer(self, request: web.Request) -> web.Response:
        key, verb = key_of(request), request.match_info["verb"]
        change = CHANGES.get(verb)
        if change is None:
            raise NotFoundError(f"a rollout cannot be told to {verb!r}", next_step=f"one of: {', '.join(CHANGES)}")

        async def steered(stored: Deployment) -> Deployment:
            if stored.rollout is None:
                raise ConflictError(
                    f"no rollout of {key[1]!r} is under way",
                    where=f"deployment {key[1]}",
                    next_step=f"`snowdrop rollout status {key[1]}` shows the last ones",
                )
            return rollouts.with_rollout(stored, change(stored.rollout, time.time_ns()))

        await self._deploying.change(*key, steered)
        return answer(self._view(key))

    async def _rollback(self, request: web.Request) -> web.Response:
        """Back to the revision before, or to one that is named: a rollout at once, which is watched as well."""
        key = key_of(request)
        body = await body_of(request, Rollback)

        async def back(stored: Deployment) -> Deployment:
            now = time.time_ns()
            if stored.rollout is not None and body.revision in {"", stored.rollout.stable}:
                gone = rollout.ended(stored.rollout, RolloutPhase.ABORTED, "rolled back by hand", now)
                return rollouts.with_rollout(stored, gone)
            target = RevisionId(body.revision) if body.revision else await self._previous(stored)
            revision = await self._state.get_revision(*key, target)
            if revision is None:
                raise NotFoundError(
                    f"{key[1]!r} has no revision {target!r}",
                    where="revision",
                    next_step=f"`snowdrop revisions {key[1]}` lists them",
                )
            if stored.rollout is None and target == stored.revision:
                raise ConflictError(f"{key[1]!r} is at revision {target} already", where="revision")
            await self._deploying.check(key[0], revision.spec)  # what it names may have been removed since
            spec = msgspec.structs.replace(revision.spec.rollout, steps=())
            return self._deploying.rolling(stored, target, spec, now)

        await self._deploying.change(*key, back)
        return answer(self._view(key))

    async def _restart(self, request: web.Request) -> web.Response:
        key = key_of(request)
        await self._deploying.restart(*key)
        return answer(self._view(key))

    async def _previous(self, stored: Deployment) -> RevisionId:
        """The revision that served before the current one."""
        for past in stored.rollouts:
            if past.phase is RolloutPhase.DONE and past.candidate == stored.revision:
                return past.stable
        revisions = await self._state.list_revisions(stored.tenant, stored.name)
        current = next((r.created_unix_ns for r in revisions if r.id == stored.revision), 0)
        for revision in revisions:
            if revision.id != stored.revision and revision.created_unix_ns <= current:
                return revision.id
        raise ConflictError(f"{stored.name!r} has no earlier revision", where=f"deployment {stored.name}")

    async def _revisions(self, request: web.Request) -> web.Response:
        key = key_of(request)
        self._entry(key)
        found = await self._state.list_revisions(*key)
        entry = self._entry(key)
        weights = {each.revision: each.weight for each in rollouts.weights(self._loop.world, key)}
        if not weights:
            weights = {entry.revision.id: 1.0}
        rejected = {
            past.candidate: f"{past.phase}: {past.reason}"
            for past in reversed(entry.deployment.rollouts)
            if past.phase is not RolloutPhase.DONE
        }
        views = []
        for revision in found:
            replicas = [r for _, r in self._loop.world.replicas_of(key) if r.revision == revision.id]
            views.append(
                RevisionView(
                    id=revision.id,
                    created_unix_ns=revision.created_unix_ns,
                    manifest=revision.code.manifest,
                    weight=weights.get(revision.id, 0.0),
                    ready=sum(1 for r in replicas if r.state is ReplicaState.READY and not r.draining),
                    replicas=len(replicas),
                    note=rejected.get(revision.id, "") if revision.id not in weights else "",
                )
            )
        return answer(views)

    def _view(self, key: DeploymentKey) -> RolloutView:
        entry = self._entry(key)
        deployment = entry.deployment
        rivals: tuple[Rival, ...] = ()
        if deployment.rollout is not None:
            new, old = rollouts.samples(self._loop.world, key, deployment.rollout)
            rivals = tuple(
                Rival(
                    revision=weight.revision,
                    role=weight.role,
                    weight=weight.weight,
                    done=sample.done,
                    failed=sample.failed,
                    p95_s=rollout.quantile_s(sample.latency, 0.95),
                )
                for weight, sample in zip(rollouts.weights(self._loop.world, key), (old, new), strict=False)
            )
        return RolloutView(
            deployment=key[1],
            revision=deployment.revision,
            summary=rollouts.summary(deployment),
            active=deployment.rollout,
            ended=deployment.rollouts,
            revisions=rivals,
        )

    def _entry(self, key: DeploymentKey) -> DeploymentEntry:
        entry = self._loop.world.deployments.get(key)
        if entry is None:
            raise unknown_deployment(key[1])
        return entry


def _aborted(active: Rollout, now_unix_ns: int) -> Rollout:
    return rollout.ended(active, RolloutPhase.ABORTED, "aborted by hand", now_unix_ns)


def _paused(active: Rollout, _now_unix_ns: int) -> Rollout:
    return msgspec.structs.replace(active, paused=True)


def _resumed(active: Rollout, _now_unix_ns: int) -> Rollout:
    return msgspec.structs.replace(active, paused=False)


CHANGES: dict[str, Change] = {
    "promote": rollout.promoted,
    "abort": _aborted,
    "pause": _paused,
    "resume": _resumed,
}
