"""Pushes, removals and collections at once, in any order of calls, with crashes: nothing named loses anything."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from collection_world import PACK_DATA, SECOND_NS, World, collects, pushes, removes

NAMES = ("a", "b", "c")


def some_packs(rng: random.Random) -> tuple[int, ...]:
    return tuple(sorted(rng.sample(range(len(PACK_DATA)), rng.randint(1, 4))))


def add_actors(world: World, rng: random.Random, rounds: int, graces: tuple[float, ...]) -> None:
    for number in range(rounds):
        kind = rng.choice(("push", "push", "push", "remove", "collect", "collect"))
        if kind == "push":
            world.start(
                f"push{number}", pushes(world, rng.choice(NAMES), some_packs(rng), by_state=rng.random() < 0.3)
            )
        elif kind == "remove":
            world.start(f"remove{number}", removes(world, rng.choice(NAMES)))
        else:
            world.start(f"collect{number}", collects(world, rng.choice(graces)))


def settle(world: World) -> None:
    """Quiet: time passes, and collection runs by itself a few times."""
    for _ in range(4):
        world.now_ns += 10_000 * SECOND_NS
        world.start("collect", collects(world, 1_000))
        world.run(slow=False)


@given(st.integers(0, 1 << 40))
@settings(max_examples=120, deadline=None)
def test_nothing_named_ever_loses_anything_and_garbage_goes_in_the_end(seed: int) -> None:
    world, rng = World(seed), random.Random(seed)
    for _ in range(3):
        add_actors(world, rng, rng.randint(2, 6), graces=(0, 50, 1_000))
        world.run(kills=rng.choice((0.0, 0.0, 0.01, 0.05)))
    settle(world)
    live = world.live()
    assert world.content() == live | {pack for manifest in live for pack in world.packs_of[manifest]}
    left = [key for key in world.store.objects if key.startswith(("leases/", "gc/deleting/", "gc/condemned/"))]
    assert left == []


@given(st.integers(0, 1 << 40))
@settings(max_examples=60, deadline=None)
def test_a_push_of_what_is_being_collected_ends_whole(seed: int) -> None:
    """The narrowest place: the very objects that a collection deletes are pushed again, by two at once."""
    world, rng = World(seed), random.Random(seed)
    world.start("first", pushes(world, "a", (0, 1, 2), by_state=False))
    world.run()
    world.start("remove", removes(world, "a"))
    world.run()
    if rng.random() < 0.7:
        world.start("condemn", collects(world, 10_000))
        world.run()
    for number in range(2):
        world.start(f"collect{number}", collects(world, 0))
        world.start(f"again{number}", pushes(world, f"n{number}", (0, 1, 2, 3)[: 3 + number], by_state=False))
    world.run()
    assert len(world.live()) == 2 or any("again" in told for told in world.told)
