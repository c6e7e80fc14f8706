"""`model push|ls|show|rm|keys`."""

from __future__ import annotations

import time
from contextlib import closing
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from snowdrop.cli import content_keys, mounts
from snowdrop.cli.output import (
    Context,
    JsonFlag,
    console,
    context,
    errors,
    human_age,
    human_bytes,
    reported,
    say_json,
    table,
)
from snowdrop.cli.publishing import Publication, publication
from snowdrop.content.ingest import (
    Compress,
    Filter,
    IngestIndex,
    PushOptions,
    PushProgress,
    PushResult,
    Source,
    SourceOptions,
    open_source,
    push_source,
)
from snowdrop.content.keys import PUBLIC_HASHER, Hasher, Keyring, key_domain, load_keyring, tenant_key
from snowdrop.content.layout import PUBLIC_DOMAIN, manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import open_origin
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.ids import TenantId, parse_name
from snowdrop.domain.manifest import MANIFEST_BYTES_MAX, Manifest
from snowdrop.wire.api import Info

app = typer.Typer(no_args_is_help=True, help="Models: push, list, show, remove.")
app.add_typer(content_keys.app, name="keys")
mounts.add_commands(app)


SourceArgument = Annotated[
    str,
    typer.Argument(
        help="A directory, hf://org/name@revision, s3://, gs:// or az:// with a prefix, or an http(s):// URL."
    ),
]
PrivateFlag = Annotated[
    bool,
    typer.Option("--private", help="Name it with the tenant's key: nobody else can tell whether it is there."),
]
CompressOption = Annotated[
    Compress, typer.Option(help="auto: where it saves a lot. zstd: wherever it saves. none: fastest to load.")
]
PatternsOption = Annotated[list[str] | None, typer.Option(help="Pattern of paths; may be repeated.")]
TokenOption = Annotated[str | None, typer.Option(help="Token of the hub; better in HF_TOKEN or `hf auth login`.")]


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="The name deployments will use.")],
    source: SourceArgument,
    *,
    include: PatternsOption = None,
    exclude: PatternsOption = None,
    compress: CompressOption = "none",
    private: PrivateFlag = False,
    token: TokenOption = None,
    endpoint: Annotated[str | None, typer.Option(help="URL of another hub or object store.")] = None,
    region: Annotated[str | None, typer.Option(help="Region of an s3:// source.")] = None,
    anonymous: Annotated[bool, typer.Option("--anonymous", help="Read the store without credentials.")] = False,
    reread: Annotated[bool, typer.Option("--reread", help="Read every file, also unchanged ones.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read back what is re-used at the origin; replace what is wrong.")
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Cut a model into verified chunks, store what the origin does not have, and give it a name.

    A push that was interrupted goes on where it was when it is run again.
    """
    with reported():
        ctx = context(json=json)
        parse_name(name, what="model name")
        chosen = Filter(tuple(include or ()), tuple(exclude or ()))
        reached = SourceOptions(token=token, endpoint=endpoint, region=region, anonymous=anonymous, chosen=chosen)
        opened = open_source(source, reached)
        options = PushOptions(
            hasher=private_hasher(ctx, private=private), compress=compress, reread=reread, repair=repair
        )
        started_s = time.monotonic()
        with publication(ctx, name) as published:
            result = _carry(ctx, name, opened, published, options)
            record = published.publish(ctx, result.artefact, source=opened.name)
        if ctx.json:
            counts = {"new_bytes": result.new_bytes, "reused_bytes": result.reused_bytes}
            say_json({"model": record, **counts, "read_bytes": result.read_bytes})
            return
        _say_pushed(record, result, time.monotonic() - started_s)


def push_model(ctx: Context, name: str, source: str, reached: SourceOptions) -> ModelRecord:
    """`model push` with default options, as part of another command."""
    parse_name(name, what="model name")
    opened = open_source(source, reached)
    started_s = time.monotonic()
    with publication(ctx, name) as published:
        result = _carry(ctx, name, opened, published, PushOptions())
        record = published.publish(ctx, result.artefact, source=opened.name)
    if not ctx.json:
        _say_pushed(record, result, time.monotonic() - started_s)
    return record


def private_hasher(ctx: Context, *, private: bool) -> Hasher:
    """Of the tenant's key domain if `private`, which is made if it is not there; otherwise of `public`."""
    if not private:
        return PUBLIC_HASHER
    key = tenant_key(ctx.layout.content_keys, TenantId(ctx.tenant))
    return Keyring({key_domain(key): key}).hasher(key_domain(key))


def _carry(ctx: Context, name: str, source: Source, published: Publication, options: PushOptions) -> PushResult:
    """Pushes under a progress bar."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        TimeRemainingColumn(),
    )
    origin_url = ctx.client.get(Info, "info").origin_url
    with (
        closing(IngestIndex(ctx.layout.ingest_index, origin_url, options.hasher.domain)) as index,
        Progress(*columns, console=errors, disable=ctx.json, transient=True) as bar,
    ):
        task = bar.add_task(f"pushing {name}", total=None)

        def progress(state: PushProgress) -> None:
            bar.update(task, completed=state.done_bytes, total=state.total_bytes)

        return push_source(source, published.origin, options, index=index, progress=progress)


def _say_pushed(record: ModelRecord, result: PushResult, took_s: float) -> None:
    artefact = record.artefact
    privacy = "private, " if artefact.key_domain != PUBLIC_DOMAIN else ""
    console.print(
        f"pushed {record.name}: {privacy}{artefact.file_count} files, {human_bytes(artefact.total_bytes)} "
        f"({human_bytes(result.new_bytes)} new) in {took_s:.1f} s"
    )
    console.print(f"  from {record.source}", style="dim")
    console.print(f"  {artefact.manifest}", style="dim")


@app.command("ls")
def list_models(json: JsonFlag = False) -> None:
    """List models."""
    with reported():
        ctx = context(json=json)
        records = [
            record for record in ctx.client.get(list[ModelRecord], "models") if record.artefact.kind != "image"
        ]
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
        manifest = manifest_of(ctx, record)
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


def manifest_of(ctx: Context, record: ModelRecord) -> Manifest:
    """A model's manifest, read from the origin and checked."""
    info = ctx.client.get(Info, "info")
    hasher = load_keyring(ctx.layout.content_keys).hasher(record.artefact.key_domain)
    origin = open_origin(info.origin_url, info.origin)
    key = manifest_key(record.artefact.key_domain, record.artefact.manifest)
    # One byte too many is refused by the decoder: what lies at an origin may have any size.
    data = bytearray(min(origin.size(key), MANIFEST_BYTES_MAX + 1))
    if data:
        origin.read_range(key, 0, memoryview(data))
    return decode_manifest(bytes(data), expected=record.artefact.manifest, hasher=hasher)
