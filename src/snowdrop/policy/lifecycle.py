"""The life of a replica as a table: (state, event) -> (state, instructions).

The agent's shell feeds events in and carries the instructions out; nothing else changes a replica's state. An
event that has no row raises IllegalTransition with the history that led there. Rows are data, so that the
diagram in the docs and the tests read the same table as the agent does.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from snowdrop.domain.replica import ReplicaState, Transition

HISTORY_MAX = 64
"""Longest history kept; a replica passes through at most 8 states, so more means a bug worth seeing whole."""


class Event(StrEnum):
    """What can happen to a replica."""

    MOUNT_BEGUN = "mount begun"
    CONTENT_LANDED = "content landed"
    CONTENT_FAILED = "content failed"
    LAUNCH_FAILED = "launch failed"
    IMPORTED = "imported"
    SERVING = "serving"
    STAGE_FAILED = "stage failed"
    BOUND_EXCEEDED = "bound exceeded"
    DRAIN_ORDERED = "drain ordered"
    EXITED = "exited"


class Instruction(StrEnum):
    """What the shell must do, in the order given."""

    ENSURE_CONTENT = "ensure content"
    CANCEL_CONTENT = "cancel content"
    LAUNCH = "launch"
    SEND_DRAIN = "send drain"
    KILL = "kill"
    CLEAN_UP = "clean up"


S, E, DO = ReplicaState, Event, Instruction
Row = tuple[ReplicaState, tuple[Instruction, ...]]

TABLE: dict[tuple[ReplicaState, Event], Row] = {
    (S.PENDING, E.MOUNT_BEGUN): (S.MOUNTING, (DO.ENSURE_CONTENT,)),
    (S.PENDING, E.DRAIN_ORDERED): (S.STOPPED, (DO.CLEAN_UP,)),
    (S.MOUNTING, E.CONTENT_LANDED): (S.STARTING, (DO.LAUNCH,)),
    (S.MOUNTING, E.CONTENT_FAILED): (S.FAILED, (DO.CLEAN_UP,)),
    (S.MOUNTING, E.BOUND_EXCEEDED): (S.FAILED, (DO.CANCEL_CONTENT, DO.CLEAN_UP)),
    (S.MOUNTING, E.DRAIN_ORDERED): (S.STOPPED, (DO.CANCEL_CONTENT, DO.CLEAN_UP)),
    (S.STARTING, E.IMPORTED): (S.LOADING, ()),
    (S.STARTING, E.LAUNCH_FAILED): (S.FAILED, (DO.CLEAN_UP,)),
    (S.LOADING, E.SERVING): (S.READY, ()),
    # A drain before ready has nothing to finish: the process is ended, and its exit closes the case.
    (S.STARTING, E.DRAIN_ORDERED): (S.DRAINING, (DO.KILL,)),
    (S.LOADING, E.DRAIN_ORDERED): (S.DRAINING, (DO.KILL,)),
    (S.READY, E.DRAIN_ORDERED): (S.DRAINING, (DO.SEND_DRAIN,)),
    (S.READY, E.EXITED): (S.FAILED, (DO.CLEAN_UP,)),
    (S.DRAINING, E.EXITED): (S.STOPPED, (DO.CLEAN_UP,)),
    (S.DRAINING, E.DRAIN_ORDERED): (S.DRAINING, ()),
    # `shutdown` raised: the requests are answered already, so this is worth a note and no more.
    (S.DRAINING, E.STAGE_FAILED): (S.DRAINING, ()),
    (S.DRAINING, E.BOUND_EXCEEDED): (S.DRAINING, (DO.KILL,)),
    # The launch may end, or a late stage report may come, after the order to stop.
    (S.DRAINING, E.LAUNCH_FAILED): (S.STOPPED, (DO.CLEAN_UP,)),
    (S.DRAINING, E.IMPORTED): (S.DRAINING, ()),
    (S.DRAINING, E.SERVING): (S.DRAINING, ()),
}
for _state in (S.STARTING, S.LOADING):
    TABLE[_state, E.STAGE_FAILED] = (S.FAILED, (DO.KILL, DO.CLEAN_UP))
    TABLE[_state, E.BOUND_EXCEEDED] = (S.FAILED, (DO.KILL, DO.CLEAN_UP))
    TABLE[_state, E.EXITED] = (S.FAILED, (DO.CLEAN_UP,))
for _state in (S.STOPPED, S.FAILED):
    # What was under way when the end came may still report; the end has been recorded and stays.
    for _event in Event:
        TABLE[_state, _event] = (_state, ())


class IllegalTransition(RuntimeError):  # noqa: N818 -- a broken invariant, not an error that callers handle
    """An event that the table does not allow; the message carries the replica's whole history."""


class ReplicaMachine(msgspec.Struct, frozen=True):
    """A replica's state and how it got there. `version` counts the steps."""

    state: ReplicaState = ReplicaState.PENDING
    reason: str = "ordered"
    version: int = 1
    history: tuple[Transition, ...] = ()


def step(
    machine: ReplicaMachine, event: Event, *, reason: str, now_unix_ns: int
) -> tuple[ReplicaMachine, tuple[Instruction, ...]]:
    """The machine after `event` and what to do about it. Raises IllegalTransition for a missing row."""
    row = TABLE.get((machine.state, event))
    if row is None:
        story = "; ".join(f"{t.before} -> {t.after} ({t.reason})" for t in machine.history) or "none"
        raise IllegalTransition(f"{event!r} in state {machine.state!r} ({reason}); history: {story}")
    after, instructions = row
    if after == machine.state:
        return machine, instructions
    return _moved(machine, after, reason, now_unix_ns), instructions


def fail(machine: ReplicaMachine, *, reason: str, now_unix_ns: int) -> ReplicaMachine:
    """The machine failed from whatever state it was in: the only way past the table, for broken invariants."""
    return _moved(machine, ReplicaState.FAILED, reason, now_unix_ns)


def _moved(machine: ReplicaMachine, after: ReplicaState, reason: str, now_unix_ns: int) -> ReplicaMachine:
    step_taken = Transition(unix_ns=now_unix_ns, before=machine.state, after=after, reason=reason)
    history = (*machine.history, step_taken)[-HISTORY_MAX:]
    return ReplicaMachine(after, reason, machine.version + 1, history)
