import os
from pathlib import Path

import pytest
from blake3 import blake3

from snowdrop.content.keys import (
    PUBLIC_HASHER,
    PUBLIC_KEYRING,
    Keyring,
    key_domain,
    load_keyring,
    rotate_key,
    tenant_key,
)
from snowdrop.domain.errors import InvalidInputError, NotFoundError
from snowdrop.domain.ids import TenantId

ACME, OTHER = TenantId("acme"), TenantId("other")


def test_public_names_are_plain_and_private_ones_keyed() -> None:
    key = bytes(range(32))
    assert PUBLIC_HASHER.hexdigest(b"weights") == blake3(b"weights").hexdigest()
    keyed = Keyring({key_domain(key): key}).hasher(key_domain(key))
    assert keyed.hexdigest(b"weights") == blake3(b"weights", key=key).hexdigest()
    assert keyed.hexdigest(b"weights") != PUBLIC_HASHER.hexdigest(b"weights")


def test_the_domain_follows_from_the_key_and_does_not_hold_it() -> None:
    key = bytes(range(32))
    assert key_domain(key) == "t-0c0890aa6d19cac7af97dc23ce4e094a"


def test_a_key_is_made_once_and_kept_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    key = tenant_key(folder, ACME)
    assert tenant_key(folder, ACME) == key
    assert tenant_key(folder, OTHER) != key
    assert (folder / "acme.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in folder.iterdir()) == ["acme.json", "other.json"]


def test_rotation_changes_new_content_and_keeps_the_old_readable(tmp_path: Path) -> None:
    old = tenant_key(tmp_path, ACME)
    new = rotate_key(tmp_path, ACME)
    assert new != old
    assert tenant_key(tmp_path, ACME) == new
    assert set(load_keyring(tmp_path).domains) == {"public", key_domain(old), key_domain(new)}


def test_two_that_make_the_first_key_at_once_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_link = os.link
    made: list[bytes] = []

    def late(source: object, target: object, **options: object) -> None:
        monkeypatch.setattr(os, "link", real_link)
        made.append(tenant_key(tmp_path, ACME))
        real_link(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", late)
    assert tenant_key(tmp_path, ACME) == made[0]


def test_a_missing_folder_holds_only_public(tmp_path: Path) -> None:
    assert load_keyring(tmp_path / "none").domains == ("public",)
    with pytest.raises(NotFoundError) as caught:
        PUBLIC_KEYRING.hasher("t-" + "0" * 32)
    assert caught.value.next_step


def test_a_key_file_that_others_may_read_is_refused(tmp_path: Path) -> None:
    tenant_key(tmp_path, ACME)
    (tmp_path / "acme.json").chmod(0o640)
    for read in (lambda: tenant_key(tmp_path, ACME), lambda: load_keyring(tmp_path)):
        with pytest.raises(InvalidInputError, match="others may read") as caught:
            read()
        assert "chmod 600" in caught.value.next_step


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b'{"version":1,"keys":[]}',
        b'{"version":2,"keys":["' + b"00" * 32 + b'"]}',
        b'{"version":1,"keys":["00"]}',
        b'{"version":1,"keys":["zz"]}',
        b"\xff",
    ],
)
def test_a_damaged_key_file_is_named_and_never_replaced(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "acme.json"
    path.touch(mode=0o600)
    path.write_bytes(content)
    for act in (tenant_key, rotate_key):
        with pytest.raises(InvalidInputError) as caught:
            act(tmp_path, ACME)
        assert caught.value.where == str(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("tenant", ["../x", "", "A", "a/b"])
def test_a_hostile_tenant_names_no_file(tmp_path: Path, tenant: str) -> None:
    with pytest.raises(InvalidInputError):
        tenant_key(tmp_path, TenantId(tenant))


def test_a_key_under_a_foreign_domain_is_refused() -> None:
    with pytest.raises(InvalidInputError):
        Keyring({"t-" + "0" * 32: b"k" * 32})
    with pytest.raises(InvalidInputError):
        Keyring({"public": b"k" * 32})
