"""The range reader: bytes of an object straight into memory, over plain HTTP/1.1, whatever happens on the way.

It resumes where an answer broke off, tries again with pauses, follows redirects, asks twice for what is late. It
verifies nothing: the reader of the bytes does.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

import msgspec

from snowdrop.content.origin.connection import Pool
from snowdrop.content.origin.exchange import (
    FailedError,
    RedirectedError,
    RefusedError,
    TooShortError,
    UntrustedError,
)
from snowdrop.content.origin.head import GarbledError
from snowdrop.content.origin.port import cut_short, missing, place
from snowdrop.content.origin.race import CancelledReadError, Race, RaceCourse, RaceLimits
from snowdrop.content.origin.recent import ReadCounts, ReadRecord
from snowdrop.content.origin.steer import Steer
from snowdrop.content.origin.target import Located, redirected
from snowdrop.domain.cancel import cancelled
from snowdrop.domain.errors import (
    OriginRefusedError,
    ReadCancelledError,
    SnowdropError,
    TimedOutError,
    UnavailableError,
)
from snowdrop.policy.parallelism import CONNECTIONS_START
from snowdrop.policy.retry import Failure, GiveUp, ReadHistory, RetryLimits, after_failure

REDIRECTS_MAX = 5
OPEN_AHEAD = 2 * CONNECTIONS_START - 1
"""Besides the one that reads a manifest, which the load then uses, too: some for the first tensors, some for the
headers that go beside them."""
PAUSE_LOOK_S = 0.25
_NEXT_STEPS = {
    "connect": "check that the origin runs and that this node reaches it",
    "throttled": "the origin asks for fewer requests: lower content.fetch_threads",
}


class Urls(Protocol):
    """Where the objects of an origin are. Called from several threads."""

    def locate(self, key: str, *, renewed: bool = False) -> Located:
        """Where to GET the object.

        `renewed` asks for a new signature, the last one having been refused.
        """

    @property
    def renewable(self) -> bool:
        """Whether a refusal may come from a signature that has expired."""


class ReadLimits(msgspec.Struct, frozen=True, kw_only=True):
    """All bounds of a read."""

    retry: RetryLimits = RetryLimits()
    race: RaceLimits = RaceLimits()


class Answered(NamedTuple):
    """What the last answer of a read was: seconds to its first byte, bytes of the whole object or -1."""

    first_byte_s: float
    total_bytes: int


class RangeReader:
    """Reads ranges of the objects of one origin. Thread-safe; `pause` and `draw` are replaced in tests."""

    def __init__(
        self,
        urls: Urls,
        origin: str,
        context: ssl.SSLContext,
        *,
        limits: ReadLimits | None = None,
        steer: Steer | None = None,
        pause: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._urls = urls
        self._origin = origin
        self._pool = Pool(context)
        self._limits = limits or ReadLimits()
        self._steer = steer
        self._pause = pause
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._rng_lock = threading.Lock()
        self._record = ReadRecord()
        self._course = RaceCourse(self._pool, self._limits.race, self._record)

    @property
    def counts(self) -> ReadCounts:
        return self._record.counts

    def read(self, key: str, offset: int, into: memoryview) -> None:
        """Fills `into` from `offset`. Raises typed errors that name the object, and UnusableError."""
        before = self._record.counts.throttled
        if self._steer is not None:
            self._steer.began()
        done, first_byte_s = 0, 0.0
        try:
            first_byte_s = self._read(key, offset, into).first_byte_s
            done = len(into)
        finally:
            if self._steer is not None:
                self._steer.ended(done, first_byte_s, throttled=self._record.counts.throttled - before)

    def total_bytes(self, key: str) -> int:
        """The object's length, from the answer to a read of its first byte; -1 if that does not say.

        The bytes asked for next come over the same connection. Raises as `read`, IntegrityError if it is empty.
        """
        return self._read(key, 0, memoryview(bytearray(1))).total_bytes

    def read_start(self, key: str, into: memoryview) -> int:
        """Fills the front of `into`, with all of the object if it is shorter; its length, -1 if that is not said.

        Connections for the reads that follow are opened meanwhile. Raises as `read`.
        """
        server = self._urls.locate(key).target.server
        with suppress(OSError):  # the read itself will say so
            self._pool.open_ahead(server, OPEN_AHEAD)
        return self._read(key, 0, into, may_end=True).total_bytes

    def _read(self, key: str, offset: int, into: memoryview, *, may_end: bool = False) -> Answered:
        history = ReadHistory(started_s=time.monotonic())
        done = redirects = 0
        answered = Answered(0.0, -1)
        renewed = False
        located = self._urls.locate(key)
        while done < len(into):
            until_s = history.started_s + self._limits.retry.elapsed_s_max
            race = Race(self._course, located, offset + done, into[done:], may_end=may_end)
            try:
                race.run(until_s)
                done += race.moved
                answered = Answered(race.first_byte_s, race.total_bytes)
                if may_end and offset + done == race.total_bytes:
                    break
                if done < len(into):
                    less = FailedError("truncated", "it gives fewer bytes than asked for")
                    history = self._after(key, history, less, race.moved)
            except FailedError as error:
                done += race.moved
                history = self._after(key, history, error, race.moved)
                located = self._urls.locate(key)
                redirects = 0
            except RedirectedError as error:
                redirects += 1
                located = self._onward(key, located, error.location, redirects)
            except RefusedError as error:
                if error.status not in {400, 401, 403} or renewed or not self._urls.renewable:
                    raise self._refusal(key, error) from error
                renewed = True
                located = self._urls.locate(key, renewed=True)
            except TooShortError as error:
                raise cut_short(key, len(into), max(error.total - offset, done, 0), self._origin) from error
            except UntrustedError as error:
                raise self._untrusted(key, error) from error
            except CancelledReadError as error:
                raise self._cancelled(key) from error
        self._record.count(bytes=done)
        return answered

    def close(self) -> None:
        self._pool.close()

    def _after(self, key: str, history: ReadHistory, error: FailedError, moved: int) -> ReadHistory:
        """Pauses before the next attempt, or raises."""
        self._record.count(
            retries=1, throttled=int(error.kind == "throttled"), resumed=int(moved > 0 and error.kind != "server")
        )
        failure = Failure(kind=error.kind, moved_bytes=moved, retry_after_s=error.retry_after_s)
        with self._rng_lock:
            draw = self._rng.random()
        what = after_failure(self._limits.retry, history, failure, now_s=time.monotonic(), draw=draw)
        if isinstance(what, GiveUp):
            raise self._given_up(key, error, what) from error
        left_s = what.pause_s
        while left_s > 0:
            if cancelled():
                raise self._cancelled(key)
            self._pause(min(left_s, PAUSE_LOOK_S))
            left_s -= PAUSE_LOOK_S
        return what.history

    def _onward(self, key: str, located: Located, location: str | None, redirects: int) -> Located:
        self._record.count(redirects=1)
        try:
            if redirects > REDIRECTS_MAX:
                raise GarbledError(f"more than redirects_max={REDIRECTS_MAX} redirects")
            onward = redirected(located.target, location)
        except GarbledError as error:
            raise UnavailableError(
                f"the origin answers with {error}",
                where=place(self._origin, key),
                next_step="check the origin's URL",
            ) from error
        # Credentials are for the server that they were given for.
        same = onward.server == located.target.server
        return Located(onward, located.authorization if same else "")

    def _given_up(self, key: str, error: FailedError, verdict: GiveUp) -> SnowdropError:
        step = _NEXT_STEPS.get(error.kind, "try again; if it stays, look at the origin's own logs")
        kind = TimedOutError if error.kind == "stalled" else UnavailableError
        return kind(
            f"the origin does not give this object: {error}; {verdict.reason} ({verdict.bound})",
            where=place(self._origin, key),
            next_step=step,
            retry_after_s=error.retry_after_s,
        )

    def _refusal(self, key: str, error: RefusedError) -> SnowdropError:
        if error.status in {404, 410}:
            return missing(key, self._origin)
        return OriginRefusedError(
            f"the origin refuses to give this object: it answered {error}",
            where=place(self._origin, key),
            next_step="check the credentials of this node and what they may read",
        )

    def _untrusted(self, key: str, error: UntrustedError) -> SnowdropError:
        return OriginRefusedError(
            f"the origin's certificate is not trusted: {error}",
            where=place(self._origin, key),
            next_step="name its authority's certificate in content.origin_ca_file",
        )

    def _cancelled(self, key: str) -> SnowdropError:
        return ReadCancelledError("the read was cancelled", where=place(self._origin, key))
