"""The command tree. Commands live in the module of their subject; this one only names them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import typer

from snowdrop import __version__
from snowdrop.cli.output import Globals
from snowdrop.cli.tree import CommandTree


class _Commands(CommandTree):
    places: ClassVar[dict[str, str]] = {
        "up": "snowdrop.cli.platform:up",
        "down": "snowdrop.cli.platform:down",
        "doctor": "snowdrop.cli.platform:doctor",
        "config": "snowdrop.cli.platform:config",
        "model": "snowdrop.cli.models:app",
        "image": "snowdrop.cli.images:app",
        "store": "snowdrop.cli.store:app",
        "deploy": "snowdrop.cli.deploy:deploy",
        "run": "snowdrop.cli.run:run",
        "deploy-command": "snowdrop.cli.run:deploy_command",
        "ps": "snowdrop.cli.deployments:ps",
        "describe": "snowdrop.cli.deployments:describe",
        "scale": "snowdrop.cli.scaling:scale",
        "why": "snowdrop.cli.why:why",
        "delete": "snowdrop.cli.deployments:delete",
        "logs": "snowdrop.cli.deployments:logs",
        "call": "snowdrop.cli.deployments:call",
        "rollout": "snowdrop.cli.rollouts:app",
        "rollback": "snowdrop.cli.rollouts:rollback",
        "restart": "snowdrop.cli.rollouts:restart",
        "revisions": "snowdrop.cli.rollouts:revisions",
        "receipts": "snowdrop.cli.receipts:app",
        "usage": "snowdrop.cli.receipts:usage",
        "key": "snowdrop.cli.keys:app",
        "secret": "snowdrop.cli.secrets:app",
        "volume": "snowdrop.cli.volumes:app",
        "gateway": "snowdrop.cli.gateway:app",
        "task": "snowdrop.cli.tasks:app",
        "batch": "snowdrop.cli.batch:app",
        "dev": "snowdrop.cli.dev:dev",
    }


app = typer.Typer(
    cls=_Commands,
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


def run() -> None:
    """Entry of the `snowdrop` command."""
    app()
