"""`model mount|unmount|mounts`: a model as a directory, served by this machine's agent."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snowdrop.cli.output import Context, JsonFlag, console, context, human_bytes, reported, say_json, table
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.ids import TenantId
from snowdrop.wire.mounts import PersonalMount, Unmount


def mount(
    name: Annotated[str, typer.Argument(help="A model that was pushed.")],
    directory: Annotated[Path, typer.Argument(help="Where: an empty directory, or one to be made.")],
    json: JsonFlag = False,
) -> None:
    """Show a model as a directory with all its files, which are fetched as they are read."""
    with reported():
        ctx = context(json=json)
        mount_artefact(ctx, ctx.client.get(ModelRecord, "models", name), directory)


def unmount(directory: Path, json: JsonFlag = False) -> None:
    """Remove what `model mount` has made. Programs that have files open keep them."""
    with reported():
        unmount_directory(context(json=json), directory)


def list_mounts(json: JsonFlag = False) -> None:
    """List the directories in which models are mounted."""
    with reported():
        ctx = context(json=json)
        found = ctx.client.agent().get(list[PersonalMount], "mounts")
        if ctx.json:
            say_json(found)
            return
        shown = table("directory", "model", "tenant", "#size")
        for entry in found:
            shown.add_row(entry.directory, entry.model, entry.tenant, human_bytes(entry.artefact.total_bytes))
        console.print(shown if found else "nothing is mounted; `snowdrop model mount NAME DIRECTORY` does it")


def mount_artefact(ctx: Context, record: ModelRecord, directory: Path, start: str = "") -> None:
    """Has the agent mount a model or an image, and says so."""
    at = directory.absolute()
    wanted = PersonalMount(
        directory=str(at), tenant=TenantId(ctx.tenant), model=record.name, artefact=record.artefact, start=start
    )
    ctx.client.agent().send(list[PersonalMount], "PUT", "mounts", body=wanted)
    if ctx.json:
        say_json(wanted)
        return
    size = human_bytes(record.artefact.total_bytes)
    files = "" if record.artefact.kind == "image" else f"{record.artefact.file_count} files, "
    console.print(f"{record.name} is at {at}: {files}{size}, fetched as they are read")


def unmount_directory(ctx: Context, directory: Path) -> None:
    """Has the agent remove a mount, and says so."""
    at = directory.absolute()
    ctx.client.agent().send(list[PersonalMount], "DELETE", "mounts", body=Unmount(directory=str(at)))
    if ctx.json:
        say_json({"unmounted": str(at)})
    else:
        console.print(f"{at} is unmounted")


def add_commands(app: typer.Typer) -> None:
    """To `snowdrop model`."""
    app.command()(mount)
    app.command()(unmount)
    app.command("mounts")(list_mounts)
