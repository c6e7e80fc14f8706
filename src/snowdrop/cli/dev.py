"""`dev`: a service without the platform, for debugging."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snowdrop.cli.output import reported
from snowdrop.domain.errors import InvalidInputError


def read_refs(pairs: list[str]) -> dict[str, str]:
    """Addresses by name. Raises InvalidInputError."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, url = pair.partition("=")
        if not equals or not url.startswith(("http://", "https://")):
            raise InvalidInputError(
                f"{pair!r} is not NAME=URL",
                where="--ref",
                next_step="as in `--ref embed=http://127.0.0.1:8080/embed`",
            )
        found[name] = url
    return found


def dev(  # noqa: PLR0917 -- one parameter for each option
    target: Annotated[str, typer.Argument(help="service.py, or service.py:Class.")],
    model: Annotated[list[str] | None, typer.Option(help="NAME=DIRECTORY of a model; may be repeated.")] = None,
    ref: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL of a service that this one calls; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option()] = 8000,
    reload: Annotated[bool, typer.Option(help="Restart when the code changes.")] = True,
) -> None:
    """Serve a service in the foreground without the platform, reloading it when its code changes."""
    from snowdrop.sdk.dev import run_dev  # noqa: PLC0415 -- loads the server only for this command

    with reported():
        file, _, class_name = target.partition(":")
        models: dict[str, Path] = {}
        for pair in model or []:
            name, equals, directory = pair.partition("=")
            if not equals:
                raise InvalidInputError(f"{pair!r} is not NAME=DIRECTORY", where="--model")
            models[name] = Path(directory)
        run_dev(Path(file), class_name or None, host, port, models, reload, read_refs(ref or []))
