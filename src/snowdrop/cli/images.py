"""`image push|build|ls|show|mount|unmount|rm`; what else there is of images is in `cli.image_traces`."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from snowdrop.cli.image_records import image_of, record_of
from snowdrop.cli.image_traces import add_commands as add_trace_commands
from snowdrop.cli.models import PrivateFlag, private_hasher
from snowdrop.cli.mounts import mount_artefact, unmount_directory
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
from snowdrop.content.imagetrace import check_start
from snowdrop.content.ingest import Compress, IngestIndex, PushOptions, PushProgress
from snowdrop.domain.deployment import ModelRecord
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import parse_name
from snowdrop.image.build.bases import DEBIAN_MIRROR
from snowdrop.image.build.build import BuildOptions, build_image
from snowdrop.image.build.cache import BuildCache
from snowdrop.image.oci import machine_platform, parse_platform
from snowdrop.image.opening import ReachOptions, open_image
from snowdrop.image.push import ImageOptions, ImagePushed, LayerProgress, push_image
from snowdrop.image.source import ImageSource
from snowdrop.image.unpack import LayerFolder
from snowdrop.sdk.inspect import describe_service
from snowdrop.sdk.load import split_target
from snowdrop.wire.api import Info

app = typer.Typer(no_args_is_help=True, help="Images: push, build, list, show, remove.")
PASSWORD_VARIABLE = "SNOWDROP_REGISTRY_PASSWORD"  # noqa: S105 (its name)
LARGEST_SHOWN = 10

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="HOST/REPOSITORY:TAG (docker://), an OCI layout or archive (oci:PATH), or docker-archive:PATH."
    ),
]
HostsOption = Annotated[list[str] | None, typer.Option(help="A host; may be repeated.")]


@app.command()
def push(
    name: Annotated[str, typer.Argument(help="The name deployments will use.")],
    source: SourceArgument,
    *,
    for_platform: Annotated[
        str | None, typer.Option("--platform", help="OS/ARCHITECTURE[/VARIANT]; this machine's if not given.")
    ] = None,
    allow_setid: Annotated[
        bool, typer.Option("--allow-setid", help="Keep set-user-id and set-group-id bits, and capabilities.")
    ] = False,
    skip_devices: Annotated[
        bool, typer.Option("--skip-devices", help="Leave device files out, instead of refusing the image.")
    ] = False,
    mirror: HostsOption = None,
    insecure: HostsOption = None,
    ca_file: Annotated[str, typer.Option(help="PEM file of the registry's certificate authority.")] = "",
    user: Annotated[
        str,
        typer.Option(help=f"User at the registry; its password from {PASSWORD_VARIABLE}. Else docker's config."),
    ] = "",
    docker_config: Annotated[Path | None, typer.Option(help="Another config.json with credentials.")] = None,
    compress: Annotated[
        Compress, typer.Option(help="auto: where it saves a lot. zstd: wherever it saves. none: fastest to read.")
    ] = "auto",
    private: PrivateFlag = False,
    json: JsonFlag = False,
) -> None:
    """Flatten an image into a tree, store what the origin does not have, and give it a name.

    A push that was interrupted goes on where it was when it is run again.
    """
    with reported():
        ctx = context(json=json)
        parse_name(name, what="image name")
        reach = ReachOptions(
            platform=parse_platform(for_platform) if for_platform else machine_platform(platform.machine()),
            insecure=tuple(insecure or ()),
            mirrors=tuple(mirror or ()),
            ca_file=ca_file,
            docker_config=docker_config,
            user=user,
            password=os.environ.get(PASSWORD_VARIABLE, ""),
        )
        options = PushOptions(kind="image", hasher=private_hasher(ctx, private=private), compress=compress)
        opened, is_remote = open_image(source, reach)
        chosen = ImageOptions(allow_setid=allow_setid, skip_devices=skip_devices, fetch=is_remote)
        started_s = time.monotonic()
        with closing(opened), publication(ctx, name, kind="image") as published:
            pushed = _carry(ctx, opened, published, options, chosen)
            record = published.publish(
                ctx, pushed.result.artefact, source=f"{opened.name} ({pushed.source.digest[:19]})"
            )
        if ctx.json:
            counts = {"new_bytes": pushed.result.new_bytes, "reused_bytes": pushed.result.reused_bytes}
            say_json({"image": record, "source_digest": pushed.source.digest, **counts})
            return
        _say_pushed(record, pushed, time.monotonic() - started_s)


@app.command()
def build(
    target: Annotated[str, typer.Argument(help="FILE[:CLASS]: the service whose environment is made.")],
    name: Annotated[str, typer.Argument(help="The image's name; if not given, the one the service says.")] = "",
    *,
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse if the lock beside FILE is not for what is asked.")
    ] = False,
    upgrade: Annotated[bool, typer.Option("--upgrade", help="Make the base and the lock anew.")] = False,
    debian_mirror: Annotated[str, typer.Option(help="Where a base `debian:SUITE` comes from.")] = DEBIAN_MIRROR,
    private: PrivateFlag = False,
    json: JsonFlag = False,
) -> None:
    """Make a service's environment without a container engine, and push it as an image.

    Versions and digests of packages are kept in a lock beside FILE. What was made is kept: a build that was
    interrupted goes on where it was when it is run again.
    """
    with reported():
        ctx = context(json=json)
        file, class_name = split_target(target)
        image = describe_service(file, class_name).image
        name = name or image.name
        if not name:
            raise InvalidInputError(
                "the image has no name", where="NAME", next_step="give it as the second argument, or in sd.Image"
            )
        parse_name(name, what="image name")
        options = BuildOptions(
            lock=file.absolute().with_suffix(f".{class_name}.lock" if class_name else ".lock"),
            reach=ReachOptions(platform=machine_platform(platform.machine())),
            locked=locked,
            upgrade=upgrade,
            debian_mirror=debian_mirror,
        )
        push_options = PushOptions(kind="image", hasher=private_hasher(ctx, private=private), compress="auto")
        started_s = time.monotonic()
        with closing(BuildCache(ctx.layout.image_builds)) as cache:
            with errors.status("building") as status:
                built = build_image(image, file.absolute().parent, cache, options, report=status.update)
            with closing(built.source) as source, publication(ctx, name, kind="image") as published:
                # Sandboxes have devices of their own; those that a base brings are left out.
                chosen = ImageOptions(skip_devices=True, fetch=built.fetch)
                pushed = _carry(ctx, source, published, push_options, chosen)
                record = published.publish(ctx, pushed.result.artefact, source=source.name)
        if ctx.json:
            counts = {"new_bytes": pushed.result.new_bytes, "reused_bytes": pushed.result.reused_bytes}
            say_json({"image": record, "lock": str(options.lock), **counts})
            return
        _say_pushed(record, pushed, time.monotonic() - started_s)


def _carry(
    ctx: Context, source: ImageSource, published: Publication, options: PushOptions, chosen: ImageOptions
) -> ImagePushed:
    """Pushes under progress bars: one for the layers, one for the store."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        TimeRemainingColumn(),
    )
    origin_url = ctx.client.get(Info, "info").origin_url
    with ExitStack() as stack:
        index = stack.enter_context(
            closing(IngestIndex(ctx.layout.ingest_index, origin_url, options.hasher.domain))
        )
        folder = stack.enter_context(closing(LayerFolder(ctx.layout.image_layers)))
        bar = stack.enter_context(Progress(*columns, console=errors, disable=ctx.json, transient=True))
        layers = bar.add_task("layers", total=None)
        store = bar.add_task(f"pushing {published.name}", total=None, visible=False)

        def layer_progress(state: LayerProgress) -> None:
            said = f"layer {state.layer} of {state.layers}"
            bar.update(layers, description=said, completed=state.done_bytes, total=state.total_bytes or None)

        def progress(state: PushProgress) -> None:
            bar.update(store, visible=True, completed=state.done_bytes, total=state.total_bytes)

        return push_image(
            source,
            published.origin,
            folder,
            options,
            chosen,
            index=index,
            layer_progress=layer_progress,
            progress=progress,
        )


