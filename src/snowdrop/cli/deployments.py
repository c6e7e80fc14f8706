"""`ps`, `describe`, `delete`, `logs`, `call`: deployments that are there."""

from __future__ import annotations

import http.client
import sys
import time
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import quote, urlsplit

import msgspec
import typer
from rich.text import Text

from snowdrop.cli.client import Client, answered_error
from snowdrop.cli.output import (
    Context,
    JsonFlag,
    console,
    context,
    errors,
    human_age,
    human_bytes,
    human_ns,
    reported,
    say_json,
    table,
)
from snowdrop.cli.scaling import summary
from snowdrop.domain.errors import InvalidInputError, NotFoundError, PlatformDownError
from snowdrop.domain.replica import ReplicaReport
from snowdrop.wire.api import DeploymentView, Description, Info, ReplicaLine

DELETE_S_MAX = 60.0
CALL_S_MAX = 3_600.0
HEALTH_STYLE = {"ok": "green", "backing-off": "yellow", "crash-looping": "red", "deleting": "dim"}


def ps(json: JsonFlag = False) -> None:
    """List deployments: what they have, what they should have, and why."""
    with reported():
        ctx = context(json=json)
        views = ctx.client.get(list[DeploymentView], "deployments")
        if ctx.json:
            say_json(views)
            return
        if not views:
            console.print("no deployments yet; make one with `snowdrop deploy service.py`")
            return
        shown = table("deployment", "health", "#ready", "#desired", "#busy", "#queued", "scale", "why")
        for view in views:
            starting = f" (+{view.starting})" if view.starting else ""
            shown.add_row(
                view.name,
                Text(view.health, style=HEALTH_STYLE.get(view.health, "")),
                f"{view.ready}{starting}",
                str(view.desired),
                str(view.in_flight),
                str(view.queued),
                f"{view.scale.min}..{view.scale.max}",
                view.why,
            )
        console.print(shown)


def describe(name: str, json: JsonFlag = False) -> None:
    """Show everything about a deployment: revision, limits, sandbox, replicas and their histories."""
    with reported():
        ctx = context(json=json)
        found = ctx.client.get(Description, "deployments", name)
        if ctx.json:
            say_json(found)
            return
        _print_description(found)


def delete(name: str, json: JsonFlag = False) -> None:
    """Drain and remove a deployment. Requests in flight are finished first."""
    with reported():
        ctx = context(json=json)
        ctx.client.delete("deployments", name)
        limit_s = time.monotonic() + DELETE_S_MAX
        gone = False
        while not gone and time.monotonic() < limit_s:
            gone = _is_gone(ctx.client, name)
            time.sleep(0 if gone else 0.05)
        if ctx.json:
            say_json({"deleted": name, "gone": gone})
        else:
            console.print(
                f"deleted {name}" if gone else f"{name} is draining; `snowdrop ps` shows when it is gone"
            )


