"""A replica's report, at the end of its start, as a receipt."""

from __future__ import annotations

from snowdrop.domain.ids import receipt_id_of
from snowdrop.domain.receipt import Receipt
from snowdrop.domain.replica import ReplicaReport, ReplicaState


def receipt_of(report: ReplicaReport, *, ordered_unix_ns: int) -> Receipt:
    """The receipt of a start that became ready or failed."""
    ready = next((t.unix_ns for t in report.history if t.after is ReplicaState.READY), 0)
    outcome = "ready" if ready else str(report.state)
    return Receipt(
        id=receipt_id_of(report.key.replica),
        tenant=report.key.tenant,
        deployment=report.key.deployment,
        revision=report.key.revision,
        replica=report.key.replica,
        node=report.node,
        outcome=outcome if ready or not report.reason else f"{outcome}: {report.reason}",
        started_unix_ns=ordered_unix_ns or report.started_unix_ns,
        ready_unix_ns=ready or report.ended_unix_ns,
        spans=report.spans,
        content=report.content,
        error=report.error,
    )
