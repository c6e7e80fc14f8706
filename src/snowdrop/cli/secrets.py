"""`secret set|ls|rm|rotate-key`: values come from standard input, a file or a prompt, never from the command line,
where every user of the machine could read them.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from snowdrop.cli.output import JsonFlag, console, context, human_age, reported, say_json, table
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.secret import SECRET_BYTES_MAX
from snowdrop.wire.api import PutSecret, Rotated, SecretView

app = typer.Typer(no_args_is_help=True, help="Secrets that services name; encrypted where they are stored.")


@app.command("set")
def set_secret(
    name: str,
    file: Annotated[Path | None, typer.Option(help="Read the value from this file, as it is.")] = None,
    json: JsonFlag = False,
) -> None:
    """Store a value, asked for at the terminal, or read from standard input or a file."""
    with reported():
        ctx = context(json=json)
        view = ctx.client.send(SecretView, "PUT", "secrets", name, body=PutSecret(value=_value(name, file)))
        if ctx.json:
            say_json(view)
            return
        console.print(f"secret {view.name} has version {view.version}")
        if view.used_by:
            console.print(
                f"  replicas that run keep the old value; replace them: snowdrop restart {view.used_by[0]}",
                style="dim",
            )


@app.command("ls")
def list_secrets(json: JsonFlag = False) -> None:
    """List secrets by name; nothing shows their values."""
    with reported():
        ctx = context(json=json)
        views = ctx.client.get(list[SecretView], "secrets")
        if ctx.json:
            say_json(views)
            return
        shown = table("secret", "#version", "changed", "used by")
        for view in views:
            age = human_age(time.time_ns(), view.changed_unix_ns)
            shown.add_row(view.name, str(view.version), f"{age} ago", ", ".join(view.used_by))
        console.print(shown if views else "no secrets; set one with `snowdrop secret set NAME`")


@app.command()
def rm(name: str, json: JsonFlag = False) -> None:
    """Remove a secret that no deployment names."""
    with reported():
        ctx = context(json=json)
        ctx.client.delete("secrets", name)
        if ctx.json:
            say_json({"removed": name})
        else:
            console.print(f"removed {name}")


@app.command("rotate-key")
def rotate_key(json: JsonFlag = False) -> None:
    """Wrap all secrets of all tenants with a new key of the platform, and remove the old one."""
    with reported():
        ctx = context(json=json)
        done = ctx.client.send(Rotated, "POST", "rotate-secret-key", body={})
        if ctx.json:
            say_json(done)
        else:
            console.print(f"{done.rewrapped} secrets are under key {done.key_id}; {done.removed} old keys removed")


def _value(name: str, file: Path | None) -> str:
    try:
        if file is not None:
            data = file.read_bytes()[: SECRET_BYTES_MAX + 1]
        elif sys.stdin.isatty():
            return str(typer.prompt(f"value of {name}", hide_input=True))
        else:
            # A line end that an editor or `echo` leaves is no part of the value.
            data = sys.stdin.buffer.read(SECRET_BYTES_MAX + 2).removesuffix(b"\n").removesuffix(b"\r")
        return data.decode()
    except OSError as error:
        raise InvalidInputError(f"cannot read the value: {error.strerror}", where=str(file)) from error
    except UnicodeDecodeError:
        raise InvalidInputError(
            "the value is not UTF-8 text",
            where=str(file or "standard input"),
            next_step="encode binary values, for example with base64",
        ) from None
