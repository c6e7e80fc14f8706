"""A registry as the source of an image: the pull half of the OCI distribution protocol."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from snowdrop.domain.errors import (
    CorruptContentError,
    IntegrityError,
    NotFoundError,
    SnowdropError,
    TimedOutError,
    UnauthorisedError,
)
from snowdrop.image.archive import image_of
from snowdrop.image.credentials import Credentials, default_config, find_credentials
from snowdrop.image.oci import (
    DOCUMENT_BYTES_MAX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    Blob,
    Reference,
    choose,
    is_index,
    parse_document,
)
from snowdrop.image.opening import ReachOptions
from snowdrop.image.registry_http import Connection
from snowdrop.image.source import Layer, Read, SourceImage

ATTEMPTS_MAX = 5
PAUSE_S = 0.5
RETRY_AFTER_S_MAX = 60.0
INDEX_DEPTH_MAX = 3
SLOW_S_MAX = 60.0
SLOW_BYTES_MIN = 64 << 10
"""A blob that brings less in SLOW_S_MAX is asked for anew, from where it was."""
_ACCEPT = ", ".join((*INDEX_TYPES, *MANIFEST_TYPES))
_T = TypeVar("_T")


class RegistrySource:
    """One image of a registry, or of a mirror of it. Layers are asked for by digest, with ranges."""

    def __init__(
        self,
        reference: Reference,
        options: ReachOptions,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = f"docker://{reference}"
        self._reference = reference
        self._platform = options.platform
        self._sleep = sleep
        self._clock = clock
        config = options.docker_config or default_config()

        def credentials(host: str) -> Credentials | None:
            if options.user and host == reference.host:
                return Credentials(options.user, options.password)
            return find_credentials(config, host)

        self._connections = [
            Connection(
                host,
                reference.repository,
                credentials=credentials,
                is_insecure=host in options.insecure,
                ca_file=options.ca_file,
            )
            for host in (*options.mirrors, reference.host)
        ]

    def image(self) -> SourceImage:
        wanted, where = self._reference.wanted, self.name
        for _ in range(INDEX_DEPTH_MAX):
            data = self._document(wanted)
            digest = _digest(data)
            if wanted.startswith("sha256:") and digest != wanted:
                raise _wrong(digest, wanted, where)
            document = parse_document(data, where=where)
            if not is_index(document):
                return image_of(document, Blob(digest=digest, size=len(data)), self._config, where=where)
            wanted = choose(document, self._platform, where=where).digest
        raise CorruptContentError(f"indexes more than {INDEX_DEPTH_MAX} deep", where=where)

    @contextmanager
    def read_layer(self, layer: Layer, offset: int) -> Iterator[Read]:
        """One try at each place that may have it; whoever reads goes on at the offset that was reached."""
        failure: SnowdropError | None = None
        for connection in self._connections:
            try:
                opened = connection.open_blob(layer.digest, offset)
                read = opened.__enter__()
            except SnowdropError as error:
                failure = _worse(failure, error)
                continue
            try:
                yield self._paced(read, f"{connection.host}: {layer.digest}")
            finally:
                opened.__exit__(None, None, None)
            return
        assert failure is not None
        raise failure

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def _document(self, wanted: str) -> bytes:
        return self._tried(lambda connection: connection.document("manifests", wanted, _ACCEPT))

    def _config(self, blob: Blob) -> bytes:
        if blob.size > DOCUMENT_BYTES_MAX:
            raise CorruptContentError(f"a config of {blob.size} bytes", where=self.name)
        data = self._tried(lambda connection: connection.document("blobs", blob.digest, "*/*"))
        if _digest(data) != blob.digest:
            raise _wrong(_digest(data), blob.digest, self.name)
        return data

    def _tried(self, ask: Callable[[Connection], _T]) -> _T:
        """Asks every place, and all of them again after a pause while it may help."""
        failure: SnowdropError | None = None
        for attempt in range(ATTEMPTS_MAX):
            if failure is not None:
                waited = failure.retry_after_s if failure.retry_after_s is not None else PAUSE_S * 2**attempt
                self._sleep(min(waited, RETRY_AFTER_S_MAX))
            failure = None
            for connection in self._connections:
                try:
                    return ask(connection)
                except SnowdropError as error:
                    failure = _worse(failure, error)
            assert failure is not None
            if not failure.retryable:
                break
        assert failure is not None
        raise failure

    def _paced(self, read: Read, where: str) -> Read:
        begun_s, in_window = self._clock(), 0

        def paced(most: int) -> bytes:
            nonlocal begun_s, in_window
            data = read(most)
            in_window += len(data)
            now_s = self._clock()
            if in_window >= SLOW_BYTES_MIN:
                begun_s, in_window = now_s, 0
            elif data and now_s - begun_s > SLOW_S_MAX:
                raise TimedOutError(
                    f"less than {SLOW_BYTES_MIN} bytes in {SLOW_S_MAX:.0f} s",
                    where=f"{where}: slow_s_max={SLOW_S_MAX:.0f}",
                    next_step="push again; it goes on where it was",
                )
            return data

        return paced


def _worse(before: SnowdropError | None, error: SnowdropError) -> SnowdropError:
    """Of what two places said, what tells more: that one may be asked again, then that it wants to know us."""
    if before is None or error.retryable or (isinstance(before, NotFoundError) and not before.retryable):
        return error
    return before if before.retryable or isinstance(before, UnauthorisedError) else error


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _wrong(got: str, wanted: str, where: str) -> IntegrityError:
    return IntegrityError(
        f"the registry gives another document than the one asked for: {got[:26]}, not {wanted[:26]}",
        where=where,
        next_step="ask another mirror, or tell who runs it",
    )
