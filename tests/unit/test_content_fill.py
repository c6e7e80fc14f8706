from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import CountingOrigin, noise, push, safetensors_bytes, small_pool
from snowdrop.content.area import Area
from snowdrop.content.disk import DiskTier
from snowdrop.content.fill import Fill
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.placement import area_layout, header_chunks
from snowdrop.content.runs import Run, Ticket
from snowdrop.content.source import PackSource, bad_chunks


@pytest.fixture
def fill(tmp_path: Path) -> Iterator[Fill]:
    """Of one tensor file; neither place has any of it yet."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {"t": ("U8", [300_000], noise(300_000))}
    (source / "m.safetensors").write_bytes(safetensors_bytes(tensors))
    origin = CountingOrigin()
    digest = push(source, origin).artefact.manifest
    manifest = decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])
    layout = area_layout(manifest)
    fill = Fill(
        manifest,
        layout,
        header_chunks(manifest),
        PackSource(origin, manifest),
        lambda first, count, view: bad_chunks(manifest, first, count, view),
    )
    fill.area = Area(manifest, layout, small_pool())
    disk = DiskTier(tmp_path / "cache", 1 << 30)
    disk.open()
    fill.landing = disk.open_landing(digest, manifest)
    yield fill
    fill.area.close()
    disk.close()


def take(fill: Fill) -> Run | None:
    return fill.next_run(lambda tier, spare: True, 1 << 30)


def carry_out(fill: Fill) -> None:
    """All that is due, one run after the other."""
    while (run := take(fill)) is not None:
        fill.finish(run, fill.carry(run, lambda size: memoryview(bytearray(size))))


def test_a_reader_gets_what_was_on_its_way_to_the_directory_when_it_came(fill: Fill) -> None:
    fill.open_ticket(Ticket("landing", {*fill.layout.places}, lambda: None))
    run = take(fill)
    assert run is not None
    fill.attach("h", None, is_lazy=False)
    assert take(fill) is None, "all of it is under way"
    fill.finish(run, fill.carry(run, lambda size: memoryview(bytearray(size))))
    carry_out(fill)
    assert fill.area is not None
    assert fill.area.is_complete


def test_the_directory_gets_what_a_reader_had_got_when_it_was_asked_for(fill: Fill) -> None:
    fill.attach("h", None, is_lazy=False)
    run = take(fill)
    assert run is not None
    outcome = fill.carry(run, lambda size: memoryview(bytearray(size)))
    ended: list[bool] = []
    fill.open_ticket(Ticket("landing", {*fill.layout.places}, lambda: ended.append(True)))
    assert take(fill) is None, "all of it is under way"
    fill.finish(run, outcome)
    carry_out(fill)
    assert ended == [True]
