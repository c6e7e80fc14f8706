"""A task's life under any order of events: it ends once, only its newest lease counts, attempts are bounded."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snowdrop.domain.errors import ConflictError
from snowdrop.domain.task import ENDED_STATES, HISTORY_MAX, Task, TaskState, Webhook
from snowdrop.policy import tasks
from snowdrop.policy.tasks import OF_A_LEASE, TABLE, Event, step
from task_helpers import DAY_NS, answer, happening, leased, task

SECOND_NS = 10**9


class Life(RuleBasedStateMachine):
    """Gateways that come and go, answer late or twice, people who cancel and try again."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1
        self.task = task(attempts_max=3, webhook=Webhook(url="http://hook/"))
        self.leases: list[int] = []
        self.ends = 0
        self.redriven_at = 0
        self.counted = 0

    def _apply(self, event: Event, generation: int = 0, **more: object) -> bool:
        before = self.task
        happened = happening(event, self.now, generation, **more)
        fresh = before.state is TaskState.RUNNING and before.generation == generation
        try:
            self.task = step(before, happened)
        except ConflictError:
            assert (before.state, event) not in TABLE or (event in OF_A_LEASE and not fresh)
            return False
        assert event not in OF_A_LEASE or fresh, "an old lease changed the task"
        if self.task.ended and not before.ended:
            self.ends += 1
        return self.task is not before

    @rule(seconds=st.integers(0, 40_000))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds * SECOND_NS

    @precondition(lambda self: self.task.state is TaskState.QUEUED and self.task.due_unix_ns <= self.now)
    @rule()
    def is_leased(self) -> None:
        assert self._apply(Event.LEASED, holder="g")
        self.leases.append(self.task.generation)
        self.counted += 1

    @precondition(lambda self: self.leases)
    @rule(
        data=st.data(),
        event=st.sampled_from(sorted(OF_A_LEASE)),
        retryable=st.booleans(),
        draw=st.floats(0, 1, exclude_max=True),
        after_s=st.none() | st.floats(-5, 1e7),
    )
    def a_lease_reports(
        self, data: st.DataObject, event: Event, retryable: bool, draw: float, after_s: float | None
    ) -> None:
        generation = data.draw(st.sampled_from(self.leases))
        told = {"retryable": retryable, "draw": draw, "retry_after_s": after_s}
        moved = self._apply(event, generation, answer=answer(500), **told)
        if moved and event is Event.HANDED_BACK:
            self.counted -= 1

    @rule()
    def is_cancelled(self) -> None:
        self._apply(Event.CANCELLED)
        assert self.task.ended

    @rule()
    def is_tried_again(self) -> None:
        if self._apply(Event.REDRIVEN, ttl_s=86_400):
            self.ends -= 1
            self.counted = 0

    @precondition(lambda self: self.task.expires_unix_ns <= self.now)
    @rule()
    def its_time_is_over(self) -> None:
        self._apply(Event.EXPIRED)

    @invariant()
    def ends_at_most_once(self) -> None:
        assert self.ends == (1 if self.task.state in ENDED_STATES else 0)

    @invariant()
    def attempts_are_those_that_may_have_run_and_bounded(self) -> None:
        assert self.task.attempts == self.counted <= self.task.attempts_max

    @invariant()
    def only_a_newer_lease_grows_the_generation(self) -> None:
        assert self.task.generation == len(self.leases)

    @invariant()
    def the_webhook_is_due_when_it_has_ended_and_only_then(self) -> None:
        assert self.task.webhook is not None
        assert (self.task.webhook.state == "due") == self.task.ended

    @invariant()
    def a_queued_one_can_still_run_before_it_expires(self) -> None:
        if self.task.state is TaskState.QUEUED:
            assert self.task.due_unix_ns < self.task.expires_unix_ns
        assert len(self.task.history) <= HISTORY_MAX


TestLife = Life.TestCase


