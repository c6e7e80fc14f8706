"""A service class as an ASGI app: dispatch by path, validation, bounded calls, streams, cancellation.

Walk: `ServiceApp.asgi` -> find the endpoint -> read and decode -> a slot -> call -> answer. A caller that goes
away cancels the work; a handler in a thread can't be interrupted and keeps its slot until it returns.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qsl

import anyio
import msgspec

from snowdrop.domain.batched import client_signature
from snowdrop.domain.calling import CALL_CONTEXT
from snowdrop.domain.cancel import CANCEL_FLAG
from snowdrop.domain.errors import InvalidInputError, MethodNotAllowedError, NotFoundError, SnowdropError
from snowdrop.domain.openapi import openapi_document
from snowdrop.domain.servers import OPENAI_PATHS
from snowdrop.domain.service import ServiceSpec
from snowdrop.domain.signature import RequestDecoder, encode_json
from snowdrop.replica.batching import Batcher
from snowdrop.replica.call import DONE, Decoder, Endpoint, Items, Raised, stage
from snowdrop.replica.exchange import JSON, OCTETS, Disconnected, Exchange, Refused, octets
from snowdrop.replica.gate import Gate
from snowdrop.replica.openai import Asked, BodyDecoder, respond
from snowdrop.replica.servable import Receive, Scope, Send
from snowdrop.replica.userfault import request_error

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel

OPENAPI_PATH = "/-/openapi.json"
STATS_PATH = "/-/stats"
ALLOWED_METHODS = "GET, POST"
QUERY_FIELDS_MAX = 1_000

T = TypeVar("T")


def build_service(service_class: type, spec: ServiceSpec) -> ServiceApp:
    """The app for `service_class`, not instantiated yet. Raises InvalidInputError for unusable signatures."""
    return ServiceApp(service_class, spec)


class ServiceApp:
    """Serves one instance of a service class. `start` before the first request, `shutdown` after the last.

    Both raise what the service's own code raises, SystemExit included.
    """

    has_websockets = False

    def __init__(self, service_class: type, spec: ServiceSpec) -> None:
        self._class = service_class
        self._spec = spec
        self._running: set[Callable[[], None]] = set()
        self._cut: SnowdropError | None = None
        self._endpoints: dict[str, Endpoint] = {}
        for endpoint in spec.endpoints:
            where = f"{spec.class_name}.{endpoint.method_name}"
            function = getattr(service_class, endpoint.method_name, None)
            if function is None:
                raise InvalidInputError(f"{where} does not exist", where=spec.entry, next_step="deploy again")
            signature = client_signature(function, where, endpoint.batch)
            decoder = BodyDecoder if endpoint.path in OPENAI_PATHS else RequestDecoder
            self._endpoints[endpoint.path] = Endpoint(endpoint.path, signature, decoder(signature))
        self._method_names = {endpoint.path: endpoint.method_name for endpoint in spec.endpoints}
        self._batchers: dict[str, Batcher] = {}

    async def start(self, models: dict[str, LoadedModel]) -> None:
        """Makes the instance and runs its startup stage; `models` by parameter name."""
        self._gate = Gate(self._spec.concurrency, waiting_max=self._spec.concurrency)
        self._threads = anyio.CapacityLimiter(self._spec.concurrency)
        self._instance: object = await _own_error(stage(self._class, {}))
        if self._spec.startup_name is not None:
            await _own_error(stage(getattr(self._instance, self._spec.startup_name), models))
        self._open_batchers()

    def _open_batchers(self) -> None:
        for each in self._spec.endpoints:
            if each.batch is not None:
                call = partial(self._call, self._endpoints[each.path])
                self._batchers[each.path] = Batcher(
                    each.batch, call, f"{self._spec.class_name}.{each.method_name}"
                )

    async def live(self) -> int:
        """A class has no life of its own beside its calls."""
        await anyio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    def adopt(self, instance: object) -> None:
        """Serves an instance that was made elsewhere, without its startup stage: for stand-ins in tests."""
        self._gate = Gate(self._spec.concurrency, waiting_max=self._spec.concurrency)
        self._threads = anyio.CapacityLimiter(self._spec.concurrency)
        self._instance = instance
        self._open_batchers()

    def cut(self, error: SnowdropError) -> None:
        """Cancels every call and answers it with `error`; a thread sees `cancelled()` and is waited for."""
        self._cut = error
        for end in tuple(self._running):
            end()

    async def shutdown(self) -> None:
        """Runs the shutdown stage. To be called when no request is in flight any more."""
        if self._spec.shutdown_name is not None:
            await _own_error(stage(getattr(self._instance, self._spec.shutdown_name), {}))

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers HTTP; every error becomes a typed answer. Other scopes (lifespan, websocket) are refused."""
        if scope["type"] != "http":
            raise NotImplementedError(f"ASGI scope {scope['type']!r}")
        exchange = Exchange(scope, receive, send)
        try:
            await self._dispatch(exchange)
        except Disconnected:
            return
        except Refused as refused:
            await exchange.refuse(refused.error, headers=refused.headers)
        except Raised as raised:
            await exchange.refuse(request_error(raised.cause, exchange.path, exchange.request_id))
        except SnowdropError as error:
            await exchange.refuse(error)

    async def _dispatch(self, exchange: Exchange) -> None:
        if exchange.path == STATS_PATH:
            await exchange.answer(encode_json(self._stats()))
            return
        if exchange.path == OPENAPI_PATH:
            await exchange.answer(encode_json(openapi_document(self._spec)))
            return
        endpoint = self._endpoints.get(exchange.path)
        if endpoint is None:
            known = ", ".join(self._endpoints) or "no endpoint"
            raise NotFoundError(
                f"no endpoint {exchange.path!r}", where=exchange.path, next_step=f"this service has: {known}"
            )
        if exchange.method not in {"GET", "POST"}:
            error = MethodNotAllowedError(
                f"{exchange.method} is not allowed",
                where=exchange.path,
                next_step="send POST with a JSON object, or GET with a query string",
            )
            raise Refused(error, {"allow": ALLOWED_METHODS})
        exchange.speaks_openai = isinstance(endpoint.decoder, BodyDecoder)
        with self._gate.admission():
            body = await exchange.body()
            arguments = _decode(endpoint.decoder, exchange, body)
            if isinstance(endpoint.decoder, BodyDecoder):
                run = partial(self._respond, exchange, endpoint, arguments, endpoint.decoder.asked(body))
            else:
                run = partial(self._run, exchange, endpoint, arguments)
            await self._run_watched(exchange, run)

    async def _run_watched(self, exchange: Exchange, run: Callable[[], Awaitable[None]]) -> None:
        """Runs the call; cancels it when its caller goes away or `cut` ends it. Raises what the call raises."""
        ended = threading.Event()
        failure: Raised | SnowdropError | None = None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await exchange.disconnected()
                end()

            def end() -> None:
                ended.set()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            flag = CANCEL_FLAG.set(ended)
            context = CALL_CONTEXT.set(exchange.context())
            self._running.add(end)
            try:
                async with self._gate.slot():
                    await run()
            except (Raised, SnowdropError) as error:
                failure = error  # raised below: out of a task group it would come wrapped
            finally:
                self._running.discard(end)
                CANCEL_FLAG.reset(flag)
                CALL_CONTEXT.reset(context)
                group.cancel_scope.cancel()
        if ended.is_set():
            failure = self._cut  # None where the caller has gone
        if failure is not None:
            raise failure

    def _stats(self) -> dict[str, object]:
        batches = {path: batcher.stats for path, batcher in self._batchers.items()}
        return {**msgspec.structs.asdict(self._gate.stats()), **({"batches": batches} if batches else {})}

    async def _call(self, endpoint: Endpoint, arguments: dict[str, Any]) -> object:
        method = getattr(self._instance, self._method_names[endpoint.path])
        return await endpoint.call(method, arguments, self._threads)

    async def _respond(
        self, exchange: Exchange, endpoint: Endpoint, arguments: dict[str, Any], asked: Asked
    ) -> None:
        """Answers in OpenAI's dialect."""
        method = getattr(self._instance, self._method_names[endpoint.path])
        call = partial(self._value, endpoint, arguments) if endpoint.signature.stream == "no" else None
        await respond(exchange, asked, call, partial(endpoint.open, method, arguments, self._threads))

    async def _value(self, endpoint: Endpoint, arguments: dict[str, Any]) -> object:
        """What the method returns, perhaps called once for several requests."""
        batcher = self._batchers.get(endpoint.path)
        return await (batcher.submit(arguments) if batcher is not None else self._call(endpoint, arguments))

    async def _run(self, exchange: Exchange, endpoint: Endpoint, arguments: dict[str, Any]) -> None:
        method = getattr(self._instance, self._method_names[endpoint.path])
        if endpoint.signature.stream != "no":
            items = await endpoint.open(method, arguments, self._threads)
            try:
                await _stream(exchange, endpoint, items)
            finally:
                await items.close()
            return
        value = await self._value(endpoint, arguments)
        is_octets = endpoint.signature.returns is bytes
        try:
            body = octets(value) if is_octets else encode_json(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise Raised(error) from error
        await exchange.answer(body, content_type=OCTETS if is_octets else JSON)


async def _own_error(call: Awaitable[T]) -> T:
    """`call`'s result, or the exception of user code itself instead of its carrier."""
    try:
        return await call
    except Raised as raised:
        cause = raised.cause
    if isinstance(cause, StopIteration):  # would end this coroutine as if it had returned
        cause = RuntimeError("StopIteration was raised").with_traceback(cause.__traceback__)
    raise cause


def _decode(decoder: Decoder, exchange: Exchange, body: bytes) -> dict[str, Any]:
    if exchange.method == "POST":
        encoding = exchange.headers.get("content-encoding", "").strip().lower()
        if encoding not in {"", "identity"}:
            raise InvalidInputError(
                f"bodies are not unpacked here, and this one is {encoding[:32]!r}",
                where="header content-encoding",
                next_step="send it uncompressed",
            )
        return decoder.from_body(body)
    try:
        pairs = parse_qsl(exchange.query.decode("utf-8"), keep_blank_values=True, max_num_fields=QUERY_FIELDS_MAX)
    except ValueError as error:
        raise InvalidInputError(f"unusable query string: {error}", where="query string") from error
    return decoder.from_query(pairs)


async def _stream(exchange: Exchange, endpoint: Endpoint, items: Items) -> None:
    """Writes items as they come. The first one exists before the headers go, so that an early failure is a 500."""
    form = exchange.stream_form(endpoint.signature.stream)
    while (item := await items.next()) is not DONE:
        try:
            chunk = form.item(item)
        except (TypeError, ValueError, OverflowError) as error:
            raise Raised(error) from error
        if not exchange.has_begun:
            await exchange.begin_stream(form)
        await exchange.write(chunk)
    if not exchange.has_begun:
        await exchange.begin_stream(form)
    await exchange.write(b"", more=False)
