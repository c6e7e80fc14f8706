"""Who we are to a registry: what was given, else what `docker login` or `podman login` has left."""

from __future__ import annotations

import base64
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.image.oci import DOCKER_HUB

CONFIG_BYTES_MAX = 4 << 20
HELPER_S_MAX = 30.0
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_KEYS = ("https://index.docker.io/v1/", "index.docker.io", "docker.io", "registry-1.docker.io")


class Credentials(msgspec.Struct, frozen=True):
    """A user with a password, or an identity token. Its repr shows neither."""

    user: str
    password: str = ""
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Credentials({self.user!r}, ...)"

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def default_config() -> Path | None:
    """The file that docker and podman keep, the first that is there."""
    home = Path.home()
    places = [
        Path(os.environ["REGISTRY_AUTH_FILE"]) if "REGISTRY_AUTH_FILE" in os.environ else None,
        Path(os.environ.get("DOCKER_CONFIG", home / ".docker")) / "config.json",
        Path(os.environ["XDG_RUNTIME_DIR"]) / "containers" / "auth.json"
        if "XDG_RUNTIME_DIR" in os.environ
        else None,
    ]
    return next((path for path in places if path is not None and path.is_file()), None)


def find_credentials(config: Path | None, host: str) -> Credentials | None:
    """What the config file has for `host`, from itself or from the helper that it names; None if nothing.

    Raises InvalidInputError if the file is damaged or a helper that it names cannot be run.
    """
    if config is None:
        return None
    where = str(config)
    try:
        with config.open("rb") as stream:
            document = msgspec.json.decode(stream.read(CONFIG_BYTES_MAX), type=dict[str, Any])
    except (OSError, msgspec.DecodeError) as error:
        raise InvalidInputError(
            f"credentials cannot be read: {error}", where=where, next_step="log in again, or repair the file"
        ) from error
    keys = (
        _HUB_KEYS
        if host == DOCKER_HUB
        else (host, f"https://{host}", f"https://{host}/v1/", f"https://{host}/v2/")
    )
    helpers, auths = document.get("credHelpers", {}), document.get("auths", {})
    if not isinstance(helpers, dict) or not isinstance(auths, dict):
        raise InvalidInputError("is no docker config", where=where)
    for key in keys:
        helper = helpers.get(key)
        if helper:
            return _ask_helper(str(helper), key, where)
    for key in keys:
        entry = auths.get(key)
        if isinstance(entry, dict) and (found := _from_entry(entry, where)) is not None:
            return found
    if store := document.get("credsStore"):
        return _ask_helper(str(store), keys[0], where)
    return None


def _from_entry(entry: dict[str, Any], where: str) -> Credentials | None:
    token = str(entry.get("identitytoken") or "")
    user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        try:
            user, _, password = (
                base64.b64decode(str(entry["auth"]), validate=True).decode().rstrip("\0").partition(":")
            )
        except ValueError as error:
            raise InvalidInputError("`auth` is no base64 of user:password", where=where) from error
    return Credentials(user, password, token) if user or token else None


def _ask_helper(name: str, key: str, where: str) -> Credentials | None:
    """Speaks the protocol of docker-credential-helpers."""
    if not _HELPER.fullmatch(name):
        raise InvalidInputError(f"{name[:80]!r} is no name of a credential helper", where=where)
    program = f"docker-credential-{name}"
    try:
        answer = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=HELPER_S_MAX, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InvalidInputError(
            f"{program} cannot be asked: {error}", where=where, next_step="install it, or take it out of the file"
        ) from error
    if answer.returncode != 0:
        return None  # it has nothing for this host
    try:
        found = msgspec.json.decode(answer.stdout, type=dict[str, str])
    except msgspec.DecodeError as error:
        raise InvalidInputError(f"{program} answers with something else", where=where) from error
    user, secret = found.get("Username", ""), found.get("Secret", "")
    return Credentials("", "", secret) if user == "<token>" else Credentials(user, secret)