@given(st.integers(1, 100), st.floats(0, 1, exclude_max=True), st.none() | st.floats(-10, 1e9))
def test_pauses_grow_are_bounded_and_obey_what_was_asked(
    attempts: int, draw: float, retry_after_s: float | None
) -> None:
    pause = tasks.pause_s(attempts, draw=draw, retry_after_s=retry_after_s)
    assert 0 < pause <= max(tasks.PAUSE_S_MAX, tasks.RETRY_AFTER_S_MAX)
    assert pause >= min(retry_after_s or 0.0, tasks.RETRY_AFTER_S_MAX)
    assert tasks.pause_s(attempts + 1, draw=draw) >= tasks.pause_s(attempts, draw=draw)
    low, high = tasks.pause_s(attempts, draw=0.0), tasks.pause_s(attempts, draw=0.999)
    assert low < high, "callers that failed together would come back together"


@given(st.integers(0, 1_000), st.integers(0, 5_000))
def test_leases_are_bounded_by_the_slots_that_are_there(slots: int, leased_now: int) -> None:
    more = tasks.room(slots, leased_now)
    assert more >= 0
    assert leased_now + more <= max(leased_now, tasks.LOOK_AHEAD * slots)
    assert slots == 0 or leased_now >= slots or more >= slots - leased_now, "a free slot would stay empty"


@pytest.mark.parametrize("state", list(TaskState))
@pytest.mark.parametrize("event", list(Event))
def test_every_pair_is_in_the_table_or_refused(state: TaskState, event: Event) -> None:
    given_task = msgspec.structs.replace(leased(task()), state=state)
    if (state, event) in TABLE:
        assert step(given_task, happening(event)).state in TABLE[state, event]
    elif event is Event.CANCELLED:
        assert step(given_task, happening(event)) is given_task
    else:
        with pytest.raises(ConflictError):
            step(given_task, happening(event))


def _deliver(hook: Webhook, problem: str, *, final: bool = False) -> Webhook:
    return tasks.webhook_after(hook, problem=problem, final=final, now_unix_ns=5, draw=0.5)


def test_a_webhook_is_given_up_after_a_bounded_number_of_deliveries() -> None:
    hook = Webhook(url="http://x/", state="due", due_unix_ns=1)
    pauses: list[int] = []
    while hook.state == "due":
        hook = _deliver(hook, "HTTP 500")
        pauses.append(hook.due_unix_ns)
    assert (hook.state, hook.attempts, hook.last_error) == ("given up", tasks.WEBHOOK_ATTEMPTS_MAX, "HTTP 500")
    assert pauses[:-1] == sorted(pauses[:-1])
    assert _deliver(Webhook(url="http://x/", state="due"), "gone", final=True).state == "given up"
    assert _deliver(Webhook(url="http://x/", state="due"), "").state == "delivered"


def test_what_is_worth_another_attempt() -> None:
    assert [
        status for status in (400, 404, 408, 413, 422, 425, 429, 500, 502, 503, 504) if tasks.may_help(status)
    ] == [*(408, 425, 429, 500, 502, 503, 504)]


def test_a_failure_that_nothing_helps_ends_at_once_and_others_after_their_attempts() -> None:
    first = leased(task(attempts_max=2))
    assert step(first, happening(Event.FAILED, answer=answer(422))).state is TaskState.FAILED
    again = step(first, happening(Event.FAILED, answer=answer(503), retryable=True))
    assert (again.state, again.attempts) == (TaskState.QUEUED, 1)
    second = leased(again, again.due_unix_ns)
    ended = step(second, happening(Event.FAILED, generation=2, answer=answer(503), retryable=True))
    assert (ended.state, ended.attempts) == (TaskState.FAILED, 2)
    assert "attempts_max=2" in ended.reason


def test_one_handed_back_was_no_attempt_but_expires() -> None:
    given_task: Task = task(attempts_max=1, expires=1 + DAY_NS)
    back = step(leased(given_task), happening(Event.HANDED_BACK, error=None))
    assert (back.state, back.attempts, back.due_unix_ns) == (TaskState.QUEUED, 0, 10)
    late = step(leased(given_task), happening(Event.HANDED_BACK, DAY_NS * 2))
    assert late.state is TaskState.FAILED
