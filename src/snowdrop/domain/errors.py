"""The errors that cross a boundary: what failed, where, and what the caller can do next.

Inside a module, ordinary exceptions are fine; at each boundary (HTTP, CLI, a wire message) they become one of
these, once. Each class fixes its `kind` (stable, for programs), HTTP status and whether trying again can help.
"""

from typing import Any, ClassVar

import msgspec


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as it travels: in HTTP bodies under the key `error`, in wire messages, in stored records."""

    kind: str
    message: str
    where: str = ""
    next_step: str = ""
    retryable: bool = False
    retry_after_s: float | None = None
    request_id: str = ""
    fields: list[dict[str, Any]] = msgspec.field(default_factory=list)


class SnowdropError(Exception):
    """Base of all typed errors. `str()` gives one line; `body()` gives the form that travels."""

    kind: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        next_step: str = "",
        retry_after_s: float | None = None,
        fields: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.next_step = next_step
        self.retry_after_s = retry_after_s
        self.fields = fields or []

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        step = f"; {self.next_step}" if self.next_step else ""
        return f"{self.message}{place}{step}"

    def body(self, *, request_id: str = "") -> ErrorBody:
        return ErrorBody(
            kind=self.kind,
            message=self.message,
            where=self.where,
            next_step=self.next_step,
            retryable=self.retryable,
            retry_after_s=self.retry_after_s,
            request_id=request_id,
            fields=self.fields,
        )


class InvalidInputError(SnowdropError):
    """Bad input of any kind: request, config, service file, command line."""

    kind = "invalid_input"
    http_status = 422


class CorruptContentError(InvalidInputError):
    """A manifest, weights file or tree that breaks its format. `where` names the file and the place in it."""

    kind = "corrupt_content"


class IntegrityError(SnowdropError):
    """Bytes that do not match their digest, and no other source had the right ones."""

    kind = "integrity"
    http_status = 502
    retryable = True


class UntrustedError(SnowdropError):
    """A ref that is not signed by a trusted key, is not the one asked for, or is older than one seen before."""

    kind = "untrusted"
    http_status = 403


class UnauthorisedError(SnowdropError):
    kind = "unauthorised"
    http_status = 401


class NotFoundError(SnowdropError):
    kind = "not_found"
    http_status = 404


class ForbiddenError(SnowdropError):
    """A rule says no: a service calls a deployment that it does not declare. `where` names the rule."""

    kind = "forbidden"
    http_status = 403


class MethodNotAllowedError(SnowdropError):
    kind = "method_not_allowed"
    http_status = 405


class TooLargeError(SnowdropError):
    """A request's body is above its bound. `where` names the bound, as in `request_bytes_max`."""

    kind = "too_large"
    http_status = 413


class ConflictError(SnowdropError):
    """The thing exists already, or another writer was first (a stale generation)."""

    kind = "conflict"
    http_status = 409


class QueueFullError(SnowdropError):
    """The deployment's queue is at its bound: 429 with a Retry-After."""

    kind = "queue_full"
    http_status = 429
    retryable = True


class UnavailableError(SnowdropError):
    """Nothing can answer now: crash-looping revision, no node, longest wait exceeded, shutting down."""

    kind = "unavailable"
    http_status = 503
    retryable = True


class WaitedTooLongError(UnavailableError):
    """No slot came free within the longest wait: 503 with a Retry-After. `where` names the bound."""

    kind = "waited_too_long"


class OriginRefusedError(UnavailableError):
    """The origin turns this node or its credentials away. Only a change of them, or of their rights, helps."""

    kind = "origin_refused"
    retryable = False


class ReadCancelledError(UnavailableError):
    """A read that nobody waits for any more was ended early. Whoever comes next simply reads again."""

    kind = "read_cancelled"


class RevisionFailedError(UnavailableError):
    """The revision does not start; the message carries why. Only a new revision or `scale` helps."""

    kind = "revision_failed"
    retryable = False


class ReplicaDiedError(SnowdropError):
    """The replica died after it had started on the request, so the request is not sent again."""

    kind = "replica_died"
    http_status = 502
    retryable = True


class TimedOutError(SnowdropError):
    """A named bound ran out. `where` names the bound, as in `startup_s_max`."""

    kind = "timed_out"
    http_status = 504
    retryable = True


class CallDeadlockError(SnowdropError):
    """A call between services that could only wait for itself, or one in a chain that is too long."""

    kind = "call_deadlock"
    http_status = 508


class CallFailedError(SnowdropError):
    """A service's call to another one failed. `error` is what the other one said; `where` is the way to it."""

    kind = "call_failed"
    http_status = 502
    error: ErrorBody | None = None


class CallUnavailableError(CallFailedError):
    """The other service could not take the call, which was not started there; trying again may help."""

    kind = "call_unavailable"
    http_status = 503
    retryable = True


class CallTimedOutError(CallFailedError):
    """The time for the call was over, the caller's own or what was left of its caller's."""

    kind = "call_timed_out"
    http_status = 504
    retryable = True


class UserCodeError(SnowdropError):
    """The service's own code raised: at import, in `startup`, in a request or in `shutdown`."""

    kind = "user_code"
    http_status = 500


class StorageFullError(SnowdropError):
    """No space (ENOSPC, EDQUOT) at `where`."""

    kind = "storage_full"
    http_status = 507
    retryable = True


class DeviceError(SnowdropError):
    """A device did not take a tensor: no memory left on it, or a copy failed. `where` names device and tensor."""

    kind = "device"
    http_status = 500


class SandboxError(SnowdropError):
    """A sandbox could not be made, or a limit could not be set."""

    kind = "sandbox"


class PlatformDownError(SnowdropError):
    """A process of the platform cannot be reached."""

    kind = "platform_down"
    http_status = 503
    retryable = True


class ProtocolError(SnowdropError):
    """A peer process spoke another version, or broke the framing."""

    kind = "protocol"


def error_kinds() -> dict[str, type[SnowdropError]]:
    """All kinds by name, for turning an ErrorBody back into its class."""
    kinds: dict[str, type[SnowdropError]] = {}
    pending: list[type[SnowdropError]] = [SnowdropError]
    while pending:
        cls = pending.pop()
        if "kind" in vars(cls):  # one that only adds a base to its parent travels as that
            kinds[cls.kind] = cls
        pending.extend(cls.__subclasses__())
    return kinds


def error_from_body(body: ErrorBody) -> SnowdropError:
    """The typed error that `body` was made from; an unknown kind becomes a plain SnowdropError."""
    cls = error_kinds().get(body.kind, SnowdropError)
    return cls(
        body.message,
        where=body.where,
        next_step=body.next_step,
        retry_after_s=body.retry_after_s,
        fields=body.fields,
    )
