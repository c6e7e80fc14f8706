"""`batch run`: every line of a file through a deployment, to be broken off and gone on with at any time."""

from __future__ import annotations

import enum
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import anyio
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from snowdrop.cli.batch_files import Journal, header_of, open_journal, read_lines
from snowdrop.cli.output import Context, JsonFlag, console, context, errors, reported, say_json
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import parse_name
from snowdrop.wire.api import Info

if TYPE_CHECKING:
    from snowdrop.cli.batch_run import Batch, BatchTarget

RATE_S_MIN = 0.5
app = typer.Typer(no_args_is_help=True, help="Batches: files of requests.")


class Order(enum.StrEnum):
    """How the result's lines are ordered."""

    INPUT = "input"
    COMPLETED = "completed"


@app.callback()
def batch() -> None:
    """Run files of requests."""


@app.command()
def run(
    deployment: str,
    source: Annotated[Path, typer.Argument(metavar="IN.jsonl", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl")],
    *,
    endpoint: Annotated[str, typer.Option(help="For plain lines; left out if the deployment has only one.")] = "",
    retries: Annotated[int, typer.Option(help="Further attempts of a line.", min=0, max=100)] = 5,
    concurrency: Annotated[int, typer.Option(help="Lines at once at most.", min=1, max=10_000)] = 256,
    order: Annotated[Order, typer.Option(help="Order of the result's lines.")] = Order.INPUT,
    timeout_s: Annotated[
        float, typer.Option(help="Longest attempt, with its wait for a replica.", min=0.1)
    ] = 3_600.0,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run lines that failed once more.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew; forget what is there.")] = False,
    gateway: Annotated[str, typer.Option(envvar="SNOWDROP_GATEWAY", help="URL; left out: this platform's.")] = "",
    key: Annotated[str | None, typer.Option(envvar="SNOWDROP_KEY", help="API key.")] = None,
    json: JsonFlag = False,
) -> None:
    """Send each line of a file to a deployment, and write each answer to another.

    Lines are in the form of OpenAI's batches (custom_id, method, url, body), or each is a body. Broken off, the
    same command goes on where it was. It fails if a line failed; the result says which.
    """
    from snowdrop.cli.batch_run import BatchTarget, find_endpoint  # noqa: PLC0415 -- only batches need it

    with reported():
        ctx = context(json=json)
        url = (gateway or ctx.client.get(Info, "info").gateway_url).rstrip("/")
        parse_name(deployment, what="deployment name")
        _check_files(source, out)
        total, plain = _count(source)
        if plain and not endpoint:
            endpoint = anyio.run(find_endpoint, url, deployment, key)
        endpoint = f"/{endpoint.lstrip('/')}"
        header = header_of(source, deployment=deployment, endpoint=endpoint if plain else "")
        journal = open_journal(out, header, again=retry_failed, overwrite=overwrite)
        target = BatchTarget(
            gateway_url=url,
            deployment=deployment,
            endpoint=endpoint,
            key=key,
            retries=retries,
            most=concurrency,
            timeout_s=timeout_s,
        )
        _run(ctx, target, journal, (source, out, total), order)
        if not all(journal.done.values()):
            raise typer.Exit(1)


def _run(ctx: Context, target: BatchTarget, journal: Journal, files: tuple[Path, Path, int], order: Order) -> None:
    from snowdrop.cli.batch_run import Batch  # noqa: PLC0415 -- only batches need it

    source, out, total = files
    began_s, before = time.monotonic(), len(journal.done)
    try:
        with _Bar(total, journal, quiet=ctx.json) as bar:
            made = Batch(target, journal, bar.told)
            bar.follow(made)
            anyio.run(made.run, read_lines(source))
        journal.finish(order.value)
    except KeyboardInterrupt:
        errors.print(f"broken off after {len(journal.done)} of {total} lines; the same command goes on")
        raise
    finally:
        journal.close()
    _summary(ctx, journal, out, lasted_s=time.monotonic() - began_s, before=before)


def _check_files(source: Path, out: Path) -> None:
    if out.exists() and out.samefile(source):
        raise InvalidInputError("the result would overwrite the input", where=str(out))
    if not out.parent.is_dir():
        raise InvalidInputError(f"there is no folder {out.parent}", where=str(out), next_step="make it first")


def _count(source: Path) -> tuple[int, bool]:
    """Lines, and whether any of them is a plain body."""
    total, plain = 0, False
    for line in read_lines(source):
        total += 1
        plain = plain or not (line.is_openai or line.problem)
    return total, plain


def _summary(ctx: Context, journal: Journal, out: Path, *, lasted_s: float, before: int) -> None:
    failed = sum(1 for ok in journal.done.values() if not ok)
    done = len(journal.done)
    rate = (done - before) / max(lasted_s, 1e-3)
    if ctx.json:
        say_json({"lines": done, "failed": failed, "resumed": before, "seconds": lasted_s, "out": str(out)})
        return
    console.print(f"{done} lines, {failed} failed, {rate:.1f} a second: {out}", soft_wrap=True)
    if failed:
        errors.print(f'  next:  look for "error" in {out}; --retry-failed runs those again', soft_wrap=True)


class _Bar:
    """Lines, errors, rate and time left, on standard error."""

    def __init__(self, total: int, journal: Journal, *, quiet: bool) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[more]}"),
            console=errors,
            disable=quiet,
        )
        self._total = total
        self._done = len(journal.done)
        self._failed = sum(1 for ok in journal.done.values() if not ok)
        self._began_s = time.monotonic()
        self._here = 0
        self._task = TaskID(0)
        self._followed: Batch | None = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        self._task = self._progress.add_task("lines", total=self._total, completed=self._done, rate="", more="")
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def follow(self, followed: Batch) -> None:
        """Whose lines are shown."""
        self._followed = followed

    def told(self, ok: bool) -> None:
        """One more line is done."""
        self._here += 1
        self._failed += not ok
        lasted_s = time.monotonic() - self._began_s
        rate = f"{self._here / lasted_s:.1f}/s" if lasted_s > RATE_S_MIN else ""
        at_once = self._followed.at_once if self._followed is not None else 0
        more = f"{at_once} at once" + (f", {self._failed} failed" if self._failed else "")
        self._progress.update(self._task, advance=1, rate=rate, more=more)
