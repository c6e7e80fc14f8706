"""What readers of refs refuse."""

from pathlib import Path

import msgspec
import pytest

from platform_helpers import artefact
from snowdrop.content.layout import ref_key
from snowdrop.content.origin import MemoryOrigin
from snowdrop.content.refs import REF_BYTES_MAX, make_ref, read_ref, sign_again, verify_ref
from snowdrop.content.seen import SeenFile
from snowdrop.content.signing import KeyStore, Signer, TrustedKeys
from snowdrop.domain.errors import CorruptContentError, InvalidInputError, NotFoundError, UntrustedError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.domain.manifest import ArtefactRef
from snowdrop.domain.ref import Ref

SIGNER = Signer.make()
TRUSTED = TrustedKeys({SIGNER.key_id: SIGNER.public_key})
KEY = ref_key("public", DEFAULT_TENANT, "minilm")


def ref_bytes(generation: int = 1, *, letter: str = "a", signer: Signer = SIGNER, name: str = "minilm") -> bytes:
    return make_ref(
        artefact(letter),
        tenant=DEFAULT_TENANT,
        name=name,
        generation=generation,
        created_unix_ns=5,
        signer=signer,
    )


class Reader:
    """A reader with a memory that outlives it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.origin = MemoryOrigin()

    def read(self, *, domain: str = "public", tenant: str = "default", name: str = "minilm") -> Ref:
        seen = SeenFile(self.folder / "seen.json")
        return read_ref(self.origin, domain, TenantId(tenant), name, trusted=TRUSTED, seen=seen)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_a_ref_says_what_was_signed(reader: Reader) -> None:
    reader.origin.put(KEY, ref_bytes(3))
    ref = reader.read()
    assert (ref.artefact, ref.generation, ref.created_unix_ns) == (artefact("a"), 3, 5)


def test_none_there_is_not_found(reader: Reader) -> None:
    with pytest.raises(NotFoundError):
        reader.read()


def test_an_unsigned_or_unfinished_one_is_refused(reader: Reader) -> None:
    whole = ref_bytes()
    inner = whole[whole.index(b":") + 1 : whole.rindex(b',"signature"')]
    for data in (
        b"",
        b"{}",
        inner,
        b'{"ref":' + inner + b"}",
        whole[:-1],
        whole + b" ",
        whole.replace(b":1", b": 1"),
    ):
        reader.origin.put(KEY, data)
        with pytest.raises(CorruptContentError):
            reader.read()


def test_a_key_that_is_not_trusted_is_refused_also_under_the_id_of_one_that_is(reader: Reader) -> None:
    stranger = Signer.make()
    reader.origin.put(KEY, ref_bytes(signer=stranger))
    with pytest.raises(UntrustedError, match="not trusted"):
        reader.read()
    stranger.key_id = SIGNER.key_id
    reader.origin.put(KEY, ref_bytes(signer=stranger))
    with pytest.raises(UntrustedError, match="not that of key"):
        reader.read()


def test_a_valid_ref_under_another_name_tenant_or_domain_is_refused(reader: Reader) -> None:
    reader.origin.put(ref_key("public", DEFAULT_TENANT, "other"), ref_bytes())
    reader.origin.put(ref_key("public", TenantId("eve"), "minilm"), ref_bytes())
    reader.origin.put(ref_key("t-1", DEFAULT_TENANT, "minilm"), ref_bytes())
    for place in ({"name": "other"}, {"tenant": "eve"}, {"domain": "t-1"}):
        with pytest.raises(UntrustedError, match="put under another name"):
            reader.read(**place)


def test_a_rolled_back_ref_is_refused_also_by_a_reader_that_was_started_anew(reader: Reader) -> None:
    reader.origin.put(KEY, ref_bytes(1, letter="a"))
    reader.read()
    reader.origin.put(KEY, ref_bytes(2, letter="b"))
    reader.read()
    reader.origin.put(KEY, ref_bytes(1, letter="a"))
    with pytest.raises(UntrustedError, match="rolled back"):
        reader.read()
    reader.origin.put(KEY, ref_bytes(2, letter="c"))
    with pytest.raises(UntrustedError, match="rolled back"):
        reader.read()
    reader.origin.put(KEY, ref_bytes(2, letter="b"))
    assert reader.read().generation == 2


def test_a_memory_that_makes_no_sense_is_not_taken_for_an_empty_one(reader: Reader) -> None:
    reader.origin.put(KEY, ref_bytes())
    reader.read()
    (reader.folder / "seen.json").write_text("{}")
    with pytest.raises(CorruptContentError, match="makes no sense"):
        reader.read()


def test_an_unknown_version_is_named(reader: Reader) -> None:
    reader.origin.put(KEY, ref_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(CorruptContentError, match="version 2"):
        reader.read()


def test_a_large_object_is_not_even_read(reader: Reader) -> None:
    reader.origin.put(KEY, b" " * (REF_BYTES_MAX + 1))
    with pytest.raises(CorruptContentError, match="ref_bytes_max"):
        reader.read()


def test_bad_names_and_numbers_are_not_signed() -> None:
    for name, generation in (("Bad Name", 1), ("ok", 0), ("ok", 1 << 63)):
        with pytest.raises(InvalidInputError):
            ref_bytes(generation, name=name)
    sha = msgspec.structs.replace(artefact(), manifest="sha256:" + "a" * 64)
    upper = msgspec.structs.replace(artefact(), key_domain="Public")
    for bad in (sha, upper):
        with pytest.raises(InvalidInputError):
            _make(bad)


def test_signing_again_for_another_key_keeps_what_it_says(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    first = verify_ref(ref_bytes(signer=store.signer()), store.trusted(), where="x")
    again = verify_ref(sign_again(first, store.rotate()), store.trusted(), where="x")
    assert again.key_id == store.signing_key_id() != first.key_id
    assert again.generation == first.generation + 1
    assert (again.artefact, again.created_unix_ns) == (first.artefact, first.created_unix_ns)


def _make(bad: ArtefactRef) -> bytes:
    return make_ref(bad, tenant=DEFAULT_TENANT, name="ok", generation=1, created_unix_ns=0, signer=SIGNER)
