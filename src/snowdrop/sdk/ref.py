"""`sd.ref("embed")`: another deployment of the same tenant, to be called by name.

A call goes over the gateway like any request, so the other deployment starts if nothing of it runs, and its queue
and its limits hold. It carries on what the request it is made for has: the time that is left, its trace, its id.
Where the caller goes away, the call is cancelled.
"""

import queue
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, TypedDict, TypeVar, Unpack, overload

import msgspec

from snowdrop.domain.calling import (
    CALL_CONTEXT,
    DEADLINE_HEADER,
    LEASE_HEADER,
    CallContext,
    OutgoingCall,
    Reply,
    Transport,
    get_transport,
)
from snowdrop.domain.cancel import cancelled
from snowdrop.domain.errors import (
    CallFailedError,
    CallTimedOutError,
    CallUnavailableError,
    InvalidInputError,
    SnowdropError,
)
from snowdrop.domain.ids import parse_name
from snowdrop.domain.signature import encode_json
from snowdrop.sdk.events import events, failure, lines

CALL_S_MAX = 3_600.0
"""How long a call may take that belongs to no request, as one of `startup`."""
ANSWER_BYTES_MAX = 256 << 20
ERROR_BYTES_MAX = 1 << 20
POLL_S = 0.05
"""How often a thread that waits for a call looks whether its caller is still there."""
ITEMS_AHEAD_MAX = 16
"""Items of a stream that are fetched before the thread that reads it asks for them."""
EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"
JSON = "application/json"
OCTETS = "application/octet-stream"

T = TypeVar("T")
Decode = Callable[[bytes], Any]


class CallOptions(TypedDict, total=False):
    """Of every form of a call; `timeout_s` shortens what the caller's own time leaves."""

    method: str
    headers: Mapping[str, str] | None
    timeout_s: float | None


