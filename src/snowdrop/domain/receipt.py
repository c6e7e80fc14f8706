"""Receipts: the record of one cold start, the only way in which Snowdrop measures one.

Times are unix nanoseconds. The *main line* spans follow one another without overlap, so their sum can be held
against what the caller waited; *detail* spans (a weights fetch inside `startup`) lie within them and are drawn
but not summed.
"""

from collections.abc import Iterable

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DeploymentName, NodeId, ReceiptId, ReplicaId, RevisionId, TenantId

PHASES = (
    "activate",  # request seen by the gateway -> start ordered: decision, placement, also waiting for room
    "mount",  # content fetched and landed, mounts prepared
    "start",  # sandbox made, interpreter running
    "import",  # the runtime's and the service's imports
    "startup",  # the service's own startup stage, weights included
    "route",  # ready at the agent -> slot given to the request, also waiting for others in the queue
    "answer",  # slot given -> first byte of the replica's answer
)
"""The main line, in order. What the caller waited beyond their sum is `unaccounted`."""


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A named stretch of time. `parent` is empty on the main line."""

    name: str
    start_unix_ns: int
    end_unix_ns: int
    parent: str = ""
    note: str = ""

    @property
    def duration_ns(self) -> int:
        return self.end_unix_ns - self.start_unix_ns


class ContentBytes(msgspec.Struct, frozen=True, kw_only=True):
    """Plaintext bytes by the tier that they came from; `late` ones left the node after ready."""

    ram: int = 0
    disk: int = 0
    peer: int = 0
    origin: int = 0
    late: int = 0

    def __add__(self, other: "ContentBytes") -> "ContentBytes":
        return ContentBytes(
            ram=self.ram + other.ram,
            disk=self.disk + other.disk,
            peer=self.peer + other.peer,
            origin=self.origin + other.origin,
            late=self.late + other.late,
        )

    @property
    def total(self) -> int:
        return self.ram + self.disk + self.peer + self.origin


class CallerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The first request that the new replica answered, as its caller felt it."""

    request_id: str
    arrived_unix_ns: int
    admitted_unix_ns: int
    first_byte_unix_ns: int

    @property
    def waited_ns(self) -> int:
        return self.first_byte_unix_ns - self.arrived_unix_ns


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One start of one replica. `caller` is None when nobody was waiting for it."""

    id: ReceiptId
    tenant: TenantId
    deployment: DeploymentName
    revision: RevisionId
    replica: ReplicaId
    node: NodeId
    outcome: str
    started_unix_ns: int
    ready_unix_ns: int
    spans: tuple[Span, ...]
    content: ContentBytes = ContentBytes()
    caller: CallerTimes | None = None
    error: ErrorBody | None = None

    def main_line(self) -> tuple[Span, ...]:
        """The main-line spans, with the caller's own phases added when there is a caller."""
        own = tuple(span for span in self.spans if not span.parent)
        if self.caller is None:
            return own
        return join_caller(
            own, self.caller, ordered_unix_ns=self.started_unix_ns, ready_unix_ns=self.ready_unix_ns
        )

    @property
    def waited_ns(self) -> int:
        """What the caller waited, or without one the time from the order to ready."""
        if self.caller is not None:
            return self.caller.waited_ns
        return max(0, self.ready_unix_ns - self.started_unix_ns)

    @property
    def unaccounted_ns(self) -> int:
        return self.waited_ns - total_ns(self.main_line())


def total_ns(spans: Iterable[Span]) -> int:
    return sum(span.duration_ns for span in spans)


def join_caller(
    own: tuple[Span, ...], caller: CallerTimes, *, ordered_unix_ns: int, ready_unix_ns: int
) -> tuple[Span, ...]:
    """Main-line spans of a start as its first caller felt them: cut to the caller's wait, its own phases added.

    A caller may arrive when the replica is half-way up; what happened before it came is not part of its wait.
    `activate` ends with the order and `route` begins with ready, both as measured: what lies between them and the
    replica's own spans (messages on their way, an agent that was busy) belongs to no phase and is unaccounted.
    """
    arrived, admitted = caller.arrived_unix_ns, caller.admitted_unix_ns
    spans = [
        Span(name="activate", start_unix_ns=arrived, end_unix_ns=min(ordered_unix_ns, admitted)),
        *(_cut(span, max(arrived, ordered_unix_ns), min(admitted, ready_unix_ns)) for span in own),
        Span(name="route", start_unix_ns=max(ready_unix_ns, arrived), end_unix_ns=admitted),
    ]
    kept = [span for span in spans if span.end_unix_ns > span.start_unix_ns]
    return (*kept, Span(name="answer", start_unix_ns=admitted, end_unix_ns=caller.first_byte_unix_ns))


def _cut(span: Span, start_unix_ns: int, end_unix_ns: int) -> Span:
    return msgspec.structs.replace(
        span,
        start_unix_ns=max(span.start_unix_ns, start_unix_ns),
        end_unix_ns=min(span.end_unix_ns, end_unix_ns),
    )
