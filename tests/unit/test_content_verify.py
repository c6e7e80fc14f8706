"""Reading an origin back finds what is wrong and says where."""

from pathlib import Path

import pytest

from content_helpers import CountingOrigin, noise, push, write_model
from snowdrop.content.gcformat import Root
from snowdrop.content.keys import PUBLIC_KEYRING
from snowdrop.content.layout import manifest_key, ref_key
from snowdrop.content.refs import make_ref
from snowdrop.content.seen import SeenFile
from snowdrop.content.signing import Signer, TrustedKeys
from snowdrop.content.verify import OriginVerified, verify_names, verify_origin
from snowdrop.domain.ids import DEFAULT_TENANT
from snowdrop.domain.manifest import ArtefactRef


class Bench:
    def __init__(self, folder: Path) -> None:
        self.origin = CountingOrigin()
        self.artefact = push(write_model(folder / "model"), self.origin).artefact
        self.signer = Signer.make()
        self.seen = folder / "seen.json"

    def verify(self, *roots: Root) -> OriginVerified:
        return verify_origin(self.origin, roots or (Root("public", self.artefact.manifest),), PUBLIC_KEYRING)

    def name(self, generation: int, artefact: ArtefactRef, signer: Signer | None = None) -> None:
        ref = make_ref(
            artefact,
            tenant=DEFAULT_TENANT,
            name="m",
            generation=generation,
            created_unix_ns=1,
            signer=signer or self.signer,
        )
        self.origin.put(ref_key("public", DEFAULT_TENANT, "m"), ref)

    def problems_of_name(self) -> list[str]:
        trusted = TrustedKeys({self.signer.key_id: self.signer.public_key})
        names = [("public", DEFAULT_TENANT, "m", self.artefact.manifest)]
        return [problem.what for problem in verify_names(self.origin, names, trusted, SeenFile(self.seen))]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_what_is_right_is_read_once_and_found_right(bench: Bench) -> None:
    root = Root("public", bench.artefact.manifest)
    found = bench.verify(root, root)
    assert found.problems == ()
    packs = sum(len(bench.origin.objects[key]) for key in bench.origin.packs())
    assert found.read_bytes == bench.origin.pack_bytes_read == packs


def test_a_wrong_byte_is_found_with_its_file_and_chunk(bench: Bench) -> None:
    bench.origin.flip_byte(noise(70_000, 3)[1000:1100])
    problems = bench.verify().problems
    assert [(problem.file, problem.what) for problem in problems] == [("nested/vocab.txt", "its bytes are wrong")]
    assert problems[0].chunk >= 0
    assert problems[0].where in bench.origin.objects


def test_a_pack_that_is_cut_or_gone_is_found(bench: Bench) -> None:
    key = bench.origin.packs()[0]
    whole = bench.origin.objects[key]
    bench.origin.put(key, whole[:-1])
    assert "bytes instead of" in bench.verify().problems[0].what
    bench.origin.delete(key)
    assert "no such object" in bench.verify().problems[0].what


def test_a_manifest_that_is_damaged_or_gone_is_found(bench: Bench) -> None:
    key = manifest_key("public", bench.artefact.manifest)
    bench.origin.put(key, b"junk")
    assert [problem.where for problem in bench.verify().problems] == [key]
    bench.origin.delete(key)
    assert [problem.where for problem in bench.verify().problems] == [key]


def test_private_content_without_its_key_is_not_judged(bench: Bench) -> None:
    found = bench.verify(Root("t-" + "0" * 32, bench.artefact.manifest))
    assert found.problems == ()
    assert len(found.skipped) == 1


def test_names_are_checked_as_any_reader_must(bench: Bench) -> None:
    assert "no such object" in bench.problems_of_name()[0]
    bench.name(2, bench.artefact)
    assert bench.problems_of_name() == []
    bench.name(1, bench.artefact)
    assert "rolled back" in bench.problems_of_name()[0]
    bench.name(3, bench.artefact, signer=Signer.make())
    assert "not trusted" in bench.problems_of_name()[0]
