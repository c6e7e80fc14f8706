"""`key create|ls|rm`: API keys of a tenant."""

from __future__ import annotations

import time

import typer

from snowdrop.cli.output import console, context, human_age, reported, say_json, table
from snowdrop.cli.platform import JsonFlag
from snowdrop.state.port import KeyRecord
from snowdrop.wire.api import NewKey

app = typer.Typer(
    no_args_is_help=True, help="API keys; needed by callers only where gateway.keys_required is set."
)


@app.command()
def create(name: str, json: JsonFlag = False) -> None:
    """Make a key. Its secret is shown once."""
    with reported():
        ctx = context(json=json)
        made = ctx.client.send(NewKey, "POST", "keys", name)
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
        shown = table("key", "tenant", "#age")
        for record in records:
            shown.add_row(record.name, record.tenant, human_age(time.time_ns(), record.created_unix_ns))
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
