"""`store stats|gc|...`: the content at the origin and on the node."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn

from snowdrop.cli import node_store, store_keys, verifying
from snowdrop.cli.output import (
    EXIT_FAILED,
    Context,
    JsonFlag,
    console,
    context,
    errors,
    human_bytes,
    reported,
    say_json,
    table,
)
from snowdrop.content.collect import CollectionProgress, CollectionReport, Collector, forget_platform
from snowdrop.content.gcformat import Root
from snowdrop.content.keys import load_keyring
from snowdrop.content.observe import Observer
from snowdrop.content.origin import Origin, open_origin
from snowdrop.content.originstats import OriginStats, origin_stats
from snowdrop.domain.errors import InvalidInputError
from snowdrop.wire.api import Info, StoreRoots

app = typer.Typer(no_args_is_help=True, help="Stored content: statistics, verification, collection, pins, keys.")
app.add_typer(store_keys.app, name="keys")


@app.command()
def stats(json: JsonFlag = False) -> None:
    """Show what the origin and the node hold: bytes, sharing, garbage, pins, wrong chunks."""
    with reported():
        ctx = context(json=json)
        node = node_store.node_stats(ctx)
        content = node_store.node_content(ctx)
        origin = origin_of(ctx)
        observed = observer_of(ctx, origin).observe(now_unix_ns=time.time_ns())
        figures = origin_stats(observed, now_unix_ns=time.time_ns())
        if ctx.json:
            say_json({"origin": figures, "node": node, "content": content})
            return
        print_origin(figures)
        console.print()
        node_store.print_node(node, content)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted; change nothing.")] = False,
    grace_s: Annotated[
        float | None,
        typer.Option(help="Keep what was condemned, written or used within so many seconds.", min=0.0),
    ] = None,
    forget: Annotated[
        str | None, typer.Option("--forget-platform", help="Drop the roots of a platform that is gone for ever.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Delete what nothing names, at the origin (condemned for the grace period) and on the node."""
    with reported():
        ctx = context(json=json)
        grace = ctx.resolved.settings.content.collect_grace_s if grace_s is None else grace_s
        origin = origin_of(ctx)
        if forget is not None:
            _forget(ctx, origin, forget, dry_run=dry_run)
        report = _collect(ctx, origin, grace, dry_run=dry_run)
        if not ctx.json:
            print_collection(report)
        cleaned = node_store.clean_node(ctx, grace_s=grace, dry_run=dry_run)
        if ctx.json:
            say_json({"origin": report, "node": cleaned})
        else:
            node_store.print_cleaned(cleaned, dry_run=dry_run)


@app.command()
def pin(
    what: Annotated[str, typer.Argument(metavar="NAME|DIGEST", help="A model, or a manifest's digest.")],
    json: JsonFlag = False,
) -> None:
    """Bring content to the node now and never evict it there, until it is unpinned."""
    with reported():
        ctx = context(json=json)
        with Progress(
            SpinnerColumn(), TextColumn("{task.description}"), console=errors, disable=ctx.json, transient=True
        ) as bar:
            task = bar.add_task(f"bringing {what}")
            artefact = node_store.pin(ctx, what, lambda: bar.update(task))
        if ctx.json:
            say_json({"pinned": artefact.manifest})
        else:
            console.print(
                f"pinned {what}: all of it is on the node and stays\n  {artefact.manifest}", soft_wrap=True
            )


@app.command()
def unpin(
    what: Annotated[str, typer.Argument(metavar="NAME|DIGEST", help="As it was pinned.")], json: JsonFlag = False
) -> None:
    """Let the node evict content again when it needs the room."""
    with reported():
        ctx = context(json=json)
        found = node_store.unpin(ctx, what)
        if ctx.json:
            say_json({"unpinned": found})
        else:
            console.print(f"unpinned {what}")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="A model; or --all.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that any tenant's state names.")] = False,
    at_origin: Annotated[bool, typer.Option("--origin", help="Read every pack at the origin too.")] = False,
    json: JsonFlag = False,
) -> None:
    """Read the node's copies back, mend what is wrong; exit code 1 if something stays wrong."""
    with reported():
        ctx = context(json=json)
        if everything == (name is not None):
            raise InvalidInputError("say what to verify", where="NAME or --all", next_step="one of the two")
        result = verifying.verify(ctx, name, at_origin=at_origin)
        if ctx.json:
            say_json(result)
        else:
            verifying.print_result(result)
        if not result.ok:
            raise typer.Exit(EXIT_FAILED)


