"""Any traffic, any start-up and service times, clients that leave: queue and deciders lose and leak nothing."""

import anyio
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_world import ScalingWorld
from snowdrop.domain.scale import Scale
from snowdrop.policy.autoscale import judge
from snowdrop.policy.autoscale.explain import alternatives

arrivals = st.lists(
    st.tuples(st.floats(0.0, 40.0), st.integers(1, 20), st.one_of(st.none(), st.floats(0.01, 10.0))),
    min_size=1,
    max_size=5,
)
seconds = st.floats(0.01, 20.0)
REST_S_MAX = 4_000.0


@settings(max_examples=20, deadline=None)
@given(
    traffic=arrivals,
    starts_s=st.lists(seconds, min_size=1, max_size=5),
    services_s=st.lists(st.floats(0.001, 4.0), min_size=1, max_size=5),
    bounds=st.tuples(st.integers(0, 2), st.integers(2, 6), st.integers(0, 2)),
    idle_s=st.floats(0.0, 20.0),
    concurrency=st.integers(1, 5),
)
def test_everyone_is_answered_and_nothing_is_left(
    traffic: list[tuple[float, int, float | None]],
    starts_s: list[float],
    services_s: list[float],
    bounds: tuple[int, int, int],
    idle_s: float,
    concurrency: int,
) -> None:
    world = ScalingWorld()
    low, high, buffer = bounds
    scale = Scale(min=low, max=high, buffer=buffer, idle_s=idle_s)
    asked = iter(range(10_000))
    world.start_s = lambda: starts_s[next(asked) % len(starts_s)]
    world.service_s = lambda: services_s[next(asked) % len(services_s)]

    def held(_entry: object) -> None:
        living = sum(1 for entry in world.world.replicas.values() if not entry.draining)
        assert living <= high, "above its maximum"
        decision = world.entry().decision
        assert decision is not None
        assert low <= decision.desired <= high
        assert world.world.load(("default", "embed"))[0] <= concurrency * len(world.world.replicas)

    async def run() -> None:
        await world.deploy(scale=scale, concurrency=concurrency)
        world.on_look = held
        for after_s, count, patience_s in traffic:
            for _ in range(count):
                world.request(after_s=after_s, patience_s=patience_s)
        world.run(60.0)
        while (world.core.busy or len(world.world.replicas) != low) and world.now_s < REST_S_MAX:
            world.run(20.0)

    anyio.run(run)
    for served in world.requests:
        assert served.ended_s is not None or served.denied == "gone", "lost"
    assert not world.core.busy, "in-flight did not return to 0"
    assert len(world.world.replicas) == low, "the deployment did not come to rest"
    for record in world.records:
        assert judge(record.signals) == record.decision, "the record does not explain the decision"
        for alternative in alternatives(record.signals):
            assert alternative.desired != record.decision.desired, alternative.text