def _say_pushed(record: ModelRecord, pushed: ImagePushed, took_s: float) -> None:
    console.print(
        f"pushed {record.name}: {len(pushed.tree.entries)} entries, {human_bytes(pushed.tree.data_bytes)} "
        f"({human_bytes(pushed.result.new_bytes)} new) in {took_s:.1f} s"
    )
    console.print(f"  from {record.source}", style="dim")
    console.print(f"  {record.artefact.manifest}", style="dim")


@app.command("ls")
def list_images(json: JsonFlag = False) -> None:
    """List images."""
    with reported():
        ctx = context(json=json)
        records = [
            record for record in ctx.client.get(list[ModelRecord], "models") if record.artefact.kind == "image"
        ]
        if ctx.json:
            say_json(records)
            return
        shown = table("image", "#size", "#age", "manifest", "source")
        for record in records:
            age = human_age(time.time_ns(), record.created_unix_ns)
            size = human_bytes(record.artefact.total_bytes)
            shown.add_row(record.name, size, age, record.artefact.manifest[:19], record.source)
        console.print(shown if records else "no images yet; push one with `snowdrop image push NAME SOURCE`")


@app.command()
def show(name: str, json: JsonFlag = False) -> None:
    """Show an image's config, what it holds and its largest files."""
    with reported():
        ctx = context(json=json)
        record, tree = image_of(ctx, name)
        counts = Counter(entry.kind for entry in tree.entries)
        if ctx.json:
            say_json({"image": record, "config": tree.config, "counts": counts, "data_bytes": tree.data_bytes})
            return
        config = tree.config
        console.print(f"{record.name}  {record.artefact.manifest}")
        console.print(f"  from {record.source}, for {config.os}/{config.architecture}")
        held = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        console.print(f"  {held}; {human_bytes(tree.data_bytes)}")
        for label, value in (
            ("entrypoint", " ".join(config.entrypoint)),
            ("cmd", " ".join(config.cmd)),
            ("user", config.user),
            ("workdir", config.workdir),
            ("env", " ".join(config.env)),
        ):
            if value:
                console.print(f"  {label}: {value}", markup=False)
        shown = table("largest files", "#size", "sha256")
        for entry in sorted(tree.entries, key=lambda entry: -entry.size)[:LARGEST_SHOWN]:
            if entry.size:
                path = entry.path.decode(errors="backslashreplace")
                shown.add_row(path, human_bytes(entry.size), entry.sha256.hex()[:16])
        console.print(shown)


