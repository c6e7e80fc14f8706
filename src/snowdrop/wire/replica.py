"""Agent <-> replica, over the packet channel that the sandbox inherits.

The agent sends Boot as the first message; everything a replica needs to know is in it, nothing comes by
command line or inherited environment, so that a replica forked from a warm pool can be told the same way.
"""

from __future__ import annotations

import msgspec

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.receipt import Span
from snowdrop.domain.replica import ReplicaKey
from snowdrop.domain.secret import SecretValue
from snowdrop.domain.service import ServiceSpec
from snowdrop.domain.trace import TraceSpan
from snowdrop.wire.codec import Codec, Message

SPANS_MAX = 64
"""Spans in one packet, which has a bound of its own."""


class AreaFile(msgspec.Struct, frozen=True, array_like=True):
    """A file inside a landing area: its bytes are area[offset : offset + size]."""

    path: str
    offset: int
    size: int


class SlabHandle(msgspec.Struct, frozen=True, array_like=True):
    """A part of a landing area: `fd` indexes the descriptors that came with the message."""

    fd: int
    size: int


class ModelHandle(msgspec.Struct, frozen=True, kw_only=True):
    """A model given to a replica.

    `directory` is where its files appear. Its landing area is `slabs` side by side, and none if it has no tensor
    files; the area holds the files of `area_files`, each aligned to 4096 bytes, and may still be filled:
    `progress_fd` is the map that says how far, `wake_fd` the socket that goes with it (`content.progress`). Both
    index descriptors, as those of the slabs do, and are -1 without an area. A `lazy` one is filled only as asked.
    With `has_all_files` every file can be read in the directory, as it is complete or mounted.
    """

    name: str
    param: str
    directory: str
    area_bytes: int = 0
    area_files: tuple[AreaFile, ...] = ()
    slabs: tuple[SlabHandle, ...] = ()
    progress_fd: int = -1
    wake_fd: int = -1
    lazy: bool = False
    has_all_files: bool = False


class Boot(Message, frozen=True, kw_only=True):
    """Agent -> replica, once, with descriptors: index 0 is the listening socket, then those of the models."""

    version: int
    key: ReplicaKey
    spec: ServiceSpec
    code_directory: str
    models: tuple[ModelHandle, ...] = ()
    env: dict[str, str] = msgspec.field(default_factory=dict)
    secrets: dict[str, SecretValue] = msgspec.field(default_factory=dict)
    tracing: bool = False


class WaitForDirectory(Message, frozen=True, kw_only=True):
    """Replica -> agent: user code asked for a model's directory, which may still be written behind."""

    model: str


class DirectoryReady(Message, frozen=True, kw_only=True):
    """Agent -> replica: the directory is complete and verified, or why it never will be."""

    model: str
    error: ErrorBody | None = None


class RenewModel(Message, frozen=True, kw_only=True):
    """Replica -> agent: the data plane that filled the model's area is gone; the model is needed again."""

    model: str


class ModelRenewed(Message, frozen=True, kw_only=True):
    """Agent -> replica: the model in a new area, with descriptors by their index, or why it cannot be had."""

    model: str
    handle: ModelHandle | None = None
    error: ErrorBody | None = None


class OpenCall(Message, frozen=True, kw_only=True):
    """Replica -> agent: it wants a connection to the gateway, to call other services. Answered by CallOpened.

    `number` is the replica's own for this wish.
    """

    number: int


class CallOpened(Message, frozen=True, kw_only=True):
    """Agent -> replica: the connection, as the one descriptor that comes along, or why there is none."""

    number: int
    error: ErrorBody | None = None


class Booted(Message, frozen=True, kw_only=True):
    """Replica -> agent: the interpreter runs and has read Boot."""

    unix_ns: int


class Imported(Message, frozen=True, kw_only=True):
    """Replica -> agent: runtime and service are imported, `startup` begins."""

    spans: tuple[Span, ...]


class Ready(Message, frozen=True, kw_only=True):
    """Replica -> agent: `startup` is done and the socket is served."""

    spans: tuple[Span, ...]


class SpansDone(Message, frozen=True, kw_only=True):
    """Replica -> agent: spans of sampled requests, at most SPANS_MAX. `dropped` came too fast to be kept."""

    spans: tuple[TraceSpan, ...]
    dropped: int = 0


class StageFailed(Message, frozen=True, kw_only=True):
    """Replica -> agent, before it exits: a stage raised. `stage` is boot, import, startup or shutdown."""

    stage: str
    error: ErrorBody


class Drain(Message, frozen=True, kw_only=True):
    """Agent -> replica: finish what is in flight, run `shutdown`, exit."""

    drain_s_max: float


class Drained(Message, frozen=True, kw_only=True):
    """Replica -> agent: `shutdown` has run; the process exits next."""


ToReplica = Boot | DirectoryReady | ModelRenewed | CallOpened | Drain
FromReplica = (
    SpansDone | WaitForDirectory | RenewModel | OpenCall | Booted | Imported | Ready | StageFailed | Drained
)

TO_REPLICA: Codec[ToReplica] = Codec(ToReplica)
FROM_REPLICA: Codec[FromReplica] = Codec(FromReplica)
