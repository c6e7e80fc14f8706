"""Routing."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.routing import choose


class Slots(msgspec.Struct, frozen=True):
    in_flight: int
    concurrency: int
    accepting: bool

    @property
    def free(self) -> bool:
        return self.accepting and self.in_flight < self.concurrency


slots = st.builds(Slots, st.integers(0, 8), st.integers(1, 8), st.booleans())


@given(st.lists(slots, max_size=8))
def test_the_least_loaded_free_replica_is_chosen(replicas: list[Slots]) -> None:
    chosen = choose(replicas)
    free = [r for r in replicas if r.free]
    if not free:
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.free
    share = min(r.in_flight / r.concurrency for r in free)
    assert chosen is next(r for r in free if r.in_flight / r.concurrency == share), "the first wins a tie"
