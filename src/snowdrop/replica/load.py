"""Imports the service's class from its packed code."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from snowdrop.domain.errors import InvalidInputError


def load_class(entry: str, code_directory: Path) -> type:
    """The class named by `module:Class` in `code_directory`. Raises as `load_object`."""
    found = load_object(entry, code_directory)
    if not isinstance(found, type):
        raise InvalidInputError(f"{entry} is no class", where=entry, next_step="deploy the service again")
    return found


def load_object(entry: str, code_directory: Path) -> object:
    """What `module:name` names in `code_directory`, which goes first on the import path.

    Raises InvalidInputError if there is nothing; whatever the module itself raises passes through.
    """
    module_name, _, class_name = entry.partition(":")
    folder = str(code_directory)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.import_module(module_name)
    file = getattr(module, "__file__", None)
    if file is None or not Path(file).resolve().is_relative_to(code_directory.resolve()):
        raise InvalidInputError(
            f"the module name {module_name!r} is taken by {file or 'a built-in module'}",
            where=entry,
            next_step="give the service's file another name",
        )
    found: object = module
    for part in class_name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise InvalidInputError(
            f"{module_name} has no class {class_name!r}", where=entry, next_step="deploy the service again"
        )
    return found
