"""`model push|ls|show|rm`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from snowdrop.cli.output import console, context, errors, human_age, human_bytes, reported, say_json, table
from snowdrop.cli.platform import JsonFlag
from snowdrop.cli.publishing import publication
from snowdrop.content.ingest import PushProgress, push_directory
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import open_origin
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.ids import TenantId, parse_name
from snowdrop.domain.manifest import Manifest
from snowdrop.wire.api import Info

app = typer.Typer(no_args_is_help=True, help="Models: push, list, show, remove.")


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="The name deployments will use.")],
    source: Annotated[Path, typer.Argument(help="A model's directory.")],
    json: JsonFlag = False,
) -> None:
    """Cut a model directory into verified chunks, store them at the origin, and give it a name."""
    with reported():
        ctx = context(json=json)
        parse_name(name, what="model name")
        started_s = time.monotonic()
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
            TimeRemainingColumn(),
        )
        with (
            publication(ctx, name) as push_of_model,
            Progress(*columns, console=errors, disable=ctx.json, transient=True) as bar,
        ):
            task = bar.add_task(f"pushing {name}", total=None)

            def progress(state: PushProgress) -> None:
                bar.update(task, completed=state.done_bytes, total=state.total_bytes)

            result = push_directory(
                source, push_of_model.origin, kind="model", tenant=TenantId(ctx.tenant), progress=progress
            )
            record = push_of_model.publish(ctx, result.artefact, source=str(source))
        if ctx.json:
            say_json({"model": record, "new_bytes": result.new_bytes, "reused_bytes": result.reused_bytes})
            return
        took_s = time.monotonic() - started_s
        console.print(
            f"pushed {name}: {record.artefact.file_count} files, {human_bytes(record.artefact.total_bytes)} "
            f"({human_bytes(result.new_bytes)} new) in {took_s:.1f} s"
        )
        console.print(f"  {record.artefact.manifest}", style="dim")


@app.command("ls")
def list_models(json: JsonFlag = False) -> None:
    """List models."""
    with reported():
        ctx = context(json=json)
        records = ctx.client.get(list[ModelRecord], "models")
        if ctx.json:
            say_json(records)
            return
        shown = table("model", "#size", "#files", "#age", "manifest")
        for record in records:
            artefact = record.artefact
            age = human_age(time.time_ns(), record.created_unix_ns)
            shown.add_row(
                record.name,
                human_bytes(artefact.total_bytes),
                str(artefact.file_count),
                age,
                artefact.manifest[:19],
            )
        console.print(shown if records else "no models yet; push one with `snowdrop model push NAME DIRECTORY`")


@app.command()
def show(name: str, json: JsonFlag = False) -> None:
    """Show a model's files and tensors."""
    with reported():
        ctx = context(json=json)
        record = ctx.client.get(ModelRecord, "models", name)
        manifest = _manifest(ctx.client.get(Info, "info"), record)
        if ctx.json:
            say_json({"model": record, "files": manifest.files})
            return
        console.print(f"{record.name}  {record.artefact.manifest}")
        console.print(f"  from {record.source}, {len(manifest.chunks)} chunks in {len(manifest.packs)} packs")
        shown = table("file", "#size", "#tensors", "sha256")
        for entry in manifest.files:
            tensors = str(len(entry.tensors)) if entry.tensors else ""
            shown.add_row(entry.path, human_bytes(entry.size), tensors, entry.sha256[:16])
        console.print(shown)


@app.command()
def rm(name: str, json: JsonFlag = False) -> None:
    """Remove a model's name. Its bytes stay at the origin until `snowdrop store gc` collects them."""
    with reported():
        ctx = context(json=json)
        ctx.client.delete("models", name)
        if ctx.json:
            say_json({"removed": name})
        else:
            console.print(f"removed {name}; its bytes stay at the origin until `snowdrop store gc` collects them")


def _manifest(info: Info, record: ModelRecord) -> Manifest:
    origin = open_origin(info.origin_url, info.origin)
    key = manifest_key(record.artefact.key_domain, record.artefact.manifest)
    data = bytearray(origin.size(key))
    origin.read_range(key, 0, memoryview(data))
    return decode_manifest(bytes(data), expected=record.artefact.manifest)
