"""Measuring reads for the parallelism decider, and the node's bandwidth limits, on a clock of their own."""

from __future__ import annotations

from pathlib import Path

from snowdrop.content.origin import DirectoryOrigin
from snowdrop.content.origin.bandwidth import Bandwidth
from snowdrop.content.origin.steer import Steer
from snowdrop.domain.ids import TenantId

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def read_rounds(steer: Steer, clock: Clock, rounds: int, link: float, each: float) -> None:
    """Keeps `steer.connections` reads under way on a link of `link` bytes a second, `each` for one connection."""
    for _ in range(rounds):
        connections = steer.connections
        took_s = steer.range_bytes * connections / min(link, each * connections)
        for _ in range(connections):
            steer.began()
        clock.now_s += took_s
        for _ in range(connections):
            steer.ended(steer.range_bytes, 0.005)


def test_connections_follow_what_the_link_needs() -> None:
    clock = Clock()
    steer = Steer(32, clock=clock)
    read_rounds(steer, clock, 3_000, link=1_000e6, each=100e6)
    assert 9 <= steer.connections <= 12
    clock = Clock()
    steer = Steer(32, clock=clock)
    read_rounds(steer, clock, 3_000, link=1_000e6, each=1_000e6)
    assert steer.connections <= 2


def test_ranges_grow_with_delay_and_speed() -> None:
    clock = Clock()
    slow, fast = Steer(8, clock=clock), Steer(8, clock=clock)
    read_rounds(slow, clock, 500, link=4e6, each=1e6)
    read_rounds(fast, clock, 500, link=2_000e6, each=250e6)
    assert slow.range_bytes == MIB
    assert fast.range_bytes == 16 * MIB


def test_being_told_to_slow_down_halves_the_connections() -> None:
    clock = Clock()
    steer = Steer(16, clock=clock)
    read_rounds(steer, clock, 200, link=1_000e6, each=100e6)
    before = steer.connections
    steer.began()
    clock.now_s += 1.0
    steer.ended(0, 0.0, throttled=1)
    assert steer.connections == before // 2
    assert "slow down" in steer.steering.reason


def test_idle_time_between_loads_is_not_measured() -> None:
    clock = Clock()
    steer = Steer(8, clock=clock)
    read_rounds(steer, clock, 300, link=400e6, each=100e6)
    before = steer.connections
    for _ in range(20):
        clock.now_s += 3_600.0
        read_rounds(steer, clock, 10, link=400e6, each=100e6)
    assert abs(steer.connections - before) <= 1


def test_a_directory_measures_its_reads_too(tmp_path: Path) -> None:
    clock = Clock()
    steer = Steer(8, clock=clock)
    origin = DirectoryOrigin(tmp_path, steer=steer)
    origin.put("k", bytes(MIB))
    into = memoryview(bytearray(MIB))
    steer.began()  # others, so that all connections are busy
    steer.began()
    steer.began()
    for _ in range(8):
        clock.now_s += 0.05
        origin.read_range("k", 0, into)
    assert steer.steering.reason != "nothing measured yet"
    origin.close()


def test_a_tenant_at_its_limit_waits_and_another_does_not() -> None:
    clock = Clock()
    bandwidth = Bandwidth(0, 1_000_000, clock=clock)
    one, other = TenantId("one"), TenantId("other")
    assert bandwidth.wait_s(one) == 0
    bandwidth.spend(one, 500_000)
    assert 0.3 < bandwidth.wait_s(one) <= 0.5
    assert bandwidth.wait_s(other) == 0
    clock.now_s += 0.5
    assert bandwidth.wait_s(one) == 0


def test_the_limit_of_the_node_holds_for_all_tenants_together() -> None:
    clock = Clock()
    bandwidth = Bandwidth(1_000_000, 0, clock=clock)
    taken = 0
    tenants = [TenantId(f"t{index}") for index in range(3)]
    while clock.now_s < 110.0:
        for tenant in tenants:
            if bandwidth.wait_s(tenant) == 0:
                bandwidth.spend(tenant, bandwidth.piece_bytes)
                taken += bandwidth.piece_bytes
        clock.now_s += 0.01
    assert 9_500_000 <= taken <= 10_300_000


def test_without_limits_nothing_is_remembered() -> None:
    bandwidth = Bandwidth(0, 0)
    assert not bandwidth.is_limited
    bandwidth.spend(TenantId("t"), 1 << 40)
    assert bandwidth.wait_s(TenantId("t")) == 0
