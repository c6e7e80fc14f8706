from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import CountingOrigin, noise, push, safetensors_bytes, small_pool
from snowdrop.content import siblings
from snowdrop.content.area import Area
from snowdrop.content.disk import DiskTier
from snowdrop.content.fill import Fill
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.placement import area_layout, header_chunks
from snowdrop.content.runs import Run, Ticket
from snowdrop.content.siblings import EarlierFills
from snowdrop.content.source import ChunkSource, PackSource, bad_chunks
from snowdrop.domain.manifest import Manifest
from snowdrop.policy.prefetch import SMALL_RUN_BYTES, START_RUNS


@pytest.fixture
def fill(tmp_path: Path) -> Iterator[Fill]:
    """Of one tensor file; neither place has any of it yet."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {f"t{index}": ("U8", [300_000], noise(300_000, index)) for index in range(8)}
    (source / "m.safetensors").write_bytes(safetensors_bytes(tensors))
    origin = CountingOrigin()
    digest = push(source, origin).artefact.manifest
    manifest = decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])
    layout = area_layout(manifest)
    fill = made(manifest, PackSource(origin, manifest))
    fill.area = Area(manifest, layout, small_pool())
    disk = DiskTier(tmp_path / "cache", 1 << 30)
    disk.open()
    fill.landing = disk.open_landing(digest, manifest)
    yield fill
    fill.area.close()
    disk.close()


@pytest.fixture
def sharded(tmp_path: Path) -> Fill:
    """Of three tensor files, without places."""
    source = tmp_path / "source"
    source.mkdir()
    for shard in range(3):
        tensors = {
            f"t{shard}.{index}": ("U8", [300_000], noise(300_000, 10 * shard + index)) for index in range(3)
        }
        (source / f"m-{shard}.safetensors").write_bytes(safetensors_bytes(tensors))
    origin = CountingOrigin()
    digest = push(source, origin).artefact.manifest
    manifest = decode_manifest(origin.objects[manifest_key(PUBLIC_DOMAIN, digest)])
    return made(manifest, PackSource(origin, manifest))


def made(manifest: Manifest, last: ChunkSource) -> Fill:
    return Fill(
        manifest,
        area_layout(manifest),
        header_chunks(manifest),
        last,
        lambda first, count, view: bad_chunks(manifest, first, count, view),
    )


def take(fill: Fill) -> Run | None:
    return fill.next_run(lambda tier, limit, spare: True, 1 << 30)


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


@pytest.mark.parametrize("ending", ["it comes", "it is given up"])
def test_what_an_earlier_load_brings_is_waited_for_without_looking_at_all_of_it(
    fill: Fill, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siblings, "LOOK_MAX", 2)
    own = made(fill.manifest, fill.last)
    fill.attach("earlier", None, is_lazy=False)
    own.attach("later", None, is_lazy=False)
    waits = EarlierFills(own, [fill])
    chunks = sorted(fill.layout.places)
    assert all(waits.holds_up(chunk) for chunk in chunks)
    looks: list[int] = []
    will_bring = fill.will_bring
    monkeypatch.setattr(fill, "will_bring", lambda chunk: looks.append(chunk) or will_bring(chunk))
    assert waits.no_longer() == []
    assert len(looks) == 2
    if ending == "it comes":
        carry_out(fill)
    else:
        fill.detach("earlier")
    assert sorted(waits.no_longer()) == chunks


def test_headers_are_asked_for_beside_the_first_tensors_and_count_for_nothing(fill: Fill) -> None:
    """The origin gives two runs at a time, both taken: a header goes all the same, a tensor waits."""
    fill.attach("h", None, is_lazy=False)
    asked: list[tuple[int, int]] = []

    def full(tier: str, run_bytes_max: int, spare: int) -> bool:
        asked.append((run_bytes_max, spare))
        return run_bytes_max <= SMALL_RUN_BYTES

    run = fill.next_run(full, 8 << 20)
    assert run is not None
    assert (run.first, run.count) == (0, 1)
    assert run.length < 10_000
    assert asked[-1] == (SMALL_RUN_BYTES, 1)
    assert fill.next_run(full, 8 << 20) is None
    assert [spare for _, spare in asked] == [START_RUNS, 1, START_RUNS]


def test_the_headers_of_later_files_take_none_of_their_tensors_along(sharded: Fill) -> None:
    """They go ahead of the first tensor, which would wait for what they bring."""
    sharded.area = Area(sharded.manifest, sharded.layout, small_pool())
    sharded.attach("h", None, is_lazy=False)
    headers = header_chunks(sharded.manifest)
    assert len(headers) == 3
    runs = [run for run in iter(lambda: take(sharded), None) if run is not None]
    assert [(run.first, run.count) for run in runs[:3]] == [(chunk, 1) for chunk in headers]
    rest = [chunk for run in runs[3:] for chunk in range(run.first, run.first + run.count)]
    assert sorted({*headers, *rest}) == sorted(sharded.layout.places)
    sharded.area.close()
