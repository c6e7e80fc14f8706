"""What `model show` believes of an origin."""

from types import SimpleNamespace
from typing import Any

import pytest

from snowdrop.cli import models
from snowdrop.content.layout import manifest_key
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import CorruptContentError, IntegrityError
from snowdrop.domain.ids import DEFAULT_TENANT, Digest, ModelName
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX, ArtefactRef

DIGEST = Digest("blake3:" + "a" * 64)
RECORD = ModelRecord(
    tenant=DEFAULT_TENANT,
    name=ModelName("m"),
    artefact=ArtefactRef(manifest=DIGEST, kind="model", total_bytes=1, file_count=1, key_domain="public"),
    created_unix_ns=1,
    source="x",
    generation=1,
)


class Hostile(MemoryOrigin):
    """Says of every object that it has a petabyte."""

    def __init__(self) -> None:
        super().__init__()
        self.read_bytes = 0

    def size(self, key: str) -> int:
        return 1 << 50

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        self.read_bytes += len(into)


def shown(origin: MemoryOrigin, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> object:
    info = SimpleNamespace(origin_url="memory:", origin=None)
    ctx: Any = SimpleNamespace(
        client=SimpleNamespace(get=lambda *_: info), layout=SimpleNamespace(content_keys=tmp_path / "none")
    )
    monkeypatch.setattr(models, "open_origin", lambda *_: origin)
    return models.manifest_of(ctx, RECORD)


def test_a_manifest_of_any_size_is_read_up_to_the_limit(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = Hostile()
    with pytest.raises(CorruptContentError, match="manifest_bytes_max"):
        shown(origin, tmp_path, monkeypatch)
    assert origin.read_bytes == MANIFEST_BYTES_MAX + 1


def test_an_empty_manifest_is_not_what_its_name_says(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = MemoryOrigin()
    origin.put(manifest_key("public", DIGEST), b"")
    with pytest.raises(IntegrityError):
        shown(origin, tmp_path, monkeypatch)
