"""A service that is an ASGI app: its lifespan is the startup stage, its models are in the lifespan's state."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from snowdrop.domain.calling import CALL_CONTEXT
from snowdrop.domain.errors import UserCodeError
from snowdrop.domain.servers import AsgiSpec
from snowdrop.domain.service import ServiceSpec
from snowdrop.replica.bounded import BoundedServable
from snowdrop.replica.callcontext import context_of
from snowdrop.replica.servable import AsgiMessage, Receive, Scope, Send
from snowdrop.replica.userfault import UserRaised

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel

App = Callable[[Scope, Receive, Send], Awaitable[None]]
SHUTDOWN_S_MAX = 60.0
MESSAGES_MAX = 4


class AsgiService(BoundedServable):
    """One app of one replica. `target` is the app, or its factory."""

    def __init__(self, spec: ServiceSpec, asgi: AsgiSpec, target: Callable[..., Any]) -> None:
        super().__init__(spec)
        self._asgi = asgi
        self._target = target
        self._state: dict[str, Any] = {}
        self._lifespan = None if asgi.lifespan == "off" else Lifespan(self._call, self._state)

    async def _call(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    async def start(self, models: dict[str, LoadedModel]) -> None:
        """Makes the app and runs its lifespan's startup. Raises what they raise."""
        self.open_gate()
        self._state["models"] = models
        self._app: App = await self._made(models) if self._asgi.is_factory else self._target
        if self._lifespan is not None:
            await self._lifespan.startup(is_wanted=self._asgi.lifespan == "on")

    async def _made(self, models: dict[str, LoadedModel]) -> App:
        if inspect.iscoroutinefunction(self._target):
            app = await self._target(**models)
        else:
            app = await anyio.to_thread.run_sync(lambda: self._target(**models))
        if not callable(app):
            raise UserCodeError(
                f"the factory returned {type(app).__name__}, which is no ASGI app",
                where=self._spec.entry,
                next_step="return the app from it",
            )
        made: App = app
        return made

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope.get("headers", ())}
        mark = CALL_CONTEXT.set(context_of(headers, headers.get("x-request-id", "")))
        try:
            await self._app({**scope, "state": self._state.copy()}, receive, send)
        finally:
            CALL_CONTEXT.reset(mark)

    async def live(self) -> int:
        if self._lifespan is not None:
            await self._lifespan.run()
        await anyio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    async def shutdown(self) -> None:
        if self._lifespan is not None:
            await self._lifespan.shutdown()


class Lifespan:
    """The lifespan protocol. `run` is the app's side: one task from startup to shutdown, as its scopes need."""

    def __init__(self, app: App, state: dict[str, Any]) -> None:
        self._app = app
        self._state = state
        self._begun = anyio.Event()
        self._raised: BaseException | None = None
        self._to_app, self._app_receives = anyio.create_memory_object_stream[AsgiMessage](MESSAGES_MAX)
        self._app_sends, self._from_app = anyio.create_memory_object_stream[AsgiMessage](MESSAGES_MAX)

    async def run(self) -> None:
        """Runs the app's side from `startup` on until it ends. Does not raise what the app raises."""
        scope: Scope = {
            "type": "lifespan",
            "asgi": {"version": "3.0", "spec_version": "2.0"},
            "state": self._state,
        }
        with self._app_sends, self._app_receives, self._to_app, self._from_app:
            await self._begun.wait()
            try:
                await self._app(scope, self._app_receives.receive, self._app_sends.send)
            except UserRaised as error:
                self._raised = error

    async def startup(self, *, is_wanted: bool) -> None:
        """Raises UserCodeError with what the app says. One that knows no lifespan is fine, unless it is wanted."""
        self._begun.set()
        answer = await self._exchange("startup")
        if answer is None and is_wanted:
            if self._raised is not None:
                raise self._raised
            raise UserCodeError("the app has no lifespan", where="lifespan", next_step='say lifespan="auto"')
        if answer is not None and answer["type"] == "lifespan.startup.failed":
            raise UserCodeError(
                answer.get("message") or "the app's lifespan failed",
                where="lifespan",
                next_step="the traceback is in the logs (`snowdrop logs`); correct it and deploy again",
            )

    async def shutdown(self) -> None:
        """Raises what the app raises, or UserCodeError. Bounded by SHUTDOWN_S_MAX."""
        try:
            with anyio.fail_after(SHUTDOWN_S_MAX):
                answer = await self._exchange("shutdown")
        except TimeoutError as error:
            raise UserCodeError(
                "the app's lifespan did not end", where=f"shutdown_s_max={SHUTDOWN_S_MAX:g}"
            ) from error
        if answer is not None and answer["type"] == "lifespan.shutdown.failed":
            raise UserCodeError(answer.get("message") or "the app's lifespan failed in its end", where="lifespan")

    async def _exchange(self, step: str) -> AsgiMessage | None:
        """Sends the step and waits for its answer; None from an app that knows no lifespan, or has left it."""
        try:
            await self._to_app.send({"type": f"lifespan.{step}"})
            return await self._from_app.receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
            return None
