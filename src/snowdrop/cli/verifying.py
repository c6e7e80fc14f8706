"""What `store verify` does: the names, the packs at the origin, the copies on the node."""

from __future__ import annotations

import msgspec
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from snowdrop.cli.node_store import NodeArtefact, NodeVerified, print_verified, resolve, verify_node
from snowdrop.cli.output import Context, console, errors, human_bytes
from snowdrop.content.gcformat import Root
from snowdrop.content.keys import load_keyring
from snowdrop.content.origin import open_origin
from snowdrop.content.seen import SeenFile
from snowdrop.content.signing import KeyStore
from snowdrop.content.verify import OriginVerified, Problem, VerifyProgress, verify_names, verify_origin
from snowdrop.domain.deployment import ModelRecord
from snowdrop.wire.api import Info, StoreModels, StoreRoots
from snowdrop.wire.upkeep import WorkLine

SHOWN_MAX = 50
_COUNTED = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The whole result. `ok` says that nothing is wrong that could not be repaired."""

    ok: bool
    node: tuple[NodeVerified, ...]
    names: tuple[Problem, ...]
    origin: OriginVerified | None


def verify(ctx: Context, name: str | None, *, at_origin: bool) -> Verification:
    """One model of the tenant, or without `name` everything that control's state names."""
    info = ctx.client.get(Info, "info")
    origin = open_origin(info.origin_url, info.origin)
    if name is not None:
        models = [ctx.client.get(ModelRecord, "models", name)]
        wanted = [resolve(ctx, name)]
    else:
        models = list(ctx.client.get(StoreModels, "store", "models").models)
        named = ctx.client.get(StoreRoots, "store", "roots").roots
        wanted = [
            NodeArtefact(manifest=root.manifest, key_domain=root.key_domain, name=", ".join(root.named_by))
            for root in named
        ]
    node = [_on_node(ctx, artefact) for artefact in wanted]
    roots = [Root(artefact.key_domain, artefact.manifest) for artefact in wanted]
    names: list[Problem] = []
    found: OriginVerified | None = None
    if at_origin:
        seen = SeenFile(ctx.layout.keys / "seen-refs.json")
        refs = [(m.artefact.key_domain, m.tenant, m.name, m.artefact.manifest) for m in models]
        names = verify_names(origin, refs, KeyStore(ctx.layout.keys).trusted(), seen)
        with _bar(ctx) as bar:
            task = bar.add_task("reading the origin", total=None)

            def progress(state: VerifyProgress) -> None:
                bar.update(task, completed=state.done_bytes, total=state.total_bytes)

            found = verify_origin(origin, roots, load_keyring(ctx.layout.content_keys), progress=progress)
    node_ok = not any(chunk.problem for one in node for chunk in one.bad)
    ok = node_ok and not names and (found is None or not found.problems)
    return Verification(ok=ok, node=tuple(node), names=tuple(names), origin=found)


def _on_node(ctx: Context, artefact: NodeArtefact) -> NodeVerified:
    with Progress(*_COUNTED, console=errors, disable=ctx.json, transient=True) as bar:
        task = bar.add_task(f"reading {artefact.name} on the node", total=None)

        def progress(line: WorkLine) -> None:
            bar.update(task, completed=line.done, total=line.total or None)

        return verify_node(ctx, artefact, progress)


def print_result(result: Verification) -> None:
    print_verified(list(result.node))
    for problem in result.names:
        console.print(f"[red]wrong[/] name {problem.where}: {problem.what}", soft_wrap=True)
    found = result.origin
    if found is not None:
        console.print(
            f"origin: {found.artefacts} artefacts, {found.packs} packs, {human_bytes(found.read_bytes)} read, "
            f"{len(found.problems)} wrong"
        )
        for problem in found.problems[:SHOWN_MAX]:
            place = f"{problem.file}, chunk {problem.chunk}" if problem.chunk >= 0 else problem.artefact
            console.print(f"  [red]wrong[/] {place}: {problem.what}", soft_wrap=True)
            console.print(f"    {problem.where}", style="dim", soft_wrap=True)
        if len(found.problems) > SHOWN_MAX:
            console.print(f"  and {len(found.problems) - SHOWN_MAX} more; --json has them")
        if found.problems:
            console.print(
                "  next: `snowdrop model push NAME SOURCE --repair` puts it right; code: deploy it again",
                soft_wrap=True,
            )
        for text in found.skipped:
            console.print(f"  not judged: {text}", style="yellow")
    console.print("all right" if result.ok else "some content is wrong")


def _bar(ctx: Context) -> Progress:
    columns = (
        *(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=errors, disable=ctx.json, transient=True)
