"""Agent <-> data plane, over a packet channel.

One request has one id; the agent may have many under way. An answer to Ensure carries the landing area's
descriptors, read-only for whoever gets them.
"""

from __future__ import annotations

from typing import Literal

from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import Digest, TenantId
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.wire.codec import Codec, Message
from snowdrop.wire.replica import AreaFile
from snowdrop.wire.upkeep import FromUpkeep, ToUpkeep


class Ensure(Message, frozen=True, kw_only=True):
    """Bring an artefact to this node and pin it for `holder` until Release.

    With `map_tensors` its tensor files get a landing area, which is filled from then on (WaitFilled), with `lazy`
    only as its readers ask; small other files are in the directory when the answer comes. The rest reaches the
    directory behind (WaitDirectory).
    """

    request: int
    tenant: TenantId
    manifest: Digest
    holder: str
    map_tensors: bool
    lazy: bool = False
    key_domain: str = "public"


class WaitFilled(Message, frozen=True, kw_only=True):
    """Answer (Filled) once the area that `holder` was given is filled, or at once if it is lazy."""

    request: int
    manifest: Digest
    holder: str


class WaitDirectory(Message, frozen=True, kw_only=True):
    """Answer (Completed) once the artefact's directory holds every file, verified and durable."""

    request: int
    manifest: Digest


class ServeMount(Message, frozen=True, kw_only=True):
    """Serve a mounted directory of an artefact that was ensured before; answered (Completed) once that has begun.

    Comes with two descriptors: the mount's /dev/fuse and its journal (`content.fuse.journal`). Served until the
    mount is gone. Another data plane may have served it before; this one answers what that one had left.
    `view` says what it shows: the artefact's `files`; of an image, its `tree`, or the one file `data`.
    """

    request: int
    manifest: Digest
    view: Literal["files", "data", "tree"] = "files"


class BeginStart(Message, frozen=True, kw_only=True):
    """Something starts in an image that is pinned for `pin`; answered (Completed) once that is known.

    What an earlier start of the same name has read is fetched from now on, in that order. With `record`, what is
    read through the image's mounts is recorded until EndStart.
    """

    request: int
    tenant: TenantId
    manifest: Digest
    pin: str
    holder: str
    start: str
    record: bool


class EndStart(Message, frozen=True, kw_only=True):
    """The start of `holder` is over: what was recorded is kept, and reads count as late from now on.

    Answered by StartTold, also if it had been said before.
    """

    request: int
    holder: str


class AskStart(Message, frozen=True, kw_only=True):
    """-> StartTold."""

    request: int
    holder: str


class StartTold(Message, frozen=True, kw_only=True):
    """A start so far. `foreseen_bytes`: what a trace said it would read. `missed_bytes`: what its image's readers
    wanted until it ended and had to wait for, because only the origin had it; `late_bytes`: the same after that.
    """

    request: int
    foreseen_bytes: int
    recorded_bytes: int
    missed_bytes: int
    late_bytes: int


class Release(Message, frozen=True, kw_only=True):
    """`holder` no longer uses any artefact. Not answered."""

    holder: str


class Cancel(Message, frozen=True, kw_only=True):
    """The agent no longer wants the answer to `request`; work that nobody else waits for stops."""

    request: int


class Ensured(Message, frozen=True, kw_only=True):
    """`directory` is a host path to be mounted read-only; `directory_complete` says that every file is in it.

    If `slab_bytes` is not empty, descriptors come along: one for each slab, then the progress map, then the socket
    that goes with it. `content` are the bytes of the files only.
    """

    request: int
    directory: str
    directory_complete: bool = False
    slab_bytes: tuple[int, ...]
    area_bytes: int
    area_files: tuple[AreaFile, ...]
    content: ContentBytes
    spans: tuple[Span, ...]


class Filled(Message, frozen=True, kw_only=True):
    """The area is filled; where its bytes came from, and how long that took."""

    request: int
    content: ContentBytes
    spans: tuple[Span, ...]


class Completed(Message, frozen=True, kw_only=True):
    request: int


class Refused(Message, frozen=True, kw_only=True):
    """The request failed; nothing of it is pinned."""

    request: int
    error: ErrorBody


ToStarts = BeginStart | EndStart | AskStart
ToDataPlane = Ensure | WaitFilled | WaitDirectory | ServeMount | Release | Cancel | ToStarts | ToUpkeep
FromDataPlane = Ensured | Filled | Completed | StartTold | Refused | FromUpkeep

TO_DATA_PLANE: Codec[ToDataPlane] = Codec(ToDataPlane)
FROM_DATA_PLANE: Codec[FromDataPlane] = Codec(FromDataPlane)
