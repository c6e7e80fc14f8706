"""Reads from an origin that misbehaves: they end right, or with an error that says what to do.

Nothing waits for long and nothing looks at the clock: bounds are set low, pauses are counted instead of slept.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from content_helpers import noise
from origin_servers import Asked, Fault, FaultyServer, Plan, free_port
from snowdrop.content.origin.objects import ObjectStoreOrigin
from snowdrop.content.origin.race import RaceLimits
from snowdrop.content.origin.ranges import OPEN_AHEAD, ReadLimits
from snowdrop.domain.cancel import CANCEL_FLAG
from snowdrop.domain.errors import (
    IntegrityError,
    NotFoundError,
    OriginRefusedError,
    TimedOutError,
    UnavailableError,
)
from snowdrop.domain.origin import OriginOptions
from snowdrop.policy.hedge import HedgeLimits
from snowdrop.policy.retry import RetryLimits

MIB = 1 << 20
BODY = noise(2 * MIB, 5)
NEVER = HedgeLimits(burst=0, share_max=0.0)
AT_ONCE = HedgeLimits(unknown_s=0.02, samples_min=1_000_000)


class Reading:
    """An origin over a faulty server, with what it did."""

    def __init__(self, server: FaultyServer, origin: ObjectStoreOrigin, pauses: list[float]) -> None:
        self.server = server
        self.origin = origin
        self.pauses = pauses

    def read(self, offset: int = 0, length: int = MIB, key: str = "k") -> bytes:
        into = bytearray(length)
        self.origin.read_range(key, offset, memoryview(into))
        return bytes(into)


@contextmanager
def reading(
    plan: Plan, *, hedge: HedgeLimits = NEVER, stall_s_max: float = 0.2, retry: RetryLimits | None = None
) -> Iterator[Reading]:
    pauses: list[float] = []
    limits = ReadLimits(
        retry=retry or RetryLimits(), race=RaceLimits(stall_s_max=stall_s_max, head_s_max=2.0, hedge=hedge)
    )
    with FaultyServer({"k": BODY, "empty": b""}, plan).running() as server:
        origin = ObjectStoreOrigin(
            server.url, OriginOptions(), limits=limits, pause=pauses.append, rng=random.Random(1)
        )
        try:
            yield Reading(server, origin, pauses)
        finally:
            origin.close()


def first(count: int, fault: Fault) -> Plan:
    """The first `count` answers are faulty."""
    return lambda asked: fault if asked.index < count else None


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408])
def test_a_burst_of_errors_is_waited_out(status: int) -> None:
    with reading(first(4, Fault(status=status))) as it:
        assert it.read(7, 1000) == BODY[7:1007]
        assert it.origin.counts.retries == 4
        assert len(it.pauses) >= 4  # a long pause is made in pieces
        assert it.server.connections == 1  # the answer was read to its end: the connection serves on


@pytest.mark.parametrize(
    ("end", "hedge"), [("reset", NEVER), ("close", NEVER), ("stall", NEVER), ("stall", AT_ONCE)]
)
@pytest.mark.parametrize("after", [0, 1, 300_000, MIB - 1])
def test_an_answer_that_breaks_off_is_gone_on_with_at_its_offset(end: str, hedge: HedgeLimits, after: int) -> None:
    with reading(first(1, Fault(after=after, end=end)), hedge=hedge) as it:
        assert it.read(MIB // 2) == BODY[MIB // 2 :][:MIB]
        again = it.server.asked[1]
        assert MIB // 2 <= again.first <= MIB // 2 + after
        assert again.last == MIB // 2 + MIB - 1
        if end != "reset":  # a reset may take away what the client had not read yet
            assert again.first == MIB // 2 + after


def test_many_breaks_in_one_read_are_no_reason_to_give_up() -> None:
    with reading(lambda asked: Fault(after=50_000, end="close"), retry=RetryLimits(attempts_max=2)) as it:
        assert it.read() == BODY[:MIB]
        assert it.origin.counts.resumed == MIB // 50_000


@pytest.mark.parametrize(
    "fault",
    [
        Fault(head=b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
        Fault(head=b"HTTP/1.1 two hundred\r\n\r\n"),
        Fault(head=b"\x00\xff" * 100 + b"\r\n\r\n"),
        Fault(head=b"HTTP/1.1 206 X\r\nContent-Length: -5\r\nContent-Range: bytes 0-4/5\r\n\r\n"),
        Fault(head=b"HTTP/1.1 206 X\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"),
        Fault(head=b"HTTP/1.1 206 X\r\nNo colon here\r\n\r\n"),
        Fault(head=b"HTTP/1.1 206 X\r\n" + b"A: b\r\n" * 200 + b"\r\n"),
        Fault(head=b"HTTP/1.1 206 X\r\n", head_again=b"X-Endless: " + b"x" * 4096 + b"\r\n"),
        Fault(head=b"HTTP/1.1 206 X\r\nX-Endless: ", head_again=b"y" * 4096),
        Fault(shift=1),
        Fault(headers=("Content-Range: bytes 0-99/100",)),
    ],
)
def test_an_answer_that_is_no_http_or_another_range_is_refused_and_asked_for_again(fault: Fault) -> None:
    with reading(first(2, fault)) as it:
        assert it.read(10, 5000) == BODY[10:5010]
        assert it.origin.counts.retries == 2


def test_an_origin_that_only_ever_talks_garbage_is_given_up() -> None:
    with reading(lambda asked: Fault(head=b"garbage\r\n\r\n")) as it, pytest.raises(UnavailableError) as caught:
        it.read()
    assert "status line" in str(caught.value)
    assert "attempts_max=7" in str(caught.value)
    assert f"{it.server.url}/k" in caught.value.where
    assert caught.value.next_step
    assert len(it.server.asked) == 8


def test_nobody_listening_is_a_clear_error() -> None:
    pauses: list[float] = []
    url = f"http://127.0.0.1:{free_port()}"
    origin = ObjectStoreOrigin(url, OriginOptions(), pause=pauses.append)
    with pytest.raises(UnavailableError) as caught:
        origin.read_range("k", 0, memoryview(bytearray(1)))
    assert "refused" in str(caught.value)
    assert "this node reaches it" in caught.value.next_step
    assert caught.value.where == f"{url}/k"
    assert sum(pauses) > 0


def test_an_origin_that_never_answers_is_given_up_with_the_bound_that_ran_out() -> None:
    plan = lambda asked: Fault(after=0, end="stall")  # noqa: E731
    with (
        reading(plan, stall_s_max=0.05, retry=RetryLimits(attempts_max=2)) as it,
        pytest.raises(TimedOutError, match=r"stall_s_max=0\.05.*attempts_max=2"),
    ):
        it.read()
    assert len(it.server.asked) == 3


def test_retry_after_is_kept_to() -> None:
    with reading(first(1, Fault(status=429, headers=("Retry-After: 3",)))) as it:
        it.read(0, 10)
        assert sum(it.pauses) >= 3
        assert it.origin.counts.throttled == 1


def test_a_retry_after_that_is_too_long_ends_the_read_and_tells_it() -> None:
    with (
        reading(first(1, Fault(status=503, headers=("Retry-After: 120",)))) as it,
        pytest.raises(UnavailableError, match="120 s") as caught,
    ):
        it.read(0, 10)
    assert caught.value.retry_after_s == 120
    assert it.pauses == []


@pytest.mark.parametrize("status", [400, 401, 403, 405, 451])
def test_a_refusal_is_not_tried_again(status: int) -> None:
    with reading(lambda asked: Fault(status=status)) as it, pytest.raises(OriginRefusedError, match=str(status)):
        it.read()
    assert len(it.server.asked) == 1


def test_a_missing_object_is_not_tried_again() -> None:
    with reading(lambda asked: None) as it, pytest.raises(NotFoundError, match="push the artefact again"):
        it.read(key="nothing")
    assert it.pauses == []


def test_an_object_that_is_too_short_says_so() -> None:
    with reading(lambda asked: None) as it, pytest.raises(IntegrityError, match="has 100 of the 200"):
        it.read(len(BODY) - 100, 200)
    with reading(lambda asked: Fault(whole=True)) as it, pytest.raises(IntegrityError, match="has 100 of the 200"):
        it.read(len(BODY) - 100, 200)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(chunked=True), "chunked"),
        (Fault(headers=("Content-Encoding: gzip",)), "compressed"),
        (Fault(head=b"HTTP/1.1 200 X\r\n\r\n"), "length"),
    ],
)
def test_an_answer_of_a_form_that_is_not_read_is_named(fault: Fault, message: str) -> None:
    with reading(lambda asked: fault) as it, pytest.raises(OriginRefusedError, match=message) as caught:
        it.read()
    assert "with their length" in caught.value.next_step
    assert len(it.server.asked) == 1


def test_a_server_that_ignores_ranges_is_read_all_the_same() -> None:
    with reading(lambda asked: Fault(whole=True)) as it:
        assert it.read(100_000, 50_000) == BODY[100_000:150_000]
        assert it.read(0, 10) == BODY[:10]
        assert it.read(len(BODY) - 10, 10) == BODY[-10:]


def test_what_is_cut_off_behind_a_whole_object_is_not_taken_for_the_next_answer() -> None:
    with reading(lambda asked: Fault(whole=True) if asked.index % 2 == 0 else None) as it:
        for offset in (0, 5, 1000, MIB):
            assert it.read(offset, 300) == BODY[offset : offset + 300]


def test_redirects_are_followed_without_the_credentials() -> None:
    with FaultyServer({"cdn/k": BODY}, lambda asked: None).running() as cdn:
        location = f"Location: {cdn.url}/cdn/k?signature=1"
        with reading(lambda asked: Fault(status=307, headers=(location,))) as it:
            assert it.read(3, 100) == BODY[3:103]
            assert it.origin.counts.redirects == 1
            assert [asked.authorization for asked in cdn.asked] == [""]


def test_redirects_in_a_circle_end() -> None:
    with (
        reading(lambda asked: Fault(status=302, headers=("Location: /k",))) as it,
        pytest.raises(UnavailableError, match="redirects_max=5"),
    ):
        it.read()


def test_a_connection_that_the_server_closed_while_it_was_idle_is_no_failure() -> None:
    with reading(lambda asked: Fault(closes=True)) as it:
        for offset in range(5):
            assert it.read(offset, 100) == BODY[offset : offset + 100]
        assert it.origin.counts.retries == 0
        assert it.server.connections == 5


def test_one_that_it_closes_just_as_it_is_used_again_is_no_failure_either() -> None:
    with reading(lambda asked: Fault(drops=True) if asked.index in {1, 3} else None) as it:
        for offset in range(3):
            assert it.read(offset, 100) == BODY[offset : offset + 100]
        assert it.origin.counts.retries == 0
        assert len(it.server.asked) == 5


def test_connections_are_kept_from_one_read_to_the_next() -> None:
    with reading(lambda asked: None) as it:
        for offset in range(20):
            assert it.read(offset, 100_000) == BODY[offset : offset + 100_000]
        assert it.server.connections == 1


def test_slow_ranges_are_rescued_by_hedges_within_their_budget() -> None:
    """1 of 100 ranges stalls for good; without hedges such a read ends by its bound only."""

    def plan(asked: Asked) -> Fault | None:
        block = asked.first // 4096
        stalls = block % 100 == 37 and block not in seen
        seen.add(block)
        return Fault(after=asked.first % 3 * 1000, end="stall") if stalls else None

    seen: set[int] = set()
    hedge = HedgeLimits(late_s_min=0.1, unknown_s=0.5)
    with reading(plan, hedge=hedge, stall_s_max=20.0) as it:
        for offset in range(0, len(BODY), 4096):
            assert it.read(offset, 4096) == BODY[offset : offset + 4096]
        counts = it.origin.counts
        slow = len([offset for offset in range(0, len(BODY), 4096) if offset // 4096 % 100 == 37])
        assert slow == 5
        assert counts.retries == 0
        assert slow <= counts.hedges <= hedge.burst + hedge.share_max * counts.requests + 1
        assert counts.hedges_won >= slow


def test_a_hedge_that_wins_brings_only_what_was_missing() -> None:
    def plan(asked: Asked) -> Fault | None:
        if asked.index == 0:
            return Fault(after=1000, end="stall")
        it.server.objects["k"] = bytes(len(BODY))
        return None

    with reading(plan, hedge=AT_ONCE, stall_s_max=20.0) as it:
        assert it.read() == BODY[:1000] + BODY[1000:MIB]
        assert it.server.asked[1].first == 1000


def test_a_hedge_that_loses_leaves_nothing_in_the_memory() -> None:
    """It has brought half of its bytes, all wrong, when the first answer goes on and comes to its end."""
    gate = threading.Event()

    def plan(asked: Asked) -> Fault | None:
        if asked.index == 0:
            return Fault(after=1000, gate=gate)
        it.server.objects["k"] = bytes(len(BODY))
        threading.Timer(0.05, gate.set).start()
        return Fault(after=MIB // 2, end="stall", flip=True)

    with reading(plan, hedge=AT_ONCE, stall_s_max=20.0) as it:
        assert it.read() == BODY[:MIB]
        assert it.origin.counts.hedges == 1
        assert it.origin.counts.hedges_won == 0


@pytest.mark.parametrize(
    "answer",
    [Fault(status=404), Fault(status=403), Fault(status=302, headers=("Location: /k",)), Fault(chunked=True)],
    ids=["missing", "refused", "elsewhere", "chunked"],
)
def test_a_hedge_that_gets_no_bytes_ends_no_read_whose_first_answer_goes_on(answer: Fault) -> None:
    gate = threading.Event()

    def plan(asked: Asked) -> Fault | None:
        if asked.index == 0:
            return Fault(after=1000, gate=gate)
        threading.Timer(0.2, gate.set).start()
        return answer

    with reading(plan, hedge=AT_ONCE, stall_s_max=20.0) as it:
        assert it.read() == BODY[:MIB]
        assert it.origin.counts.hedges == 1
        assert len(it.server.asked) == 2


def test_a_cancelled_load_ends_its_reads_at_once() -> None:
    flag = threading.Event()

    def plan(asked: Asked) -> Fault | None:
        flag.set()
        return Fault(after=10, end="stall")

    token = CANCEL_FLAG.set(flag)
    try:
        with (
            reading(plan, stall_s_max=20.0) as it,
            pytest.raises(UnavailableError, match="cancelled"),
        ):
            it.read()
        assert it.origin.counts.retries == 0
    finally:
        CANCEL_FLAG.reset(token)


def test_seeded_mixtures_of_faults_end_right() -> None:
    rng = random.Random(20)
    faults: list[Callable[[], Fault | None]] = [
        lambda: None,
        lambda: None,
        lambda: Fault(status=rng.choice([500, 503, 429])),
        lambda: Fault(after=rng.randrange(60_000), end=rng.choice(["reset", "close"])),
        lambda: Fault(after=rng.randrange(60_000), end="stall"),
        lambda: Fault(head=b"junk\r\n\r\n"),
        lambda: Fault(closes=True),
        lambda: Fault(whole=True),
        lambda: Fault(shift=3),
    ]
    retry = RetryLimits(attempts_max=50)
    with reading(lambda asked: rng.choice(faults)(), hedge=AT_ONCE, stall_s_max=0.1, retry=retry) as it:
        for _ in range(60):
            offset = rng.randrange(len(BODY) - 60_000)
            assert it.read(offset, 60_000) == BODY[offset : offset + 60_000]


@pytest.mark.parametrize("threads", [8])
def test_several_threads_read_at_once(threads: int) -> None:
    rng = random.Random(3)
    plan = lambda asked: Fault(after=1000, end="close") if rng.random() < 0.2 else None  # noqa: E731
    wrong: list[int] = []
    with reading(plan, hedge=HedgeLimits(unknown_s=5.0)) as it:

        def work(seed: int) -> None:
            mine = random.Random(seed)
            for _ in range(20):
                offset = mine.randrange(len(BODY) - 50_000)
                if it.read(offset, 50_000) != BODY[offset : offset + 50_000]:
                    wrong.append(offset)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert wrong == []
        assert it.server.connections < 160


@pytest.mark.parametrize("whole", [False, True])
def test_a_short_object_comes_in_one_request_and_its_connection_and_others_are_kept(whole: bool) -> None:
    with reading(lambda asked: Fault(whole=True) if whole else None) as it:
        into = bytearray(3 * MIB)
        assert it.origin.read_start("k", memoryview(into)) == len(BODY)
        assert into[: len(BODY)] == BODY
        assert not any(into[len(BODY) :])
        assert len(it.server.asked) == 1
        for offset in range(8):
            it.read(offset, 1000 if not whole else len(BODY) - offset)
        assert it.server.connections <= OPEN_AHEAD + 1, "one that reads, and those that were opened ahead"


def test_the_start_of_an_object_is_gone_on_with_where_it_broke_off() -> None:
    with reading(first(2, Fault(after=70_000))) as it:
        into = bytearray(3 * MIB)
        assert it.origin.read_start("k", memoryview(into)) == len(BODY)
        assert into[: len(BODY)] == BODY
        assert it.origin.counts.resumed == 2
