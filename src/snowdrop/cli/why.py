"""`why`: why a deployment has the replicas that it has, what would have changed it, why a request waited."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.text import Text

from snowdrop.cli.output import JsonFlag, console, context, human_age, human_ns, reported, say_json, table
from snowdrop.cli.receipts import waterfall
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.replica import STARTING_STATES
from snowdrop.policy.autoscale.record import ScalingRecord
from snowdrop.wire.waits import WaitRecord
from snowdrop.wire.why import Why, WhyRequest

UNITS_S = {"s": 1.0, "min": 60.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}


def why(
    name: str,
    request: Annotated[
        str | None, typer.Option(help="Why this request waited (the answer's `x-request-id`).")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="All decisions of so long: 90s, 10min, 2h, 1d. The latest few without.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Say why a deployment has the replicas it has, what would have changed it, and why a request waited."""
    with reported():
        ctx = context(json=json)
        if request is not None:
            told = ctx.client.get(WhyRequest, "deployments", name, "why", request)
            if ctx.json:
                say_json(told)
            else:
                _print_request(told)
            return
        since_s = None if since is None else parse_duration_s(since, "--since")
        found = ctx.client.get(Why, "deployments", name, "why", since_s=since_s)
        if ctx.json:
            say_json(found)
        else:
            _print_why(found)


def parse_duration_s(text: str, where: str) -> float:
    """Seconds of `90`, `90s`, `10min`, `2h`, `1d`. Raises InvalidInputError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d)?", text.strip())
    if match is None:
        raise InvalidInputError(
            f"{text!r} is no length of time", where=where, next_step="a number with s, min, h or d, as in 10min"
        )
    return float(match[1]) * UNITS_S[match[2] or "s"]


def _print_why(found: Why) -> None:
    record = found.now
    if record is None:
        console.print(f"{found.deployment} was not looked at yet; try again in a moment")
        return
    signals, decision = record.signals, record.decision
    starting = sum(1 for replica in found.replicas if replica.state in STARTING_STATES and not replica.draining)
    going = sum(1 for replica in found.replicas if replica.draining)
    ready = len(found.replicas) - starting - going
    has = (
        f"{ready} ready"
        + (f", {starting} starting" if starting else "")
        + (f", {going} draining" if going else "")
    )
    console.print(Text.assemble((found.deployment, "bold"), f"  {has}; should have {decision.desired}"))
    bounds = signals.bounds
    of = f" ({bounds.source})" if bounds.source else ""
    standing = f", {bounds.buffer} standing by while in use" if bounds.buffer else ""
    rows = {
        "why": decision.reason,
        "but": found.short,
        "load": f"{signals.in_flight} in flight, {signals.queued} queued, {signals.arriving_per_s:.1f} arriving a"
        f" second; in flight on average {signals.stable_load:.1f} over {signals.stable_window_s:g} s,"
        f" {signals.panic_load:.1f} over {signals.panic_window_s:g} s",
        "a replica": f"{signals.concurrency} slots, aiming at {100 * signals.target:.0f} % taken",
        "learned": _learned(found, record),
        "bounds": f"{bounds.min} to {bounds.max} replicas{standing}{of}",
        "idle": _idle(found, record),
    }
    for label, value in rows.items():
        if value:
            console.print(Text.assemble((f"  {label:<10}", "dim"), value), soft_wrap=True)
    if found.alternatives:
        console.print("  what would change it", style="dim")
        for alternative in found.alternatives:
            console.print(Text(f"    {alternative.text}"), soft_wrap=True)
    for replica in found.replicas:
        note = f"draining: {replica.draining}" if replica.draining else f"{replica.state}: {replica.reason}"
        console.print(
            Text.assemble(("  replica   ", "dim"), f"{replica.id}  {note}, {replica.in_flight} in flight")
        )
    if found.history:
        console.print()
        _print_history(found.history)
    if found.waits:
        console.print()
        _print_waits(found.waits)


def _learned(found: Why, record: ScalingRecord) -> str:
    signals = record.signals
    start = "no start seen yet"
    if signals.start_s > 0:
        start = f"a start takes {signals.start_s:.2f} s (nine of ten within {found.start_high_s:.2f} s,"
        start += f" {found.starts_seen} seen)"
    request = (
        f"a request {human_ns(signals.service_s * 1e9)}" if signals.service_s > 0 else "no request has ended yet"
    )
    return f"{start}; {request}"


def _idle(found: Why, record: ScalingRecord) -> str:
    if found.idle is not None:
        return (
            f"all but the minimum go after {found.idle.idle_s:.3g} s without a request (auto: {found.idle.reason})"
        )
    return f"all but the minimum go after {record.signals.idle_s:g} s without a request"


def _print_history(history: tuple[ScalingRecord, ...]) -> None:
    shown = table("when", "#decided", "#ready", "#starting", "#in flight", "#queued", "why")
    for record in history:
        signals = record.signals
        reason = f"{record.decision.reason} [{record.note}]" if record.note else record.decision.reason
        shown.add_row(
            _moment(record.unix_ns),
            str(record.decision.desired),
            str(signals.ready),
            str(len(signals.starting_left_s)),
            str(signals.in_flight),
            str(signals.queued),
            Text(reason),
        )
    console.print(shown)


def _print_waits(waits: tuple[WaitRecord, ...]) -> None:
    shown = table("request that waited", "when", "#waited", "outcome", "for")
    for wait in waits:
        waited = human_ns(wait.ended_unix_ns - wait.arrived_unix_ns)
        shown.add_row(wait.request_id, _moment(wait.arrived_unix_ns), waited, wait.outcome, Text(wait.reason))
    console.print(shown)


def _print_request(told: WhyRequest) -> None:
    for wait in told.waits:
        waited = human_ns(wait.ended_unix_ns - wait.arrived_unix_ns)
        ended = f"{OUTCOMES[wait.outcome]}, {human_age(time.time_ns(), wait.ended_unix_ns)} ago"
        how = f"has waited {waited} so far" if wait.outcome == "waiting" else f"waited {waited}, {ended}"
        console.print(Text.assemble((wait.request_id, "bold"), f"  {how}"))
        expected = "" if wait.expected_s is None else f"{wait.expected_s:.2f} s"
        rows = {
            "for": wait.reason,
            "ahead": f"{wait.position} requests" if wait.position else "",
            "priority": str(wait.priority) if wait.priority else "",
            "forecast": expected,
            "replica": wait.replica or "",
            "error": wait.error,
        }
        for label, value in rows.items():
            if value:
                console.print(Text.assemble((f"  {label:<10}", "dim"), value), soft_wrap=True)
    for receipt in told.receipts:
        console.print()
        for line in waterfall(receipt, width=console.width):
            console.print(line, soft_wrap=True)
    if told.decisions:
        console.print("\ndecisions while it waited", style="dim")
        _print_history(told.decisions)


OUTCOMES = {
    "granted": "then had its slot",
    "refused": "then was refused",
    "too_long": "until its longest wait was over",
    "gone": "until its caller left",
    "waiting": "and waits still",
}


def _moment(unix_ns: int) -> str:
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).astimezone().strftime("%m-%d %H:%M:%S")
