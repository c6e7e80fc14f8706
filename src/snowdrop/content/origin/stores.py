"""From a URL and options to the object store of `obstore`, and to where its objects can be read over HTTP.

Credentials come from the environment in each cloud's own variables, or from a file in its own form: an AWS shared
credentials file, a Google service account, Azure's config, a netrc for plain HTTP.
"""

from __future__ import annotations

import base64
import configparser
import netrc
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.origin import OriginOptions

if TYPE_CHECKING:
    from obstore.store import AzureConfig, GCSConfig, S3Config

SCHEMES = ("s3", "gs", "az", "http", "https")
REQUEST_S_MAX = 120
CONNECT_S_MAX = 5
RETRIES_MAX = 6
RETRY_S_MAX = 60
AWS_REGION_DEFAULT = "us-east-1"

Store = S3Store | GCSStore | AzureStore | HTTPStore


class OpenStore(NamedTuple):
    """`base_url` is where objects are without a signature; `signs` is whether URLs can carry one."""

    store: Store
    base_url: str
    signs: bool
    authorization: str = ""


def open_store(url: str, options: OriginOptions, environ: Mapping[str, str] = os.environ) -> OpenStore:
    """The store at `url`. Raises InvalidInputError naming the setting."""
    parts = urlsplit(url)
    if parts.query or parts.fragment or parts.username is not None or not parts.netloc:
        raise _invalid(
            "origin_url",
            "the origin's URL has no bucket, or parts that do not belong in it",
            "use scheme://bucket/prefix; credentials come from the environment or a file",
        )
    prefix = unquote(parts.path).strip("/")
    common = _client(url, options)
    try:
        match parts.scheme:
            case "s3":
                return _s3(parts.netloc, prefix, options, environ, common)
            case "gs":
                return _gcs(parts.netloc, prefix, options, environ, common)
            case "az":
                return _azure(parts.netloc, prefix, options, environ, common)
            case _:
                return _http(url, parts.hostname or "", options, common)
    except (BaseError, ValueError) as error:
        raise _invalid(
            "origin_url", f"the origin cannot be opened: {one_line(error)}", "check its settings"
        ) from error


