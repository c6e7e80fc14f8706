"""Bursts, slow loads and quiet times in virtual time: queue and deciders together (`scaling_world`)."""

import itertools
import random

import pytest
from benchmarks.burst import REPLICAS_MAX, SCENES, Scene, ideal_s, needed

from scaling_world import ScalingWorld
from snowdrop.domain.replica import ReplicaState
from snowdrop.domain.service import ResourceSpec, Scale
from snowdrop.policy.autoscale import judge

pytestmark = pytest.mark.anyio
SCALE = Scale(max=REPLICAS_MAX, idle_s=1.0)


async def world_at_zero(*, known: bool, scale: Scale = SCALE) -> ScalingWorld:
    world = ScalingWorld()
    await world.deploy(scale=scale)
    if known:
        for _ in range(4):
            world.request()
        world.run(60.0)
        assert len(world.world.replicas) == scale.min, "not at zero"
    world.requests.clear()
    world.started.clear()
    return world


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
async def test_bursts_keep_the_bars_of_the_benchmark(scene: Scene) -> None:
    world = await world_at_zero(known=not scene.fresh)
    began_s, arrivals_s = world.now_s, scene.arrivals_s()
    for at_s in arrivals_s:
        world.request(after_s=at_s)
    world.run(60.0)
    ends_s = [served.ended_s for served in world.requests]
    assert None not in ends_s, "lost"
    assert not any(served.denied for served in world.requests)
    last_s = max(end_s for end_s in ends_s if end_s is not None) - began_s
    if scene.requests >= 500:
        assert last_s <= 1.3 * ideal_s(arrivals_s, REPLICAS_MAX)
        assert len(world.started) == REPLICAS_MAX
    else:
        assert scene.needed() == 3
        assert len(world.started) <= 4
    assert not world.world.replicas, "something is left"
    assert not world.core.busy
    assert all(judge(record.signals) == record.decision for record in world.records)


@pytest.mark.parametrize("seed", range(8))
async def test_a_small_burst_never_overshoots_by_more_than_one(seed: int) -> None:
    rng = random.Random(seed)
    world = await world_at_zero(known=True)
    world.start_s = lambda: 2.0 * rng.uniform(0.7, 1.5)
    world.service_s = lambda: 0.2 * rng.uniform(0.5, 1.5)
    arrivals_s = sorted(rng.uniform(0.0, 1.0) for _ in range(rng.randint(40, 70)))
    for at_s in arrivals_s:
        world.request(after_s=at_s)
    world.run(60.0)
    assert all(served.ended_s is not None for served in world.requests)
    assert len(world.started) <= needed(arrivals_s) + 1


async def test_what_was_before_an_idle_time_starts_nothing_after_it() -> None:
    world = await world_at_zero(known=True)
    for _ in range(500):
        world.request()
    world.run(12.0)
    assert not world.world.replicas, "not at zero"
    world.started.clear()
    world.request()
    world.run(5.0)
    assert len(world.started) == 1


async def test_a_start_far_slower_than_learned_breeds_no_replica() -> None:
    world = await world_at_zero(known=True)
    world.start_s = lambda: 90.0
    for number in range(60):
        world.request(after_s=number / 60)
    for number in range(75):
        world.request(after_s=2.0 + number)
    world.run(80.0)
    assert 1 <= len(world.started) <= 4
    assert all(served.ended_s is None and not served.denied for served in world.requests)
    world.run(60.0)
    assert all(served.ended_s is not None for served in world.requests), "a replica was given up for a slow load"
    assert len(world.started) <= 4
    assert all(state is ReplicaState.READY for _, _, state in world.ended), "one was stopped while it started"


async def test_when_clients_leave_during_a_load_starting_replicas_go_before_ready_ones() -> None:
    world = await world_at_zero(known=True, scale=Scale(max=8, min=1, idle_s=1.0))
    ready = {name for name, entry in world.world.replicas.items() if entry.state is ReplicaState.READY}
    assert len(ready) == 1
    world.start_s = lambda: 50.0
    for _ in range(60):
        world.request(patience_s=3.0)
    world.service_s = lambda: 5.0
    world.run(40.0)
    assert len(world.started) > 1
    gone = {name: state for _, name, state in world.ended}
    assert not ready & set(gone), "a running replica was stopped before starting ones"


