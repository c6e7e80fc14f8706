"""What control asks an agent for over HTTP, on a unix socket: logs, as newline-delimited JSON."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import msgspec
from aiohttp import web
from anyio.streams.memory import MemoryObjectSendStream

from snowdrop.agent.context import log_folder
from snowdrop.agent.logs import LogLine, follow, read
from snowdrop.agent.store_api import Plane, add_store_routes
from snowdrop.domain.errors import InvalidInputError
from snowdrop.wire.api import ReplicaLine

FOLLOWED_MAX = 32
NEW_LOG_POLL_S = 0.3
LINES_BUFFERED_MAX = 1_000
TAIL_LINES_MAX = 100_000
TAIL_DIGITS_MAX = 9
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def build_agent_api(logs: Path, is_living: Callable[[str], bool], plane: Plane | None = None) -> web.Application:
    """`GET /logs/{tenant}/{deployment}?tail=N&follow=0|1&replica=ID`, and `/store/...` with the data plane."""

    async def get_logs(request: web.Request) -> web.StreamResponse:
        try:
            folder = _folder(logs, request.match_info["tenant"], request.match_info["deployment"])
            tail = _tail(request.query.get("tail", "100"))
        except InvalidInputError as error:
            return web.json_response({"error": msgspec.to_builtins(error.body())}, status=error.http_status)
        only = request.query.get("replica")
        answer = web.StreamResponse(headers={"content-type": "application/x-ndjson"})
        await answer.prepare(request)
        if request.query.get("follow") != "1":
            for line in await anyio.to_thread.run_sync(_read_all, folder, only, tail):
                await answer.write(msgspec.json.encode(line) + b"\n")
        else:
            await _follow_all(answer, folder, only, tail, is_living)
        await answer.write_eof()
        return answer

    app = web.Application()
    app.router.add_get("/logs/{tenant}/{deployment}", get_logs)
    if plane is not None:
        add_store_routes(app, plane)
    return app


def _folder(logs: Path, tenant: str, deployment: str) -> Path:
    for text in (tenant, deployment):
        if not _NAME.fullmatch(text):
            raise InvalidInputError(f"{text[:80]!r} is not a name", where="path", next_step="see `snowdrop ps`")
    return log_folder(logs, tenant, deployment)


def _tail(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise InvalidInputError(
            f"{text[:20]!r} is not a number of lines", where="tail", next_step=f"0 to {TAIL_LINES_MAX}"
        )
    return min(int(text[:TAIL_DIGITS_MAX]), TAIL_LINES_MAX)


def _paths(folder: Path, only: str | None) -> list[Path]:
    found = [path for path in folder.glob("*.log") if only in {None, path.stem}]
    return sorted(found, key=_changed_s)[-FOLLOWED_MAX:]


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # removed meanwhile, to keep the number of logs bounded
        return 0.0


def _read_all(folder: Path, only: str | None, tail: int) -> list[ReplicaLine]:
    """The last lines of all logs together, in the order of their times."""
    lines = [_named(path, line) for path in _paths(folder, only) for line in read(path, tail)]
    return sorted(lines, key=lambda line: line.unix_ms)[-tail:] if tail else []


async def _follow_all(
    answer: web.StreamResponse, folder: Path, only: str | None, tail: int, is_living: Callable[[str], bool]
) -> None:
    """The last lines of all logs, then each new one, also of replicas that start later, until the client goes."""
    send, lines = anyio.create_memory_object_stream[ReplicaLine](LINES_BUFFERED_MAX)

    async def follow_one(path: Path, first: int, output: MemoryObjectSendStream[ReplicaLine]) -> None:
        async for line in follow(path, tail_lines=first, ended=lambda: not is_living(path.stem)):
            await output.send(_named(path, line))

    async def find_new(output: MemoryObjectSendStream[ReplicaLine]) -> None:
        known: set[Path] = set()
        first = tail
        while True:
            for path in _paths(folder, only):
                if path not in known:
                    known.add(path)
                    tasks.start_soon(follow_one, path, first, output)
            first = TAIL_LINES_MAX  # a log that appears while we look is new from its first line
            await anyio.sleep(NEW_LOG_POLL_S)

    async with anyio.create_task_group() as tasks, send, lines:
        tasks.start_soon(find_new, send)
        async for line in lines:
            await answer.write(msgspec.json.encode(line) + b"\n")


def _named(path: Path, line: LogLine) -> ReplicaLine:
    return ReplicaLine(replica=path.stem, unix_ms=line.unix_ms, stream=line.stream, text=line.text)
