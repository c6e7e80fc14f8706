"""The life of a task as a table, and when it is tried again.

(state, event) -> the states that may follow. `step` is the only way from one state to the next; the store calls
it inside a transaction, so that two who change one task at once do it one after the other. An event of a lease
carries the lease's generation: one of an older lease is refused, whatever it brings.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from snowdrop.domain.errors import ConflictError, ErrorBody, TimedOutError
from snowdrop.domain.task import HISTORY_MAX, Task, TaskAnswer, TaskChange, TaskState, Webhook

PAUSE_S_FIRST = 1.0
PAUSE_S_MAX = 300.0
HANDED_BACK_S = 1.0
RETRY_AFTER_S_MAX = 3_600.0
WEBHOOK_ATTEMPTS_MAX = 10
WEBHOOK_PAUSE_S_FIRST = 5.0
WEBHOOK_PAUSE_S_MAX = 6 * 3_600.0
LOOK_AHEAD = 2
"""Tasks leased per slot that is there: one that runs and one that takes its place without asking control first."""
RETRIED_STATUS = frozenset({408, 425, 429})


class Event(StrEnum):
    """What can happen to a task."""

    LEASED = "leased"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    HANDED_BACK = "handed back"
    LEASE_LOST = "lease lost"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    REDRIVEN = "redriven"


S, E = TaskState, Event

TABLE: dict[tuple[TaskState, Event], tuple[TaskState, ...]] = {
    (S.QUEUED, E.LEASED): (S.RUNNING,),
    (S.QUEUED, E.CANCELLED): (S.CANCELLED,),
    (S.QUEUED, E.EXPIRED): (S.FAILED,),
    (S.RUNNING, E.SUCCEEDED): (S.SUCCEEDED,),
    (S.RUNNING, E.FAILED): (S.QUEUED, S.FAILED),
    # The service has not seen it, so it does not count as an attempt.
    (S.RUNNING, E.HANDED_BACK): (S.QUEUED, S.FAILED),
    # Nobody knows how far it came: it counts, or a task that kills whoever runs it would be tried for ever.
    (S.RUNNING, E.LEASE_LOST): (S.QUEUED, S.FAILED),
    (S.RUNNING, E.CANCELLED): (S.CANCELLED,),
    (S.FAILED, E.REDRIVEN): (S.QUEUED,),
    (S.CANCELLED, E.REDRIVEN): (S.QUEUED,),
}
OF_A_LEASE = frozenset({E.SUCCEEDED, E.FAILED, E.HANDED_BACK, E.LEASE_LOST})


class Happening(msgspec.Struct, frozen=True, kw_only=True):
    """An event with what it brings. `generation` is the lease's, for the events of a lease.

    `retry_after_s` is what was asked for; `draw` from [0, 1) spreads the pauses; `retryable` is of failures.
    """

    event: Event
    now_unix_ns: int
    generation: int = 0
    holder: str = ""
    answer: TaskAnswer | None = None
    error: ErrorBody | None = None
    retryable: bool = False
    retry_after_s: float | None = None
    draw: float = 0.5
    ttl_s: float = 86_400.0


def step(task: Task, happened: Happening) -> Task:
    """The task after `happened`. Raises ConflictError for a stale lease and for what the state does not allow."""
    if happened.event in OF_A_LEASE and (task.state is not S.RUNNING or task.generation != happened.generation):
        raise ConflictError(
            f"task {task.id} is {task.state} in generation {task.generation}; this is of generation "
            f"{happened.generation}, whose lease has ended",
            where=f"task {task.id}",
        )
    if happened.event is E.CANCELLED and task.ended:
        return task
    allowed = TABLE.get((task.state, happened.event))
    if allowed is None:
        raise ConflictError(f"a task that is {task.state} cannot be {happened.event}", where=f"task {task.id}")
    moved = _APPLY[happened.event](task, happened)
    if moved.state not in allowed:
        raise AssertionError(f"{task.state} -> {moved.state} by {happened.event} is not in the table")
    change = TaskChange(unix_ns=happened.now_unix_ns, after=moved.state, reason=moved.reason)
    moved = msgspec.structs.replace(moved, history=(*task.history, change)[-HISTORY_MAX:])
    return _ended(moved, happened.now_unix_ns) if moved.ended else moved


def pause_s(attempts: int, *, draw: float, retry_after_s: float | None = None) -> float:
    """Exponential, half of it jitter, and never before what the service asked for."""
    whole = min(PAUSE_S_FIRST * 2.0 ** max(0, attempts - 1), PAUSE_S_MAX)
    asked = min(max(retry_after_s or 0.0, 0.0), RETRY_AFTER_S_MAX)
    return max(whole / 2 + draw * whole / 2, asked)


def may_help(status: int) -> bool:
    """Whether another attempt may bring another answer than this one."""
    return status >= 500 or status in RETRIED_STATUS


def room(slots: int, leased: int) -> int:
    """How many more tasks of a deployment may be leased, of `slots` at replicas that are ready."""
    return max(0, LOOK_AHEAD * slots - leased)


def webhook_after(hook: Webhook, *, problem: str, final: bool, now_unix_ns: int, draw: float) -> Webhook:
    """After one delivery: `problem` is empty if it was taken, `final` if nothing will come of another."""
    attempts = hook.attempts + 1
    if not problem:
        return msgspec.structs.replace(hook, state="delivered", attempts=attempts, due_unix_ns=0, last_error="")
    if final or attempts >= WEBHOOK_ATTEMPTS_MAX:
        return msgspec.structs.replace(
            hook, state="given up", attempts=attempts, due_unix_ns=0, last_error=problem
        )
    whole = min(WEBHOOK_PAUSE_S_FIRST * 3.0 ** (attempts - 1), WEBHOOK_PAUSE_S_MAX)
    due = now_unix_ns + _ns(whole / 2 + draw * whole / 2)
    return msgspec.structs.replace(hook, attempts=attempts, due_unix_ns=due, last_error=problem)


def _lease(task: Task, happened: Happening) -> Task:
    return msgspec.structs.replace(
        task,
        state=S.RUNNING,
        reason=f"leased to {happened.holder}",
        generation=task.generation + 1,
        attempts=task.attempts + 1,
        holder=happened.holder,
        started_unix_ns=happened.now_unix_ns,
    )


def _succeed(task: Task, happened: Happening) -> Task:
    return msgspec.structs.replace(
        task, state=S.SUCCEEDED, reason="answered", answer=happened.answer, error=None, holder=""
    )


def _fail(task: Task, happened: Happening) -> Task:
    error = happened.error
    why = error.message if error is not None else f"the service answered {_status(happened)}"
    task = msgspec.structs.replace(task, error=error, answer=happened.answer, holder="")
    if not happened.retryable:
        return msgspec.structs.replace(task, state=S.FAILED, reason=why)
    if task.attempts >= task.attempts_max:
        return msgspec.structs.replace(task, state=S.FAILED, reason=f"{why}; attempts_max={task.attempts_max}")
    pause = pause_s(task.attempts, draw=happened.draw, retry_after_s=happened.retry_after_s)
    return _again(task, happened, pause, why)


def _hand_back(task: Task, happened: Happening) -> Task:
    why = happened.error.message if happened.error is not None else "its gateway stops"
    task = msgspec.structs.replace(task, attempts=task.attempts - 1, error=happened.error, holder="")
    asked = min(max(happened.retry_after_s or 0.0, 0.0), RETRY_AFTER_S_MAX)
    pause = max(HANDED_BACK_S * (0.5 + happened.draw), asked) if happened.error is not None else 0.0
    return _again(task, happened, pause, why)


def _lose(task: Task, happened: Happening) -> Task:
    why = f"{task.holder} is gone, or silent for too long"
    error = TimedOutError(
        f"the lease of task {task.id} ran out: {why}", where="tasks.lease_s", next_step="look at the gateway's log"
    ).body()
    lost = msgspec.structs.replace(happened, error=error, retryable=True, answer=None)
    return _fail(task, lost)


def _cancel(task: Task, _happened: Happening) -> Task:
    return msgspec.structs.replace(task, state=S.CANCELLED, reason="cancelled", holder="")


def _expire(task: Task, happened: Happening) -> Task:
    error = task.error or happened.error
    return msgspec.structs.replace(
        task, state=S.FAILED, reason=f"not done in time; before: {task.reason}", error=error
    )


def _redrive(task: Task, happened: Happening) -> Task:
    return msgspec.structs.replace(
        task,
        state=S.QUEUED,
        reason="tried again on request",
        attempts=0,
        due_unix_ns=happened.now_unix_ns,
        expires_unix_ns=happened.now_unix_ns + _ns(happened.ttl_s),
        ended_unix_ns=0,
        error=None,
        answer=None,
        webhook=Webhook(url=task.webhook.url) if task.webhook is not None else None,
    )


_APPLY = {
    E.LEASED: _lease,
    E.SUCCEEDED: _succeed,
    E.FAILED: _fail,
    E.HANDED_BACK: _hand_back,
    E.LEASE_LOST: _lose,
    E.CANCELLED: _cancel,
    E.EXPIRED: _expire,
    E.REDRIVEN: _redrive,
}


def _again(task: Task, happened: Happening, pause: float, why: str) -> Task:
    """Back into the queue, unless its time is over before its turn comes."""
    due = happened.now_unix_ns + _ns(pause)
    if due >= task.expires_unix_ns:
        return msgspec.structs.replace(task, state=S.FAILED, reason=f"not done in time; the last attempt: {why}")
    return msgspec.structs.replace(
        task, state=S.QUEUED, reason=f"again in {pause:.1f} s, after: {why}", due_unix_ns=due, answer=None
    )


def _ended(task: Task, now_unix_ns: int) -> Task:
    hook = task.webhook
    if hook is not None:
        event = f"msg_{task.id}-{task.generation}-{task.state}"
        hook = Webhook(url=hook.url, state="due", event=event, due_unix_ns=now_unix_ns)
    return msgspec.structs.replace(task, ended_unix_ns=now_unix_ns, webhook=hook)


def _status(happened: Happening) -> int:
    return happened.answer.status if happened.answer is not None else 0


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
