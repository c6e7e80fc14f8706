"""`store ...`: the content at the origin and on the node."""

from __future__ import annotations

import typer

from snowdrop.cli import store_keys

app = typer.Typer(no_args_is_help=True, help="Stored content: statistics, verification, collection, pins, keys.")
app.add_typer(store_keys.app, name="keys")
