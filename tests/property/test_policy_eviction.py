from random import Random

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.policy.eviction import Kept, choose

sizes = st.integers(0, 1000)


@st.composite
def tiers(draw: st.DrawFn) -> list[Kept]:
    rows = draw(st.lists(st.tuples(sizes, st.integers(0, 5), st.booleans()), max_size=12))
    return [
        Kept(name=f"a{index}", size_bytes=size, used=used, is_pinned=pinned)
        for index, (size, used, pinned) in enumerate(rows)
    ]


@given(tiers(), sizes, st.integers(0, 5000))
def test_what_is_left_fits_and_nothing_held_goes(kept: list[Kept], wanted: int, bytes_max: int) -> None:
    decision = choose(kept, wanted, bytes_max)
    by_name = {artefact.name: artefact for artefact in kept}
    assert len(set(decision.victims)) == len(decision.victims)
    assert not any(by_name[name].is_pinned for name in decision.victims)
    left = sum(artefact.size_bytes for artefact in kept if artefact.name not in decision.victims)
    if decision.fits:
        assert left + wanted <= bytes_max
    else:
        assert not decision.victims
        assert wanted + sum(artefact.size_bytes for artefact in kept if artefact.is_pinned) > bytes_max
    assert decision.reason


@given(tiers(), sizes, st.integers(0, 5000))
def test_no_victim_is_in_vain_and_none_was_used_after_one_that_stays(
    kept: list[Kept], wanted: int, bytes_max: int
) -> None:
    decision = choose(kept, wanted, bytes_max)
    by_name = {artefact.name: artefact for artefact in kept}
    if not decision.victims:
        return
    without_last = sum(a.size_bytes for a in kept if a.name not in decision.victims[:-1])
    assert without_last + wanted > bytes_max
    newest = max(by_name[name].used for name in decision.victims)
    stays = [a for a in kept if a.name not in decision.victims and not a.is_pinned and a.size_bytes]
    assert all(artefact.used >= newest for artefact in stays)


@given(tiers(), sizes, st.integers(0, 5000), st.randoms())
def test_the_order_of_the_books_does_not_matter(
    kept: list[Kept], wanted: int, bytes_max: int, rng: Random
) -> None:
    shuffled = list(kept)
    rng.shuffle(shuffled)
    assert choose(shuffled, wanted, bytes_max) == choose(kept, wanted, bytes_max)


@given(tiers(), sizes, st.integers(0, 5000), st.integers(0, 500))
def test_more_room_never_drops_more(kept: list[Kept], wanted: int, bytes_max: int, more: int) -> None:
    before, after = choose(kept, wanted, bytes_max), choose(kept, wanted, bytes_max + more)
    if before.fits:
        assert after.fits
        assert set(after.victims) <= set(before.victims)
