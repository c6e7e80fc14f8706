"""What a service's calls to others need to know of the request that they are made for, and who carries them.

The replica (or `snowdrop dev`, or a test) sets both; the SDK's `ref` reads them. Both reach each other here.
"""

from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

DEADLINE_HEADER = "snowdrop-deadline"
"""Unix seconds after which nobody waits for the answer any more."""
LEASE_HEADER = "snowdrop-lease"
"""The gateway's number of the slot that a request holds; calls made for the request say it back."""


class CallContext(msgspec.Struct, frozen=True, kw_only=True):
    """The request that is being worked on. Empty texts and None where nothing is known."""

    request_id: str = ""
    traceparent: str = ""
    tracestate: str = ""
    deadline_unix_s: float | None = None
    lease: str = ""


CALL_CONTEXT: ContextVar[CallContext | None] = ContextVar("snowdrop_call_context", default=None)


class OutgoingCall(msgspec.Struct, frozen=True, kw_only=True):
    """One call to a deployment, ready to be sent. `timeout_s` is what is left of its time, if it has a bound."""

    deployment: str
    path: str
    method: str
    headers: dict[str, str]
    body: bytes
    timeout_s: float | None = None


class Reply(Protocol):
    """The answer to a call; its body may still be on its way."""

    status: int

    @property
    def headers(self) -> dict[str, str]:
        """By lower-case name."""

    async def read(self, bytes_max: int) -> bytes:
        """The whole body. Raises a typed error if it is longer, or breaks off."""

    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises a typed error if it breaks off."""


class Transport(Protocol):
    """Carries calls. Leaving the context cancels what is not finished."""

    def send(self, call: OutgoingCall) -> AbstractAsyncContextManager[Reply]:
        """Raises the typed error of a call that could not be made or was not answered."""

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Runs `work` on the event loop that carries calls; to be called in another thread than its own."""


class _Carrier:
    transport: Transport | None = None


_carrier = _Carrier()


def set_transport(transport: Transport | None) -> None:
    """Who carries the calls of this process."""
    _carrier.transport = transport


def get_transport() -> Transport | None:
    return _carrier.transport
