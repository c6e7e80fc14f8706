"""`key create|ls|rm`: API keys of a tenant."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from snowdrop.cli.output import JsonFlag, console, context, human_age, reported, say_json, table
from snowdrop.domain.service import PRIORITY_MAX
from snowdrop.state.port import KeyRecord
from snowdrop.wire.api import MakeKey, NewKey

app = typer.Typer(
    no_args_is_help=True, help="API keys; needed by callers only where gateway.keys_required is set."
)


PriorityMax = Annotated[
    int | None,
    typer.Option(
        min=-PRIORITY_MAX, max=PRIORITY_MAX, help="No request with it gets a higher priority in a queue."
    ),
]


@app.command()
def create(name: str, priority_max: PriorityMax = None, json: JsonFlag = False) -> None:
    """Make a key. Its secret is shown once."""
    with reported():
        ctx = context(json=json)
        made = ctx.client.send(NewKey, "POST", "keys", name, body=MakeKey(priority_max=priority_max))
        if ctx.json:
            say_json(made)
        else:
            console.print(f"{made.secret}\n  shown once; send it as `Authorization: Bearer ...`", soft_wrap=True)


@app.command("ls")
def list_keys(json: JsonFlag = False) -> None:
    """List keys by name; their secrets are not stored."""
    with reported():
        ctx = context(json=json)
        records = ctx.client.get(list[KeyRecord], "keys")
        if ctx.json:
            say_json(records)
            return
        shown = table("key", "tenant", "#priority", "#age")
        for record in records:
            most = "" if record.priority_max is None else f"<= {record.priority_max}"
            shown.add_row(record.name, record.tenant, most, human_age(time.time_ns(), record.created_unix_ns))
        console.print(shown if records else "no keys")


@app.command()
def rm(name: str, json: JsonFlag = False) -> None:
    """Revoke a key at once."""
    with reported():
        ctx = context(json=json)
        ctx.client.delete("keys", name)
        if ctx.json:
            say_json({"revoked": name})
        else:
            console.print(f"revoked {name}")
