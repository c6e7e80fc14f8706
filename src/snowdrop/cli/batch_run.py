"""Runs the lines of a batch through a gateway: as many at once as the deployment offers, with retries."""

from __future__ import annotations

import base64
import math
import ssl
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import aiohttp
import anyio
import msgspec

from snowdrop.cli.batch_files import Journal, Line
from snowdrop.domain.errors import (
    InvalidInputError,
    NotFoundError,
    PlatformDownError,
    SnowdropError,
    UnauthorisedError,
    error_from_body,
)
from snowdrop.policy.batch import AT_ONCE_FIRST, at_once
from snowdrop.policy.tasks import may_help, pause_s
from snowdrop.wire.api import ApiError

LOOK_S = 2.0
LOOK_S_MAX = 5.0
CONNECT_S_MAX = 10.0
REFUSED = frozenset({429, 503})
_spread = Random()  # noqa: S311 -- spreads pauses


class BatchTarget(msgspec.Struct, frozen=True, kw_only=True):
    """Where lines go. `timeout_s` bounds one attempt, waiting for a replica included."""

    gateway_url: str
    deployment: str
    endpoint: str
    key: str | None
    retries: int
    most: int
    timeout_s: float


class Batch:
    """One run. `told` is called after each line with whether it went well."""

    def __init__(self, target: BatchTarget, journal: Journal, told: Callable[[bool], None]) -> None:
        self._target = target
        self._journal = journal
        self._told = told
        self._refused = False
        self._limit = anyio.CapacityLimiter(min(AT_ONCE_FIRST, target.most))
        self._failure: SnowdropError | None = None

    @property
    def at_once(self) -> int:
        """Lines that may be under way now."""
        return int(self._limit.total_tokens)

    async def run(self, lines: Iterable[Line]) -> None:
        """Every line that the journal does not have. Raises what makes all further lines pointless."""
        async with self._session() as session, anyio.create_task_group() as beside:
            beside.start_soon(self._follow, session)
            async with anyio.create_task_group() as running:
                for line in lines:
                    if line.number in self._journal.done:
                        continue
                    if self._failure is not None:
                        break
                    await self._limit.acquire_on_behalf_of(line.number)
                    running.start_soon(self._one, session, line)
            beside.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _session(self) -> aiohttp.ClientSession:
        headers = {"user-agent": "snowdrop-batch"}
        if self._target.key:
            headers["authorization"] = f"Bearer {self._target.key}"
        timeout = aiohttp.ClientTimeout(total=self._target.timeout_s, sock_connect=CONNECT_S_MAX)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=ssl.create_default_context()),
            headers=headers,
            timeout=timeout,
        )

    async def _follow(self, session: aiohttp.ClientSession) -> None:
        """Keeps the bound at what the deployment offers, for ever."""
        while True:
            await anyio.sleep(LOOK_S)
            slots = await self._slots(session)
            refused, self._refused = self._refused, False
            before = int(self._limit.total_tokens)
            self._limit.total_tokens = at_once(before, slots=slots, refused=refused, most=self._target.most)

    async def _slots(self, session: aiohttp.ClientSession) -> int | None:
        url = f"{self._target.gateway_url}/{self._target.deployment}/readyz"
        try:
            async with session.get(url, timeout=aiohttp.ClientTimeout(total=LOOK_S_MAX)) as answer:
                found = msgspec.json.decode(await answer.read(), type=dict[str, Any]).get("slots")
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            return None
        return found if isinstance(found, int) else None

    async def _one(self, session: aiohttp.ClientSession, line: Line) -> None:
        try:
            ok, out = (False, _problem(line)) if line.problem else await self._asked(session, line)
            if self._failure is None:
                self._journal.add(line.number, out, ok=ok)
                self._told(ok)
        finally:
            self._limit.release_on_behalf_of(line.number)

    async def _asked(self, session: aiohttp.ClientSession, line: Line) -> tuple[bool, dict[str, Any]]:
        """Whether it went well, and the line of the result."""
        url = f"{self._target.gateway_url}/{self._target.deployment}{line.path or self._target.endpoint}"
        attempt = 0
        while True:
            attempt += 1
            wait_s: float | None = None
            try:
                async with session.request(
                    line.method, url, data=line.body, headers={"content-type": "application/json"}
                ) as answer:
                    data = await answer.read()
                    status, request_id = answer.status, answer.headers.get("x-request-id", "")
                    wait_s = _seconds(answer.headers.get("retry-after"))
                self._refused |= status in REFUSED
                if status < 400 or not may_help(status) or attempt > self._target.retries:
                    self._judge(status, data)
                    return 200 <= status < 300, _answered(line, status, request_id, data)
            except (aiohttp.ClientError, TimeoutError) as error:
                if attempt > self._target.retries:
                    return False, _unanswered(line, error)
            await anyio.sleep(pause_s(attempt, draw=_spread.random(), retry_after_s=wait_s))

    def _judge(self, status: int, data: bytes) -> None:
        """A key that is not taken, or a deployment that is not there, will be so for every line."""
        if status not in {401, 404}:
            return
        try:
            error = error_from_body(msgspec.json.decode(data, type=ApiError).error)
        except msgspec.DecodeError:
            return
        deployment_missing = isinstance(error, NotFoundError) and "no deployment" in error.message
        if isinstance(error, UnauthorisedError) or deployment_missing:
            self._failure = error


