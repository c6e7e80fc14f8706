"""Pushes of images: sources in files, codecs, bounds, sharing, going on."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from content_helpers import CountingOrigin, noise
from image_helpers import Layout, Pushed, digest, member, names, pack, tar
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.errors import (
    ConflictError,
    CorruptContentError,
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    StorageFullError,
)
from snowdrop.image import codecs, unpack
from snowdrop.image.archive import DirectoryFiles, LayoutSource
from snowdrop.image.codecs import plain_stream
from snowdrop.image.oci import Platform, parse_reference
from snowdrop.image.opening import ReachOptions, open_image
from snowdrop.image.unpack import LayerFolder

REACH = ReachOptions(platform=Platform())
BASE = tar(member("bin/sh", data=b"#!" * 5000, mode=0o755), member("etc/gone", data=b"x"))
TOP = tar(member("app/main", data=noise(3 << 20, seed=1)), member("etc/.wh.gone"))
RUN = {"Env": ["A=1"], "Entrypoint": ["/bin/sh"], "Cmd": ["-c", "x"], "User": "1000:1000", "WorkingDir": "/app"}
PATHS = [b"", b"app", b"app/main", b"bin", b"bin/sh", b"etc"]


def drain(read: Callable[[int], bytes]) -> None:
    while read(1 << 20):
        pass


def archive(layout: Layout, path: Path) -> Path:
    """A tar of the layout."""
    layout.write(path.with_suffix(".d"))
    with tarfile.open(path, "w") as made:
        made.add(path.with_suffix(".d"), arcname=".")
    return path


def docker_archive(path: Path, layers: list[bytes], tags: list[str]) -> Path:
    config = json.dumps({"rootfs": {"diff_ids": [digest(layer) for layer in layers]}, "config": RUN}).encode()
    listed = [{"Config": "c.json", "RepoTags": tags, "Layers": [f"{n}/layer.tar" for n in range(len(layers))]}]
    with tarfile.open(path, "w") as made:
        for name, data in [("manifest.json", json.dumps(listed).encode()), ("c.json", config)]:
            made.addfile(*_info(name, data))
        made.addfile(*_info("blob", layers[0]))
        link, _ = member("0/layer.tar", tarfile.SYMTYPE, linkname="../blob")
        made.addfile(link)
        for number, data in enumerate(layers[1:], 1):
            made.addfile(*_info(f"{number}/layer.tar", data))
    return path


def _info(name: str, data: bytes) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info, _ = member(name, data=data)
    return info, io.BytesIO(data)


@pytest.mark.parametrize("kind", ["layout", "archive", "docker"])
@pytest.mark.parametrize("codec", ["plain", "gzip", "zstd"])
def test_an_image_in_files_becomes_a_tree(kind: str, codec: str, tmp_path: Path) -> None:
    layout = Layout([(BASE, codec), (TOP, codec)], RUN)
    if kind == "layout":
        text = str(layout.write(tmp_path / "l"))
    elif kind == "archive":
        text = f"oci:{archive(layout, tmp_path / 'a.tar')}:latest"
    else:
        text = str(docker_archive(tmp_path / "d.tar", [BASE, TOP], ["app:1"]))
    source, is_remote = open_image(text, REACH)
    pushed = Pushed(source, tmp_path / "w")
    tree, data = pushed.tree(), pushed.data()
    assert (names(tree.entries), is_remote) == (PATHS, False)
    main = tree.entries[2]
    assert data[main.offset : main.offset + main.size] == noise(3 << 20, seed=1)
    config = tree.config
    assert (config.env, config.entrypoint, config.cmd) == (("A=1",), ("/bin/sh",), ("-c", "x"))
    assert (config.user, config.workdir) == ("1000:1000", "/app")
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["lock"]  # nothing is left


def test_the_same_layers_give_the_same_artefact_however_they_are_packed(tmp_path: Path) -> None:
    made = [
        Pushed(LayoutSource(DirectoryFiles(Layout([(BASE, codec), (TOP, codec)], RUN).write(tmp_path / codec)),
                            name=codec, wanted="", platform=Platform()), tmp_path / "w")
        for codec in ("plain", "gzip", "zstd")
    ]  # fmt: skip
    assert len({one.pushed.result.artefact.manifest for one in made}) == 1


def test_images_share_what_is_the_same_in_them(tmp_path: Path) -> None:
    many = [member(f"lib/{n:03d}", data=noise(3000 + n, seed=n)) for n in range(400)]
    origin = MemoryOrigin()
    results = []
    for number, files in enumerate((many, [*many[:200], member("lib/new", data=b"n" * 5000), *many[200:]])):
        layout = Layout([(tar(*files), "gzip")]).write(tmp_path / str(number))
        source, _ = open_image(str(layout), REACH)
        results.append(Pushed(source, tmp_path / "w", origin=origin))
    before, after = ({chunk.digest for chunk in one.manifest.chunks[1:]} for one in results)
    assert len(before) > 5
    assert len(after - before) <= 2


def test_a_trace_says_what_comes_first(tmp_path: Path) -> None:
    layout = Layout([(BASE, "plain"), (TOP, "plain")]).write(tmp_path / "l")
    plain = Pushed(open_image(str(layout), REACH)[0], tmp_path / "w").tree()
    ordered = Pushed(
        open_image(str(layout), REACH)[0], tmp_path / "w", order=(b"no/file", b"bin", b"bin/sh")
    ).tree()
    assert [entry.offset for entry in plain.entries if entry.size] == [0, 3 << 20]
    assert [entry.offset for entry in ordered.entries if entry.size] == [12288, 0]


@pytest.mark.parametrize("what", ["layer", "diff_id", "config", "manifest"])
def test_a_wrong_digest_is_noticed(what: str, tmp_path: Path) -> None:
    layout = Layout([(BASE, "gzip")])
    if what == "diff_id":
        other = Layout([(TOP, "gzip")])
        document = {"schemaVersion": 2, "config": other.config, "layers": layout.layers}
        layout.blobs |= other.blobs
        layout.manifest = layout.add(json.dumps(document).encode(), layout.manifest["mediaType"])
    else:
        name = {"layer": layout.layers[0], "config": layout.config, "manifest": layout.manifest}[what]["digest"]
        changed = layout.blobs[name]
        if what == "layer":
            layout.blobs[name] = pack(TOP, "gzip")
        else:
            layout.blobs[name] = changed.replace(b"amd64", b"arm64") if what == "config" else changed + b" "
    with pytest.raises(IntegrityError, match="not what"):
        Pushed(open_image(str(layout.write(tmp_path / "l")), REACH)[0], tmp_path / "w")


def test_several_images_want_a_name(tmp_path: Path) -> None:
    layout = Layout([(BASE, "gzip")])
    root = layout.write(tmp_path / "l")
    other = Layout([(TOP, "gzip")])
    entries = json.loads(layout.index("one"))["manifests"] + json.loads(other.index("two"))["manifests"]
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    with pytest.raises(InvalidInputError, match="2 images") as raised:
        open_image(str(root), REACH)[0].image()
    assert "one, two" in raised.value.next_step
    assert open_image(f"oci:{root}:one", REACH)[0].image().digest == layout.manifest["digest"]
    with pytest.raises(NotFoundError):
        open_image(f"oci:{root}:three", REACH)[0].image()


def test_a_platform_is_chosen(tmp_path: Path) -> None:
    layout = Layout([(BASE, "gzip")])
    root = layout.write(tmp_path / "l")
    entries = [
        {**layout.manifest, "platform": {"os": "linux", "architecture": "arm64", "variant": "v8"}},
        {**Layout([(TOP, "gzip")]).manifest, "platform": {"os": "linux", "architecture": "amd64"}},
    ]
    (root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": entries}))
    reach = ReachOptions(platform=Platform("linux", "arm64"))
    assert open_image(str(root), reach)[0].image().digest == layout.manifest["digest"]
    with pytest.raises(NotFoundError, match="s390x") as raised:
        open_image(str(root), ReachOptions(platform=Platform("linux", "s390x")))[0].image()
    assert "linux/arm64/v8, linux/amd64" in raised.value.next_step


@pytest.mark.parametrize(
    "packed",
    [
        gzip.compress(b"a" * 3000) + gzip.compress(b"b" * 3000) + bytes(700),
        zstandard.compress(b"a" * 3000) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(b"b" * 3000),
        b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(b"a" * 3000 + b"b" * 3000),
        b"a" * 3000 + b"b" * 3000,
    ],
    ids=["gzip", "zstd", "zstd-skippable-first", "plain"],
)
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_members_and_frames_follow_each_other(packed: bytes, step: int) -> None:
    stream = io.BytesIO(packed)
    read = plain_stream(lambda most: stream.read(min(most, step)), where="x", plain_bytes_max=1 << 20)
    found = b"".join(iter(lambda: read(999), b""))
    assert found == b"a" * 3000 + b"b" * 3000


@pytest.mark.parametrize("damage", ["cut", "flip", "garbage"])
def test_damaged_gzip_is_noticed(damage: str) -> None:
    packed = gzip.compress(noise(5000))
    bad = {"cut": packed[:-9], "flip": packed[:-6] + b"!" + packed[-5:], "garbage": packed + b"junk"}[damage]
    read = plain_stream(io.BytesIO(bad).read, where="x", plain_bytes_max=1 << 20)
    with pytest.raises(CorruptContentError, match="gzip"):
        drain(read)


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_bomb_ends_at_the_ratio(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "RATIO_FREE_BYTES", 1 << 20)
    read = plain_stream(io.BytesIO(pack(bytes(64 << 20), codec)).read, where="x", plain_bytes_max=1 << 40)
    with pytest.raises(CorruptContentError, match="ratio_max"):
        drain(read)


def test_a_layer_has_a_bound() -> None:
    read = plain_stream(io.BytesIO(bytes(3 << 20)).read, where="x", plain_bytes_max=1 << 20)
    with pytest.raises(CorruptContentError, match="layer_bytes_max"):
        drain(read)


def test_the_folder_has_a_bound_and_one_user(tmp_path: Path) -> None:
    source, _ = open_image(str(Layout([(TOP, "gzip")]).write(tmp_path / "l")), REACH)
    folder = LayerFolder(tmp_path / "w", bytes_max=1 << 20)
    try:
        with pytest.raises(ConflictError, match="another push"):
            LayerFolder(tmp_path / "w")
        layer = source.image().layers[0]
        with pytest.raises(StorageFullError) as raised:
            folder.obtain(source, layer, fetch=False, skip_devices=False, progress=lambda _: None)
        assert raised.value.next_step
    finally:
        folder.close()


def test_a_push_goes_on_with_the_layers_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Layout([(BASE, "gzip"), (TOP, "gzip")]).write(tmp_path / "l")
    read: list[str] = []

    class Watched(LayoutSource):
        def read_layer(self, layer: Any, offset: int) -> Any:
            read.append(layer.key)
            return super().read_layer(layer, offset)

    def source() -> Watched:
        return Watched(DirectoryFiles(root), name="x", wanted="", platform=Platform())

    first, second = (layer.key for layer in source().image().layers)
    whole = (root / second).read_bytes()
    (root / second).write_bytes(whole[:1000])
    with pytest.raises(CorruptContentError, match="too early"):
        Pushed(source(), tmp_path / "w")
    (root / second).write_bytes(whole)
    assert names(Pushed(source(), tmp_path / "w").tree().entries) == PATHS
    assert read == [first, second, second]
    monkeypatch.setattr(unpack, "STALE_S", -1.0)
    LayerFolder(tmp_path / "w").close()
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["lock"]


def test_a_full_origin_leaves_no_manifest(tmp_path: Path) -> None:
    class Full(CountingOrigin):
        def put(self, key: str, data: Any) -> None:
            raise StorageFullError("no space", where=key)

    origin = Full()
    with pytest.raises(StorageFullError):
        Pushed(
            open_image(str(Layout([(TOP, "gzip")]).write(tmp_path / "l")), REACH)[0], tmp_path / "w", origin=origin
        )
    assert not origin.objects


def test_references_are_read_as_others_read_them() -> None:
    sha = "sha256:" + "a" * 64
    said = {
        "busybox": ("registry-1.docker.io", "library/busybox", "latest", ""),
        "org/app:1": ("registry-1.docker.io", "org/app", "1", ""),
        "docker.io/app": ("registry-1.docker.io", "library/app", "latest", ""),
        "localhost/app": ("localhost", "app", "latest", ""),
        "ghcr.io/a/b/c:x_y": ("ghcr.io", "a/b/c", "x_y", ""),
        "host:5000/app": ("host:5000", "app", "latest", ""),
        "[::1]:5000/app:2": ("[::1]:5000", "app", "2", ""),
        f"host.d/app:1@{sha}": ("host.d", "app", "1", sha),
        f"host.d/app@{sha}": ("host.d", "app", "", sha),
    }
    for text, wanted in said.items():
        found = parse_reference(text)
        assert (found.host, found.repository, found.tag, found.digest) == wanted, text


@pytest.mark.parametrize(
    "text", ["", "UPPER", "a//b", "h.x/../b", "a:b:c", "a@sha256:12", "a b", "h.x/", "-h.x/a", "a:" + "t" * 129]
)
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="no image reference"):
        parse_reference(text)