class Ref:
    """A deployment, by name.

    `await ref("/path", {...})` calls one of its endpoints, `ref.stream(...)` reads a stream; `ref.call(...)` and
    `ref.iterate(...)` are the same for code in threads.
    """

    def __init__(self, name: str) -> None:
        self.name = parse_name(name, what="deployment name")

    def __repr__(self) -> str:
        return f"sd.ref({self.name!r})"

    async def __call__(
        self,
        path: str,
        body: object = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """The answer of the endpoint: decoded JSON, or bytes for anything else.

        `body` becomes JSON; bytes are sent as they are. Options: `method` (POST), `headers`, `timeout_s`.
        Raises CallFailedError, CallUnavailableError or CallTimedOutError.
        """
        return await fetch(make_call(self.name, path, body, **options), msgspec.json.decode)

    def stream(
        self,
        path: str,
        body: object = None,
        **options: Unpack[CallOptions],
    ) -> AsyncIterator[Any]:
        """The items of a stream, decoded; pieces of bytes where it is one of bytes. Raises as a call does."""
        return items(self._streamed(path, body, options), msgspec.json.decode)

    def call(
        self,
        path: str,
        body: object = None,
        **options: Unpack[CallOptions],
    ) -> Any:
        """As a plain call, for a thread: waits for the answer."""
        call = make_call(self.name, path, body, **options)
        return blocking(lambda: fetch(call, msgspec.json.decode), call)

    def iterate(
        self,
        path: str,
        body: object = None,
        **options: Unpack[CallOptions],
    ) -> Iterator[Any]:
        """As `stream`, for a thread."""
        return blocking_items(self._streamed(path, body, options), msgspec.json.decode)

    def _streamed(self, path: str, body: object, options: CallOptions) -> OutgoingCall:
        accepting = {"accept": EVENT_STREAM, **(options.get("headers") or {})}
        options["headers"] = accepting
        return make_call(self.name, path, body, **options)


@overload
def ref(name: str) -> Ref: ...
@overload
def ref(name: str, service: type[T]) -> T: ...
def ref(name: str, service: type[Any] | None = None) -> Any:
    """Another deployment of the same tenant, by name. A service may call those that its class or module refers to.

    With `service`, a service class or a Protocol of one, it has that class's methods, typed: `async` ones are
    awaited, plain ones wait in a thread, those that stream are iterated. Raises InvalidInputError for a name that
    no deployment can have.
    """
    if service is None:
        return Ref(name)
    from snowdrop.sdk.typed import TypedRef  # noqa: PLC0415 -- reads signatures, which most services never ask for

    return TypedRef(name, service)


def name_of_ref(value: object) -> str | None:
    """The deployment that `value` is a reference of, plain or typed; None for anything else."""
    if isinstance(value, Ref):
        return value.name
    # Not by its class, which lives in a module that is only loaded where somebody uses it.
    name = vars(value).get("_snowdrop_name") if type(value).__name__ == "TypedRef" else None
    return name if isinstance(name, str) else None


def make_call(
    deployment: str,
    path: str,
    body: object,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> OutgoingCall:
    """The call with what it carries on from the running request. Raises InvalidInputError, CallTimedOutError."""
    if not path.startswith("/"):
        raise InvalidInputError(
            f"{path!r} is no path", where=f"call to {deployment}", next_step=f'write it with a slash: "/{path}"'
        )
    context = CALL_CONTEXT.get() or CallContext()
    left_s = _left_s(context, timeout_s)
    if left_s <= 0:
        raise CallTimedOutError(
            "the caller's time is over, so the call was not made",
            where=f"{deployment}{path}",
            next_step="allow the request more time, or do less before the call",
        )
    octets = isinstance(body, bytes | bytearray | memoryview)
    sent = {"content-type": OCTETS if octets else JSON} if method != "GET" else {}
    carried = {
        "x-request-id": context.request_id,
        "traceparent": context.traceparent,
        "tracestate": context.tracestate,
        LEASE_HEADER: context.lease,
        DEADLINE_HEADER: f"{time.time() + left_s:.3f}",
    }
    given = {name.lower(): value for name, value in (headers or {}).items()}
    if method == "GET":
        content = b""
    else:
        content = (
            bytes(body) if isinstance(body, bytes | bytearray | memoryview) else _encode(body, deployment, path)
        )
    return OutgoingCall(
        deployment=deployment,
        path=path,
        method=method,
        headers=sent | given | {name: value for name, value in carried.items() if value},
        body=content,
        timeout_s=left_s,
    )


def _encode(body: object, deployment: str, path: str) -> bytes:
    try:
        return encode_json({} if body is None else body)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"the body can't be sent as JSON: {error}",
            where=f"call to {deployment}{path}",
            next_step="send a dict, a dataclass or a msgspec.Struct, or bytes",
        ) from error


def _left_s(context: CallContext, timeout_s: float | None) -> float:
    left = [] if context.deadline_unix_s is None else [context.deadline_unix_s - time.time()]
    return min(left if timeout_s is None else [*left, timeout_s], default=CALL_S_MAX)


async def fetch(call: OutgoingCall, decode: Decode) -> Any:
    """The whole answer, decoded where it is JSON. Raises CallFailedError and its kin."""
    transport = _transport(call)
    try:
        async with transport.send(call) as reply:
            await _check(reply)
            body = await reply.read(ANSWER_BYTES_MAX)
            return decode(body) if _content_type(reply) == JSON else body
    except SnowdropError as error:
        raise wrapped(error, call) from error
    except msgspec.DecodeError as error:
        raise wrapped(SnowdropError(f"the answer does not fit: {error}", where="answer"), call) from error


async def items(call: OutgoingCall, decode: Decode) -> AsyncIterator[Any]:
    """The items of the answer as they come. An answer that is no stream is its only item."""
    transport = _transport(call)
    try:
        async with transport.send(call) as reply:
            await _check(reply)
            kind = _content_type(reply)
            if kind == EVENT_STREAM:
                async for data in events(reply.chunks()):
                    yield decode(data)
            elif kind == NDJSON:
                async for line in lines(reply.chunks()):
                    yield decode(line)
            elif kind == JSON:
                yield decode(await reply.read(ANSWER_BYTES_MAX))
            else:
                async for chunk in reply.chunks():
                    yield chunk
    except SnowdropError as error:
        raise wrapped(error, call) from error
    except msgspec.DecodeError as error:
        raise wrapped(SnowdropError(f"an item does not fit: {error}", where="answer"), call) from error


def wrapped(error: SnowdropError, call: OutgoingCall) -> CallFailedError:
    """`error` as the failure of a call: what the other service found wrong is not the fault of our own caller."""
    inner = error.body()
    kind: type[CallFailedError] = CallFailedError
    if error.http_status in {429, 503}:
        kind = CallUnavailableError
    elif error.http_status == CallTimedOutError.http_status:
        kind = CallTimedOutError
    place = f"{call.deployment}{call.path}"
    nested = isinstance(error, CallFailedError)
    failed = kind(
        error.message if nested else f"{call.deployment} failed: {inner.kind}: {error.message}",
        where=f"{place} > {error.where}" if error.where else place,
        next_step=error.next_step,
        retry_after_s=error.retry_after_s,
        fields=error.fields,
    )
    failed.error = inner
    return failed


def blocking(work: Callable[[], Coroutine[Any, Any, T]], call: OutgoingCall) -> T:
    """Runs `work` on the loop that carries calls and waits for it in this thread."""
    import asyncio  # noqa: PLC0415 -- `import snowdrop` does without

    transport = _transport(call)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise InvalidInputError(
            "a blocking call would hold up the event loop",
            where=f"call to {call.deployment}{call.path}",
            next_step="await it (`await ref(...)`, `await sd.acall(ref.method, ...)`), or write a plain `def`",
        )
    future = transport.submit(work())
    try:
        while True:
            try:
                return future.result(POLL_S)
            except TimeoutError:
                if future.done():
                    raise
                if cancelled():
                    raise CallFailedError(
                        "the caller has gone, so the call was cancelled", where=f"{call.deployment}{call.path}"
                    ) from None
    finally:
        future.cancel()


def blocking_items(call: OutgoingCall, decode: Decode) -> Iterator[Any]:
    """The items of a stream, in a thread; a bounded number of them is fetched ahead."""
    import asyncio  # noqa: PLC0415 -- `import snowdrop` does without

    got: queue.Queue[Any] = queue.Queue()  # bounded by `pump`
    end = object()

    async def pump() -> None:
        try:
            async for item in items(call, decode):
                got.put(item)
                while got.qsize() >= ITEMS_AHEAD_MAX:  # noqa: ASYNC110 -- the reader is in a thread
                    await asyncio.sleep(POLL_S)
        finally:
            got.put(end)

    transport = _transport(call)
    future = transport.submit(pump())
    try:
        while True:
            try:
                item = got.get(timeout=POLL_S)
            except queue.Empty:
                if cancelled():
                    return
                continue
            if item is end:
                break
            yield item
        future.result()
    finally:
        future.cancel()


def _transport(call: OutgoingCall) -> Transport:
    transport = get_transport()
    if transport is None:
        raise InvalidInputError(
            f"nothing carries calls to {call.deployment!r} here: this code runs neither on the platform nor in "
            "`snowdrop dev`",
            where=f"{call.deployment}{call.path}",
            next_step=f"in a test, put a stand-in in its place: `service.attribute = Fake()`, or "
            f"`with sd.stub({{{call.deployment!r}: Fake()}}):`",
        )
    return transport


async def _check(reply: Reply) -> None:
    """Raises the typed error of an answer that is one."""
    if reply.status < 400:
        return
    error = failure(await reply.read(ERROR_BYTES_MAX))
    if type(error) is SnowdropError:
        error = _AnsweredError(
            f"status {reply.status}: {error.message}", where=error.where, next_step=error.next_step
        )
        error.status = reply.status
    raise error


class _AnsweredError(SnowdropError):
    """An error that is not in the platform's own form, as any server may answer it."""

    status = 500

    @property
    def http_status(self) -> int:  # type: ignore[override]
        return self.status


def _content_type(reply: Reply) -> str:
    return reply.headers.get("content-type", "").partition(";")[0].strip().lower()