@pytest.mark.parametrize(("rate", "seed"), [(3.0, 1), (13.0, 2), (14.0, 3), (41.0, 4), (62.0, 5)])
async def test_constant_traffic_does_not_flap(rate: float, seed: int) -> None:
    rng = random.Random(seed)
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=16, idle_s=30.0))
    for_s = 300.0 if rate < 20 else 220.0
    times = list(
        itertools.takewhile(
            lambda t: t < for_s, itertools.accumulate(rng.expovariate(rate) for _ in range(40_000))
        )
    )
    for at_s in times:
        world.request(after_s=at_s)
    counts: list[int] = []

    def note(entry: object) -> None:
        decision = world.entry().decision
        if world.now_s > 1_150.0 and decision is not None:
            counts.append(decision.desired)

    world.on_look = note
    world.run(for_s)
    changes = [pair for pair in itertools.pairwise(counts) if pair[0] != pair[1]]
    needs = rate * 0.2 / (4 * 0.7)
    assert len(changes) <= 2, changes
    assert needs <= max(counts) <= needs + 2
    assert sum(1 for served in world.requests if served.denied) == 0


async def test_a_ramp_up_and_down_follows_the_load_without_going_back_and_forth() -> None:
    rng = random.Random(7)
    world = ScalingWorld()
    await world.deploy(scale=Scale(max=16, idle_s=5.0))
    now_s = 0.0
    while now_s < 600.0:
        rate = 60.0 * (now_s if now_s < 300.0 else 600.0 - now_s) / 300.0 + 0.5
        now_s += rng.expovariate(rate)
        world.request(after_s=now_s)
    counts: list[int] = []
    world.on_look = lambda entry: counts.append(entry.decision.desired if entry.decision else 0)
    world.run(640.0)
    turns = [pair[0] for pair in itertools.groupby(counts)]
    peak = turns.index(max(turns))
    assert max(turns) >= 4
    down = [pair for pair in itertools.pairwise(turns[: peak + 1]) if pair[1] < pair[0]]
    up = [pair for pair in itertools.pairwise(turns[peak:]) if pair[1] > pair[0]]
    assert len(down) + len(up) <= 2, turns
    assert all(served.ended_s is not None for served in world.requests)
    waits_s = [
        served.granted_s - served.arrived_s for served in world.requests[500:] if served.granted_s is not None
    ]
    assert sorted(waits_s)[int(0.99 * len(waits_s))] <= 2.5, "the backlog starved"


async def test_requests_far_longer_than_learned_do_not_starve_those_who_wait() -> None:
    world = await world_at_zero(known=True)
    world.service_s = lambda: 60.0
    for number in range(12):
        world.request(after_s=number * 0.01)
    world.run(40.0)
    assert sum(1 for served in world.requests if served.granted_s is not None) == 12


async def test_a_buffer_stands_by_while_in_use_and_goes_with_the_last() -> None:
    world = await world_at_zero(known=True, scale=Scale(max=8, idle_s=20.0, buffer=2))
    for number in range(100):
        world.request(after_s=number * 0.25)
    world.run(20.0)
    assert world.entry().decision is not None
    assert world.entry().decision.desired == 3
    world.run(60.0)
    assert not world.world.replicas


async def test_idle_replicas_make_room_for_a_start_that_fits_nowhere() -> None:
    gib = 1 << 30
    world = ScalingWorld(memory_bytes=4 * gib)
    resources = ResourceSpec(memory_bytes_max=2 * gib)
    for name in ("old", "kept", "new"):
        keep = 1 if name == "kept" else 0
        await world.deploy(name, scale=Scale(min=keep, idle_s=3_600.0), resources=resources)
    world.request("old")
    world.run(20.0)
    assert {entry.key[1] for entry in world.world.replicas.values()} == {"old", "kept"}
    served = world.request("new")
    world.run(20.0)
    assert served.ended_s is not None
    assert {entry.key[1] for entry in world.world.replicas.values()} == {"new", "kept"}
    assert "room" in (world.entry("old").decision or world).reason
    busy = world.request("old")
    world.service_s = lambda: 30.0
    world.run(30.0)
    assert busy.granted_s is not None, "what made room comes back when it is called"


async def test_nothing_that_is_busy_or_the_minimum_makes_room() -> None:
    gib = 1 << 30
    world = ScalingWorld(memory_bytes=2 * gib)
    resources = ResourceSpec(memory_bytes_max=2 * gib)
    for name in ("busy", "new"):
        await world.deploy(name, scale=Scale(idle_s=3_600.0), resources=resources)
    world.service_s = lambda: 100.0
    world.request("busy")
    world.run(10.0)
    waits = world.request("new")
    world.run(50.0)
    assert waits.granted_s is None
    assert "no idle replica" in world.entry("new").placement_reason
    world.run(100.0)
    assert waits.granted_s is not None