async def find_endpoint(gateway_url: str, deployment: str, key: str | None) -> str:
    """The only endpoint of a deployment; wakes it. Raises InvalidInputError if there are several."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    url = f"{gateway_url}/{deployment}/-/openapi.json"
    try:
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as answer:
            data = await answer.read()
            if answer.status != 200:
                raise error_from_body(msgspec.json.decode(data, type=ApiError).error)
            paths = msgspec.json.decode(data, type=dict[str, Any]).get("paths", {})
    except aiohttp.ClientError as error:
        raise PlatformDownError(
            f"the gateway does not answer: {error}", where=gateway_url, next_step="is the platform up?"
        ) from error
    except msgspec.DecodeError as error:
        raise InvalidInputError(
            "the deployment does not describe itself", where=url, next_step="name the --endpoint"
        ) from error
    found = [path for path, methods in paths.items() if "post" in methods and not path.startswith("/-/")]
    if len(found) != 1:
        raise InvalidInputError(
            f"{deployment!r} has {len(found)} endpoints: {', '.join(found[:10])}",
            where="endpoint",
            next_step="name one with --endpoint",
        )
    return str(found[0])


def _answered(line: Line, status: int, request_id: str, data: bytes) -> dict[str, Any]:
    body = _value(data)
    if line.is_openai:
        response = {"status_code": status, "request_id": request_id, "body": body}
        return {**_openai(line), "response": response, "error": None}
    good = status < 400
    error = None if good else (body.get("error", body) if isinstance(body, dict) else body)
    return {"line": line.number, "status_code": status, "output": body if good else None, "error": error}


def _unanswered(line: Line, error: Exception) -> dict[str, Any]:
    told = {"code": "no_answer", "message": str(error) or type(error).__name__}
    if line.is_openai:
        return {**_openai(line), "response": None, "error": told}
    return {"line": line.number, "status_code": None, "output": None, "error": told}


def _problem(line: Line) -> dict[str, Any]:
    told = {"code": "invalid_line", "message": line.problem}
    if line.is_openai:
        return {**_openai(line), "response": None, "error": told}
    return {"line": line.number, "status_code": None, "output": None, "error": told}


def _openai(line: Line) -> dict[str, Any]:
    return {"id": f"batch_req_{line.number}", "custom_id": line.custom_id}


def _value(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError:
        pass
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _seconds(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
