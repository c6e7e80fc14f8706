"""One request for a range and its answer, step by step: connect, send, head, body. It never waits by itself."""

from __future__ import annotations

import re
import select
import ssl
from collections.abc import Mapping

from snowdrop.content.origin.connection import Connection
from snowdrop.content.origin.head import (
    HEAD_BYTES_MAX,
    GarbledError,
    ResponseHead,
    parse_content_range,
    parse_head,
)
from snowdrop.content.origin.target import Located
from snowdrop.policy.retry import FailureKind

ERROR_BODY_BYTES_MAX = 4 << 10
SCRATCH_BYTES = 16 << 10
_CODE = re.compile(rb"<Code>([A-Za-z0-9_.]{1,80})</Code>")
_STATUS_KINDS: Mapping[int, FailureKind] = {408: "stalled", 425: "throttled", 429: "throttled", 503: "throttled"}


class FailedError(Exception):
    """This attempt failed; another one may not."""

    def __init__(self, kind: FailureKind, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


class RedirectedError(Exception):
    """The bytes are elsewhere."""

    def __init__(self, location: str | None) -> None:
        super().__init__("redirected")
        self.location = location


class RefusedError(Exception):
    """An answer that stays the same however often one asks: a 4xx."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}".strip())
        self.status = status


class TooShortError(Exception):
    """The object ends before the range: it has `total` bytes (-1: it was not said)."""

    def __init__(self, total: int) -> None:
        super().__init__(f"{total} bytes")
        self.total = total


class UnusableError(Exception):
    """A correct answer of a form that is not read here, such as a chunked body."""


class Exchange:
    """Asks for `len(into)` bytes from `offset` and puts what comes at the front of `into`.

    `done` bytes are there. `complete` says that all of this answer are, which may be fewer than were asked.
    """

    def __init__(
        self,
        connection: Connection,
        located: Located,
        offset: int,
        into: memoryview,
        now_s: float,
        *,
        may_end: bool = False,
    ) -> None:
        self.connection = connection
        connection.events = select.POLLOUT
        self.done = 0
        self.complete = False
        self.ignored_range = False
        self.started_s = self.moved_s = now_s
        self.first_byte_s = 0.0
        self.total_bytes = -1  # of the whole object, if the answer says
        self._offset = offset
        self._into = into
        self._unsent = memoryview(_request(located, offset, len(into)))
        self._step = "send"
        self._head = bytearray()
        self._response: ResponseHead | None = None
        self._skip = 0
        self._expected = len(into)
        self._keep = False
        self._refused = False
        self._may_end = may_end

    @property
    def connected(self) -> bool:
        return self.connection.ready

    @property
    def answered(self) -> bool:
        """Whether the head has come."""
        return self._response is not None

    @property
    def in_body(self) -> bool:
        """Whether all that is missing are bytes which go straight into place."""
        return self._step == "body" and not self._skip

    @property
    def reusable(self) -> bool:
        """Whether the answer was read to its end, so that the connection can carry another one."""
        return self._keep and (self.complete or self._refused)

    @property
    def events(self) -> int:
        """What to poll for before the next `step`."""
        return self.connection.events if self._step == "send" else self.connection.events | select.POLLIN

    def step(self, now_s: float) -> None:
        """Does what can be done without waiting. Raises FailedError and its siblings."""
        try:
            self._advance(now_s)
        except ssl.SSLCertVerificationError as error:
            raise UntrustedError(error.verify_message) from error
        except OSError as error:
            raise self._broken(error) from error
        except GarbledError as error:
            raise FailedError("garbled", str(error)) from error

    def receive(self, now_s: float, wait_s: float) -> None:
        """As `step`, in the body only, waiting up to `wait_s` for bytes."""
        try:
            came = self.connection.receive_within(self._into[self.done : self._expected], wait_s)
        except OSError as error:
            raise self._broken(error) from error
        if came is not None:
            self._take(came, now_s + wait_s if came == 0 else now_s)

    def _advance(self, now_s: float) -> None:
        if not self.connection.ready and not self.connection.advance():
            return
        if self._step == "send":
            while self._unsent:
                sent = self.connection.send_now(self._unsent)
                if sent == 0:
                    return
                self._unsent = self._unsent[sent:]
            self._step = "head"
            self.connection.events = select.POLLIN
            self.moved_s = now_s
        if self._step == "head" and not self._read_head(now_s):
            return
        if self._step == "refusal":
            self._read_refusal()
        while self._step == "body" and not self.complete:
            if self._skip:
                scratch = memoryview(bytearray(min(self._skip, SCRATCH_BYTES)))
                came = self.connection.receive_now(scratch)
                if came:
                    self._skip -= came
                    self.moved_s = now_s
                    continue
            else:
                came = self.connection.receive_now(self._into[self.done : self._expected])
            if came is None:
                return
            self._take(came, now_s)

    def _take(self, came: int, now_s: float) -> None:
        if came == 0:
            raise FailedError("truncated", f"the answer ended after {self.done} of {self._expected} bytes")
        self.done += came
        self.moved_s = now_s
        self.complete = self.done == self._expected

    def _read_head(self, now_s: float) -> bool:
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        while True:
            end = self._head.find(b"\r\n\r\n")
            if end >= 0:
                surplus = bytes(self._head[end + 4 :])
                response = parse_head(bytes(self._head[: end + 4]))
                if response.status >= 200:
                    break
                self._head = bytearray(surplus)  # an interim answer, such as 103
                continue
            if len(self._head) >= HEAD_BYTES_MAX:
                raise GarbledError(f"the head has no end (head_bytes_max={HEAD_BYTES_MAX})")
            came = self.connection.receive_now(scratch)
            if came is None:
                return False
            if came == 0:
                raise FailedError("reset", "the connection was closed before an answer")
            self._head += scratch[:came]
            self.moved_s = now_s
        self._response = response
        self.first_byte_s = now_s
        self._begin_body(response, surplus)
        return True

    def _begin_body(self, response: ResponseHead, surplus: bytes) -> None:
        if response.status not in {200, 206}:
            self._step = "refusal"
            self._head = bytearray(surplus)
            return
        if "transfer-encoding" in response.headers:
            raise UnusableError("the answer is chunked")
        if response.headers.get("content-encoding", "identity").lower() not in {"identity", ""}:
            raise UnusableError("the answer is compressed")
        length = response.content_length
        if length is None:
            raise UnusableError("the answer does not tell its length")
        self._step = "body"
        self._plan_body(response, length)
        self._keep = self._keep and response.keeps_alive
        skipped = min(self._skip, len(surplus))
        self._skip -= skipped
        rest = surplus[skipped:][: self._expected]
        if len(surplus) - skipped > len(rest):
            self._keep = False  # more than the body came, or more than is wanted of it
        self._into[: len(rest)] = rest
        self.done = len(rest)
        self.complete = not self._skip and self.done == self._expected

    def _plan_body(self, response: ResponseHead, length: int) -> None:
        wanted = len(self._into)
        if response.status == 206:
            got = parse_content_range(response.headers.get("content-range"))
            if got.first != self._offset or got.last >= self._offset + wanted:
                raise GarbledError(f"asked for {wanted} bytes from {self._offset}, got {got.first}-{got.last}")
            self._expected = got.last - got.first + 1
            if length != self._expected:
                raise GarbledError(f"content-length {length} for a range of {self._expected} bytes")
            self.total_bytes = got.total
            if self._expected < wanted and got.total == got.last + 1 and not self._may_end:
                raise TooShortError(got.total)
            self._keep = True
            return
        self.ignored_range = True
        self.total_bytes = length
        if length < self._offset + wanted:
            if not self._may_end or length <= self._offset:
                raise TooShortError(length)
            self._expected = length - self._offset
        self._skip = self._offset
        self._keep = length == self._offset + self._expected

    def _read_refusal(self) -> None:
        response = self._response
        assert response is not None
        announced = response.content_length
        # Without a length it may end only with the connection: what came together with the head is enough then.
        limit = 0 if announced is None else min(announced, ERROR_BODY_BYTES_MAX)
        scratch = memoryview(bytearray(ERROR_BODY_BYTES_MAX))
        while len(self._head) < limit:
            came = self.connection.receive_now(scratch[: limit - len(self._head)])
            if came is None:
                return
            if came == 0:
                break
            self._head += scratch[:came]
        self._refused = True
        self._keep = response.keeps_alive and len(self._head) == announced
        raise self._refusal(response)

    def _refusal(self, response: ResponseHead) -> Exception:
        status = response.status
        found = _CODE.search(self._head)
        code = found[1].decode() if found else ""
        if status in {301, 302, 303, 307, 308}:
            return RedirectedError(response.headers.get("location"))
        if status == 416:
            total = response.headers.get("content-range", "").rpartition("/")[2]
            return TooShortError(int(total) if total.isascii() and total.isdigit() and len(total) < 19 else -1)
        if status in _STATUS_KINDS or (status >= 500 and status not in {501, 505}):
            kind = _STATUS_KINDS.get(status, "server")
            return FailedError(kind, f"it answered {status} {code}".strip(), response.retry_after_s)
        return RefusedError(status, code)

    def _broken(self, error: OSError) -> FailedError:
        if not self.connected:
            return FailedError("connect", error.strerror or str(error))
        return FailedError("reset", error.strerror or str(error))


class UntrustedError(Exception):
    """The server's certificate is not trusted."""


def _request(located: Located, offset: int, length: int) -> bytes:
    target = located.target
    lines = [
        f"GET {target.path} HTTP/1.1",
        f"Host: {target.authority}",
        f"Range: bytes={offset}-{offset + length - 1}",
        "Accept-Encoding: identity",
        "User-Agent: snowdrop",
    ]
    if located.authorization:
        lines.append(f"Authorization: {located.authorization}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
