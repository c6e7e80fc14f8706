"""Origins: where packs and manifests are kept. `port` says what one does, `opening` finds the one of a URL."""

from snowdrop.content.origin.directory import DirectoryOrigin
from snowdrop.content.origin.memory import MemoryOrigin
from snowdrop.content.origin.opening import open_origin
from snowdrop.content.origin.port import ObjectInfo, Origin
from snowdrop.domain.origin import OriginOptions

__all__ = ["DirectoryOrigin", "MemoryOrigin", "ObjectInfo", "Origin", "OriginOptions", "open_origin"]
