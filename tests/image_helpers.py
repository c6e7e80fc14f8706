"""Layers, layouts and directories for tests of images."""

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import zstandard

from snowdrop.content.imageread import read_file, read_tree
from snowdrop.content.ingest import PushOptions
from snowdrop.content.keys import PUBLIC_HASHER
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.image import ImageTree, TreeEntry
from snowdrop.domain.manifest import Manifest
from snowdrop.image.push import ImageOptions, ImagePushed, push_image
from snowdrop.image.source import ImageSource
from snowdrop.image.unpack import LayerFolder


def member(
    path: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", **fields: Any
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(path)
    info.type, info.size = kind, len(data)
    for name, value in fields.items():
        setattr(info, name, value)
    return info, data


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, errors="surrogateescape") as made:
        for info, data in members:
            made.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def pack(plain: bytes, codec: str) -> bytes:
    if codec == "gzip":
        return gzip.compress(plain, mtime=0)
    return zstandard.compress(plain) if codec == "zstd" else plain


class Layout:
    """An OCI layout in memory: `blobs` by digest, and its documents."""

    def __init__(self, layers: Iterable[tuple[bytes, str]], run: dict[str, Any] | None = None) -> None:
        self.blobs: dict[str, bytes] = {}
        diff_ids, described = [], []
        for plain, codec in layers:
            diff_ids.append(digest(plain))
            suffix = {"plain": "", "gzip": "+gzip", "zstd": "+zstd"}[codec]
            described.append(self.add(pack(plain, codec), f"application/vnd.oci.image.layer.v1.tar{suffix}"))
        config = {
            "architecture": "amd64", "os": "linux", "config": run or {},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        }  # fmt: skip
        self.layers = described
        self.config = self.add(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json")
        document = {"schemaVersion": 2, "config": self.config, "layers": described}
        self.manifest = self.add(json.dumps(document).encode(), "application/vnd.oci.image.manifest.v1+json")
        self.manifest_bytes = self.blobs[self.manifest["digest"]]

    def add(self, data: bytes, media_type: str) -> dict[str, Any]:
        self.blobs[digest(data)] = data
        return {"mediaType": media_type, "digest": digest(data), "size": len(data)}

    def index(self, tag: str = "latest") -> bytes:
        named = {**self.manifest, "annotations": {"org.opencontainers.image.ref.name": tag}}
        return json.dumps({"schemaVersion": 2, "manifests": [named]}).encode()

    def write(self, root: Path, tag: str = "latest") -> Path:
        (root / "blobs" / "sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        (root / "index.json").write_bytes(self.index(tag))
        for name, data in self.blobs.items():
            (root / "blobs" / name.replace(":", "/")).write_bytes(data)
        return root


class Pushed:
    """A push into an origin in memory, and what can be read back from there."""

    def __init__(
        self,
        source: ImageSource,
        folder: Path,
        *,
        origin: MemoryOrigin | None = None,
        **options: Any,
    ) -> None:
        self.origin = origin or MemoryOrigin()
        layers = LayerFolder(folder, sleep=lambda _: None)
        try:
            self.pushed: ImagePushed = push_image(
                source, self.origin, layers, PushOptions(kind="image"), ImageOptions(**options)
            )
        finally:
            layers.close()
            source.close()

    @property
    def manifest(self) -> Manifest:
        name = self.pushed.result.artefact.manifest
        return decode_manifest(self.origin.objects[manifest_key("public", name)], expected=name)

    def tree(self) -> ImageTree:
        return read_tree(self.origin, self.manifest, PUBLIC_HASHER)

    def data(self) -> bytes:
        return read_file(self.origin, self.manifest, self.manifest.files[1], PUBLIC_HASHER)


def names(entries: Iterable[TreeEntry]) -> list[bytes]:
    return [entry.path for entry in entries]


Seen = dict[bytes, tuple[Any, ...]]


def seen_in_directory(root: Path) -> Seen:
    """All that a directory shows: by path, kind, mode, owner, time, content or target, xattrs, other names."""
    found: Seen = {}
    inodes: dict[int, bytes] = {}
    pending = [b""]
    base = os.fsencode(root)
    while pending:
        path = pending.pop()
        place = os.path.join(base, path) if path else base
        status = os.lstat(place)
        is_dir, is_link = stat.S_ISDIR(status.st_mode), stat.S_ISLNK(status.st_mode)
        content: bytes = b""
        if is_link:
            content = os.readlink(place)
        elif stat.S_ISREG(status.st_mode):
            with open(place, "rb") as stream:
                content = hashlib.sha256(stream.read()).digest()
        names = sorted(os.listxattr(place, follow_symlinks=False))
        xattrs = tuple((os.fsencode(name), os.getxattr(place, name, follow_symlinks=False)) for name in names)
        found[path] = (
            stat.S_IFMT(status.st_mode),
            0o777 if is_link else stat.S_IMODE(status.st_mode),
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_size if stat.S_ISREG(status.st_mode) else 0,
            content,
            xattrs,
        )
        if is_dir:
            pending += [os.path.join(path, name) if path else name for name in os.listdir(place)]
        else:
            inodes.setdefault(status.st_ino, path)
    groups: dict[int, list[bytes]] = {}
    for path in found:
        status = os.lstat(os.path.join(base, path) if path else base)
        if not stat.S_ISDIR(status.st_mode):
            groups.setdefault(status.st_ino, []).append(path)
    return _with_groups(found, groups.values())


_FORMATS = {"dir": stat.S_IFDIR, "file": stat.S_IFREG, "symlink": stat.S_IFLNK, "fifo": stat.S_IFIFO}


def seen_in_tree(tree: ImageTree, data: bytes) -> Seen:
    """The same of a tree, contents read from `data`."""
    found: Seen = {}
    groups: dict[bytes, list[bytes]] = {}
    by_path = {entry.path: entry for entry in tree.entries}
    for entry in tree.entries:
        real = by_path[entry.target] if entry.kind == "hardlink" else entry
        content = real.target
        if real.kind == "file":
            content = hashlib.sha256(data[real.offset : real.offset + real.size]).digest()
            assert content == real.sha256
        found[entry.path] = (
            _FORMATS[real.kind], real.mode, real.uid, real.gid, real.mtime_ns, real.size, content, real.xattrs,
        )  # fmt: skip
        if real.kind != "dir":
            groups.setdefault(real.path, []).append(entry.path)
    return _with_groups(found, groups.values())


def _with_groups(found: Seen, groups: Iterable[list[bytes]]) -> Seen:
    together = {path: tuple(sorted(group)) for group in groups for path in group if len(group) > 1}
    return {path: (*values, together.get(path, ())) for path, values in found.items()}


def wheel(index: Path, version: str, *, needs: str = "", name: str = "petal") -> None:
    """A wheel with a script, in an index of its own kind: a page per project."""
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"version = {version!r}\n",
        f"{info}/METADATA": meta + (f"Requires-Dist: {needs}\n" if needs else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[console_scripts]\n{name} = {name}:main\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as made:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            made.writestr(path, text)
    links = "".join(f'<a href="{path.name}">{path.name}</a>' for path in sorted(folder.glob("*.whl")))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")
