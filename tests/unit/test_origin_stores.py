"""Stores, signatures, credentials and certificates: from settings to requests, and never into a message."""

from __future__ import annotations

import datetime
import ipaddress
import random
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from content_helpers import noise
from origin_servers import Asked, Fault, FaultyServer, Plan
from snowdrop.content.origin import OriginOptions, open_origin
from snowdrop.content.origin.objects import ObjectStoreOrigin
from snowdrop.content.origin.port import OBJECT_BYTES_MAX
from snowdrop.content.origin.race import RaceLimits
from snowdrop.content.origin.ranges import ReadLimits
from snowdrop.content.origin.stores import open_store
from snowdrop.domain.errors import (
    InvalidInputError,
    OriginRefusedError,
    SnowdropError,
    StorageFullError,
    UnavailableError,
)
from snowdrop.policy.hedge import HedgeLimits
from snowdrop.policy.retry import RetryLimits

BODY = noise(1 << 20, 9)
SECRET = "do-not-show-this-secret"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "key-id", "AWS_SECRET_ACCESS_KEY": SECRET}


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)


def s3(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> ObjectStoreOrigin:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    origin = open_origin("s3://bucket/pre", OriginOptions(endpoint=server.url))
    assert isinstance(origin, ObjectStoreOrigin)
    return origin


def read(origin: ObjectStoreOrigin, key: str = "k", offset: int = 0, length: int = 1000) -> bytes:
    into = bytearray(length)
    origin.read_range(key, offset, memoryview(into))
    return bytes(into)


def test_a_signature_is_kept_for_many_reads_and_renewed_when_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refuse = {3}

    def plan(asked: Asked) -> Fault | None:
        return Fault(status=403) if asked.index in refuse else None

    with FaultyServer({"bucket/pre/k": BODY}, plan).running() as server:
        origin = s3(server, monkeypatch)
        for offset in range(5):
            assert read(origin, offset=offset) == BODY[offset : offset + 1000]
        assert len(server.asked) == 6
        refuse.update(range(100))
        with pytest.raises(OriginRefusedError, match="403") as caught:
            read(origin)
        assert len(server.asked) == 8  # once more with a fresh signature, then no more
        origin.close()
    told = f"{caught.value} {caught.value.body()}"
    assert "X-Amz" not in told
    assert SECRET not in told
    assert "key-id" not in told


def test_a_signature_that_expires_while_a_read_breaks_off_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {0: Fault(after=100, end="close"), 1: Fault(status=403)}
    with FaultyServer({"bucket/pre/k": BODY}, lambda asked: faults.get(asked.index)).running() as server:
        origin = s3(server, monkeypatch)
        assert read(origin) == BODY[:1000]
        assert [asked.first for asked in server.asked] == [0, 100, 100]
        origin.close()


def test_a_store_that_cannot_sign_is_read_through_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*args: object) -> str:
        raise ValueError(f"no key to sign {SECRET}")

    monkeypatch.setattr("snowdrop.content.origin.urls.obstore.sign", cannot)
    with FaultyServer({"bucket/pre/k": BODY}).running() as server:
        origin = s3(server, monkeypatch)
        assert read(origin, offset=5) == BODY[5:1005]
        origin.close()


def test_keys_of_a_shared_credentials_file_by_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text(
        f"[default]\naws_access_key_id = a\naws_secret_access_key = {SECRET}\n"
        f"[other]\naws_access_key_id = b\naws_secret_access_key = {SECRET}\nregion = eu-north-1\n"
    )
    options = OriginOptions(credentials_file=str(file), endpoint="http://127.0.0.1:1")
    for profile, key, region in (("default", "a", "us-east-1"), ("other", "b", "eu-north-1")):
        opened = open_store("s3://bucket", options, {"AWS_PROFILE": profile})
        config = dict(opened.store.config)  # type: ignore[union-attr]
        found = {str(name).removeprefix("aws_"): value for name, value in config.items()}
        assert (found["access_key_id"], found["region"]) == (key, region)
    with pytest.raises(InvalidInputError, match="missing"):
        open_store("s3://bucket", options, {"AWS_PROFILE": "missing"})


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://bucket", f"aws_secret_access_key = {SECRET}"),
        ("s3://bucket", f"[default\n{SECRET}"),
        ("gs://bucket", f'{{"private_key": "{SECRET}"}}'),
        ("az://container", f"[storage]\nkey = {SECRET}"),
        ("az://container", f"[storage]\naccount = a\nkey = {SECRET}"),
        ("https://host/path", f"machine host login {SECRET}"),
        ("https://host/path", f"machine other login a password {SECRET}"),
    ],
)
def test_bad_credentials_are_named_and_not_shown(tmp_path: Path, url: str, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        open_origin(url, OriginOptions(credentials_file=str(file)))
    assert SECRET not in str(caught.value)
    assert caught.value.where.startswith("content.origin_")
    assert caught.value.next_step


@pytest.mark.parametrize("url", ["s3://", "s3://bucket?x=1", "https://user:pw@host/", "gs://bucket#part"])
def test_a_url_with_parts_that_do_not_belong_is_refused(url: str) -> None:
    with pytest.raises(InvalidInputError):
        open_origin(url)


def test_a_netrc_is_sent_to_its_host_and_not_behind_a_redirect(tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    file.write_text("machine 127.0.0.1 login ada password lovelace\n")
    with FaultyServer({"k": BODY}).running() as cdn:
        plan: Plan = lambda asked: (  # noqa: E731
            Fault(status=302, headers=(f"Location: {cdn.url}/k",)) if asked.key == "moved" else None
        )
        with FaultyServer({"k": BODY, "moved": BODY}, plan).running() as server:
            origin = ObjectStoreOrigin(server.url, OriginOptions(credentials_file=str(file)))
            assert read(origin) == BODY[:1000]
            assert read(origin, "moved") == BODY[:1000]
            assert [asked.authorization for asked in server.asked] == ["Basic YWRhOmxvdmVsYWNl"] * 2
            assert [asked.authorization for asked in cdn.asked] == [""]
            origin.close()


def test_public_buckets_are_read_without_a_signature() -> None:
    with FaultyServer({"bucket/pre/k": BODY}).running() as server:
        origin = ObjectStoreOrigin("s3://bucket/pre", OriginOptions(endpoint=server.url, anonymous=True))
        assert read(origin) == BODY[:1000]
        origin.close()


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("s3://b/p q", "https://s3.eu-west-1.amazonaws.com/b/p%20q"),
        ("gs://b/p", "https://storage.googleapis.com/b/p"),
        ("az://b/p", "https://account.blob.core.windows.net/b/p"),
    ],
)
def test_where_the_clouds_keep_their_objects(url: str, base: str) -> None:
    options = OriginOptions(anonymous=True, region="eu-west-1")
    assert open_store(url, options, {"AZURE_STORAGE_ACCOUNT_NAME": "account"}).base_url == base


