"""`scale`: how far and how fast a deployment scales, changed while it runs."""

from __future__ import annotations

import math
import re
from typing import Annotated

import typer

from snowdrop.cli.output import JsonFlag, console, context, reported, say_json
from snowdrop.cli.why import parse_duration_s
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import RevisionId
from snowdrop.domain.scale import Scale, Schedule
from snowdrop.wire.api import SetScale

SCHEDULE_HELP = (
    'Other bounds at certain times, as in "0 8 * * mon-fri for 10h min=2 tz=Europe/Berlin" (min, max, buffer, tz).'
    ' Repeat it for several; those of before are replaced, by --schedule "" with none.'
)


def scale(  # noqa: PLR0917 -- options by name, none by position
    name: str,
    minimum: Annotated[int | None, typer.Option("--min", help="Replicas kept even without load.")] = None,
    maximum: Annotated[int | None, typer.Option("--max", help="Replicas never exceeded.")] = None,
    buffer: Annotated[
        int | None, typer.Option(help="Replicas standing by while the deployment is in use.")
    ] = None,
    idle_s: Annotated[float | None, typer.Option(help="Seconds without a request before all go.")] = None,
    idle: Annotated[str | None, typer.Option(help="fixed: --idle-s; auto: chosen from the gaps seen.")] = None,
    wait_price: Annotated[
        float | None, typer.Option(help="With --idle auto: replica-seconds that a second of waiting is worth.")
    ] = None,
    target: Annotated[
        float | None, typer.Option(help="Share of its slots that a replica should have taken.")
    ] = None,
    schedule: Annotated[list[str] | None, typer.Option(help=SCHEDULE_HELP)] = None,
    revision: Annotated[
        str | None, typer.Option(help="Bound this revision only (--min, --max; none of them: no bound any more).")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Change how far a deployment scales; also gives a crash-looping revision another chance."""
    with reported():
        ctx = context(json=json)
        for option, value in (("--idle-s", idle_s), ("--wait-price", wait_price), ("--target", target)):
            if value is not None and not math.isfinite(value):
                raise InvalidInputError(f"{value} is not a finite number", where=option)
        if idle is not None and idle not in {"fixed", "auto"}:
            raise InvalidInputError(f"{idle!r} is neither fixed nor auto", where="--idle")
        body = SetScale(
            min=minimum,
            max=maximum,
            idle_s=idle_s,
            buffer=buffer,
            idle=None if idle is None else "auto" if idle == "auto" else "fixed",
            wait_price=wait_price,
            target=target,
            schedules=None
            if schedule is None
            else tuple(parse_schedule(text) for text in schedule if text.strip()),
            revision=None if revision is None else RevisionId(revision),
        )
        result = ctx.client.send(Scale, "PATCH", "deployments", name, "scale", body=body)
        if ctx.json:
            say_json(result)
        elif revision is not None:
            low, high = body.min, body.max
            none = low is None and high is None
            bounds = "no bounds of its own" if none else f"min {_or_open(low)}, max {_or_open(high)}"
            console.print(f"{name}: revision {revision} has {bounds}")
        else:
            console.print(f"{name}: {summary(result)}")


def summary(scale: Scale) -> str:
    """A scale in a line."""
    idle = f"idle after {scale.idle_s:g} s"
    if scale.idle == "auto":
        idle = f"idle time chosen from gaps (waiting worth {scale.wait_price:g}), before that {scale.idle_s:g} s"
    parts = [f"{scale.min} to {scale.max} replicas", idle]
    if scale.buffer:
        parts.insert(1, f"{scale.buffer} standing by")
    parts += [
        f"schedule {each.cron!r} {each.timezone} for {each.duration_s / 3600:g} h" for each in scale.schedules
    ]
    return ", ".join(parts)


def parse_schedule(text: str) -> Schedule:
    """A schedule of "CRON for DURATION key=value ...". Raises InvalidInputError naming what is not understood."""
    match = re.fullmatch(r"(.+?)\s+for\s+(\S+)((?:\s+\S+=\S+)*)", text.strip())
    if match is None:
        raise InvalidInputError(
            f"{text!r} is no schedule",
            where="--schedule",
            next_step='as in "0 8 * * mon-fri for 10h min=2 tz=Europe/Berlin"',
        )
    values = dict(pair.split("=", 1) for pair in match[3].split())
    unknown = set(values) - {"min", "max", "buffer", "tz"}
    counts = {name: value for name, value in values.items() if name != "tz"}
    if unknown or not all(value.isdecimal() for value in counts.values()):
        raise InvalidInputError(
            f"not understood in a schedule: {' '.join(sorted(unknown)) or match[3].strip()}",
            where="--schedule",
            next_step="min=N, max=N, buffer=N, tz=NAME",
        )
    return Schedule(
        cron=match[1],
        duration_s=parse_duration_s(match[2], "--schedule"),
        timezone=values.get("tz", "UTC"),
        min=int(counts["min"]) if "min" in counts else None,
        max=int(counts["max"]) if "max" in counts else None,
        buffer=int(counts["buffer"]) if "buffer" in counts else None,
    )


def _or_open(bound: int | None) -> str:
    return "-" if bound is None else str(bound)