def logs(
    name: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    tail: Annotated[int, typer.Option(help="Lines from the past.")] = 100,
    replica: Annotated[str | None, typer.Option(help="Only this replica.")] = None,
    json: JsonFlag = False,
) -> None:
    """Show what a deployment's replicas print."""
    with reported():
        ctx = context(json=json)
        lines = ctx.client.lines(
            "deployments", name, "logs", tail=tail, follow="1" if follow else "0", replica=replica
        )
        nothing = True
        for raw in lines:
            nothing = False
            if ctx.json:
                sys.stdout.write(raw.decode())
                sys.stdout.flush()
                continue
            line = msgspec.json.decode(raw, type=ReplicaLine)
            moment = datetime.fromtimestamp(line.unix_ms / 1000, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
            style = {"stderr": "yellow", "snowdrop": "dim"}.get(line.stream, "")
            console.print(Text.assemble((f"{moment} {line.replica} ", "dim"), (line.text, style)), soft_wrap=True)
        if nothing:
            ctx.client.get(Description, "deployments", name)  # says so if there is no such deployment


def call(
    target: Annotated[str, typer.Argument(help="DEPLOYMENT or DEPLOYMENT/endpoint.")],
    body: Annotated[str, typer.Argument(help="JSON body; - reads standard input.")] = "{}",
    key: Annotated[str | None, typer.Option(envvar="SNOWDROP_KEY", help="API key.")] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Say on stderr what the answer waited for.")] = False,
    json: JsonFlag = False,
) -> None:
    """Send a request through the gateway and print the answer, streamed as it comes."""
    with reported():
        ctx = context(json=json)
        info = ctx.client.get(Info, "info")
        path = _call_path(ctx, target)
        data = sys.stdin.buffer.read() if body == "-" else body.encode()
        _call(info.gateway_url, path, data, key, timing=timing)


def _call(gateway_url: str, path: str, data: bytes, key: str | None, *, timing: bool) -> None:
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    address = urlsplit(gateway_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=CALL_S_MAX)
    started_ns = time.monotonic_ns()
    try:
        connection.request("POST", path, data, headers)
        response = connection.getresponse()
        first_ns = time.monotonic_ns() - started_ns
        if response.status >= 400:
            raise answered_error(response.read())
        while piece := response.read1():
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    except (OSError, http.client.HTTPException) as error:
        raise PlatformDownError(
            f"the connection to the gateway broke: {str(error) or type(error).__name__}",
            where=gateway_url,
            next_step="`snowdrop ps` shows whether the platform is up; the answer is not complete",
        ) from error
    finally:
        connection.close()
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()
    if timing:
        receipt = response.headers.get("snowdrop-receipt")
        story = f"cold start, receipt {receipt}" if receipt else "warm"
        errors.print(f"first byte after {human_ns(first_ns)} ({story})")


def _call_path(ctx: Context, target: str) -> str:
    """`name/endpoint` as given; for a bare name the deployment's only endpoint."""
    name, slash, rest = target.partition("/")
    if slash:
        return quote(f"/{name}/{rest}", safe="/?&=%")
    endpoints = ctx.client.get(Description, "deployments", name).revision.spec.endpoints
    if not endpoints:
        raise InvalidInputError(
            f"{name} is no class with endpoints, so which path to call is not known",
            where=name,
            next_step=f"say the path, as in {name}/health",
        )
    if len(endpoints) != 1:
        paths = ", ".join(name + endpoint.path for endpoint in endpoints)
        raise InvalidInputError(f"{name} has several endpoints", where=name, next_step=f"choose one: {paths}")
    return f"/{name}{endpoints[0].path}"


def _is_gone(client: Client, name: str) -> bool:
    try:
        client.get(Description, "deployments", name)
    except NotFoundError:
        return True
    return False


def _print_description(found: Description) -> None:
    view, spec = found.view, found.revision.spec
    console.print(Text.assemble((view.name, "bold"), "  ", (view.health, HEALTH_STYLE.get(view.health, ""))))
    rows = {
        "url": view.url,
        "revision": f"{view.revision} of {human_age(time.time_ns(), found.revision.created_unix_ns)} ago",
        "entry": spec.entry,
        "command": " ".join(spec.command.argv) if spec.command is not None else "",
        "openai": ", ".join(spec.openai_paths),
        "models": ", ".join(f"{m.name} ({human_bytes(m.artefact.total_bytes)})" for m in found.revision.models),
        "scale": f"{summary(view.scale)}; {spec.concurrency} slots each, aiming at"
        f" {100 * view.scale.target:.0f} % taken",
        "limits": f"{human_bytes(spec.resources.memory_bytes_max)}, {spec.resources.cpus:g} CPUs,"
        f" {spec.resources.pids_max} processes",
        "sandbox": found.sandbox,
        "now": f"{view.ready} ready, {view.starting} starting, {view.draining} draining;"
        f" {view.in_flight} in flight, {view.queued} queued",
        "rollout": view.rollout,
        "why": view.why,
        "placement": found.placement,
    }
    for label, value in rows.items():
        if value:
            console.print(Text.assemble((f"  {label:<10}", "dim"), value))
    for endpoint in spec.endpoints:
        console.print(Text.assemble(("  endpoint  ", "dim"), f"{endpoint.path} ", (endpoint.doc, "dim")))
    for title, reports in (("replicas", found.replicas), ("before", found.recent)):
        if reports:
            console.print(f"  {title}", style="dim")
        for report in reports:
            _print_replica(report)


def _print_replica(report: ReplicaReport) -> None:
    age = human_age(time.time_ns(), report.started_unix_ns)
    console.print(f"    {report.key.replica}  {report.state}: {report.reason}  ({age} old)")
    steps = [
        f"{step.after} +{human_ns(step.unix_ns - report.started_unix_ns)}"
        for step in report.history
        if step.unix_ns >= report.started_unix_ns
    ]
    if steps:
        console.print(f"      {' → '.join(steps)}", style="dim")
