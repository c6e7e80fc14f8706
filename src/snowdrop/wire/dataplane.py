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


ToDataPlane = Ensure | WaitFilled | WaitDirectory | ServeMount | Release | Cancel | ToUpkeep
FromDataPlane = Ensured | Filled | Completed | Refused | FromUpkeep

TO_DATA_PLANE: Codec[ToDataPlane] = Codec(ToDataPlane)
FROM_DATA_PLANE: Codec[FromDataPlane] = Codec(FromDataPlane)