def one_line(error: BaseException) -> str:
    """The first line of an error, without the queries of URLs: those may be signatures."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return " ".join(word.partition("?")[0] if "://" in word else word for word in line.split(" "))[:400]


def _client(url: str, options: OriginOptions) -> dict[str, Any]:
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=REQUEST_S_MAX),
        "connect_timeout": timedelta(seconds=CONNECT_S_MAX),
        "allow_http": (options.endpoint or url).startswith("http://"),
        "user_agent": "snowdrop",
    }
    if options.ca_file:
        client["root_certificate"] = read_file(options.ca_file, "origin_ca_file")
    return {
        "client_options": client,
        "retry_config": {
            "max_retries": RETRIES_MAX,
            "retry_timeout": timedelta(seconds=RETRY_S_MAX),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5)},
        },
    }


def _s3(
    bucket: str, prefix: str, options: OriginOptions, environ: Mapping[str, str], common: dict[str, Any]
) -> OpenStore:
    endpoint = options.endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or ""
    region = options.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""
    # Objects are deleted one by one: not every S3 has the call for many.
    config: dict[str, Any] = {"disable_bulk_delete": True}
    if options.anonymous:
        config["skip_signature"] = True
    elif options.credentials_file or not environ.get("AWS_ACCESS_KEY_ID"):
        profile = _aws_profile(options, environ)
        region = region or profile.pop("region", "")
        config |= profile
    region = region or AWS_REGION_DEFAULT
    config["region"] = region
    if endpoint:
        config["endpoint"] = endpoint
        common["client_options"]["allow_http"] = endpoint.startswith("http://")
    store = S3Store(bucket, prefix=prefix or None, config=cast("S3Config", config), **common)
    base = f"{endpoint.rstrip('/')}/{bucket}" if endpoint else f"https://s3.{region}.amazonaws.com/{bucket}"
    return OpenStore(store, _joined(base, prefix), signs=not options.anonymous)


def _aws_profile(options: OriginOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """Keys from a shared credentials file; none if there is no file and none was named."""
    named = options.credentials_file or environ.get("AWS_SHARED_CREDENTIALS_FILE", "")
    path = Path(named or "~/.aws/credentials").expanduser()
    if not named and not path.is_file():
        return {}
    name = environ.get("AWS_PROFILE", "default")
    section = _ini(path, name)
    if "aws_access_key_id" not in section:
        if not named:
            return {}
        raise _invalid(
            "origin_credentials_file", f"{path} has no keys in [{name}]", "set AWS_PROFILE, or add the section"
        )
    wanted = {
        "aws_access_key_id": "access_key_id",
        "aws_secret_access_key": "secret_access_key",
        "aws_session_token": "session_token",
        "region": "region",
    }
    return {ours: section[theirs] for theirs, ours in wanted.items() if section.get(theirs)}


def _gcs(
    bucket: str, prefix: str, options: OriginOptions, environ: Mapping[str, str], common: dict[str, Any]
) -> OpenStore:
    config: dict[str, Any] = {}
    endpoint = options.endpoint or environ.get("GOOGLE_BASE_URL", "")
    if endpoint:
        config["base_url"] = endpoint
    if options.anonymous:
        config["skip_signature"] = True
    elif options.credentials_file:
        config["service_account_key"] = read_file(options.credentials_file, "origin_credentials_file").decode()
    store = GCSStore(bucket, prefix=prefix or None, config=cast("GCSConfig", config), **common)
    base = (endpoint or "https://storage.googleapis.com").rstrip("/")
    return OpenStore(store, _joined(f"{base}/{bucket}", prefix), signs=not options.anonymous)


def _azure(
    container: str, prefix: str, options: OriginOptions, environ: Mapping[str, str], common: dict[str, Any]
) -> OpenStore:
    config: dict[str, Any] = {}
    if options.credentials_file:
        section = _ini(Path(options.credentials_file), "storage")
        wanted = {"account": "account_name", "key": "account_key", "sas_token": "sas_key"}
        config |= {ours: section[theirs] for theirs, ours in wanted.items() if section.get(theirs)}
    account = config.get("account_name") or environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if not account:
        raise _invalid(
            "origin_url", "az:// needs the name of a storage account", "set AZURE_STORAGE_ACCOUNT_NAME or the file"
        )
    config["account_name"] = account
    if options.endpoint:
        config["endpoint"] = options.endpoint
        common["client_options"]["allow_http"] = options.endpoint.startswith("http://")
    if options.anonymous:
        config["skip_signature"] = True
    store = AzureStore(container, prefix=prefix or None, config=cast("AzureConfig", config), **common)
    base = options.endpoint.rstrip("/") or f"https://{account}.blob.core.windows.net"
    return OpenStore(store, _joined(f"{base}/{container}", prefix), signs=not options.anonymous)


def _http(url: str, host: str, options: OriginOptions, common: dict[str, Any]) -> OpenStore:
    authorization = ""
    if options.credentials_file and not options.anonymous:
        authorization = _netrc(Path(options.credentials_file), host)
        common["client_options"]["default_headers"] = {"authorization": authorization}
    return OpenStore(HTTPStore(url, **common), url.rstrip("/"), signs=False, authorization=authorization)


def _netrc(path: Path, host: str) -> str:
    read_file(str(path), "origin_credentials_file")
    try:
        found = netrc.netrc(str(path)).authenticators(host)
    except netrc.NetrcParseError as error:
        raise _invalid("origin_credentials_file", f"{path} is no netrc: {error.msg}", "see netrc(5)") from error
    if found is None or not found[2]:
        raise _invalid("origin_credentials_file", f"{path} has no password for {host}", "add a line `machine`")
    return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _ini(path: Path, section: str) -> Mapping[str, str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(read_file(str(path), "origin_credentials_file").decode())
    except (configparser.Error, UnicodeDecodeError) as error:
        # The parser's own message would quote the line, which may be the secret.
        raise _invalid(
            "origin_credentials_file", f"{path} is not in the form of an INI file", "see the how-to"
        ) from error
    return parser[section] if parser.has_section(section) else {}


def read_file(path: str, setting: str) -> bytes:
    """A file that a setting names. Raises InvalidInputError naming the setting."""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise _invalid(
            setting, f"{path} cannot be read: {error.strerror}", "check the path and its rights"
        ) from error


def _joined(base: str, prefix: str) -> str:
    return f"{base}/{quote(prefix)}" if prefix else base


def _invalid(setting: str, message: str, step: str) -> InvalidInputError:
    return InvalidInputError(message, where=f"content.{setting}", next_step=step)
