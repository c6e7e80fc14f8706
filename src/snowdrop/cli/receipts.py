"""`receipts` and `receipts show`: what a cold start was made of, drawn in the terminal."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer
from rich.text import Text

from snowdrop.cli.output import (
    JsonFlag,
    console,
    context,
    human_age,
    human_bytes,
    human_ns,
    reported,
    say_json,
    table,
)
from snowdrop.domain.errors import NotFoundError
from snowdrop.domain.receipt import Receipt, Span
from snowdrop.domain.usage import UsageTotal

BAR_MAX = 60
LABEL_CHARS = 20
DURATION_CHARS = 11
STYLES = {
    "activate": "cyan",
    "mount": "blue",
    "start": "magenta",
    "import": "yellow",
    "startup": "green",
    "route": "cyan",
    "answer": "bright_green",
}

app = typer.Typer(invoke_without_command=True, help="Receipts of cold starts.")


@app.callback()
def receipts(
    ctx: typer.Context,
    deployment: Annotated[str | None, typer.Option(help="Only of this deployment.")] = None,
    limit: Annotated[int, typer.Option(help="How many, newest first.")] = 20,
    json: JsonFlag = False,
) -> None:
    """List the receipts of cold starts, newest first."""
    if ctx.invoked_subcommand is not None:
        return
    with reported():
        shared = context(json=json)
        found = shared.client.get(list[Receipt], "receipts", deployment=deployment, limit=limit)
        if shared.json:
            say_json(found)
            return
        shown = table("receipt", "deployment", "#age", "outcome", "#waited", "#startup", "from", "caller")
        for receipt in found:
            startup = next((s.duration_ns for s in receipt.spans if s.name == "startup"), 0)
            shown.add_row(
                receipt.id,
                receipt.deployment,
                human_age(time.time_ns(), receipt.started_unix_ns),
                receipt.outcome.split(":")[0],
                human_ns(receipt.waited_ns),
                human_ns(startup) if startup else "",
                _tiers(receipt),
                receipt.caller.request_id if receipt.caller else "nobody waited",
            )
        console.print(shown if found else "no cold start yet")


@app.command()
def show(
    receipt_id: Annotated[str, typer.Argument(help="A receipt, or a deployment for its newest.")],
    json: JsonFlag = False,
) -> None:
    """Draw a cold start's phases as a waterfall."""
    with reported():
        shared = context(json=json)
        if receipt_id.startswith("rcp-"):
            receipt = shared.client.get(Receipt, "receipts", receipt_id)
        else:
            newest = shared.client.get(list[Receipt], "receipts", deployment=receipt_id, limit=1)
            if not newest:
                raise NotFoundError(f"there is no receipt of {receipt_id!r}", next_step="call it once")
            receipt = newest[0]
        if shared.json:
            extra = {"waited_ns": receipt.waited_ns, "unaccounted_ns": receipt.unaccounted_ns}
            say_json({"receipt": receipt, "main_line": receipt.main_line(), **extra})
            return
        for line in waterfall(receipt, width=console.width):
            console.print(line, soft_wrap=True)


def usage(json: JsonFlag = False) -> None:
    """Show what has been metered: replica time and content bytes by tier."""
    with reported():
        shared = context(json=json)
        totals = shared.client.get(list[UsageTotal], "usage")
        if shared.json:
            say_json(totals)
            return
        shown = table("deployment", "what", "#amount")
        for total in totals:
            if total.unit == "replica_ns":
                shown.add_row(total.deployment, "replica time", f"{total.quantity / 1e9:.1f} s")
            else:
                shown.add_row(total.deployment, f"bytes from {total.detail}", human_bytes(total.quantity))
        console.print(shown if totals else "nothing has been metered yet")


def waterfall(receipt: Receipt, *, width: int = 100) -> list[Text]:
    """The receipt as lines of at most `width` characters, one bar a phase.

    Details stand below the phase they lie in; what no phase covers is shown as unaccounted.
    """
    main = receipt.main_line()
    scale = _Scale(
        start_ns=min((span.start_unix_ns for span in main), default=receipt.started_unix_ns),
        whole_ns=max(1, receipt.waited_ns),
        chars=max(10, min(BAR_MAX, width - LABEL_CHARS - DURATION_CHARS - 3)),
    )
    who = f"request {receipt.caller.request_id}" if receipt.caller else "nobody waiting"
    lines = [
        Text.assemble((receipt.id, "bold"), f"  {receipt.deployment} on {receipt.node}, {who}"),
        Text(f"  {receipt.outcome}; {receipt.revision}, {receipt.replica}", style="dim"),
    ]
    for span in main:
        lines.append(_bar(span, scale, detail=False))
        details = [d for d in receipt.spans if d.parent == span.name]
        # What was before the caller came is not on its line.
        lines += [_bar(d, scale, detail=True) for d in details if d.start_unix_ns >= scale.start_ns]
    rest_ns = receipt.unaccounted_ns
    share = 100 * rest_ns / scale.whole_ns
    lines.append(Text.assemble((_label("unaccounted", rest_ns), "dim"), f"  {share:.1f} %"))
    lines.append(Text(_label("waited", receipt.waited_ns), style="bold"))
    lines.append(Text(f"  {'bytes':<{LABEL_CHARS}} {_tiers(receipt) or 'none'}"))
    if receipt.error is not None:
        lines.append(Text(f"  error: {receipt.error.message} [{receipt.error.where}]", style="red"))
    return lines


class _Scale(msgspec.Struct, frozen=True, kw_only=True):
    """What maps times to columns."""

    start_ns: int
    whole_ns: int
    chars: int


def _label(name: str, duration_ns: int) -> str:
    return f"  {name:<{LABEL_CHARS}}{human_ns(duration_ns):>{DURATION_CHARS - 2}}"


def _bar(span: Span, scale: _Scale, *, detail: bool) -> Text:
    begin = round(scale.chars * (span.start_unix_ns - scale.start_ns) / scale.whole_ns)
    begin = min(max(0, begin), scale.chars - 1)
    length = min(max(1, round(scale.chars * span.duration_ns / scale.whole_ns)), scale.chars - begin)
    name = f"· {span.name} {span.note}".rstrip()[:LABEL_CHARS] if detail else span.name
    style = "dim" if detail else STYLES.get(span.name, "white")
    block = ("╌" if detail else "█") * length
    return Text.assemble(
        (_label(name, span.duration_ns), "dim" if detail else ""), "  " + " " * begin, (block, style)
    )


def _tiers(receipt: Receipt) -> str:
    tiers = {"ram": receipt.content.ram, "disk": receipt.content.disk, "origin": receipt.content.origin}
    tiers["late"] = receipt.content.late
    return ", ".join(f"{human_bytes(count)} {tier}" for tier, count in tiers.items() if count)
