"""What the runtime can serve: a service class, an ASGI app, a command."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, Protocol

from snowdrop.domain.errors import SnowdropError

if TYPE_CHECKING:
    from snowdrop.weights.loaded import LoadedModel

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]


class Servable(Protocol):
    """`start` and `shutdown` raise what user code raises; `asgi` answers in between; `cut` ends all calls.

    `live` runs beside all of them, from before `start` until the replica ends. If it returns, the service has
    ended by itself, and the replica exits with that code.
    """

    @property
    def has_websockets(self) -> bool: ...

    async def live(self) -> int: ...

    async def asgi(self, scope: Scope, receive: Receive, send: Send) -> None: ...

    async def start(self, models: dict[str, LoadedModel]) -> None: ...

    def cut(self, error: SnowdropError) -> None: ...

    async def shutdown(self) -> None: ...
