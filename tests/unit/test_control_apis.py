"""Secrets, volumes and rollbacks by control's API: whose they are, what a body may be, what is checked first."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp import web

from platform_helpers import KEY, NAME, deployment, revision
from snowdrop.control.deploying import Deploying
from snowdrop.control.http import typed_errors
from snowdrop.control.loop import ControlLoop
from snowdrop.control.recorder import Recorder
from snowdrop.control.rollout_api import RolloutApi
from snowdrop.control.secrets import Secrets
from snowdrop.control.secrets_api import SecretsApi
from snowdrop.control.volumes import Volumes
from snowdrop.control.volumes_api import VolumesApi
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.settings import AgentSettings
from snowdrop.domain.volume import Volume
from snowdrop.state.memory import MemoryState
from snowdrop.wire.api import TENANT_HEADER
from snowdrop.wire.http import serving_unix

pytestmark = pytest.mark.anyio
VALUE = "hf_s3cr3t-value"
OLD, NEW = RevisionId("rev-0"), RevisionId("rev-1")


class NoRoots:
    """Nothing is published here."""

    def __init__(self) -> None:
        self.changing = anyio.Lock()


class Bench:
    def __init__(self, loop: ControlLoop, session: aiohttp.ClientSession) -> None:
        self.loop = loop
        self._session = session

    async def send(
        self, method: str, path: str, body: object = None, *, tenant: str = "default"
    ) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else None
        given: dict[str, Any] = {"data": data} if data is not None else {"json": body}
        headers = {TENANT_HEADER: tenant}
        async with self._session.request(method, f"http://control/v1/{path}", headers=headers, **given) as told:
            return told.status, await told.json() if told.status != 204 else None


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    state = MemoryState()
    loop = ControlLoop(state, Recorder(), tick_s=0.5)
    loop.secrets = await Secrets.open(state, tmp_path / "keys", loop.world)
    loop.volumes = Volumes(state, tmp_path / "volumes", AgentSettings(), loop.world)
    cache = Volume(target="/data", name="cache")
    await state.put_revision(revision(OLD, secrets={"TOKEN": "token"}, volumes=(cache,)))
    await state.put_revision(revision(NEW, created=2))
    await state.put_deployment(deployment(revision=NEW), expected_generation=0)
    await loop.load()
    app = web.Application(middlewares=[typed_errors])
    app.add_routes(RolloutApi(loop, Deploying(loop, NoRoots())).routes())  # type: ignore[arg-type]
    app.add_routes([*SecretsApi(loop, loop.secrets).routes(), *VolumesApi(loop.volumes).routes()])
    socket_path = tmp_path / "c.sock"
    async with (
        serving_unix(app, socket_path),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket_path))) as http,
    ):
        yield Bench(loop, http)


async def test_nothing_is_rolled_back_to_a_revision_whose_secret_or_volume_is_gone(bench: Bench) -> None:
    status, told = await bench.send("POST", f"deployments/{NAME}/rollback", {"revision": OLD})
    assert (status, told["error"]["message"]) == (404, "there is no secret 'token'")
    assert (await bench.send("PUT", "secrets/token", {"value": VALUE}))[0] == 201
    status, told = await bench.send("POST", f"deployments/{NAME}/rollback", {"revision": OLD})
    assert (status, told["error"]["message"]) == (404, "there is no volume 'cache'")
    assert bench.loop.world.deployments[KEY].deployment.rollout is None
    assert (await bench.send("POST", "volumes/cache", {}))[0] == 201
    status, told = await bench.send("POST", f"deployments/{NAME}/rollback", {"revision": OLD})
    assert (status, told["active"]["candidate"]) == (200, OLD)
    for path in ("secrets/token", "volumes/cache"):
        status, told = await bench.send("DELETE", path)
        assert (status, told["error"]["where"]) == (409, f"deployment {NAME}")


async def test_each_tenant_sees_and_removes_its_own(bench: Bench) -> None:
    await bench.send("PUT", "secrets/mine", {"value": VALUE})
    await bench.send("POST", "volumes/mine", {})
    for kind in ("secrets", "volumes"):
        assert await bench.send("GET", kind, tenant="other") == (200, [])
        assert (await bench.send("DELETE", f"{kind}/mine", tenant="other"))[0] == 404
        assert (await bench.send("DELETE", f"{kind}/mine"))[0] == 204
        assert (await bench.send("DELETE", f"{kind}/mine"))[0] == 404
    assert (await bench.send("GET", f"deployments/{NAME}/rollout", tenant="other"))[0] == 404


async def test_a_bad_body_is_told_of_but_a_secret_one_is_not_quoted(bench: Bench) -> None:
    wrong = f'{{"value": ["{VALUE}"], "{VALUE}": 1'.encode()
    status, told = await bench.send("PUT", "secrets/mine", wrong)
    assert (status, told["error"]["message"]) == (422, "bad request body")
    assert VALUE not in str(told)
    status, told = await bench.send("POST", "volumes/mine", {"size_bytes_max": "much"})
    assert status == 422
    assert "size_bytes_max" in told["error"]["message"]


async def test_a_secret_of_a_crash_looping_service_is_tried_at_once(bench: Bench) -> None:
    await bench.send("PUT", "secrets/token", {"value": VALUE})
    await bench.send("POST", "volumes/cache", {})
    await bench.send("POST", f"deployments/{NAME}/rollback", {"revision": OLD})
    bench.loop._dirty.clear()
    status, told = await bench.send("PUT", "secrets/token", {"value": VALUE + "2"})
    assert (status, told["version"], told["used_by"]) == (201, 2, [NAME])
    assert KEY in bench.loop._dirty
