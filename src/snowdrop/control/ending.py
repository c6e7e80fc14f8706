"""Reports of replicas that no agent can make: lost with their agent, or never sent to one."""

from __future__ import annotations

import time

import msgspec

from snowdrop.control.world import ReplicaEntry
from snowdrop.domain.errors import ErrorBody, ReplicaDiedError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.replica import ReplicaReport, ReplicaState

LOST_REASON = "its agent is gone"


def lost_report(name: ReplicaId, entry: ReplicaEntry) -> ReplicaReport:
    """The report that a lost agent can no longer make."""
    error = ReplicaDiedError(
        "the node's agent is gone, and its replicas with it",
        where=f"node {entry.node}",
        next_step="the agent is started again by itself; another replica is started then",
    )
    return ended_report(name, entry, reason=LOST_REASON, error=error.body())


def ended_report(name: ReplicaId, entry: ReplicaEntry, *, reason: str, error: ErrorBody) -> ReplicaReport:
    """The replica as failed, after all that is known of it."""
    if entry.report is not None:
        last = entry.report
    elif entry.order is not None:
        last = ReplicaReport(
            key=entry.order.key,
            node=entry.node,
            state=ReplicaState.PENDING,
            reason="ordered",
            version=0,
            socket_path="",
            started_unix_ns=entry.order.ordered_unix_ns,
        )
    else:
        raise AssertionError(f"replica {name} was neither ordered nor reported")
    return msgspec.structs.replace(
        last,
        state=ReplicaState.FAILED,
        reason=reason,
        version=last.version + 1,
        error=error,
        ended_unix_ns=time.time_ns(),
    )