def test_an_object_above_the_bound_is_not_put() -> None:
    origin = open_origin("http://127.0.0.1:1/")
    with pytest.raises(InvalidInputError, match="object_bytes_max"):
        origin.put("k", memoryview(bytes(OBJECT_BYTES_MAX + 1)))


@pytest.mark.parametrize(
    ("status", "error"),
    [(507, StorageFullError), (403, OriginRefusedError), (401, OriginRefusedError), (405, OriginRefusedError)],
)
def test_what_a_store_refuses_is_translated(status: int, error: type[SnowdropError]) -> None:
    with FaultyServer({}, put_status=status).running() as server:
        origin = ObjectStoreOrigin(server.url, OriginOptions())
        with pytest.raises(error) as caught:
            origin.put("k", b"x")
        assert server.url in caught.value.where
        assert caught.value.next_step
        assert "Debug" not in str(caught.value)
        origin.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate of an authority of its own for 127.0.0.1, its key)"""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder / "ca.pem", folder / "key.pem"


@pytest.fixture
def tls(certificates: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    return context


@pytest.fixture
def encrypted(
    certificates: tuple[Path, Path], tls: ssl.SSLContext
) -> Iterator[tuple[FaultyServer, ObjectStoreOrigin]]:
    rng = random.Random(4)

    def plan(asked: Asked) -> Fault | None:
        kinds = [None, None, Fault(status=500), Fault(after=20_000, end="close"), Fault(after=20_000, end="stall")]
        return rng.choice(kinds)

    limits = ReadLimits(race=RaceLimits(stall_s_max=0.5, hedge=HedgeLimits(unknown_s=0.05, samples_min=1_000_000)))
    with FaultyServer({"k": BODY}, plan, tls=tls).running() as server:
        origin = ObjectStoreOrigin(
            server.url,
            OriginOptions(ca_file=str(certificates[0])),
            limits=limits,
            pause=lambda pause_s: None,
            rng=random.Random(1),
        )
        yield server, origin
        origin.close()


def test_encrypted_reads_survive_the_same_faults(encrypted: tuple[FaultyServer, ObjectStoreOrigin]) -> None:
    _, origin = encrypted
    rng = random.Random(8)
    for _ in range(30):
        offset = rng.randrange(len(BODY) - 200_000)
        assert read(origin, offset=offset, length=200_000) == BODY[offset : offset + 200_000]
    assert origin.counts.retries > 0
    assert origin.counts.hedges > 0


def test_a_certificate_that_is_not_trusted_is_refused_and_the_setting_named(tls: ssl.SSLContext) -> None:
    with FaultyServer({"k": BODY}, tls=tls).running() as server:
        origin = ObjectStoreOrigin(server.url, OriginOptions(), pause=lambda pause_s: None)
        with pytest.raises(OriginRefusedError, match="not trusted") as caught:
            read(origin)
        assert "origin_ca_file" in caught.value.next_step
        assert server.asked == []
        origin.close()


def test_a_ca_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "missing.pem"):
        with pytest.raises(InvalidInputError) as caught:
            open_origin("https://127.0.0.1:1/", OriginOptions(ca_file=str(path)))
        assert caught.value.where == "content.origin_ca_file"


def test_a_server_that_speaks_no_tls_is_a_clear_error() -> None:
    with FaultyServer({"k": BODY}).running() as server:
        limits = ReadLimits(retry=RetryLimits(attempts_max=1), race=RaceLimits(connect_s_max=0.05))
        url = server.url.replace("http:", "https:")
        origin = ObjectStoreOrigin(url, OriginOptions(), limits=limits, pause=lambda pause_s: None)
        with pytest.raises(UnavailableError, match=r"connect_s_max=0\.05.*attempts_max=1"):
            read(origin)
        origin.close()
