"""Importing a service file and finding its service class; runs only in a process that may run user code."""

import importlib
import sys
import traceback
from pathlib import Path

import msgspec

from snowdrop.domain.errors import InvalidInputError, NotFoundError, SnowdropError, UserCodeError
from snowdrop.domain.service import ServiceSpec
from snowdrop.sdk.schema import complete_spec, spec_of, with_calls
from snowdrop.sdk.servers import ServedApp

MESSAGE_CHARS_MAX = 2_000

Declared = type | ServedApp
"""What declares a service in a module."""

USER_RAISED = (Exception, SystemExit)
"""What importing user code may raise that is its own fault."""


def split_target(target: str) -> tuple[Path, str | None]:
    """`FILE` or `FILE:Class`."""
    file, colon, name = target.rpartition(":")
    if colon and file and name.isidentifier():
        return Path(file), name
    return Path(target), None


def check_file(file: Path) -> Path:
    """The absolute path of a service file. Raises NotFoundError or InvalidInputError."""
    path = file.absolute()
    if not path.is_file():
        raise NotFoundError(
            f"there is no service file {file}",
            where=str(file),
            next_step="name a Python file with a service class",
        )
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise InvalidInputError(
            f"{path.name} cannot be imported as a module",
            where=str(file),
            next_step="name it like a Python module, as in service.py",
        )
    if path.stem in sys.stdlib_module_names or path.stem == "snowdrop":
        raise InvalidInputError(
            f"{path.name} has the name of another module, {path.stem!r}",
            where=str(file),
            next_step="rename it, for example to service.py",
        )
    return path


def load_service(file: Path, class_name: str | None) -> tuple[Declared, ServiceSpec]:
    """Imports `file` and gives what declares its service, with the complete spec, `entry` set to `module:Class`.

    That is a class, or what `sd.command` or `sd.asgi` returned, which goes by its variable's name.

    Puts the file's folder first on the module path. Raises NotFoundError, InvalidInputError, or UserCodeError
    chained to what the user's code raised.
    """
    path = check_file(file)
    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except SnowdropError:
        raise
    except USER_RAISED as error:
        raise import_error(error, path) from error
    name, found = _choose(vars(module), path, class_name)
    if isinstance(found, ServedApp):
        served = msgspec.structs.replace(found.spec, class_name=name, entry=f"{path.stem}:{name}")
        # A command is a program of its own: what its module refers to, it can't call.
        return found, served if found.app is None else with_calls(served, vars(module).values())
    spec = spec_of(found)
    assert spec is not None, "_choose gives service classes alone"
    entry = f"{path.stem}:{class_name or found.__name__}"
    return found, msgspec.structs.replace(complete_spec(found, spec), entry=entry)


def import_error(error: BaseException, path: Path) -> SnowdropError:
    """What the import of the service file at `path` raised, with the place in the user's own code."""
    text = f"{type(error).__name__}: {error}".removesuffix(": ")[:MESSAGE_CHARS_MAX]
    if isinstance(error, SyntaxError) and error.filename:
        text = f"{type(error).__name__}: {error.msg}"
        return InvalidInputError(
            text, where=f"{_short(error.filename, path.parent)}:{error.lineno}", next_step="correct this line"
        )
    step = f"correct it; `snowdrop dev {path.name}` shows the whole traceback"
    if isinstance(error, ModuleNotFoundError):
        step = f"install {error.name!r} in this environment and list it in the service's requirements"
    return UserCodeError(text, where=place_of(error, path.parent), next_step=step)


def place_of(error: BaseException, folder: Path) -> str:
    """`file.py:line` of the innermost frame below `folder`; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    return f"{_short(own[-1].filename, folder)}:{own[-1].lineno}" if own else ""


def _short(filename: str, folder: Path) -> str:
    path = Path(filename)
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else filename


def _choose(names: dict[str, object], path: Path, class_name: str | None) -> tuple[str, Declared]:
    """The service by the name that it goes by in its module."""
    services: dict[str, Declared] = {
        name: value
        for name, value in names.items()
        if isinstance(value, ServedApp) or (isinstance(value, type) and spec_of(value))
    }
    own = {
        name if isinstance(value, ServedApp) else value.__name__: value
        for name, value in services.items()
        if isinstance(value, ServedApp) or value.__module__ == path.stem
    }
    if class_name is not None:
        if class_name in services:
            return class_name, services[class_name]
        raise InvalidInputError(
            f"{path.name} has no service class {class_name!r}",
            where=path.name,
            next_step=f"it has: {', '.join(sorted(services)) or 'none'}",
        )
    if not own:
        raise InvalidInputError(
            f"{path.name} has no service class",
            where=path.name,
            next_step="decorate one class with `@sd.service(...)`, or assign `sd.command(...)` or `sd.asgi(app)`",
        )
    if len(own) > 1:
        raise InvalidInputError(
            f"{path.name} has several services: {', '.join(sorted(own))}",
            where=path.name,
            next_step=f"name one, as in {path.name}:{min(own)}",
        )
    return next(iter(own.items()))