@app.command()
def mount(
    name: Annotated[str, typer.Argument(help="An image that was pushed.")],
    directory: Annotated[Path, typer.Argument(help="Where: an empty directory, or one to be made.")],
    start: Annotated[
        str,
        typer.Option(
            help="What is going to be started in it, as in 'python -m app': what it reads until `image ready` is "
            "recorded, and fetched ahead when an image is mounted for the same start again."
        ),
    ] = "",
    json: JsonFlag = False,
) -> None:
    """Show an image as a directory, at once: its data is fetched as it is read."""
    with reported():
        ctx = context(json=json)
        mount_artefact(ctx, record_of(ctx, name), directory, check_start(start) if start else "")


@app.command()
def unmount(directory: Path, json: JsonFlag = False) -> None:
    """Remove what `image mount` has made. Programs that have files open keep them."""
    with reported():
        unmount_directory(context(json=json), directory)


@app.command()
def rm(name: str, json: JsonFlag = False) -> None:
    """Remove an image's name. Its bytes stay at the origin until `snowdrop store gc` collects them."""
    with reported():
        ctx = context(json=json)
        record_of(ctx, name)
        ctx.client.delete("models", name)
        if ctx.json:
            say_json({"removed": name})
        else:
            console.print(f"removed {name}; its bytes stay at the origin until `snowdrop store gc` collects them")


add_trace_commands(app)
