"""Collection of one origin by itself: what goes, what stays and is named, and what an origin may refuse."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from collection_world import PACK_DATA, SECOND_NS, manifest_of, packs_of
from content_helpers import push, write_model
from snowdrop.content.collect import CollectionReport, Collector
from snowdrop.content.gcformat import CONDEMNED, DELETING, LEASES, ROOTS, Root
from snowdrop.content.imagetrace import key_of, store_trace
from snowdrop.content.keys import PUBLIC_KEYRING
from snowdrop.content.layout import manifest_key, ref_key
from snowdrop.content.leases import Clock, push_lease
from snowdrop.content.manifest import manifest_digest
from snowdrop.content.observe import Observer
from snowdrop.content.origin import DirectoryOrigin, MemoryOrigin, Origin
from snowdrop.content.originstats import origin_stats
from snowdrop.content.refs import make_ref
from snowdrop.content.signing import Signer
from snowdrop.domain.errors import StorageFullError, UnauthorisedError
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.imagetrace import ImageTrace
from snowdrop.domain.manifest import ArtefactRef

SIGNER = Signer.make()


class Later(Clock):
    """The real time, moved forward at will."""

    ahead_s = 0.0

    def now_unix_ns(self) -> int:
        return super().now_unix_ns() + int(self.ahead_s * SECOND_NS)


class Bench:
    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.clock = Later()
        self.roots: list[Root] = []
        self.own_platform = ""

    def name(self, name: str, artefact: ArtefactRef) -> None:
        ref = make_ref(artefact, tenant=DEFAULT_TENANT, name=name, generation=1, created_unix_ns=1, signer=SIGNER)
        self.origin.put(ref_key("public", DEFAULT_TENANT, name), ref)

    def unname(self, name: str) -> None:
        self.origin.delete(ref_key("public", DEFAULT_TENANT, name))

    def observer(self) -> Observer:
        return Observer(
            self.origin, lambda: self.roots, keyring=lambda: PUBLIC_KEYRING, own_platform=self.own_platform
        )

    def gc(self, *, grace_s: float = 0.0, dry_run: bool = False) -> CollectionReport:
        collector = Collector(self.origin, self.observer(), grace_s=grace_s, clock=self.clock)
        return collector.run(dry_run=dry_run)

    def content(self) -> set[str]:
        return {key for key in self.origin.list("") if "/packs/" in key or "/manifests/" in key}

    def under(self, *prefixes: str) -> list[str]:
        return [key for prefix in prefixes for key in self.origin.list(prefix)]


@pytest.fixture
def bench() -> Bench:
    return Bench(MemoryOrigin())


@pytest.fixture
def two(bench: Bench, tmp_path: Path) -> dict[str, ArtefactRef]:
    """Two models at the origin that share most of their packs or chunks; both named."""
    one = push(write_model(tmp_path / "one"), bench.origin).artefact
    other_folder = write_model(tmp_path / "other")
    (other_folder / "config.json").write_text('{"b": 2}')
    other = push(other_folder, bench.origin).artefact
    bench.name("one", one)
    bench.name("other", other)
    return {"one": one, "other": other}


def test_what_is_named_stays(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    before = bench.content()
    report = bench.gc()
    assert (report.deleted_objects, report.condemned_objects, report.notes) == (0, 0, ())
    assert bench.content() == before
    assert bench.under(CONDEMNED, DELETING, LEASES) == []


def test_garbage_is_condemned_and_goes_after_the_grace_period(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    bench.unname("other")
    before = bench.content()
    first = bench.gc(grace_s=100)
    assert first.deleted_objects == 0
    assert first.condemned_objects > 0
    assert bench.content() == before
    bench.clock.ahead_s = 90
    assert bench.gc(grace_s=100).deleted_objects == 0
    bench.clock.ahead_s = 101
    last = bench.gc(grace_s=100)
    assert last.deleted_objects == first.condemned_objects
    assert last.deleted_bytes == first.condemned_bytes
    kept = bench.observer().observe(now_unix_ns=bench.clock.now_unix_ns())
    live = manifest_key("public", two["one"].manifest)
    assert bench.content() == {live, *kept.artefacts[live].packs}
    bench.gc(grace_s=100)
    assert bench.under(CONDEMNED, DELETING) == []


def test_a_dry_run_changes_nothing_and_says_what_would_go(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    bench.unname("other")
    before = dict(bench.origin.objects) if isinstance(bench.origin, MemoryOrigin) else {}
    told = bench.gc(dry_run=True)
    assert isinstance(bench.origin, MemoryOrigin)
    assert bench.origin.objects == before
    done = bench.gc()
    assert (told.deleted_objects, told.deleted_bytes) == (done.deleted_objects, done.deleted_bytes)
    assert done.deleted_objects > 0


def test_traces_go_with_their_image_and_are_no_strangers(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    keys = {}
    for name, artefact in two.items():
        trace = ImageTrace(1, artefact.manifest, "python -m app", 1, ((0, 4096),))
        store_trace(bench.origin, "public", DEFAULT_TENANT, trace)
        keys[name] = key_of("public", DEFAULT_TENANT, artefact.manifest, trace.start)
    assert bench.gc().stranger_count == 0
    bench.unname("other")
    bench.gc()
    assert manifest_key("public", two["other"].manifest) not in bench.content()
    bench.gc(dry_run=True)
    assert all(bench.origin.exists(key) for key in keys.values())
    bench.gc()
    assert (bench.origin.exists(keys["one"]), bench.origin.exists(keys["other"])) == (True, False)


def test_a_root_of_control_or_of_another_platform_keeps_content(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    bench.unname("other")
    bench.unname("one")
    bench.roots = [Root("public", two["one"].manifest)]
    record = b'{"version":1,"platform":"p2","seen_unix_ns":1,"roots":[["public","%s"]]}'
    bench.origin.put(ROOTS + "p2", record % two["other"].manifest.encode())
    before = bench.content()
    assert bench.gc().deleted_objects == 0
    bench.origin.put(ROOTS + "p2", b'{"version":1,"platform":"p2","seen_unix_ns":1,"roots":[]}')
    assert bench.gc().deleted_objects > 0
    assert bench.content() < before


def test_what_stands_at_the_origin_about_this_platform_itself_does_not_count(
    bench: Bench, two: dict[str, ArtefactRef]
) -> None:
    bench.unname("other")
    record = b'{"version":1,"platform":"own","seen_unix_ns":1,"roots":[["public","%s"]]}'
    bench.origin.put(ROOTS + "own", record % two["other"].manifest.encode())
    assert bench.gc(dry_run=True).deleted_objects == 0
    bench.own_platform = "own"
    assert bench.gc(dry_run=True).deleted_objects > 0


def test_a_name_that_comes_back_in_the_grace_period_saves_its_content(
    bench: Bench, two: dict[str, ArtefactRef]
) -> None:
    bench.unname("other")
    bench.gc(grace_s=100)
    bench.name("other", two["other"])
    bench.clock.ahead_s = 1_000
    assert bench.gc(grace_s=100).deleted_objects == 0
    # Garbage again later: the grace period begins anew.
    bench.unname("other")
    assert bench.gc(grace_s=100).deleted_objects == 0


def test_a_push_under_way_keeps_what_it_may_use(bench: Bench, two: dict[str, ArtefactRef], tmp_path: Path) -> None:
    bench.unname("other")
    with push_lease(bench.origin, purpose="a push", clock=bench.clock) as lease:
        report = bench.gc()
        assert report.deleted_objects == 0
        assert report.pushes == (f"{lease.id}: a push",)
        again = push(tmp_path / "other", lease.origin).artefact
        assert again == two["other"]
        bench.name("other", again)
    assert bench.gc().deleted_objects == 0


def test_a_push_that_knows_what_is_condemned_puts_it_anew_and_does_not_hold_up_the_rest(
    bench: Bench, two: dict[str, ArtefactRef], tmp_path: Path
) -> None:
    bench.unname("other")
    bench.unname("one")
    condemned = bench.gc(grace_s=100).condemned_objects
    bench.clock.ahead_s = 200
    with push_lease(bench.origin, purpose="a push", clock=bench.clock) as lease:
        assert not lease.origin.exists(manifest_key("public", two["one"].manifest))
        assert list(lease.origin.list("public/")) == list(lease.origin.entries("public/")) == []
        result = push(tmp_path / "one", lease.origin)
        assert result.new_bytes > 5 << 20
        report = bench.gc(grace_s=100)
        assert 0 < report.deleted_objects < condemned
        bench.name("one", result.artefact)
    assert bench.gc(grace_s=0).deleted_objects == 0
    observed = bench.observer().observe(now_unix_ns=bench.clock.now_unix_ns())
    live = manifest_key("public", two["one"].manifest)
    assert bench.content() == {live, *observed.artefacts[live].packs}


def test_leftovers_of_killed_pushes_go(tmp_path: Path) -> None:
    bench = Bench(DirectoryOrigin(tmp_path / "origin"))
    lease = push_lease(bench.origin, purpose="killed", clock=bench.clock)
    lease.__enter__()  # and never left, as by a kill
    push(write_model(tmp_path / "model"), bench.origin)
    temporary = tmp_path / "origin/public/packs/aa"
    temporary.mkdir(parents=True, exist_ok=True)
    (temporary / ("a" * 64 + ".put-1.tmp")).write_bytes(b"half")
    assert bench.gc().deleted_objects == 0
    bench.clock.ahead_s = 7_200
    report = bench.gc()
    assert report.deleted_objects > 0
    assert (report.temporary_objects, report.temporary_bytes) == (1, 4)
    assert [path for path in (tmp_path / "origin").rglob("*") if path.is_file()] == [
        path for path in (tmp_path / "origin/gc").rglob("*") if path.is_file()
    ]
    assert bench.under(LEASES) == []
    lease.__exit__(None, None, None)


UNKNOWN: list[tuple[str, bytes, str]] = [
    ("public/refs/default/new", b'{"ref":{"version":9},"signature":""}', "version 9"),
    ("public/refs/default/Odd Name", b"", "another form"),
    (ROOTS + "p9", b'{"version":7}', "roots"),
    (LEASES + "lease-x", b"junk", "not understood"),
]


@pytest.mark.parametrize(("key", "data", "why"), UNKNOWN)
def test_what_is_not_understood_keeps_everything_and_is_named(
    bench: Bench, two: dict[str, ArtefactRef], key: str, data: bytes, why: str
) -> None:
    bench.unname("other")
    bench.unname("one")
    bench.origin.put(key, data)
    before = bench.content()
    report = bench.gc()
    assert report.deleted_objects == 0
    assert bench.content() == before
    assert any(why in note for note in report.notes), report.notes
    bench.origin.delete(key)
    assert bench.gc().deleted_objects == len(before)


def test_a_manifest_of_a_newer_version_keeps_its_domain(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    bench.unname("other")
    newer = b'{"version":99}'
    digest = PUBLIC_KEYRING.hasher("public").hexdigest(newer)
    bench.origin.put(f"public/manifests/{digest[:2]}/{digest}", newer)
    report = bench.gc()
    assert report.deleted_objects == 0
    assert any(digest in note for note in report.notes)


def test_a_damaged_manifest_that_nothing_names_is_garbage_and_one_that_is_named_keeps_its_domain(
    bench: Bench, two: dict[str, ArtefactRef]
) -> None:
    key = manifest_key("public", two["other"].manifest)
    bench.origin.put(key, b"junk")
    kept = bench.gc()
    assert kept.deleted_objects == 0
    assert any(key in note for note in kept.notes)
    bench.unname("other")
    assert bench.gc().deleted_objects > 0
    assert not bench.origin.exists(key)


def test_strangers_are_left_alone_and_counted(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    strangers = ["README", "public/other/thing", "public/packs/zz/short", "public/packs/ab/" + "c" * 64]
    for key in strangers:
        bench.origin.put(key, b"x")
    report = bench.gc()
    assert set(report.strangers) == set(strangers)
    assert all(bench.origin.exists(key) for key in strangers)


def test_a_name_without_its_manifest_is_told(bench: Bench, two: dict[str, ArtefactRef]) -> None:
    key = manifest_key("public", two["other"].manifest)
    bench.origin.delete(key)
    assert any(key in note and "not there" in note for note in bench.gc().notes)


class Refusing(MemoryOrigin):
    """Refuses to write, or to delete, keys that begin with a prefix."""

    no_put: tuple[str, ...] = ()
    no_delete: Iterable[str] = ()
    error: type[Exception] = StorageFullError

    def put(self, key: str, data: bytes | memoryview) -> None:
        if key.startswith(self.no_put or ("nothing",)):
            raise self.error("refused")
        super().put(key, data)

    def delete(self, key: str) -> None:
        if any(part in key for part in self.no_delete):
            raise UnauthorisedError("the origin refuses to delete", where=key)
        super().delete(key)


@pytest.mark.parametrize("prefix", [CONDEMNED, DELETING])
def test_a_full_origin_deletes_nothing_and_says_what_to_do(tmp_path: Path, prefix: str) -> None:
    origin = Refusing()
    bench = Bench(origin)
    push(write_model(tmp_path / "m"), origin)
    before = bench.content()
    origin.no_put = (prefix,)
    with pytest.raises(StorageFullError, match="write down what it is about to delete"):
        bench.gc()
    assert bench.content() == before
    origin.no_put = ()
    assert bench.gc().deleted_objects == len(before)


def test_an_origin_that_refuses_to_delete_is_told_and_no_manifest_is_left_without_its_packs(
    tmp_path: Path,
) -> None:
    origin = Refusing()
    bench = Bench(origin)
    push(write_model(tmp_path / "m"), origin)
    before = bench.content()
    origin.no_delete = ("/manifests/",)
    with pytest.raises(UnauthorisedError):
        bench.gc()
    assert bench.content() == before
    assert bench.under(DELETING) == []
    origin.no_delete = ()
    assert bench.gc().deleted_objects == len(before)


def test_statistics_count_what_is_shared_and_what_is_garbage(bench: Bench) -> None:
    for number, packs in enumerate([(1, 2), (1, 2, 3), (4,)]):
        encoded = manifest_of(packs)
        digest = manifest_digest(encoded)
        bench.origin.put(manifest_key("public", digest), encoded)
        for key, pack in zip(packs_of(packs), packs, strict=True):
            bench.origin.put(key, PACK_DATA[pack])
        if number < 2:
            bench.name(
                f"m{number}", ArtefactRef(manifest=digest, kind="model", total_bytes=1, file_count=len(packs))
            )
    observed = bench.observer().observe(now_unix_ns=bench.clock.now_unix_ns())
    found = origin_stats(observed, now_unix_ns=bench.clock.now_unix_ns())
    sizes = [len(data) for data in PACK_DATA]
    assert (found.artefacts_in_use, found.models, found.refs) == (2, 2, 2)
    assert found.plain_bytes == 2 * (sizes[1] + sizes[2]) + sizes[3]
    assert found.in_use_pack_bytes == sizes[1] + sizes[2] + sizes[3]
    assert found.dedupe_ratio == found.plain_bytes / found.in_use_pack_bytes
    assert (found.garbage_objects, found.objects) == (2, 7)
    assert found.garbage_bytes == sizes[4] + len(manifest_of((4,)))
    assert found.stored_bytes == found.in_use_bytes + found.garbage_bytes
