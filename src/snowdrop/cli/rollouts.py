"""`rollout`, `rollback`, `revisions`: how a new revision takes over, and how it is sent back."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from snowdrop.cli.output import Context, JsonFlag, console, context, human_age, reported, say_json, table
from snowdrop.domain.rollout import Rollout, RolloutPhase
from snowdrop.wire.api import RevisionView, Rollback, RolloutView

app = typer.Typer(no_args_is_help=True, help="Watch and steer the rollout of a new revision.")
PHASE_STYLE = {"done": "green", "rolled-back": "red", "aborted": "yellow", "superseded": "dim"}


@app.command("status")
def status(name: str, json: JsonFlag = False) -> None:
    """How far a rollout is, what is seen of both revisions, and how earlier ones ended."""
    with reported():
        ctx = context(json=json)
        _show(ctx, ctx.client.get(RolloutView, "deployments", name, "rollout"))


@app.command("promote")
def promote(name: str, json: JsonFlag = False) -> None:
    """Skip the steps that are left: all traffic goes to the new revision as soon as it is ready for it."""
    _steer(name, "promote", json=json)


@app.command("abort")
def abort(name: str, json: JsonFlag = False) -> None:
    """Send the new revision back: all traffic goes to the old one."""
    _steer(name, "abort", json=json)


@app.command("pause")
def pause(name: str, json: JsonFlag = False) -> None:
    """Take no further step; a new revision that does badly is still sent back."""
    _steer(name, "pause", json=json)


@app.command("resume")
def resume(name: str, json: JsonFlag = False) -> None:
    """Go on with a paused rollout."""
    _steer(name, "resume", json=json)


def rollback(
    name: str,
    revision: Annotated[str, typer.Argument(help="The revision before, if none is named.")] = "",
    json: JsonFlag = False,
) -> None:
    """Go back to an earlier revision; a rollout that is under way is aborted."""
    with reported():
        ctx = context(json=json)
        body = Rollback(revision=revision)
        _show(ctx, ctx.client.send(RolloutView, "POST", "deployments", name, "rollback", body=body))


def restart(name: str, json: JsonFlag = False) -> None:
    """Replace all replicas by fresh ones, without a gap: they read secrets that were changed."""
    with reported():
        ctx = context(json=json)
        _show(ctx, ctx.client.send(RolloutView, "POST", "deployments", name, "restart", body={}))


def revisions(name: str, json: JsonFlag = False) -> None:
    """List a deployment's revisions, the newest first, with the traffic they get."""
    with reported():
        ctx = context(json=json)
        found = ctx.client.get(list[RevisionView], "deployments", name, "revisions")
        if ctx.json:
            say_json(found)
            return
        shown = table("revision", "age", "#traffic", "#ready", "#replicas", "note")
        for view in found:
            shown.add_row(
                view.id,
                human_age(time.time_ns(), view.created_unix_ns),
                f"{100 * view.weight:.3g} %" if view.weight else "",
                str(view.ready),
                str(view.replicas),
                view.note,
            )
        console.print(shown)


def _steer(name: str, verb: str, *, json: bool) -> None:
    with reported():
        ctx = context(json=json)
        _show(ctx, ctx.client.send(RolloutView, "POST", "deployments", name, "rollout", verb, body={}))


def _show(ctx: Context, view: RolloutView) -> None:
    if ctx.json:
        say_json(view)
        return
    console.print(Text.assemble((view.deployment, "bold"), f"  {view.summary}"))
    if view.active is not None:
        _print_active(view)
    for past in view.ended:
        age = human_age(time.time_ns(), past.ended_unix_ns)
        console.print(
            Text.assemble(
                ("  before  ", "dim"),
                f"{past.candidate} ",
                (str(past.phase), PHASE_STYLE.get(past.phase, "")),
                f" {age} ago: {past.reason}",
            )
        )


def _print_active(view: RolloutView) -> None:
    active = view.active
    if active is None:
        return
    for each in view.revisions:
        p95 = f", 95 % within {each.p95_s:.3g} s" if each.p95_s else ""
        console.print(
            Text.assemble(
                (f"  {each.role:<10}", "dim"),
                f"{each.revision}  {100 * each.weight:.3g} % of the traffic, {each.done} answers,"
                f" {each.failed} failed{p95}",
            )
        )
    console.print(Text.assemble(("  next      ", "dim"), _next(active, view.deployment)))


def _next(active: Rollout, name: str) -> str:
    if active.paused:
        return f"paused; `snowdrop rollout resume {name}`"
    if active.phase is RolloutPhase.STARTING:
        return "the new revision has to become ready"
    if active.phase is RolloutPhase.PROVING:
        return f"is watched for {active.spec.prove_s:g} s"
    if active.step >= len(active.spec.steps):
        return "all traffic, when enough replicas of the new revision are ready"
    step = active.spec.steps[active.step]
    if step.hold:
        return f"waits for `snowdrop rollout promote {name}`"
    least = f" and {step.requests_min} answers" if step.requests_min else ""
    gone_s = (time.time_ns() - active.step_unix_ns) / 1e9
    return f"step {active.step + 1} of {len(active.spec.steps)}: {step.s:g} s{least} ({gone_s:.0f} s gone)"
