"""What a node's cleanup may never choose, and that it chooses the rest."""

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.cleanup import Copy, choose

NOW = 1_000
COPIES = st.lists(
    st.builds(
        Copy,
        manifest=st.sampled_from("abcdef"),
        used_unix_ns=st.integers(0, NOW),
        is_held=st.booleans(),
        is_pinned=st.booleans(),
    ),
    unique_by=lambda copy: copy.manifest,
)


@given(COPIES, st.frozensets(st.sampled_from("abcdef")), st.integers(0, NOW))
def test_exactly_the_unnamed_unheld_unpinned_and_unused_go(
    copies: list[Copy], named: frozenset[str], grace: int
) -> None:
    decided = choose(copies, named, now_unix_ns=NOW, grace_ns=grace)
    for copy in copies:
        wanted = copy.manifest in named or copy.is_held or copy.is_pinned or NOW - copy.used_unix_ns < grace
        assert (copy.manifest in decided.evict) != wanted
    used = {copy.manifest: copy.used_unix_ns for copy in copies}
    assert [used[name] for name in decided.evict] == sorted(used[name] for name in decided.evict)
