"""Settings from four places, later ones winning: defaults, the TOML file, the environment, flags.

A setting `gateway.port` is `port` in the table `[gateway]`, SNOWDROP_GATEWAY_PORT in the environment.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import platformdirs

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.settings import Settings

ENV_PREFIX = "SNOWDROP_"


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """Settings and, for each dotted name, where its value came from."""

    settings: Settings
    sources: dict[str, str]

    def rows(self) -> list[tuple[str, str, str]]:
        """(name, value, source) for every setting."""
        values = flatten(msgspec.to_builtins(self.settings))
        return [(name, str(value), self.sources.get(name, "default")) for name, value in values.items()]


def default_state() -> Path:
    """The platform's usual place for a user's data."""
    return Path(platformdirs.user_data_dir("snowdrop", appauthor=False))


def resolve(
    flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, config: Path | None = None
) -> Resolved:
    """Reads all four places. Raises InvalidInputError naming the setting and the place it came from.

    `flags` maps dotted names to values; those that are None were not given.
    """
    names = flatten(msgspec.to_builtins(Settings()))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    given = {name: value for name, value in flags.items() if value is not None}
    chosen = config or (Path(environ["SNOWDROP_CONFIG"]) if "SNOWDROP_CONFIG" in environ else None)
    file_values = flatten(_read_file(chosen, required=True)) if chosen else {}
    state = given.get("state") or environ.get("SNOWDROP_STATE") or file_values.get("state") or default_state()
    layout = StateLayout(Path(state).expanduser().absolute())
    if chosen is None:
        file_values = flatten(_read_file(layout.config, required=False))
        if "state" in file_values:
            raise InvalidInputError(
                "a settings file inside the state folder cannot say where that folder is",
                where=str(layout.config),
                next_step="use --state or SNOWDROP_STATE, or name the file with --config",
            )
    for name, value in file_values.items():
        values[name], sources[name] = value, str(chosen or layout.config)
    for name in names:
        variable = ENV_PREFIX + name.replace(".", "_").upper()
        if variable in environ:
            values[name], sources[name] = environ[variable], variable
    for name, value in given.items():
        values[name], sources[name] = value, "flag"
    values["state"] = str(layout.root)
    if not values.get("content.origin_url"):
        values["content.origin_url"] = layout.origin.as_uri()
        sources["content.origin_url"] = "state folder"
    return Resolved(settings=_convert(values, sources, names), sources=sources)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _read_file(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        if required:
            raise InvalidInputError("there is no such settings file", where=str(path)) from error
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"not TOML: {error}", where=str(path)) from error


def _convert(values: dict[str, Any], sources: dict[str, str], names: dict[str, Any]) -> Settings:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        if name not in names:
            raise InvalidInputError(
                f"there is no setting {name!r}",
                where=sources.get(name, ""),
                next_step="`snowdrop config` lists all settings",
            )
        group, _, key = name.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[key] = value
        try:
            # One at a time, so that the error can name the setting and where it came from.
            msgspec.convert({group: {key: value}} if group else {key: value}, Settings, strict=False)
        except msgspec.ValidationError as error:
            raise InvalidInputError(
                f"setting {name} = {value!r}: {str(error).split(' - at')[0]}", where=sources.get(name, "")
            ) from error
    return msgspec.convert(tree, Settings, strict=False)
