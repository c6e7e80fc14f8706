"""Key files: made once, readable only by their owner, rotated and distrusted."""

import stat
import threading
from pathlib import Path

import pytest

from snowdrop.content.signing import KeyStore, Signer, key_id_of
from snowdrop.domain.errors import (
    ConflictError,
    CorruptContentError,
    InvalidInputError,
    NotFoundError,
    UntrustedError,
)


def test_the_signing_key_is_made_once_trusted_and_private(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys")
    first = store.signer()
    assert KeyStore(tmp_path / "keys").signer().public_key == first.public_key
    assert first.key_id == key_id_of(first.public_key)
    assert first.key_id in store.trusted()
    for name in ("signing.pem", "trusted.json"):
        assert stat.S_IMODE((tmp_path / "keys" / name).stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "keys").iterdir()) == ["lock", "signing.pem", "trusted.json"]


def test_two_first_users_get_one_key(tmp_path: Path) -> None:
    found: list[bytes] = []

    def first_use() -> None:
        found.append(KeyStore(tmp_path / "keys").signer().public_key)

    threads = [threading.Thread(target=first_use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_after_rotation_both_keys_are_trusted_until_the_old_one_is_not(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    old = store.signer()
    new = store.rotate()
    assert store.signer().key_id == new.key_id != old.key_id
    store.trusted().verify(old.key_id, b"x", old.sign(b"x"), where="here")
    store.distrust(old.key_id)
    with pytest.raises(UntrustedError, match="not trusted"):
        store.trusted().verify(old.key_id, b"x", old.sign(b"x"), where="here")
    store.trusted().verify(new.key_id, b"x", new.sign(b"x"), where="here")


def test_the_key_that_signs_cannot_be_distrusted_nor_one_that_is_not_there(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    signer = store.signer()
    with pytest.raises(ConflictError, match="signs the refs"):
        store.distrust(signer.key_id)
    with pytest.raises(NotFoundError):
        store.distrust("0" * 16)


def test_another_platforms_key_can_be_trusted_and_once_is_enough(tmp_path: Path) -> None:
    store, other = KeyStore(tmp_path), Signer.make()
    added = store.trust(other.public_key.hex(), "build server")
    assert store.trust(other.public_key.hex(), "again") == added
    assert [key.note for key in store.list_keys()] == ["build server"]
    assert store.signing_key_id() is None


@pytest.mark.parametrize("text", ["", "zz" * 32, "ab" * 31, "AB" * 32, " " + "ab" * 32])
def test_what_is_no_public_key_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidInputError):
        KeyStore(tmp_path).trust(text)


def test_a_trusted_file_that_makes_no_sense_trusts_nobody(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.signer()
    path = tmp_path / "trusted.json"
    good = path.read_text()
    key_id = store.list_keys()[0].key_id
    for bad in ("", "{}", good.replace('"version": 1', '"version": 2'), good.replace(key_id, "0" * 16)):
        path.write_text(bad)
        with pytest.raises(CorruptContentError, match="makes no sense"):
            store.trusted()


def test_a_private_key_that_makes_no_sense_is_said_and_not_replaced(tmp_path: Path) -> None:
    store = KeyStore(tmp_path)
    store.signer()
    (tmp_path / "signing.pem").write_text("junk")
    with pytest.raises(CorruptContentError, match="makes no sense"):
        store.signer()
    assert (tmp_path / "signing.pem").read_text() == "junk"
