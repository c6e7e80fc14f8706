"""Stand-ins for other deployments, in tests: `with sd.stub(embed=FakeEmbed()):`.

A stand-in is called as the platform would call it: requests are checked against its signatures, answers go through
JSON, its errors become the caller's. So a test of one service sees what a change of the other would break.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import anyio
import anyio.abc
import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal

from snowdrop.domain.calling import OutgoingCall, get_transport, set_transport
from snowdrop.domain.errors import InvalidInputError, NotFoundError, ReplicaDiedError, TimedOutError, TooLargeError
from snowdrop.domain.signature import encode_json
from snowdrop.replica.app import ServiceApp
from snowdrop.sdk.schema import complete_spec, spec_of

CHUNKS_AHEAD_MAX = 16

T = TypeVar("T")
Message = MutableMapping[str, Any]
Asgi = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]


@contextmanager
def stub(deployments: Mapping[str, object] | None = None, /, **named: object) -> Iterator[None]:
    """Calls of this process go to stand-ins while inside.

    A stand-in is an instance of a service class (its `startup` does not run), such a class (made without
    arguments), or a function `(path, body) -> answer`, `async` or not. Names with hyphens go into the mapping.
    """
    apps = {name: _app(name, given) for name, given in {**(deployments or {}), **named}.items()}
    before = get_transport()
    with start_blocking_portal() as portal:
        set_transport(AppTransport(apps, portal))
        try:
            yield
        finally:
            set_transport(before)


def _app(name: str, given: object) -> Asgi:
    cls = given if isinstance(given, type) else type(given)
    spec = spec_of(cls)
    if spec is not None:
        app = ServiceApp(cls, complete_spec(cls, spec))
        app.adopt(cls() if isinstance(given, type) else given)
        return app.asgi
    if callable(given):
        return _Function(given)
    raise InvalidInputError(
        f"{given!r} can't stand in for {name!r}",
        where=f"stub({name}=...)",
        next_step="give an instance of a service class, or a function (path, body) -> answer",
    )


class _Function:
    """A function as an app."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        body = (await receive())["body"]
        answer = self._function(scope["path"], msgspec.json.decode(body) if body else None)
        if inspect.isawaitable(answer):
            answer = await answer
        octets = isinstance(answer, bytes)
        kind = b"application/octet-stream" if octets else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": answer if octets else encode_json(answer)})


class AppReply:
    """Implements Reply over an app's messages."""

    def __init__(self, start: Message, chunks: AsyncIterator[bytes]) -> None:
        self.status: int = start["status"]
        self._start = start
        self._chunks = chunks

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in self._start["headers"]}

    async def read(self, bytes_max: int) -> bytes:
        body = b"".join([chunk async for chunk in self._chunks])
        if len(body) > bytes_max:
            raise TooLargeError("the answer is too large", where=f"answer_bytes_max={bytes_max}")
        return body

    def chunks(self) -> AsyncIterator[bytes]:
        return self._chunks


class AppTransport:
    """Implements Transport with apps in this process."""

    def __init__(self, apps: Mapping[str, Asgi], portal: BlockingPortal) -> None:
        self._apps = apps
        self._portal = portal

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        async def run() -> T:
            return await work

        return self._portal.start_task_soon(run)

    @asynccontextmanager
    async def send(self, call: OutgoingCall) -> AsyncIterator[AppReply]:
        app = self._apps.get(call.deployment)
        if app is None:
            raise NotFoundError(
                f"there is no stand-in for {call.deployment!r}",
                where="stub",
                next_step=f"it knows: {', '.join(sorted(self._apps)) or 'none'}",
            )
        failure: BaseException | None = None
        put, got = anyio.create_memory_object_stream[Message](CHUNKS_AHEAD_MAX)
        with got, anyio.move_on_after(call.timeout_s) as bound:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_serve, app, call, put)
                try:
                    yield AppReply(await _next(got), _body(got))
                except anyio.get_cancelled_exc_class():
                    raise
                except BaseException as error:  # noqa: BLE001 -- raised below: from here it would come in a group
                    failure = error
                tasks.cancel_scope.cancel()
        if bound.cancelled_caught:
            raise TimedOutError("no full answer in time", where=f"timeout_s={call.timeout_s:.3g}")
        if failure is not None:
            raise failure


async def _serve(app: Asgi, call: OutgoingCall, put: "anyio.abc.ObjectSendStream[Message]") -> None:
    path, _, query = call.path.partition("?")
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in call.headers.items()]
    scope = {
        "type": "http",
        "method": call.method,
        "path": path,
        "query_string": query.encode(),
        "headers": headers,
    }
    requests: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if requests:
            return requests.pop()
        await anyio.sleep_forever()
        raise AssertionError("a sleep without end has ended")

    async with put:
        await app(scope, receive, put.send)


async def _next(got: "anyio.abc.ObjectReceiveStream[Message]") -> Message:
    try:
        return await got.receive()
    except anyio.EndOfStream:
        raise ReplicaDiedError("the stand-in ended without an answer", where="stub") from None


async def _body(got: "anyio.abc.ObjectReceiveStream[Message]") -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await _next(got)
        more = message.get("more_body", False)
        if message.get("body"):
            yield message["body"]
