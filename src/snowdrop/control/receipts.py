"""A replica's report, at the end of its start, as a receipt; and what receipts tell a new life of control."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from snowdrop.control.ending import LOST_REASON
from snowdrop.domain.errors import ErrorBody
from snowdrop.domain.ids import RevisionId, receipt_id_of
from snowdrop.domain.receipt import Receipt
from snowdrop.domain.replica import ReplicaReport, ReplicaState
from snowdrop.policy.restart import StartHistory


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


def failed_starts(
    newest_first: Iterable[Receipt], revision: RevisionId, *, now_s: float, now_unix_ns: int
) -> StartHistory:
    """The revision's starts that failed in a row, so that a crash loop stays one over a restart of control.

    A replica that was ready ends the row, whatever became of it later; one whose agent was lost says nothing.
    """
    history = StartHistory()
    for receipt in newest_first:
        if receipt.revision != revision or receipt.outcome == f"{ReplicaState.FAILED}: {LOST_REASON}":
            continue
        if receipt.outcome == "ready":
            break
        if not receipt.outcome.startswith(ReplicaState.FAILED):
            continue
        if not history.failures:
            ago_s = max(0.0, (now_unix_ns - receipt.ready_unix_ns) / 1e9)
            reason = failure_of(receipt.error, receipt.outcome)
            history = StartHistory(failures=1, failed_s=now_s - ago_s, reason=reason)
        else:
            history = msgspec.structs.replace(history, failures=history.failures + 1)
    return history


def failure_of(error: ErrorBody | None, otherwise: str) -> str:
    """Why a start failed, and where, in words."""
    if error is None:
        return otherwise
    return f"{error.message} [{error.where}]" if error.where else error.message
