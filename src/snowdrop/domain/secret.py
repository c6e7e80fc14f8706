"""Secrets: what a service asks for, what is stored, and a value that does not show itself."""

import msgspec

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import TenantId

SECRET_BYTES_MAX = 32 << 10
SECRET_BYTES_MIN = 4
"""Shorter ones could not be found in logs without striking out half of them."""
SECRETS_PER_SERVICE_MAX = 32
SECRETS_FOLDER = "/dev/shm/secrets"  # noqa: S108 -- in the replica's own tmpfs
KEYS_VARIABLE = "SNOWDROP_SECRET_KEYS"
"""The platform's keys: each 32 bytes in base64, separated by commas; the first is used for what is written."""
FILE_MARK = "file:"
"""`secrets={"file:tls.pem": "tls-key"}` gives a file instead of an environment variable."""


class SecretValue(msgspec.Struct, frozen=True):
    """A secret in the clear, on its way. Printing it, or a message that holds it, shows nothing of it."""

    text: str

    def __repr__(self) -> str:
        return "SecretValue(***)"


class SecretRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A secret as it is stored: its own key, wrapped with the platform's key `key_id`, and what it sealed."""

    tenant: TenantId
    name: str
    version: int
    key_id: str
    wrapped: bytes
    sealed: bytes
    created_unix_ns: int
    changed_unix_ns: int

    def __repr__(self) -> str:
        return f"SecretRecord({self.tenant}/{self.name} version {self.version})"


def check_names(secrets: dict[str, str]) -> None:
    """Raises InvalidInputError for a mapping that no replica could be given."""
    if len(secrets) > SECRETS_PER_SERVICE_MAX:
        raise InvalidInputError(
            f"{len(secrets)} secrets", where="secrets", next_step=f"at most {SECRETS_PER_SERVICE_MAX}"
        )
    for variable in secrets:
        file = variable.removeprefix(FILE_MARK)
        fine = file.replace(".", "_").replace("-", "_").isidentifier() and not file.startswith(".")
        if not (fine if variable.startswith(FILE_MARK) else variable.isidentifier()):
            raise InvalidInputError(
                f"{variable!r} is neither an environment variable nor file:NAME",
                where="secrets",
                next_step='write secrets={"HF_TOKEN": "hf-token"} or secrets={"file:tls.pem": "tls-key"}',
            )


def check_value(value: str) -> None:
    """Raises InvalidInputError, which never shows the value."""
    size = len(value.encode())
    if not SECRET_BYTES_MIN <= size <= SECRET_BYTES_MAX:
        raise InvalidInputError(
            f"the value has {size} bytes",
            where="value",
            next_step=f"{SECRET_BYTES_MIN} to {SECRET_BYTES_MAX} bytes of text",
        )
    if "\0" in value:
        raise InvalidInputError("the value has a NUL byte, which no environment variable can hold", where="value")


class Redactor:
    """Strikes secrets out of what a replica prints and of what is told of it."""

    MARK = "[secret]"

    def __init__(self, values: tuple[str, ...]) -> None:
        # Logs are lines: of a value with several, each line of some length is struck out by itself.
        parts = {
            part for value in values for part in (value, *value.splitlines()) if len(part) >= SECRET_BYTES_MIN
        }
        self._parts = sorted(parts, key=len, reverse=True)
        self._bytes = [part.encode() for part in self._parts]

    def __bool__(self) -> bool:
        return bool(self._parts)

    def text(self, text: str) -> str:
        for part in self._parts:
            text = text.replace(part, self.MARK)
        return text

    def line(self, line: bytes) -> bytes:
        for part in self._bytes:
            line = line.replace(part, self.MARK.encode())
        return line

    def safe_end(self, data: bytes, end: int) -> int:
        """Where to cut `data`, at `end` or before it, so that no secret lies across the cut."""
        for part in self._bytes:
            for length in range(min(len(part) - 1, end), 0, -1):
                if data.startswith(part[:length], end - length):
                    return self.safe_end(data, end - length)
        return end
