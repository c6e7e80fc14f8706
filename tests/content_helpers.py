"""Trees, packs and disks for the tests of the content path."""

from __future__ import annotations

import errno
import json
import os
import random
import threading
from collections.abc import Mapping
from pathlib import Path

from snowdrop.content.area import Area
from snowdrop.content.codec import decode
from snowdrop.content.diskio import DiskIo
from snowdrop.content.ingest import PushResult, push_directory
from snowdrop.content.keys import PUBLIC_HASHER, Hasher
from snowdrop.content.layout import manifest_key, pack_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin, Origin
from snowdrop.content.placement import area_layout
from snowdrop.content.progress import FillState
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.content.slabs import SlabPool
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import ArtefactRef, Extent, Manifest
from snowdrop.wire.packet import packet_pair
from snowdrop.wire.replica import ModelHandle, SlabHandle


def safetensors_bytes(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """A safetensors file of (dtype, shape, data), laid out in the order given."""
    table: dict[str, object] = {}
    body = b""
    for name, (dtype, shape, data) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return framed(json.dumps(table).encode(), body)


def framed(header: bytes, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def write_model(root: Path, *, seed: int = 0) -> Path:
    """A small model: a large tensor, small ones, a config and an empty file."""
    root.mkdir(parents=True, exist_ok=True)
    tensors = {
        "big": ("U8", [5 << 20], noise(5 << 20, seed)),
        "half": ("U8", [300 << 10], noise(300 << 10, seed + 1)),
        **{f"tiny{index}": ("U8", [100], noise(100, seed + 10 + index)) for index in range(5)},
    }
    (root / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    (root / "config.json").write_text('{"a": 1}')
    (root / "nested").mkdir(exist_ok=True)
    (root / "nested/vocab.txt").write_bytes(noise(70_000, seed + 3))
    (root / "empty").write_bytes(b"")
    return root


def push(source: Path, origin: Origin) -> PushResult:
    return push_directory(source, origin, kind="model", tenant=DEFAULT_TENANT)


def rebuilt(origin: MemoryOrigin, artefact: ArtefactRef, hasher: Hasher = PUBLIC_HASHER) -> dict[str, bytes]:
    """The files of an artefact put together from its packs, every chunk and pack compared with its name."""
    key = manifest_key(artefact.key_domain, artefact.manifest)
    manifest = decode_manifest(origin.objects[key], expected=artefact.manifest, hasher=hasher)
    chunks = []
    for chunk in manifest.chunks:
        name = manifest.packs[chunk.pack].digest
        pack = origin.objects[pack_key(manifest.key_domain, name)]
        assert hasher.hexdigest(pack) == name
        assert len(pack) == manifest.packs[chunk.pack].size
        plain = bytearray(chunk.plain_bytes)
        stored = memoryview(pack)[chunk.pack_offset : chunk.pack_offset + chunk.stored_bytes]
        decode(chunk.codec, stored, memoryview(plain))
        assert hasher.hexdigest(plain) == chunk.digest
        chunks.append(bytes(plain))
    return {
        entry.path: b"".join(
            chunks[at][start : start + length] for _, length, at, start in map(fields, entry.extents)
        )
        for entry in manifest.files
    }


def fields(extent: Extent) -> tuple[int, int, int, int]:
    return extent.file_offset, extent.length, extent.chunk, extent.chunk_offset


def files_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def settings_for(cache: Path, *, origin_url: str = "file:///unused", **changes: int) -> DataPlaneSettings:
    """Slabs are small: a model of the tests takes several."""
    limits = {
        "ram_bytes_max": 64 << 20,
        "disk_bytes_max": 64 << 20,
        "fetch_threads": 4,
        "slab_bytes": 2 << 20,
        "big_slab_bytes": 4 << 20,
    } | changes
    return DataPlaneSettings(origin_url=origin_url, cache_directory=str(cache), **limits)


class CountingOrigin(MemoryOrigin):
    """Counts the bytes of packs that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.pack_bytes_read = 0
        self._counting = threading.Lock()

    def read_range(self, key: str, offset: int, into: memoryview) -> None:
        super().read_range(key, offset, into)
        if "/packs/" in key:
            with self._counting:
                self.pack_bytes_read += len(into)

    def packs(self) -> list[str]:
        return sorted(key for key in self.objects if "/packs/" in key)

    def flip_byte(self, wanted: bytes) -> None:
        """Damages the first pack that holds `wanted`, inside of it."""
        for key in self.packs():
            at = self.objects[key].find(wanted)
            if at >= 0:
                damaged = bytearray(self.objects[key])
                damaged[at] ^= 1
                self.objects[key] = bytes(damaged)
                return
        raise AssertionError("no pack holds these bytes")


class FullDisk(DiskIo):
    """ENOSPC once `free_bytes` have been written; the map of chunks is preallocated and always has room."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        if len(view) > 64:
            self.free_bytes -= len(view)
            if self.free_bytes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        super().write(fd, view, offset)


def small_pool() -> SlabPool:
    """Slabs of 2 and 4 MiB, so that a small model takes several of both sizes."""
    return SlabPool(big_bytes=4 << 20, small_bytes=2 << 20)


def filled_area(manifest: Manifest, source: Path, pool: SlabPool | None = None) -> Area:
    """The area of a model whose files are in `source`, all of it there."""
    area = Area(manifest, area_layout(manifest), pool or small_pool())
    for file in area.layout.files:
        area.window(file.offset, file.size)[:] = (source / file.path).read_bytes()
    for chunk in area.layout.places:
        area.mark(chunk)
    if area.slabs:
        area.set_state(FillState.COMPLETE)
    return area


class HandedOver:
    """An area as a replica is handed it: `handle` with `fds`, and `wake`, the data plane's end of the socket."""

    def __init__(self, area: Area, directory: Path, *, name: str = "m", lazy: bool = False) -> None:
        self.wake, theirs = packet_pair()
        slabs = tuple(SlabHandle(index, slab.size) for index, slab in enumerate(area.slabs))
        fds = [slab.fd for slab in area.slabs] + [area.progress.fileno(), theirs.fileno()]
        self.fds = tuple(os.dup(fd) for fd in fds)
        theirs.close()
        self.handle = ModelHandle(
            name=name,
            param=name,
            directory=str(directory),
            area_bytes=area.layout.size,
            area_files=area.layout.files,
            slabs=slabs,
            progress_fd=len(slabs),
            wake_fd=len(slabs) + 1,
            lazy=lazy,
        )

    def close(self) -> None:
        """Of this side; a model made from it keeps its own."""
        self.wake.close()
        for fd in self.fds:
            os.close(fd)
