"""What every command shares: tables or JSON, errors on stderr with the next step, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from snowdrop.cli.client import Client
from snowdrop.cli.settings_file import Resolved, resolve
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.ids import parse_name
from snowdrop.domain.layout import StateLayout

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2

JsonFlag = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """The options that stand before every command."""

    resolved: Resolved
    layout: StateLayout
    tenant: str
    json: bool

    @property
    def client(self) -> Client:
        return Client(self.layout, self.tenant)


class Globals:
    """Filled by the root callback; a command asks `context` for it with its own --json folded in."""

    state: str | None = None
    config: Path | None = None
    tenant: str = "default"
    json: bool = False


def context(*, json: bool = False, flags: dict[str, Any] | None = None) -> Context:
    """Reads the settings once a command needs them, so that `--help` works with a broken file."""
    resolved = resolve({"state": Globals.state, **(flags or {})}, config=Globals.config)
    layout = StateLayout(Path(resolved.settings.state))
    parse_name(Globals.tenant, what="tenant")
    return Context(resolved=resolved, layout=layout, tenant=Globals.tenant, json=json or Globals.json)


def say_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n")


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table; numbers are given as columns that start with `#`."""
    made = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for place, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if column.startswith("#") else "left"
        # Names stay whole in a narrow terminal, so that they can be copied; the rest folds.
        made.add_column(column.removeprefix("#"), justify=justify, no_wrap=place == 0)
    return made


@contextmanager
def reported() -> Iterator[None]:
    """Turns typed errors into a message for people, or JSON, and an exit code."""
    try:
        try:
            yield
        except OSError as error:
            raise _system_error(error) from error
    except SnowdropError as error:
        if Globals.json or "--json" in sys.argv:
            sys.stdout.write(msgspec.json.encode({"error": error.body()}).decode() + "\n")
        else:
            print_error(error)
        raise typer.Exit(EXIT_BAD_INPUT if error.http_status in {404, 409, 422} else EXIT_FAILED) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(EXIT_FAILED) from error


def _system_error(error: OSError) -> Exception:
    """What the system refused, as an error for people; a closed pipe only ends the command."""
    if isinstance(error, BrokenPipeError):
        return typer.Exit(EXIT_FAILED)
    return SnowdropError(
        f"the system refused: {error.strerror or error}",
        where=str(error.filename or ""),
        next_step="check the path, its owner and its disk",
    )


def print_error(error: SnowdropError) -> None:
    errors.print(Text.assemble(("error: ", "bold red"), error.message))
    if error.where:
        errors.print(Text(f"  where: {error.where}", style="dim"))
    for field in error.fields:
        errors.print(Text(f"  {field.get('field', '')}: {field.get('problem', '')}"))
    if error.next_step:
        errors.print(Text.assemble(("  next:  ", "bold"), error.next_step))


def human_bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_ns(duration_ns: float) -> str:
    if abs(duration_ns) < 1e9:
        return f"{duration_ns / 1e6:.1f} ms"
    return f"{duration_ns / 1e9:.2f} s"


def human_age(now_unix_ns: int, then_unix_ns: int) -> str:
    seconds = max(0, (now_unix_ns - then_unix_ns) // 1_000_000_000)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
