import secrets
import threading
from pathlib import Path

import msgspec
import pytest

from content_helpers import push, write_model
from snowdrop.content.disk import DiskTier
from snowdrop.content.keys import PUBLIC_KEYRING, Keyring, key_domain
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.source import PackSource
from snowdrop.domain.ids import Digest
from snowdrop.domain.manifest import Manifest


def landed(disk: DiskTier, origin: MemoryOrigin, source: Path) -> tuple[Digest, Manifest]:
    """Pushes a directory and brings it to the disk."""
    digest = push(source, origin).artefact.manifest
    manifest = decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])
    disk.reserve(digest, manifest, set())
    landing = disk.open_landing(digest, manifest)
    packs = PackSource(origin, manifest)
    for chunk, ref in enumerate(manifest.chunks):
        data = memoryview(bytearray(ref.plain_bytes))
        packs.read(chunk, 1, data)
        landing.write(chunk, data)
    landing.sync()
    return digest, manifest


def opened(path: Path, boot_id: str = "a boot") -> DiskTier:
    disk = DiskTier(path, 1 << 30, boot_id=boot_id)
    disk.open()
    return disk


@pytest.fixture
def origin() -> MemoryOrigin:
    return MemoryOrigin()


def test_a_landing_is_one_object_until_it_is_evicted(tmp_path: Path, origin: MemoryOrigin) -> None:
    disk = opened(tmp_path / "cache")
    digest, manifest = landed(disk, origin, write_model(tmp_path / "m"))
    first = disk.open_landing(digest, manifest)
    assert disk.open_landing(digest, manifest) is first
    assert disk.landings() == {digest: first}
    disk.evict(digest)
    assert disk.landings() == {}
    assert disk.open_landing(digest, manifest) is not first
    disk.close()


def test_a_chunk_is_found_wherever_it_lies_also_after_a_restart(tmp_path: Path, origin: MemoryOrigin) -> None:
    disk = opened(tmp_path / "cache")
    digest, manifest = landed(disk, origin, write_model(tmp_path / "m"))
    for boot in ("a boot", "another"):
        for ref in manifest.chunks:
            found = disk.find_chunk(PUBLIC_DOMAIN, ref)
            assert found is not None
            landing, chunk = found
            assert landing.manifest.chunks[chunk].digest == ref.digest
            assert landing.holds(chunk)
        disk.close()
        disk = opened(tmp_path / "cache", boot)
    other = msgspec.structs.replace(manifest.chunks[0], digest="0" * 64)
    assert disk.find_chunk(PUBLIC_DOMAIN, other) is None
    disk.evict(digest)
    assert disk.find_chunk(PUBLIC_DOMAIN, manifest.chunks[0]) is None
    disk.close()


def test_a_chunk_that_is_not_there_yet_or_no_longer_right_is_not_found(
    tmp_path: Path, origin: MemoryOrigin
) -> None:
    disk = opened(tmp_path / "cache")
    digest, manifest = landed(disk, origin, write_model(tmp_path / "m"))
    disk.open_landing(digest, manifest).quarantine(0)
    assert disk.find_chunk(PUBLIC_DOMAIN, manifest.chunks[0]) is None
    assert disk.find_chunk(PUBLIC_DOMAIN, manifest.chunks[1]) is not None
    disk.close()


def test_domains_never_mix(tmp_path: Path, origin: MemoryOrigin) -> None:
    """The id of public content finds nothing in a private domain, nor the other way round."""
    disk = opened(tmp_path / "cache")
    _, manifest = landed(disk, origin, write_model(tmp_path / "m"))
    private = key_domain(secrets.token_bytes(32))
    assert disk.find_chunk(PUBLIC_DOMAIN, manifest.chunks[0]) is not None
    assert disk.find_chunk(private, manifest.chunks[0]) is None
    disk.close()


def test_a_kept_manifest_of_another_key_is_not_taken(tmp_path: Path, origin: MemoryOrigin) -> None:
    disk = opened(tmp_path / "cache")
    digest, manifest = landed(disk, origin, write_model(tmp_path / "m"))
    key = secrets.token_bytes(32)
    other = Keyring({key_domain(key): key}).hasher(key_domain(key))
    assert disk.cached_manifest(digest) == manifest
    assert disk.cached_manifest(digest, PUBLIC_KEYRING.hasher(PUBLIC_DOMAIN)) == manifest
    assert disk.cached_manifest(digest, other) is None
    path = tmp_path / "cache/artefacts" / digest.removeprefix("blake3:") / "manifest"
    path.write_bytes(path.read_bytes().replace(b"config", b"donfig"))
    assert disk.cached_manifest(digest) is None
    disk.close()


def test_a_wrong_kept_manifest_is_replaced_when_the_artefact_is_used(tmp_path: Path, origin: MemoryOrigin) -> None:
    disk = opened(tmp_path / "cache")
    digest, manifest = landed(disk, origin, write_model(tmp_path / "m"))
    disk.close()
    path = tmp_path / "cache/artefacts" / digest.removeprefix("blake3:") / "manifest"
    path.write_bytes(b"junk")
    disk = opened(tmp_path / "cache")
    disk.open_landing(digest, manifest).sync()
    assert disk.cached_manifest(digest) == manifest
    disk.close()


def test_an_artefact_that_is_evicted_while_it_is_looked_for_is_not_made_anew(
    tmp_path: Path, origin: MemoryOrigin, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = opened(tmp_path / "cache")
    digest, _ = landed(disk, origin, write_model(tmp_path / "m"))
    disk.close()
    disk = opened(tmp_path / "cache")

    def evict() -> None:
        disk.forget(digest)
        disk.evict(digest)

    evicting = threading.Thread(target=evict)
    read = DiskTier.cached_manifest

    def slow(self: DiskTier, *given: object) -> Manifest | None:
        found = read(self, *given)  # type: ignore[arg-type]
        evicting.start()
        evicting.join(0.2)
        return found

    monkeypatch.setattr(DiskTier, "cached_manifest", slow)
    disk.known_landing(digest)
    evicting.join(10)
    assert list((tmp_path / "cache/artefacts").iterdir()) == []
    assert disk.known_landing(digest) is None
    disk.close()
