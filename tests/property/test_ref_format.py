"""A ref is believed whole and as it was signed, or not at all."""

from hypothesis import given, settings
from hypothesis import strategies as st

from snowdrop.content.refs import REF_BYTES_MAX, make_ref, verify_ref
from snowdrop.content.signing import Signer, TrustedKeys
from snowdrop.domain.errors import CorruptContentError, UntrustedError
from snowdrop.domain.ids import Digest, TenantId
from snowdrop.domain.manifest import ArtefactRef

SIGNER = Signer.make()
TRUSTED = TrustedKeys({SIGNER.key_id: SIGNER.public_key})
NAMES = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\Z").filter(lambda name: name not in {"v1", "api"})
NUMBERS = st.integers(0, 1 << 62)
ARTEFACTS = st.builds(
    ArtefactRef,
    manifest=st.from_regex(r"\Ablake3:[0-9a-f]{64}\Z").map(Digest),
    kind=st.sampled_from(["model", "code", "image"]),
    total_bytes=NUMBERS,
    file_count=NUMBERS,
    key_domain=st.from_regex(r"\A[a-z0-9][a-z0-9-]{0,20}\Z"),
)


def signed(artefact: ArtefactRef, name: str = "minilm", generation: int = 1, created_unix_ns: int = 0) -> bytes:
    return make_ref(
        artefact,
        tenant=TenantId("default"),
        name=name,
        generation=generation,
        created_unix_ns=created_unix_ns,
        signer=SIGNER,
    )


EXAMPLE = signed(
    ArtefactRef(manifest=Digest("blake3:" + "5a" * 32), kind="model", total_bytes=9, file_count=2), "minilm"
)


def refused(data: bytes) -> bool:
    try:
        verify_ref(data, TRUSTED, where="ref")
    except (CorruptContentError, UntrustedError):
        return True
    return False


@given(ARTEFACTS, NAMES, st.integers(1, 1 << 62), NUMBERS)
def test_what_is_read_is_what_was_signed(artefact: ArtefactRef, name: str, generation: int, created: int) -> None:
    data = signed(artefact, name, generation, created)
    ref = verify_ref(data, TRUSTED, where="ref")
    assert (ref.artefact, ref.name, ref.generation, ref.created_unix_ns) == (artefact, name, generation, created)
    assert len(data) <= REF_BYTES_MAX


def test_every_single_byte_counts() -> None:
    for place in range(len(EXAMPLE)):
        for change in (0x01, 0x20, 0x80, 0xFF):
            mutated = bytearray(EXAMPLE)
            mutated[place] ^= change
            assert refused(bytes(mutated)), (place, change)


@given(st.integers(0, len(EXAMPLE) - 1), st.integers(0, 255))
@settings(max_examples=300)
def test_any_other_byte_anywhere_is_refused(place: int, byte: int) -> None:
    mutated = bytearray(EXAMPLE)
    mutated[place] = byte
    assert refused(bytes(mutated)) or bytes(mutated) == EXAMPLE


@given(st.integers(0, len(EXAMPLE)), st.binary(min_size=1, max_size=8), st.integers(0, 8))
def test_insertions_and_cuts_are_refused(place: int, inserted: bytes, cut: int) -> None:
    mutated = EXAMPLE[:place] + inserted + EXAMPLE[place + cut :]
    assert refused(mutated) or mutated == EXAMPLE


@given(st.binary(max_size=REF_BYTES_MAX + 10))
def test_junk_is_refused_with_a_typed_error(data: bytes) -> None:
    assert refused(data)
