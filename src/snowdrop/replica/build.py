"""From a spec to what serves it."""

from __future__ import annotations

from pathlib import Path

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.service import ServiceSpec
from snowdrop.replica.servable import Servable


def build_servable(spec: ServiceSpec, deployment: str, code_directory: Path) -> Servable:
    """The service of `spec`, imported from its code but not started.

    Raises InvalidInputError if the code lacks what the spec names; what importing it raises passes through.
    """
    # Each kind loads what it alone needs: a cold start pays for every import.
    if spec.command is not None:
        from snowdrop.replica.command import CommandService  # noqa: PLC0415

        return CommandService(spec, spec.command, deployment, code_directory)
    if spec.asgi is not None:
        from snowdrop.replica.asgi import AsgiService  # noqa: PLC0415
        from snowdrop.replica.load import load_object  # noqa: PLC0415

        target = getattr(load_object(spec.entry, code_directory), "app", None)
        if not callable(target):
            raise InvalidInputError(
                f"{spec.entry} holds no ASGI app", where=spec.entry, next_step="deploy the service again"
            )
        return AsgiService(spec, spec.asgi, target)
    from snowdrop.replica.app import build_service  # noqa: PLC0415
    from snowdrop.replica.load import load_class  # noqa: PLC0415

    return build_service(load_class(spec.entry, code_directory), spec)
