"""`volume create|ls|rm`: directories of a tenant that outlive replicas."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from snowdrop.cli.output import JsonFlag, console, context, human_age, human_bytes, reported, say_json, table
from snowdrop.wire.api import CreateVolume, VolumeView

app = typer.Typer(no_args_is_help=True, help="Persistent directories that services mount by name.")


@app.command()
def create(
    name: str,
    size_bytes_max: Annotated[
        int, typer.Option(min=0, help="Above this, nothing more is deployed with it for writing; 0: no bound.")
    ] = 0,
    json: JsonFlag = False,
) -> None:
    """Make an empty volume."""
    with reported():
        ctx = context(json=json)
        body = CreateVolume(size_bytes_max=size_bytes_max)
        view = ctx.client.send(VolumeView, "POST", "volumes", name, body=body)
        if ctx.json:
            say_json(view)
        else:
            console.print(f'made {name}\n  next: @sd.service(volumes=[sd.Volume(target="/data", name="{name}")])')


@app.command("ls")
def list_volumes(json: JsonFlag = False) -> None:
    """List volumes with what they hold and who uses them."""
    with reported():
        ctx = context(json=json)
        views = ctx.client.get(list[VolumeView], "volumes")
        if ctx.json:
            say_json(views)
            return
        shown = table("volume", "#size", "#bound", "#files", "age", "used by")
        for view in views:
            shown.add_row(
                view.name,
                human_bytes(view.used_bytes),
                human_bytes(view.size_bytes_max) if view.size_bytes_max else "",
                str(view.files),
                human_age(time.time_ns(), view.created_unix_ns),
                ", ".join(view.used_by),
            )
        console.print(shown if views else "no volumes; make one with `snowdrop volume create NAME`")


@app.command()
def rm(name: str, json: JsonFlag = False) -> None:
    """Remove a volume and all it holds. Refused while a deployment names it."""
    with reported():
        ctx = context(json=json)
        ctx.client.delete("volumes", name)
        if ctx.json:
            say_json({"removed": name})
        else:
            console.print(f"removed {name}")
