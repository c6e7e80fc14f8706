"""Secrets at rest: sealed, bound to their place, rotated; and keys of the platform that are kept apart."""

import base64
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.agent.logs import LineSplitter
from snowdrop.domain.errors import ConflictError, InvalidInputError, NotFoundError, SnowdropError
from snowdrop.domain.ids import DEFAULT_TENANT, TenantId
from snowdrop.domain.secret import Redactor, SecretRecord, SecretValue, check_names
from snowdrop.tenancy.secrets import PlatformKeys, rewrap, seal, unseal

VALUE = "hf_s3cr3t-value"


@pytest.fixture
def keys(tmp_path: Path) -> PlatformKeys:
    made = PlatformKeys(tmp_path / "secret-keys")
    made.load()
    return made


def record(name: str = "hf-token", tenant: TenantId = DEFAULT_TENANT) -> SecretRecord:
    return SecretRecord(
        tenant=tenant,
        name=name,
        version=0,
        key_id="",
        wrapped=b"",
        sealed=b"",
        created_unix_ns=1,
        changed_unix_ns=1,
    )


def test_what_was_sealed_opens_and_holds_nothing_of_the_value(keys: PlatformKeys) -> None:
    sealed = seal(keys, VALUE, None, record())
    assert VALUE.encode() not in msgspec.msgpack.encode(sealed)
    assert unseal(keys, sealed).text == VALUE
    again = seal(keys, VALUE, sealed, record())
    assert again.version == 2
    assert again.sealed != sealed.sealed, "a nonce or a key was used twice"


@pytest.mark.parametrize("change", [{"tenant": "other"}, {"name": "other"}, {"version": 7}])
def test_a_record_that_was_moved_does_not_open(keys: PlatformKeys, change: dict[str, object]) -> None:
    moved = msgspec.structs.replace(seal(keys, VALUE, None, record()), **change)
    with pytest.raises(SnowdropError, match="was changed in the database"):
        unseal(keys, moved)


@pytest.mark.parametrize("field", ["sealed", "wrapped"])
def test_a_flipped_bit_is_found(keys: PlatformKeys, field: str) -> None:
    sealed = seal(keys, VALUE, None, record())
    data = bytearray(getattr(sealed, field))
    data[-1] ^= 1
    with pytest.raises(SnowdropError, match="was changed in the database"):
        unseal(keys, msgspec.structs.replace(sealed, **{field: bytes(data)}))


def test_rotation_makes_the_old_key_useless_for_what_is_stored(keys: PlatformKeys, tmp_path: Path) -> None:
    sealed = seal(keys, VALUE, None, record())
    old = keys.current
    assert keys.add() != old
    turned = rewrap(keys, sealed)
    assert turned.key_id == keys.current
    assert turned.sealed == sealed.sealed
    assert keys.drop_others() == 1
    assert unseal(keys, turned).text == VALUE
    with pytest.raises(NotFoundError, match=old):
        unseal(keys, sealed)
    later = PlatformKeys(tmp_path / "secret-keys")
    later.load()
    assert unseal(later, turned).text == VALUE


def test_a_rotation_that_was_broken_off_loses_nothing(keys: PlatformKeys, tmp_path: Path) -> None:
    first, second = seal(keys, VALUE, None, record()), seal(keys, VALUE, None, record("b"))
    keys.add()
    turned = rewrap(keys, first)
    later = PlatformKeys(tmp_path / "secret-keys")
    later.load()
    assert later.current == turned.key_id
    assert unseal(later, turned).text == unseal(later, second).text == VALUE


def test_key_files_are_private_and_one_that_is_not_is_refused(keys: PlatformKeys, tmp_path: Path) -> None:
    (path,) = (tmp_path / "secret-keys").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o640)
    with pytest.raises(SnowdropError, match="can be read by others"):
        PlatformKeys(tmp_path / "secret-keys").load()


def test_keys_of_the_environment_are_never_written(tmp_path: Path) -> None:
    old, new = (base64.b64encode(os.urandom(32)).decode() for _ in range(2))
    sealed = seal(PlatformKeys(tmp_path / "none", old), VALUE, None, record())
    both = PlatformKeys(tmp_path / "none", f"{new},{old}")
    both.load()
    turned = rewrap(both, sealed)
    assert unseal(PlatformKeys(tmp_path / "none", new), turned).text == VALUE
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConflictError):
        both.add()
    with pytest.raises(InvalidInputError, match="32 bytes in base64"):
        PlatformKeys(tmp_path, "c2hvcnQ=")


