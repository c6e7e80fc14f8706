"""Gateway worker <-> owner of the queues.

A worker asks for a slot and gets a lease. All leases of a worker end with its connection, so a worker that
dies holds nothing back.
"""

from __future__ import annotations

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import DEFAULT_TENANT, DeploymentName, ReceiptId, ReplicaId, RevisionId, TenantId
from snowdrop.domain.receipt import CallerTimes, Span
from snowdrop.wire.codec import Codec, Message
from snowdrop.wire.counts import RequestSeries


class WorkerHello(Message, frozen=True, kw_only=True):
    version: int
    worker: str


class Acquire(Message, frozen=True, kw_only=True):
    """One request wants one slot. `ticket` is the worker's own number for it.

    `tenant` is said by callers from inside, whom no key authenticates; `label` says whom beside the key to be fair
    to; `attempt` counts the replicas that could not be reached for it: such a request keeps its place. `dialect`
    is the path of OpenAI's dialect that the deployment must serve; one that does not is not woken.
    For a call by a service, `from_replica` is who calls, and `parent_lease` the request of its own it calls for.
    `revision` (an id, `stable` or `candidate`) alone may serve it. `deadline_left_s` is what its caller's deadline
    leaves for everything.
    """

    ticket: int
    key_sha256: str | None
    deployment: DeploymentName
    arrived_unix_ns: int
    tenant: TenantId | None = None
    label: str = ""
    request_id: str = ""
    priority: int | None = None
    wait_s_max: float | None = None
    deadline_left_s: float | None = None
    progress: bool = False
    attempt: int = 0
    dialect: str = ""
    parent_lease: int = 0
    from_replica: ReplicaId | None = None
    revision: str = ""


class AskSpeakers(Message, frozen=True, kw_only=True):
    """Asks which deployments of the caller's tenant speak OpenAI's dialect."""

    ticket: int
    key_sha256: str | None


class Look(Message, frozen=True, kw_only=True):
    """Asks how a deployment stands, and with `activate` wakes it. Answered at once with Looked or Denied."""

    ticket: int
    key_sha256: str | None
    deployment: DeploymentName
    activate: bool = False


class CancelWait(Message, frozen=True, kw_only=True):
    """The client is gone; if the slot was granted meanwhile it is given back."""

    ticket: int


class Outcome(msgspec.Struct, frozen=True, array_like=True):
    """What became of a request at its replica: for telling a bad revision. Not said if its client went away.

    `first_byte_s` counts from the slot; None if there was no answer.
    """

    failed: bool
    first_byte_s: float | None = None


class ReleaseLease(Message, frozen=True, kw_only=True):
    lease: int
    outcome: Outcome | None = None


class ReportUnreachable(Message, frozen=True, kw_only=True):
    """A connection to the replica of this lease could not be made; the lease ends with it."""

    lease: int
    message: str
    outcome: Outcome | None = None


class ReportServed(Message, frozen=True, kw_only=True):
    """The first answer of a new replica, for its receipt."""

    receipt: ReceiptId
    caller: CallerTimes


class ReportCounts(Message, frozen=True, kw_only=True):
    """What a worker counted since it last said so; said each second while there is anything, and at its end.

    Not answered. It is a difference, and lost with a worker that is killed. Heard twice it would count twice: a
    worker says it once, on a connection that it does not open again.
    """

    series: tuple[RequestSeries, ...]


class Granted(Message, frozen=True, kw_only=True):
    """A slot at a replica. For a caller that waited for the start, `receipt` and `spans` say what for."""

    ticket: int
    lease: int
    replica: ReplicaId
    socket_path: str
    request_s_max: float
    granted_unix_ns: int
    tenant: TenantId = DEFAULT_TENANT
    revision: RevisionId = RevisionId("")
    receipt: ReceiptId | None = None
    spans: tuple[Span, ...] = ()
    ordered_unix_ns: int = 0
    ready_unix_ns: int = 0


class WaitNews(Message, frozen=True, kw_only=True):
    """How it stands with a waiting request that asked for progress; said when it begins to wait and now and then.

    `phase` is one of a receipt's, of the replica that it waits for, or `queue` when all are ready and busy.
    `percent` and `expected_s` (until its turn) are None as long as nothing has been learned to tell them from.
    The client is to hear of it after `first_s`, then every `every_s`; never with `first_s` None.
    """

    ticket: int
    phase: str
    position: int
    percent: int | None = None
    expected_s: float | None = None
    first_s: float | None = None
    every_s: float = 2.0


class Looked(Message, frozen=True, kw_only=True):
    """How a deployment stands. `expected_s`: how long a request that came now would wait; None if unknown.

    `own_readyz`: the service answers at that path itself, which goes before. `woken`: somebody's activation is
    under way. `error`: requests are refused, and why.
    """

    ticket: int
    ready: int
    starting: int
    replicas_max: int
    slots: int
    in_flight: int
    queued: int
    phase: str
    revision: RevisionId
    expected_s: float | None = None
    percent: int | None = None
    woken: bool = False
    own_readyz: bool = False
    error: ErrorBody | None = None


class Speaker(msgspec.Struct, frozen=True, kw_only=True):
    """A deployment that speaks OpenAI's dialect, at `paths`."""

    tenant: TenantId
    deployment: DeploymentName
    paths: tuple[str, ...]
    created_unix_s: int


class SpeakersTold(Message, frozen=True, kw_only=True):
    """The answer to AskSpeakers, which may also be Denied."""

    ticket: int
    speakers: tuple[Speaker, ...]


class Denied(Message, frozen=True, kw_only=True):
    """No slot, and why. `status` is the HTTP status of the error's kind."""

    ticket: int
    error: ErrorBody


FromWorker = (
    WorkerHello
    | Acquire
    | Look
    | AskSpeakers
    | CancelWait
    | ReleaseLease
    | ReportUnreachable
    | ReportServed
    | ReportCounts
)
ToWorker = Granted | Denied | WaitNews | Looked | SpeakersTold

FROM_WORKER: Codec[FromWorker] = Codec(FromWorker)
TO_WORKER: Codec[ToWorker] = Codec(ToWorker)
