"""A registry that misbehaves, and what a push makes of it."""

import base64
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from content_helpers import noise
from image_helpers import Layout, Pushed, member, names, tar
from registry_server import BASIC, PASSWORD, TOKEN, USER, Registry, registry, with_index
from snowdrop.domain.errors import (
    IntegrityError,
    InvalidInputError,
    NotFoundError,
    SnowdropError,
    TimedOutError,
    UnauthorisedError,
    UnavailableError,
)
from snowdrop.image import registry_http
from snowdrop.image.credentials import find_credentials
from snowdrop.image.oci import Platform, parse_reference
from snowdrop.image.opening import ReachOptions
from snowdrop.image.registry import RegistrySource

DATA = noise(2 << 20, seed=5)
PATHS = [b"", b"big"]


def layout() -> Layout:
    return Layout([(tar(member("big", data=DATA)), "gzip")])


@pytest.fixture
def server() -> Iterator[Registry]:
    with registry(layout()) as made:
        yield made


@pytest.fixture
def reach(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text("{}")

    def make(**options: Any) -> ReachOptions:
        return ReachOptions(**{"platform": Platform(), "docker_config": tmp_path / "config.json", **options})

    return make


def source(server: Registry, options: ReachOptions, tag: str = "") -> tuple[RegistrySource, list[float]]:
    slept: list[float] = []
    reference = parse_reference(f"{server.host}/team/app{tag}")
    return RegistrySource(reference, options, sleep=slept.append), slept


def pushed(server: Registry, options: ReachOptions, tmp_path: Path, tag: str = "") -> Pushed:
    found, _ = source(server, options, tag)
    return Pushed(found, tmp_path / "w", fetch=True)


def blobs_asked(server: Registry) -> list[str]:
    """The ranges that were asked of the layer."""
    layer = server.layout.layers[0]["digest"]
    return [ranged for kind, name, ranged, _ in server.asked if kind == "blobs" and name == layer]


@pytest.mark.parametrize("login", ["", "basic", "bearer"])
def test_an_image_is_pulled_under_every_kind_of_login(login: str, reach: Any, tmp_path: Path) -> None:
    with registry(layout(), login) as server:
        options = reach(user=USER, password=PASSWORD)
        made = pushed(server, options, tmp_path)
        assert names(made.tree().entries) == PATHS
        assert made.data()[: len(DATA)] == DATA
        given = {authorization for kind, _, _, authorization in server.asked if kind != "token"}
        assert given == {"": {""}, "basic": {"", BASIC}, "bearer": {"", f"Bearer {TOKEN}"}}[login]


def test_a_public_image_behind_tokens_needs_no_user(reach: Any, tmp_path: Path) -> None:
    with registry(layout(), "bearer") as server:
        assert names(pushed(server, reach(), tmp_path).tree().entries) == PATHS
        assert {given for kind, _, _, given in server.asked if kind == "token"} == {""}


@pytest.mark.parametrize("login", ["basic", "bearer"])
def test_wrong_credentials_are_said_at_once(login: str, reach: Any) -> None:
    with registry(layout(), login) as server:
        found, slept = source(server, reach(user=USER, password="other"))
        with pytest.raises(UnauthorisedError) as raised:
            found.image()
        found.close()
        assert "docker login" in raised.value.next_step
        assert slept == []


@pytest.mark.parametrize(
    ("fault", "waited"),
    [((429, {"retry_after": "7"}), [7.0]), ((500, {}), [1.0]), ((503, {"retry_after": "100000"}), [60.0])],
)
@pytest.mark.parametrize("kind", ["manifests", "blobs"])
def test_passing_faults_are_waited_out(
    fault: Any, waited: list[float], kind: str, server: Registry, reach: Any
) -> None:
    server.faults[kind] = [fault]
    found, slept = source(server, reach())
    assert found.image().digest == server.layout.manifest["digest"]
    found.close()
    assert slept == waited


def test_faults_that_stay_end_in_an_error_that_says_when(server: Registry, reach: Any) -> None:
    server.faults["manifests"] = [(429, {"retry_after": "7"})] * 50
    found, slept = source(server, reach())
    with pytest.raises(UnavailableError, match="429") as raised:
        found.image()
    found.close()
    assert raised.value.retry_after_s == 7.0
    assert 1 < len(slept) < 10


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_layer_goes_on_where_it_was(
    fault: str, server: Registry, reach: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_http, "STALL_S_MAX", 0.3)
    found, _ = source(server, reach())
    found.image()
    server.faults["blobs"] = [None, fault, fault, "shifted", "whole"]
    made = Pushed(found, tmp_path / "w", fetch=True)
    assert made.data()[: len(DATA)] == DATA
    size = server.layout.layers[0]["size"]
    begins = [int(ranged[6:-1] or 0) if ranged else 0 for ranged in blobs_asked(server)]
    assert begins[0] == 0
    assert begins[1] > size // 4
    assert begins[2] > begins[1]
    assert begins[2:] == [begins[2]] * 2  # another range brings nothing; the whole is read from where we were


def test_a_push_that_was_given_up_goes_on_in_the_next_one(server: Registry, reach: Any, tmp_path: Path) -> None:
    server.faults["blobs"] = [None, "cut", *[(502, {})] * 10]
    with pytest.raises(UnavailableError, match="502"):
        pushed(server, reach(), tmp_path)
    server.faults["blobs"], server.asked = [], []
    assert pushed(server, reach(), tmp_path).data()[: len(DATA)] == DATA
    (ranged,) = blobs_asked(server)
    assert int(ranged[6:-1]) > server.layout.layers[0]["size"] // 4


def test_a_stall_at_the_start_is_an_error_with_its_bound(
    server: Registry, reach: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_http, "STALL_S_MAX", 0.2)
    server.faults["manifests"] = ["stall"] * 20
    found, _ = source(server, reach())
    with pytest.raises(TimedOutError, match="stalls") as raised:
        found.image()
    found.close()
    assert "stall_s_max" in raised.value.where


def test_a_drip_is_no_progress(server: Registry, reach: Any, tmp_path: Path) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 50.0
        return now[0]

    found = RegistrySource(parse_reference(f"{server.host}/team/app"), reach(), clock=clock)
    layer = found.image().layers[0]
    with found.read_layer(layer, 0) as read:
        assert len(read(1000)) == 1000
        with pytest.raises(TimedOutError, match="less than"):
            read(1000)
    found.close()


@pytest.mark.parametrize("kind", ["manifests", "config", "layer"])
def test_other_bytes_than_were_named_are_refused(kind: str, server: Registry, reach: Any, tmp_path: Path) -> None:
    named = f"@{server.layout.manifest['digest']}"
    faults = {
        "manifests": ("manifests", ["wrong"]),
        "config": ("blobs", ["wrong"]),
        "layer": ("blobs", [None, "wrong"]),
    }
    server.faults = dict([faults[kind]])
    with pytest.raises(IntegrityError) as raised:
        pushed(server, reach(), tmp_path, tag=named)
    assert raised.value.where
    # Nothing of the wrong bytes is kept: the next push is right.
    assert pushed(server, reach(), tmp_path, tag=named).data()[: len(DATA)] == DATA


def test_a_registry_that_does_not_have_it_says_so(server: Registry, reach: Any) -> None:
    found, slept = source(server, reach(), ":other")
    with pytest.raises(NotFoundError) as raised:
        found.image()
    found.close()
    assert (slept, raised.value.next_step) == ([], "check name, tag and platform")


def test_the_platform_is_chosen_from_an_index(server: Registry, reach: Any) -> None:
    other = Layout([(tar(member("arm", data=b"1")), "zstd")])
    with_index(server, other)
    for architecture, wanted in (("amd64", server.layout.manifest), ("arm64", other.manifest)):
        found, _ = source(server, reach(platform=Platform("linux", architecture)))
        assert found.image().digest == wanted["digest"]
        found.close()


def test_a_mirror_is_asked_first_and_passed_over_when_it_fails(
    server: Registry, reach: Any, tmp_path: Path
) -> None:
    with registry(layout()) as mirror:
        mirror.faults["blobs"] = [None, "cut", (500, {})]
        made = pushed(server, reach(mirrors=(mirror.host,)), tmp_path)
        assert made.data()[: len(DATA)] == DATA
        assert len(mirror.asked) > 3
        assert len(server.asked) == 1
        assert server.asked[0][2].startswith("bytes=")  # only the rest came from the registry itself


def test_a_redirect_never_gets_our_credentials(reach: Any, tmp_path: Path) -> None:
    with registry(layout(), "basic") as server, registry(layout()) as storage:
        layer = server.layout.layers[0]["digest"]
        target = f"http://{storage.host}/v2/team/app/blobs/{layer}"
        server.faults["blobs"] = [None, target]
        made = pushed(server, reach(user=USER, password=PASSWORD), tmp_path)
        assert made.data()[: len(DATA)] == DATA
        assert [given for *_, given in storage.asked] == [""]


def test_redirects_in_a_ring_end(server: Registry, reach: Any) -> None:
    server.faults["manifests"] = [f"http://{server.host}/v2/team/app/manifests/latest"] * 100
    found, _ = source(server, reach())
    with pytest.raises(UnavailableError, match="redirects_max"):
        found.image()
    found.close()


def test_tls_is_checked(reach: Any, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ours, other = tmp_path / "ca.pem", tmp_path / "other.pem"
    authority.cert_pem.write_to_path(ours)
    trustme.CA().cert_pem.write_to_path(other)
    with registry(layout(), tls=context) as server:
        assert names(pushed(server, reach(ca_file=str(ours)), tmp_path).tree().entries) == PATHS
        found, _ = source(server, reach(ca_file=str(other)))
        with pytest.raises(UnavailableError, match="certificate"):
            found.image()
        found.close()
    with pytest.raises(InvalidInputError, match="CA file"):
        source(server, reach(ca_file=str(tmp_path / "none.pem")))


def config(tmp_path: Path, document: Any) -> Path:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(document))
    return path


def test_credentials_are_found_where_others_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "docker-credential-ours"
    helper.write_text(
        '#!/bin/sh\nread host\n[ "$host" = helped ] && echo "{\\"Username\\": \\"h\\", \\"Secret\\": \\"s\\"}"\n'
    )
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made = config(
        tmp_path,
        {
            "auths": {
                "plain:5000": {"auth": base64.b64encode(b"a:b:c").decode()},
                "https://index.docker.io/v1/": {"username": "hub", "password": "p"},
                "token": {"identitytoken": "t"},
                "empty": {},
            },
            "credHelpers": {"helped": "ours", "helpless": "ours"},
        },
    )
    wanted = {"plain:5000": ("a", "b:c", ""), "registry-1.docker.io": ("hub", "p", ""), "helped": ("h", "s", ""),
              "token": ("", "", "t"), "empty": None, "helpless": None, "unknown": None}  # fmt: skip
    for host, values in wanted.items():
        found = find_credentials(made, host)
        assert (found and (found.user, found.password, found.identity_token)) == values, host
    assert "b:c" not in repr(find_credentials(made, "plain:5000"))


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"auths": []},
        {"auths": {"h": {"auth": "!"}}},
        {"credHelpers": {"h": "../x"}},
        {"credsStore": "none-such"},
    ],
)
def test_damaged_credentials_are_said(document: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError) as raised:
        find_credentials(config(tmp_path, document), "h")
    assert "c.json" in raised.value.where


def test_all_its_errors_are_typed_and_say_where(server: Registry, reach: Any) -> None:
    for status in (400, 403, 404, 408, 418, 500, 504):
        server.faults["manifests"] = [(status, {})] * 10
        found, _ = source(server, reach())
        with pytest.raises(SnowdropError) as raised:
            found.image()
        found.close()
        assert server.host in raised.value.where
