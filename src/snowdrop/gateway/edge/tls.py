"""TLS of the gateway's listeners: one context per process, whose certificate can change while it serves."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import NoReturn

import anyio

from snowdrop.domain.errors import InvalidInputError, SnowdropError
from snowdrop.domain.settings import GatewaySettings

CHECK_S = 10.0
"""How often the files are looked at; whoever cannot wait sends SIGHUP (`snowdrop gateway reload`)."""
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
log = logging.getLogger("snowdrop.gateway")


class Certificate:
    """Certificate and key of the files that the settings name. Raises InvalidInputError if they are unusable."""

    def __init__(self, settings: GatewaySettings, *, alpn: tuple[str, ...] = ("http/1.1",)) -> None:
        self._certificate = Path(settings.tls_certificate_file)
        self._key = Path(settings.tls_key_file)
        self._minimum = VERSIONS[settings.tls_version_min]
        self._alpn = alpn
        self._seen = self._stamp()
        self.context = self._load()

    def reload(self) -> None:
        """New handshakes get what is in the files now; open connections go on.

        Raises InvalidInputError, and keeps what there was, if the files are unusable.
        """
        self._seen = self._stamp()
        self._load()  # tried on a context that nobody uses: a half-loaded pair would break every handshake
        self._fill(self.context)
        log.info("the certificate of %s is in use", self._certificate)

    async def watch(self) -> None:
        """Loads the files again whenever they have changed, for ever."""
        while True:
            await anyio.sleep(CHECK_S)
            self.look()

    def look(self) -> None:
        """Loads the files again if they have changed since they were last looked at."""
        if self._stamp() == self._seen:
            return
        try:
            self.reload()
        except SnowdropError as error:
            log.error("%s; the certificate before it stays in use", error)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = self._minimum
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_alpn_protocols(list(self._alpn))
        self._fill(context)
        return context

    def _fill(self, context: ssl.SSLContext) -> None:
        for name, path in (("tls_certificate_file", self._certificate), ("tls_key_file", self._key)):
            try:
                path.read_bytes()
            except OSError as error:
                raise InvalidInputError(
                    f"cannot read {path}: {error.strerror}",
                    where=f"gateway.{name}",
                    next_step="name a PEM file that this user can read",
                ) from error
        try:
            context.load_cert_chain(self._certificate, self._key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidInputError(
                f"unusable certificate or key: {_reason(error)}",
                where=f"gateway.tls_certificate_file={self._certificate}, gateway.tls_key_file={self._key}",
                next_step="give PEM files: the certificate, its chain behind it, and its key without a password",
            ) from error

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What tells one content of the files from another; renewals replace them, in place or by a link."""
        stamps: list[tuple[int, int, int] | None] = []
        for path in (self._certificate, self._key):
            try:
                found = path.stat()
            except OSError:
                stamps.append(None)
            else:
                stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
        return tuple(stamps)


def open_certificate(settings: GatewaySettings, *, alpn: tuple[str, ...] = ("http/1.1",)) -> Certificate | None:
    """The certificate that the settings name, or None where there is no TLS. Raises InvalidInputError."""
    if bool(settings.tls_certificate_file) != bool(settings.tls_key_file):
        missing = "tls_key_file" if settings.tls_certificate_file else "tls_certificate_file"
        raise InvalidInputError(
            "TLS needs both a certificate and its key", where=f"gateway.{missing}", next_step="set both, or none"
        )
    return Certificate(settings, alpn=alpn) if settings.tls_certificate_file else None


def _no_password() -> NoReturn:
    # Without this OpenSSL would ask for it on a terminal that a service does not have.
    raise ValueError("the key is protected by a password")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    return str(reason).replace("_", " ").lower() if reason else str(error)
