"""Metered stretches cover a replica's life exactly once, whenever the ticks come and whatever crashes."""

from hypothesis import given
from hypothesis import strategies as st

from platform_helpers import replica_key, report
from snowdrop.domain.receipt import ContentBytes
from snowdrop.domain.replica import ReplicaState
from snowdrop.metering.meter import content_bytes, replica_time


@given(
    st.integers(1, 10**6),
    st.integers(0, 10**6),
    st.lists(st.tuples(st.integers(0, 2 * 10**6), st.booleans()), max_size=20),
)
def test_ticks_cover_a_life_exactly_once(started: int, length: int, ticks: list[tuple[int, bool]]) -> None:
    ended = started + length
    until, stretches = 0, []
    for now, crashed in ticks:  # in any order: clocks step back
        over = now >= ended
        seen = report(
            state=ReplicaState.STOPPED if over else ReplicaState.READY,
            started_unix_ns=started,
            ended_unix_ns=ended if over else 0,
        )
        draft = replica_time(seen, metered_until_unix_ns=until, now_unix_ns=now)
        if draft is None or crashed:  # a crash before the journal's commit loses draft and mark together
            continue
        stretches.append((draft.from_unix_ns, draft.to_unix_ns))
        until = draft.to_unix_ns
        assert draft.quantity == draft.to_unix_ns - draft.from_unix_ns > 0
    final = report(state=ReplicaState.STOPPED, started_unix_ns=started, ended_unix_ns=ended)
    last = replica_time(final, metered_until_unix_ns=until, now_unix_ns=0)
    if last is not None:
        stretches.append((last.from_unix_ns, last.to_unix_ns))
    at = started
    for begin, end in stretches:
        assert begin == at
        at = end
    assert at == ended
    assert replica_time(final, metered_until_unix_ns=at, now_unix_ns=10**9) is None


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), st.integers(0, 99))
def test_bytes_are_one_fact_a_tier(ram: int, disk: int, peer: int, origin: int) -> None:
    content = ContentBytes(ram=ram, disk=disk, peer=peer, origin=origin, late=5)
    drafts = content_bytes(replica_key(), content, from_unix_ns=1, to_unix_ns=2)
    given_tiers = {"ram": ram, "disk": disk, "peer": peer, "origin": origin}
    assert {d.detail: d.quantity for d in drafts} == {tier: n for tier, n in given_tiers.items() if n}
    assert sum(d.quantity for d in drafts) == content.total
