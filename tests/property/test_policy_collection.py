"""What the plan of a collection may never do, whatever is at the origin."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.collection import ActivePush, CollectionInput, Mark, StoredObject, plan

NOW = 1_000
MANIFESTS = [f"m{n}" for n in range(4)]
PACKS = [f"p{n}" for n in range(5)]
RECORDS = ["r0", "r1"]
TIMES = st.integers(0, NOW)


def stored(key: str, modified: int, domain: str) -> StoredObject:
    return StoredObject(
        key=key, is_manifest=key.startswith("m"), domain=domain, size_bytes=1, modified_unix_ns=modified
    )


@st.composite
def inputs(draw: st.DrawFn) -> CollectionInput:
    keys = draw(st.sets(st.sampled_from(MANIFESTS + PACKS)))
    objects = tuple(stored(k, draw(TIMES), draw(st.sampled_from(["a", "b"]))) for k in sorted(keys))
    marks = st.lists(st.builds(Mark, record=st.sampled_from(RECORDS), since_unix_ns=TIMES), max_size=2).map(tuple)
    return CollectionInput(
        objects=objects,
        live=frozenset(draw(st.sets(st.sampled_from(MANIFESTS)))),
        packs_of={m: tuple(draw(st.sets(st.sampled_from(PACKS)))) for m in MANIFESTS},
        closed_domains=draw(st.dictionaries(st.just("b"), st.just("why"), max_size=1)),
        marks=draw(st.dictionaries(st.sampled_from(MANIFESTS + PACKS), marks)),
        pushes=tuple(
            ActivePush(
                lease=f"l{n}",
                started_unix_ns=draw(TIMES),
                knows=frozenset(draw(st.sets(st.sampled_from(RECORDS)))),
                revived=frozenset(draw(st.sets(st.sampled_from(PACKS + MANIFESTS), max_size=2))),
            )
            for n in range(draw(st.integers(0, 2)))
        ),
    )


@given(inputs(), st.integers(0, NOW))
def test_what_may_never_be_deleted(seen: CollectionInput, grace: int) -> None:
    decided = plan(seen, now_unix_ns=NOW, grace_ns=grace)
    doomed = {stored.key: stored for stored in decided.delete}
    for key, stored_object in doomed.items():
        marks = seen.marks[key]
        assert key not in seen.live
        assert stored_object.domain not in seen.closed_domains
        assert min(mark.since_unix_ns for mark in marks) <= NOW - grace
        assert stored_object.modified_unix_ns <= NOW - grace
        for push in seen.pushes:
            assert key not in push.revived
            assert {mark.record for mark in marks} & push.knows
    left = {stored.key for stored in seen.objects} - set(doomed)
    for manifest in seen.live | {key for key in left if key.startswith("m")}:
        assert not set(seen.packs_of[manifest]) & set(doomed), "a manifest that stays keeps its packs"


@given(inputs(), st.integers(0, NOW))
def test_manifests_go_before_packs_and_all_that_goes_is_condemned(seen: CollectionInput, grace: int) -> None:
    decided = plan(seen, now_unix_ns=NOW, grace_ns=grace)
    kinds = [stored.is_manifest for stored in decided.delete]
    assert kinds == sorted(kinds, reverse=True)
    assert {stored.key for stored in decided.delete} <= set(decided.condemned)
    assert set(decided.verdicts) == {stored.key for stored in seen.objects}
    assert sum(decided.bytes_by_verdict.values()) == len(seen.objects)


@given(inputs(), st.integers(0, NOW))
def test_more_grace_never_deletes_more(seen: CollectionInput, grace: int) -> None:
    longer = {stored.key for stored in plan(seen, now_unix_ns=NOW, grace_ns=grace + 1).delete}
    assert longer <= {stored.key for stored in plan(seen, now_unix_ns=NOW, grace_ns=grace).delete}


@given(inputs())
def test_in_the_end_everything_that_nothing_names_goes(seen: CollectionInput) -> None:
    quiet = CollectionInput(
        objects=seen.objects,
        live=seen.live,
        packs_of=seen.packs_of,
        closed_domains={},
        marks={stored.key: (Mark(record="r", since_unix_ns=NOW),) for stored in seen.objects},
        pushes=(),
    )
    decided = plan(quiet, now_unix_ns=NOW + 10, grace_ns=10)
    used = set(seen.live) | {pack for manifest in seen.live for pack in seen.packs_of[manifest]}
    assert {stored.key for stored in decided.delete} == {stored.key for stored in seen.objects} - used
