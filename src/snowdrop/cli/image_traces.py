"""`image ready` and `image trace show`: what starts in an image read."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from snowdrop.cli.image_records import image_of
from snowdrop.cli.models import manifest_of
from snowdrop.cli.output import JsonFlag, console, context, human_age, human_bytes, reported, say_json, table
from snowdrop.content.imagetrace import check_trace, stored_traces
from snowdrop.content.origin import open_origin
from snowdrop.domain.errors import CorruptContentError, NotFoundError
from snowdrop.domain.ids import TenantId
from snowdrop.domain.image import DATA_FILE, ImageTree
from snowdrop.domain.imagetrace import ImageTrace
from snowdrop.domain.manifest import Manifest
from snowdrop.policy.replay import Place, covered_bytes, merged, replay_order
from snowdrop.wire.api import Info
from snowdrop.wire.mounts import MountReady, StartSummary

FILES_SHOWN = 10

trace_app = typer.Typer(no_args_is_help=True, help="What starts in an image read.")


class ReadFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file that a start read, or some of it. Files with the same content are shown under the first name."""

    path: str
    read_bytes: int
    size_bytes: int


class TraceShown(msgspec.Struct, frozen=True, kw_only=True):
    """A start of an image, summed up. `fetched_bytes` are those of the chunks that it touches."""

    start: str
    recorded_unix_ns: int
    extents: int
    read_bytes: int
    read_share: float
    chunks: int
    chunks_total: int
    fetched_bytes: int
    fetched_share: float
    top_files: tuple[ReadFile, ...]


def ready(directory: Path, json: JsonFlag = False) -> None:
    """Say that what was started in a mounted image is ready.

    What it read is kept for later starts, and the image is completed on this node from now on. Said again, it
    shows what readers have had to wait for since.
    """
    with reported():
        ctx = context(json=json)
        body = MountReady(directory=str(directory.absolute()))
        summary = ctx.client.agent().send(StartSummary, "POST", "mounts", "ready", body=body)
        if ctx.json:
            say_json(summary)
            return
        if not summary.is_known:
            console.print(f"{directory}: the image is completed on this node; it was not mounted with --start")
            return
        console.print(
            f"{directory}: read {human_bytes(summary.recorded_bytes)}, of which the node had to wait for "
            f"{human_bytes(summary.missed_bytes)}; {human_bytes(summary.foreseen_bytes)} were foreseen"
        )
        console.print(f"  late since it was ready: {human_bytes(summary.late_bytes)}")


@trace_app.command()
def show(
    name: Annotated[str, typer.Argument(help="An image that was pushed.")],
    files: Annotated[int, typer.Option(min=0, help="How many files to show of each start.")] = FILES_SHOWN,
    json: JsonFlag = False,
) -> None:
    """Show what starts in an image read: the share of its bytes, its chunks, and the files read most."""
    with reported():
        ctx = context(json=json)
        record, tree = image_of(ctx, name)
        manifest = manifest_of(ctx, record)
        info = ctx.client.get(Info, "info")
        origin = open_origin(info.origin_url, info.origin)
        digest, tenant = record.artefact.manifest, TenantId(ctx.tenant)
        shown: list[TraceShown] = []
        for trace in stored_traces(origin, record.artefact.key_domain, tenant, digest):
            try:
                check_trace(trace, digest, tree.data_bytes)
            except CorruptContentError:
                continue  # no start uses it either
            shown.append(summed(trace, tree, manifest, files))
        if ctx.json:
            say_json({"image": record.name, "data_bytes": tree.data_bytes, "traces": shown})
            return
        if not shown:
            raise NotFoundError(
                "no start in this image has been recorded",
                where=f"image {name}",
                next_step="mount it with `snowdrop image mount --start`, and say `snowdrop image ready`",
            )
        console.print(f"{record.name}  {human_bytes(tree.data_bytes)}")
        for each in shown:
            _say(each)


def summed(trace: ImageTrace, tree: ImageTree, manifest: Manifest, files_max: int) -> TraceShown:
    """What `image trace show` says of one trace that `check_trace` has passed."""
    (data,) = [entry for entry in manifest.files if entry.path == DATA_FILE]
    places = [Place(extent.file_offset, extent.length, extent.chunk) for extent in data.extents]
    chunks = replay_order(trace.extents, places)
    fetched = sum(manifest.chunks[chunk].plain_bytes for chunk in chunks)
    read = sum(length for _, length in trace.extents)
    found = sorted(_read_files(trace, tree), key=lambda each: (-each.read_bytes, each.path))
    return TraceShown(
        start=trace.start,
        recorded_unix_ns=trace.recorded_unix_ns,
        extents=len(trace.extents),
        read_bytes=read,
        read_share=read / max(1, tree.data_bytes),
        chunks=len(chunks),
        chunks_total=len({place.chunk for place in places}),
        fetched_bytes=fetched,
        fetched_share=fetched / max(1, tree.data_bytes),
        top_files=tuple(found[:files_max]),
    )


def _read_files(trace: ImageTrace, tree: ImageTree) -> Iterable[ReadFile]:
    ascending = merged(trace.extents)
    places: set[int] = set()
    for entry in tree.entries:
        if entry.kind == "file" and entry.size and entry.offset not in places:
            places.add(entry.offset)
            count = covered_bytes(ascending, entry.offset, entry.size)
            if count:
                path = entry.path.decode(errors="backslashreplace")
                yield ReadFile(path=path, read_bytes=count, size_bytes=entry.size)


def _say(each: TraceShown) -> None:
    age = human_age(time.time_ns(), each.recorded_unix_ns)
    console.print(f"\n{each.start}  (recorded {age} ago)", markup=False)
    read = f"{human_bytes(each.read_bytes)} ({each.read_share:.1%}) in {each.extents} stretches"
    fetched = f"{human_bytes(each.fetched_bytes)} ({each.fetched_share:.1%})"
    console.print(f"  reads {read}; fetches {fetched} in {each.chunks} of {each.chunks_total} chunks")
    found = table("most read files", "#read", "#size")
    for file in each.top_files:
        found.add_row(file.path, human_bytes(file.read_bytes), human_bytes(file.size_bytes))
    if each.top_files:
        console.print(found)


def add_commands(app: typer.Typer) -> None:
    """To `snowdrop image`."""
    app.command()(ready)
    app.add_typer(trace_app, name="trace")
