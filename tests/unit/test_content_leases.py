"""What a push does so that collection cannot take from it: at its beginning, at a condemned key, at its end."""

import threading

import pytest

from snowdrop.content.gcformat import (
    CONDEMNED,
    DELETING,
    INTENT_S,
    LEASE_S,
    LEASES,
    CondemnedRecord,
    Intent,
    Lease,
    read_record,
    write_record,
)
from snowdrop.content.leases import SECOND_NS, Clock, check_lease, push_lease
from snowdrop.content.origin import MemoryOrigin
from snowdrop.domain.errors import NotFoundError, UnavailableError

GARBAGE = "public/packs/aa/" + "a" * 64
OTHER = "public/packs/bb/" + "b" * 64


class Script(Clock):
    """A clock whose every sleep does the next thing of a list."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.then: list[object] = []
        self.slept = 0

    def now_unix_ns(self) -> int:
        return int(self.now_s * SECOND_NS)

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.slept += 1
        if self.slept == 3 and self.then:
            call = self.then.pop()
            assert callable(call)
            call()


class Journal(MemoryOrigin):
    """Notes every put."""

    def __init__(self) -> None:
        super().__init__()
        self.puts: list[str] = []

    def put(self, key: str, data: bytes | memoryview) -> None:
        self.puts.append(key)
        super().put(key, data)


@pytest.fixture
def origin() -> Journal:
    made = Journal()
    made.put(GARBAGE, b"old")
    made.put(OTHER, b"other")
    write_record(made, CONDEMNED + "c1", CondemnedRecord(id="c1", since_unix_ns={GARBAGE: 5}))
    return made


def lease_at(origin: MemoryOrigin, lease_id: str) -> Lease:
    found = read_record(origin, LEASES + lease_id, Lease)
    assert found is not None
    return found


def intend(origin: MemoryOrigin, clock: Script, *keys: str, seconds: float = INTENT_S) -> None:
    expires = clock.now_unix_ns() + int(seconds * SECOND_NS)
    write_record(origin, DELETING + "d1", Intent(id="d1", expires_unix_ns=expires, keys=keys))


def test_a_push_says_what_it_knows_and_does_not_see_it(origin: Journal) -> None:
    with push_lease(origin, purpose="test", clock=Script()) as lease:
        assert lease_at(origin, lease.id).knows == ("c1",)
        assert not lease.origin.exists(GARBAGE)
        assert lease.origin.exists(OTHER)
        assert list(lease.origin.list("public/")) == [OTHER]
        with pytest.raises(NotFoundError):
            lease.origin.size(GARBAGE)
        with pytest.raises(NotFoundError):
            lease.origin.read_range(GARBAGE, 0, memoryview(bytearray(1)))
    assert not origin.exists(LEASES + lease.id)


def test_what_is_being_deleted_is_absent_also_without_a_record(origin: Journal) -> None:
    clock = Script()
    intend(origin, clock, OTHER)
    with push_lease(origin, purpose="test", clock=clock) as lease:
        assert not lease.origin.exists(OTHER)
        assert lease_at(origin, lease.id).knows == ("c1",)


def test_a_record_that_cannot_be_read_is_not_known(origin: Journal) -> None:
    origin.put(CONDEMNED + "c2", b'{"version":9}')
    with push_lease(origin, purpose="test", clock=Script()) as lease:
        assert lease_at(origin, lease.id).knows == ("c1",)


def test_a_condemned_key_is_said_to_be_revived_before_it_is_put(origin: Journal) -> None:
    with push_lease(origin, purpose="test", clock=Script()) as lease:
        lease.origin.put(OTHER, b"other")
        assert lease_at(origin, lease.id).revived == ()
        origin.puts.clear()
        lease.origin.put(GARBAGE, b"new")
        assert origin.puts == [LEASES + lease.id, GARBAGE]
        assert lease_at(origin, lease.id).revived == (GARBAGE,)
        assert lease.origin.exists(GARBAGE)


def test_a_key_that_a_collection_may_be_deleting_is_put_only_after_it(origin: Journal) -> None:
    clock = Script()
    with push_lease(origin, purpose="test", clock=clock) as lease:
        intend(origin, clock, GARBAGE)

        def collection_ends() -> None:
            assert origin.objects[GARBAGE] == b"old", "not put yet"
            origin.delete(GARBAGE)
            origin.delete(DELETING + "d1")

        clock.then.append(collection_ends)
        lease.origin.put(GARBAGE, b"new")
        assert clock.then == []
        assert origin.objects[GARBAGE] == b"new"


def test_an_intent_that_a_killed_collection_left_is_waited_for_no_longer_than_it_holds(origin: Journal) -> None:
    clock = Script()
    with push_lease(origin, purpose="test", clock=clock) as lease:
        intend(origin, clock, GARBAGE, seconds=10)
        begun_s = clock.now_s
        lease.origin.put(GARBAGE, b"new")
        assert 10 + 300 <= clock.now_s - begun_s < 10 + 302
        intend(origin, clock, OTHER, seconds=10)
        lease.origin.put(OTHER, b"not condemned: at once")


def test_an_intent_without_end_is_told(origin: Journal) -> None:
    clock = Script()
    with push_lease(origin, purpose="test", clock=clock) as lease:
        intend(origin, clock, GARBAGE, seconds=1e6)
        with pytest.raises(UnavailableError, match="collection is deleting"):
            lease.origin.put(GARBAGE, b"new")
        assert origin.objects[GARBAGE] == b"old"


def test_a_lease_that_has_run_out_ends_the_push_here_and_at_control(origin: Journal) -> None:
    clock = Script()
    with push_lease(origin, purpose="test", clock=clock) as lease:
        lease.check()
        check_lease(origin, lease.id, now_unix_ns=clock.now_unix_ns())
        clock.now_s += LEASE_S
        with pytest.raises(UnavailableError, match="ran out"):
            lease.check()
        with pytest.raises(UnavailableError, match="no lease"):
            check_lease(origin, lease.id, now_unix_ns=clock.now_unix_ns())
        lease.renew()
        lease.check()
    with pytest.raises(UnavailableError):
        check_lease(origin, lease.id, now_unix_ns=clock.now_unix_ns())


def test_a_lease_is_renewed_by_itself_and_a_failure_is_tried_again(origin: Journal) -> None:
    clock = Script()

    class Flaky(Journal):
        failures = 2

        def put(self, key: str, data: bytes | memoryview) -> None:
            if self.failures and len(self.puts) == 2:
                self.failures -= 1
                raise UnavailableError("for a moment")
            super().put(key, data)
            if len(self.puts) == 4:
                renewed.set()

    renewed = threading.Event()
    flaky = Flaky()
    with push_lease(flaky, purpose="test", clock=clock, renew_s=0.001) as lease:
        assert renewed.wait(10)
        lease.check()
    assert flaky.failures == 0


def test_a_push_that_fails_tells_its_own_error_also_when_the_lease_cannot_be_given_back() -> None:
    class NoDelete(MemoryOrigin):
        def delete(self, key: str) -> None:
            raise UnavailableError("the origin is gone")

    with pytest.raises(ValueError, match="of the push"), push_lease(NoDelete(), purpose="t", clock=Script()):
        raise ValueError("of the push")
