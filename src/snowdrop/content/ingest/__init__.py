"""Push: a source (directory, hub repository, object-store prefix) becomes chunks, packs and a manifest."""

from snowdrop.content.ingest.index import IngestIndex
from snowdrop.content.ingest.push import (
    CODE_BYTES_MAX,
    CODE_FILES_MAX,
    PushOptions,
    PushProgress,
    PushResult,
    push_code,
    push_directory,
    push_source,
)
from snowdrop.content.ingest.source import Source, SourceFile

__all__ = [
    "CODE_BYTES_MAX",
    "CODE_FILES_MAX",
    "IngestIndex",
    "PushOptions",
    "PushProgress",
    "PushResult",
    "Source",
    "SourceFile",
    "push_code",
    "push_directory",
    "push_source",
]
