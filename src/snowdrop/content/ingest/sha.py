"""SHA-256 whose state can be kept, so that an interrupted push need not read a file from its start again.

hashlib cannot give its state away. libcrypto's own SHA256_* functions keep it in a plain structure, and Python has
libcrypto loaded; where it hides them, `state()` is None and a resumed push reads the file again.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import ssl
from functools import cache
from typing import Protocol

_CONTEXT_BYTES = 112
"""sizeof(SHA256_CTX): eight words of state, two of length, the block of sixteen, two counters."""
_LABEL = f"{platform.machine()} {ssl.OPENSSL_VERSION}".encode()


class Sha256(Protocol):
    def update(self, data: memoryview) -> None: ...

    def hexdigest(self) -> str: ...

    def state(self) -> bytes | None:
        """What `resumed_sha256` goes on from; None if that cannot be had here."""


def fresh_sha256() -> Sha256:
    return _Native(_library()) if _library() is not None else _Plain()


def resumed_sha256(state: bytes | None) -> Sha256 | None:
    """The hash as it was when `state` was taken; None if it does not come from this machine's library."""
    if state is None or _library() is None or len(state) != len(_LABEL) + _CONTEXT_BYTES:
        return None
    if not state.startswith(_LABEL):
        return None
    resumed = _Native(_library())
    resumed.load(state[len(_LABEL) :])
    return resumed


class _Plain:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def state(self) -> bytes | None:
        return None


class _Native:
    def __init__(self, library: ctypes.CDLL | None) -> None:
        assert library is not None
        self._library = library
        self._context = (ctypes.c_uint64 * (_CONTEXT_BYTES // 8))()
        library.SHA256_Init(self._context)

    def load(self, raw: bytes) -> None:
        ctypes.memmove(self._context, raw, _CONTEXT_BYTES)

    def update(self, data: memoryview) -> None:
        if data.readonly:
            self._library.SHA256_Update(self._context, bytes(data), len(data))
        elif data:
            start = (ctypes.c_char * len(data)).from_buffer(data)
            self._library.SHA256_Update(self._context, start, len(data))

    def hexdigest(self) -> str:
        last = type(self._context).from_buffer_copy(self._context)
        digest = ctypes.create_string_buffer(32)
        self._library.SHA256_Final(digest, last)
        return digest.raw.hex()

    def state(self) -> bytes | None:
        return _LABEL + bytes(self._context)


@cache
def _library() -> ctypes.CDLL | None:
    """libcrypto as Python loaded it, if its functions do what they should."""
    try:
        import _hashlib  # noqa: PLC0415 (absent where Python was built without OpenSSL)

        library = ctypes.CDLL(_hashlib.__file__)
        library.SHA256_Init.argtypes = [ctypes.c_void_p]
        library.SHA256_Update.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        library.SHA256_Final.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    except (ImportError, AttributeError, OSError):
        return None
    first, second = bytes(range(100)), bytes(200)
    probe, other = _Native(library), _Native(library)
    probe.update(memoryview(first))
    other.load(bytes(probe._context))  # noqa: SLF001 (its own class)
    other.update(memoryview(second))
    return library if other.hexdigest() == hashlib.sha256(first + second).hexdigest() else None
