"""Whose turn it is: nobody starves, classes keep their order, callers get their share."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from snowdrop.domain.service import QueueSpec
from snowdrop.policy.queueing import FORGOTTEN_MIN, Line, LineRules, Standing, priority_of

CALLERS = ("a", "b", "c", "d")
LEAD_S = 10.0
PRIORITIES = (-1, 0, 1, 2)

standings = st.builds(
    Standing,
    came_s=st.floats(0, 100),
    priority=st.sampled_from(PRIORITIES),
    caller=st.sampled_from(CALLERS),
    pin=st.sampled_from(["", "", "rev-1", "rev-2"]),
)


class Turns(RuleBasedStateMachine):
    """Joins, leaves and turns in any order, against the rules said one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.line: Line[int, int] = Line(LineRules(lead_s=LEAD_S))
        self.model: dict[int, Standing] = {}
        self.now_s = 0.0
        self.keys = 0

    @rule(
        after_s=st.floats(0, 5),
        priority=st.sampled_from(PRIORITIES),
        caller=st.sampled_from(CALLERS),
        pin=st.sampled_from(["", "", "rev-1"]),
        first=st.integers(0, 9).map(lambda drawn: drawn == 9),
        count=st.integers(1, 4),
    )
    def join(self, after_s: float, priority: int, caller: str, pin: str, first: bool, count: int) -> None:
        self.now_s += after_s
        for _ in range(count):
            self.keys += 1
            standing = Standing(self.now_s, priority, caller, pin, first)
            self.line.join(self.keys, self.keys, standing)
            self.model[self.keys] = standing

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([*self.model, -1]))
        assert self.line.leave(key) == (key if key in self.model else None)
        self.model.pop(key, None)

    @rule(fair=st.booleans(), lead_s=st.sampled_from([0.0, LEAD_S]))
    def change(self, fair: bool, lead_s: float) -> None:
        self.line.change(LineRules(fair=fair, lead_s=lead_s))

    @rule(closed=st.sampled_from([(), (), ("",), ("rev-1",), ("", "rev-1")]))
    def take(self, closed: tuple[str, ...]) -> None:
        may = {key: standing for key, standing in self.model.items() if standing.pin not in closed}
        ranks = self.line.ranks()
        taken = self.line.take(closed)
        if taken is None:
            assert not may
            return
        chosen = may[taken]
        if not closed:
            assert ranks[taken] == 0, "the one that was shown as the next is the next"
        for key, other in may.items():
            if other.first and not chosen.first:
                raise AssertionError("passed one whose turn had come before")
            same = (other.priority, other.pin, other.first) == (chosen.priority, chosen.pin, chosen.first)
            if same and key < taken:
                assert self.line.rules.fair, "passed one of its class that came earlier"
                assert other.caller != chosen.caller, "passed one of the same caller"
        del self.model[taken]

    @invariant()
    def it_holds_who_waits(self) -> None:
        assert list(self.line.values()) == list(self.model)
        assert sorted(self.line.ranks()) == sorted(self.model)
        assert sorted(self.line.ranks().values()) == list(range(len(self.model)))

    @invariant()
    def nothing_is_left_of_those_who_left(self) -> None:
        for of in self.line._classes.values():
            assert of.came
            assert len(of._tags) <= FORGOTTEN_MIN + 2 * len(CALLERS) + 1
            assert len(of._heap) <= FORGOTTEN_MIN + 2 * len(CALLERS) + 1


Turns.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTurns = Turns.TestCase


@given(
    st.integers(0, 3),
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 3), st.sampled_from(CALLERS)), max_size=60),
    st.booleans(),
)
def test_nobody_is_passed_by_who_came_too_late_to_pass(
    priority: int, later: list[tuple[float, int, str]], fair: bool
) -> None:
    """The bound on starvation by priority: (difference) x lead_s, whatever comes and however much of it."""
    line: Line[int, Standing] = Line(LineRules(fair=fair, lead_s=LEAD_S))
    mine = Standing(0.0, priority, "me")
    line.join(0, mine, mine)
    now_s = 0.0
    for key, (after_s, other, caller) in enumerate(later, start=1):
        now_s += after_s
        standing = Standing(now_s, other, caller)
        line.join(key, standing, standing)
        taken = line.take()
        assert taken is not None
        if taken is mine:
            return
        assert taken.priority >= priority
        if taken.priority > priority:
            assert taken.came_s <= (taken.priority - priority) * LEAD_S


@given(st.lists(st.sampled_from(CALLERS), max_size=80), st.integers(2, 4), st.integers(1, 40))
def test_callers_that_wait_all_the_time_get_the_same_number_of_turns(
    before: list[str], callers: int, turns: int
) -> None:
    """Whatever was before them, and however many requests each has in the line."""
    line: Line[int, str] = Line(LineRules(fair=True))
    keys = iter(range(10_000))
    for caller in before:
        line.join(next(keys), caller, Standing(0.0, 0, caller))
        line.take()
    backlog = {caller: (index + 1) * 50 for index, caller in enumerate(CALLERS[:callers])}
    for caller, count in backlog.items():
        for _ in range(count):
            line.join(next(keys), caller, Standing(1.0, 0, caller))
    served = dict.fromkeys(backlog, 0)
    for _ in range(turns):
        caller = line.take()
        assert caller is not None
        served[caller] += 1
    assert max(served.values()) - min(served.values()) <= 2


@given(st.integers(1, 30), st.integers(0, 5))
def test_new_callers_without_end_starve_nobody(others: int, mine: int) -> None:
    """A caller has its turn after as many turns as there are callers, however many new ones come each turn."""
    line: Line[int, str] = Line(LineRules(fair=True))
    keys = iter(range(100_000))
    for _ in range(mine + 1):
        line.join(next(keys), "me", Standing(0.0, 0, "me"))
    for number in range(others):
        line.join(next(keys), f"old-{number}", Standing(0.0, 0, f"old-{number}"))
    for turn in range((mine + 2) * (others + 2) * 2):
        if "me" not in line.values():
            break
        line.take()
        line.join(next(keys), f"new-{turn}", Standing(0.0, 0, f"new-{turn}"))
    assert "me" not in line.values()


@given(st.lists(standings, max_size=30), st.booleans())
def test_the_same_calls_give_the_same_order(waiting: list[Standing], fair: bool) -> None:
    waiting = sorted(waiting)

    def turns() -> list[int]:
        line: Line[int, int] = Line(LineRules(fair=fair, lead_s=LEAD_S))
        for key, standing in enumerate(waiting):
            line.join(key, key, standing)
        taken: list[int] = []
        for _ in waiting:
            key = line.take()
            assert key is not None
            taken.append(key)
        return taken

    assert turns() == turns()
    assert sorted(turns()) == list(range(len(waiting)))


@given(st.integers(-20, 20) | st.none(), st.integers(-9, 9))
def test_a_priority_is_what_the_deployment_and_the_key_allow(asked: int | None, key_max: int) -> None:
    queue = QueueSpec(priority=1, priority_min=-1, priority_max=3)
    got = priority_of(queue, asked)
    assert got == (1 if asked is None else min(max(asked, -1), 3))
    assert priority_of(queue, asked, key_max) == max(min(got, key_max), -1)
    assert priority_of(QueueSpec(), asked) == 0, "without being allowed, none passes another"
    assert msgspec.structs.replace(queue, priority_max=1).priority == 1
