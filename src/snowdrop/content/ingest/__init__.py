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
from snowdrop.content.ingest.read import Compress
from snowdrop.content.ingest.source import Filter, Source, SourceFile
from snowdrop.content.ingest.sources import SourceOptions, open_source

__all__ = [
    "CODE_BYTES_MAX",
    "CODE_FILES_MAX",
    "Compress",
    "Filter",
    "IngestIndex",
    "PushOptions",
    "PushProgress",
    "PushResult",
    "Source",
    "SourceFile",
    "SourceOptions",
    "open_source",
    "push_code",
    "push_directory",
    "push_source",
]
