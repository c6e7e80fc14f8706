"""The command tree. Commands live in the module of their subject; this one only names them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snowdrop import __version__
from snowdrop.cli import (
    batch,
    deployments,
    dev,
    gateway,
    keys,
    models,
    mounts,
    platform,
    receipts,
    rollouts,
    scaling,
    secrets,
    store,
    tasks,
    volumes,
    why,
)
from snowdrop.cli import run as run_model
from snowdrop.cli.output import Globals

app = typer.Typer(
    name="snowdrop",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="A self-hosted serverless platform for AI models. Start with `snowdrop up`.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    state: Annotated[
        str | None, typer.Option(envvar="SNOWDROP_STATE", help="Folder for everything the platform writes.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Settings file (TOML).")] = None,
    tenant: Annotated[str, typer.Option(envvar="SNOWDROP_TENANT", help="Whose things to work on.")] = "default",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable output of any command.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    Globals.state, Globals.config, Globals.tenant, Globals.json = state, config, tenant, json


app.command()(platform.up)
app.command()(platform.down)
app.command()(platform.doctor)
app.command()(platform.config)
mounts.add_commands(models.app)
app.add_typer(models.app, name="model")
app.add_typer(store.app, name="store")
app.command()(deployments.deploy)
app.command()(run_model.run)
app.command("deploy-command")(run_model.deploy_command)
app.command()(deployments.ps)
app.command()(deployments.describe)
app.command()(scaling.scale)
app.command()(why.why)
app.command()(deployments.delete)
app.command()(deployments.logs)
app.command()(deployments.call)
app.add_typer(rollouts.app, name="rollout")
app.command()(rollouts.rollback)
app.command()(rollouts.restart)
app.command()(rollouts.revisions)
app.add_typer(receipts.app, name="receipts")
app.command()(receipts.usage)
app.add_typer(keys.app, name="key")
app.add_typer(secrets.app, name="secret")
app.add_typer(volumes.app, name="volume")
app.add_typer(gateway.app, name="gateway")
app.add_typer(tasks.app, name="task")
app.add_typer(batch.app, name="batch")
app.command()(dev.dev)


def run() -> None:
    """Entry of the `snowdrop` command."""
    app()