def _collect(ctx: Context, origin: Origin, grace_s: float, *, dry_run: bool) -> CollectionReport:
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), console=errors, disable=ctx.json, transient=True
    ) as bar:
        task = bar.add_task("taking stock")

        def progress(state: CollectionProgress) -> None:
            counts = f" {state.done} of {state.total}" if state.total else ""
            bar.update(task, description=f"{state.step}{counts}")

        collector = Collector(
            origin, observer_of(ctx, origin, publish=not dry_run), grace_s=grace_s, progress=progress
        )
        return collector.run(dry_run=dry_run)


def origin_of(ctx: Context) -> Origin:
    """The platform's origin."""
    info = ctx.client.get(Info, "info")
    return open_origin(info.origin_url, info.origin)


def observer_of(ctx: Context, origin: Origin, *, publish: bool = False) -> Observer:
    """Takes stock of the origin, with what control's state names among the roots; `publish` says it there too."""

    def own_roots() -> list[Root]:
        method = "POST" if publish else "GET"
        named = ctx.client.send(StoreRoots, method, "store", "roots")
        return [Root(root.key_domain, root.manifest) for root in named.roots]

    own_platform = ctx.client.get(StoreRoots, "store", "roots").platform
    keys = ctx.layout.content_keys
    return Observer(origin, own_roots, keyring=lambda: load_keyring(keys), own_platform=own_platform)


def print_origin(figures: OriginStats) -> None:
    shown = table("origin", "#objects", "#bytes", "")
    models = f"{figures.artefacts_in_use} artefacts, {figures.models} of them models, {figures.refs} names"
    shown.add_row("stored", str(figures.objects), human_bytes(figures.stored_bytes), "")
    shown.add_row("in use", "", human_bytes(figures.in_use_bytes), models)
    ratio = f"{human_bytes(figures.plain_bytes)} of files; each stored byte serves {figures.dedupe_ratio:.2f}"
    shown.add_row("  packs", "", human_bytes(figures.in_use_pack_bytes), ratio)
    hint = (
        f"{figures.condemned_objects} condemned; `snowdrop store gc` collects" if figures.garbage_objects else ""
    )
    shown.add_row("garbage", str(figures.garbage_objects), human_bytes(figures.garbage_bytes), hint)
    console.print(shown)
    _print_rest(figures.pushes, figures.strangers, figures.stranger_count, figures.notes)


def print_collection(report: CollectionReport) -> None:
    verb = "would delete" if report.dry_run else "deleted"
    console.print(f"origin: {verb} {report.deleted_objects} objects, {human_bytes(report.deleted_bytes)}")
    if report.condemned_objects:
        condemned = f"{report.condemned_objects} condemned objects ({human_bytes(report.condemned_bytes)})"
        console.print(f"  {condemned} go when their grace period is over")
    if report.temporary_objects:
        console.print(
            f"  {report.temporary_objects} unfinished puts ({human_bytes(report.temporary_bytes)}) "
            f"{'would be' if report.dry_run else 'were'} removed"
        )
    console.print(f"  {human_bytes(report.in_use_bytes)} in use; {report.reason}", style="dim")
    _print_rest(report.pushes, report.strangers, report.stranger_count, report.notes)


def _print_rest(
    pushes: tuple[str, ...], strangers: tuple[str, ...], stranger_count: int, notes: tuple[str, ...]
) -> None:
    for push in pushes:
        console.print(f"  under way: {push}")
    if stranger_count:
        console.print(f"  {stranger_count} objects are none of ours and stay: {', '.join(strangers)}")
    for note in notes:
        console.print(f"  kept: {note}", style="yellow")


def _forget(ctx: Context, origin: Origin, platform: str, *, dry_run: bool) -> None:
    own = ctx.client.get(StoreRoots, "store", "roots").platform
    if platform == own:
        raise InvalidInputError(
            f"{platform} is this platform",
            where="--forget-platform",
            next_step="`snowdrop store stats` lists others",
        )
    if not dry_run:
        forget_platform(origin, platform)
