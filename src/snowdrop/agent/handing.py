"""What a replica is handed of a model: its handle, and the descriptors that go with it."""

from __future__ import annotations

import msgspec

from snowdrop.agent.dataplane.client import EnsuredContent
from snowdrop.domain.deployment import BoundModel
from snowdrop.domain.receipt import ContentBytes, Span
from snowdrop.wire.replica import ModelHandle, SlabHandle


class Landed(msgspec.Struct, frozen=True, kw_only=True):
    """What bringing a replica's content cost."""

    content: ContentBytes
    spans: tuple[Span, ...]


def model_handle(
    bound: BoundModel, directory: str, content: EnsuredContent, *, first_fd: int
) -> tuple[ModelHandle, tuple[int, ...]]:
    """The handle, and its descriptors as they follow `first_fd` others in the message; they stay the caller's."""
    area = content.area
    if area is None:
        return ModelHandle(name=bound.name, param=bound.param, directory=directory, lazy=bound.lazy), ()
    slabs = tuple(SlabHandle(first_fd + index, size) for index, size in enumerate(area.slab_bytes))
    handle = ModelHandle(
        name=bound.name,
        param=bound.param,
        directory=directory,
        area_bytes=area.area_bytes,
        area_files=area.files,
        slabs=slabs,
        progress_fd=first_fd + len(slabs),
        wake_fd=first_fd + len(slabs) + 1,
        lazy=bound.lazy,
    )
    return handle, area.fds
