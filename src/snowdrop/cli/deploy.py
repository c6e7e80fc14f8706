"""`deploy`: from a file with a service to a deployment that serves it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from snowdrop.cli.output import JsonFlag, console, context, errors, human_bytes, reported, say_json
from snowdrop.cli.publishing import publish_revision
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.ids import parse_name
from snowdrop.domain.rollout import RolloutStep, parse_steps
from snowdrop.domain.service import ServiceSpec
from snowdrop.sdk.environment import check_requirements
from snowdrop.sdk.inspect import describe_service


def deploy(  # noqa: PLR0917 -- the options of `snowdrop deploy`
    target: Annotated[str, typer.Argument(help="service.py, or service.py:Class if there are several.")],
    name: Annotated[str | None, typer.Option(help="Name of the deployment; the class's by default.")] = None,
    canary: Annotated[
        str | None, typer.Option(help="Steps of traffic, as 5%:10m,25%:10m:500,50%:hold (PERCENT:TIME:ANSWERS).")
    ] = None,
    preview: Annotated[bool, typer.Option(help="Only requests that name the new revision reach it.")] = False,
    env: Annotated[list[str] | None, typer.Option(help="K=V: an environment variable, not secret.")] = None,
    json: JsonFlag = False,
) -> None:
    """Pack a service's code, make a revision of it, and serve it under its name."""
    with reported():
        ctx = context(json=json)
        file, _, class_name = target.partition(":")
        spec = describe_service(Path(file), class_name or None)
        spec = _with_options(spec, canary, env or [], preview=preview)
        _check_environment(spec)
        chosen = parse_name(_dashed(spec.class_name) if name is None else name, what="deployment name")
        folder = Path(file).resolve().parent
        deployed, code = publish_revision(ctx, chosen, spec, folder)
        if ctx.json:
            say_json(deployed)
            return
        verb = "deployed" if deployed.created else "updated"
        code_bytes = human_bytes(code.artefact.total_bytes)
        console.print(
            f"{verb} {chosen}: revision {deployed.revision}, {code.artefact.file_count} files, {code_bytes}"
        )
        for endpoint in spec.endpoints:
            console.print(f"  {deployed.url}{endpoint.path}")
        if not spec.endpoints:
            console.print(f"  {deployed.url}/")
        if spec.openai_paths:
            console.print(f"  model {chosen} at {deployed.url.rsplit('/', 1)[0]}/v1 for OpenAI's clients")
        if not deployed.created:
            console.print(f"  it takes over when it is ready: snowdrop rollout status {chosen}", style="dim")
        if spec.endpoints:
            console.print(f"  next: snowdrop call {chosen}{_example(spec)}", style="dim")


def _with_options(spec: ServiceSpec, canary: str | None, env: list[str], *, preview: bool) -> ServiceSpec:
    """What the command line says beside the code."""
    if canary is not None and preview:
        raise InvalidInputError("--canary and --preview cannot both be", where="--preview")
    rollout = spec.rollout
    if canary is not None:
        rollout = msgspec.structs.replace(rollout, steps=parse_steps(canary))
    if preview:
        rollout = msgspec.structs.replace(rollout, steps=(RolloutStep(weight=0.0, s=0.0, hold=True),))
    variables = dict(spec.env)
    for word in env:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InvalidInputError(f"{word!r} is not K=V", where="--env", next_step="write it as --env MODE=fast")
        variables[key] = value
    return msgspec.structs.replace(spec, rollout=rollout, env=variables)


def _check_environment(spec: ServiceSpec) -> None:
    """Refuses a service whose requirements the replicas' environment does not meet: images come later."""
    missing = check_requirements(spec.image.requirements)
    if missing:
        raise InvalidInputError(
            "replicas run in this environment, which lacks what the service requires",
            where=sys.prefix,
            next_step="pip install " + " ".join(f"'{each.requirement}'" for each in missing),
            fields=[{"field": each.requirement, "problem": each.found or "not installed"} for each in missing],
        )
    if lacking := only_in_the_image(spec):
        errors.print(f"replicas run in this environment, not in an image yet; they will not find {lacking}")


def only_in_the_image(spec: ServiceSpec) -> str:
    """What `image build` puts into the image beside packages for Python, and replicas do not have."""
    packages = [f"Debian's {package}" for package in spec.image.apt_packages]
    return ", ".join((*(copy.target for copy in spec.image.copies), *packages))


def _dashed(class_name: str) -> str:
    """`ImageSearch` as `image-search`."""
    spaced = "".join(f"-{c.lower()}" if c.isupper() else c for c in class_name.replace("_", "-"))
    return spaced.strip("-")


def _example(spec: ServiceSpec) -> str:
    if not spec.endpoints:
        return ""
    endpoint = spec.endpoints[0]
    path = endpoint.path if len(spec.endpoints) > 1 else ""
    names = endpoint.input_schema.get("properties", {})
    fields = ", ".join(f'"{name}": ...' for name in names)
    return f"{path} '{{{fields}}}'" if fields else path