@pytest.mark.parametrize("value", ["", "abc", "a" * 40_000, "a" * (64 << 10), "ä" * 20_000, "nul\0byte"])
def test_values_that_nobody_could_be_given_are_refused_without_being_shown(keys: PlatformKeys, value: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        seal(keys, value, None, record())
    assert len(str(refused.value)) < 200


def test_a_value_does_not_show_itself() -> None:
    assert VALUE not in repr(SecretValue(VALUE))
    assert VALUE not in f"{[SecretValue(VALUE)]}"


def test_names_are_variables_or_files() -> None:
    check_names({"HF_TOKEN": "a", "file:tls.pem": "b"})
    for wrong in ("HF-TOKEN", "", "file:../x", "file:.x", "1A"):
        with pytest.raises(InvalidInputError):
            check_names({wrong: "a"})


@given(st.lists(st.binary(max_size=40), max_size=6), st.integers(1, 60), st.data())
def test_a_secret_in_a_log_is_struck_out_however_the_output_is_cut(
    around: list[bytes], line_bytes_max: int, data: st.DataObject
) -> None:
    secret = data.draw(st.text("abc", min_size=4, max_size=30))
    output = secret.encode().join([b"", *around, b""])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=6)))
    splitter = LineSplitter(line_bytes_max, Redactor((secret,)))
    lines: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True):
        lines += splitter.feed(output[start:end])
    lines += splitter.flush()
    assert all(len(line) <= max(line_bytes_max, 1) for line in lines)
    assert secret.encode() not in b"".join(lines).replace(b"[secret]", b"\0")
    rebuilt = b"".join(lines)
    assert not any(secret.encode() in line for line in lines)
    assert len(rebuilt) <= len(output) * 2 + 8


def test_every_line_of_a_secret_with_several_is_struck_out() -> None:
    redactor = Redactor(("-----BEGIN KEY-----\nMIIabc\n-----END KEY-----",))
    assert redactor.line(b"it is MIIabc") == b"it is [secret]"


@pytest.mark.parametrize(
    "value", ["line\nline\r\n", "-----BEGIN-----\n\tx\n", " 'quotes\" and \\ ", "ä€😀", "x" * (32 << 10)]
)
def test_any_text_within_the_bound_comes_back_as_it_was(keys: PlatformKeys, value: str) -> None:
    assert unseal(keys, seal(keys, value, None, record())).text == value


def test_a_new_version_keeps_when_it_was_made_and_shows_nothing(keys: PlatformKeys) -> None:
    first = seal(keys, VALUE, None, msgspec.structs.replace(record(), created_unix_ns=1))
    second = seal(keys, VALUE, first, msgspec.structs.replace(record(), created_unix_ns=9))
    assert (second.created_unix_ns, second.version) == (1, 2)
    assert repr(second) == f"SecretRecord({second.tenant}/{second.name} version 2)"


@pytest.mark.parametrize("field", ["sealed", "wrapped"])
def test_a_record_that_was_cut_off_is_found(keys: PlatformKeys, field: str) -> None:
    cut = msgspec.structs.replace(seal(keys, VALUE, None, record()), **{field: b"short"})
    with pytest.raises(SnowdropError, match="was changed in the database"):
        unseal(keys, cut)


def test_a_new_key_is_durable_before_anything_is_wrapped_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    made = PlatformKeys(tmp_path / "made")
    made.load()
    (path,) = (tmp_path / "made").iterdir()
    assert [path.suffix or str(path) for path in synced] == [".new", str(tmp_path / "made")]
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    assert path.stem.endswith(made.current)


def test_keys_of_the_environment_leave_the_folders_alone_and_junk_is_refused(tmp_path: Path) -> None:
    PlatformKeys(tmp_path).load()
    word = base64.b64encode(os.urandom(32)).decode()
    assert PlatformKeys(tmp_path, word).drop_others() == 0
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InvalidInputError, match="32 bytes in base64"):
        PlatformKeys(tmp_path, word[:8] + "*" + word[8:])


def test_a_service_has_only_so_many_secrets() -> None:
    check_names({f"V{number}": "a" for number in range(32)})
    with pytest.raises(InvalidInputError, match="33 secrets"):
        check_names({f"V{number}": "a" for number in range(33)})


def test_of_two_secrets_the_longer_one_is_struck_out_whole() -> None:
    assert Redactor(("abcd", "abcdef")).text("it is abcdef!") == "it is [secret]!"
