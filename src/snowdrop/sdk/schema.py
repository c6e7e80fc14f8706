"""From a decorated class to its ServiceSpec: finds the marked methods, checks them, makes the schemas."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from snowdrop.domain.batched import client_signature
from snowdrop.domain.batching import Batch
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.servers import OPENAI_PATHS
from snowdrop.domain.service import (
    CONCURRENCY_MAX,
    SERVICE_ATTRIBUTE,
    STAGE_ATTRIBUTE,
    EndpointSpec,
    Model,
    ServiceSpec,
)
from snowdrop.domain.signature import (
    Schemas,
    Signature,
    UnresolvedNameError,
    check_annotated,
    check_parameters,
    endpoint_schemas,
)
from snowdrop.domain.whole_body import check_whole_body
from snowdrop.sdk.ref import name_of_ref

RESERVED_PREFIX = "/-/"
"""Paths of the platform itself, on replicas and at the gateway."""

Method = Callable[..., Any]


Mark = tuple[str] | tuple[str, str] | tuple[str, str, Batch]
"""What a method decorator leaves: ("startup",), ("shutdown",), ("endpoint", path) or ("endpoint", path, batch)."""


def build_spec(cls: type, models: Sequence[Model], options: Mapping[str, Any]) -> ServiceSpec:
    """The spec of `cls`; `options` are fields of ServiceSpec. Raises InvalidInputError naming class and method.

    Schemas stay empty when an annotation can't be resolved yet (the class is still being defined, or names a type
    further down in its file); `complete_spec` makes them once the module is loaded.
    """
    _check_constructor(cls)
    endpoints, startup, shutdown = _find_marked(cls)
    if not endpoints:
        raise InvalidInputError(
            f"{cls.__name__} has no endpoint",
            where=cls.__name__,
            next_step='mark a method with `@sd.endpoint("/path")`',
        )
    specs = tuple(_endpoint_spec(cls, path, method) for path, method in endpoints.items())
    spec = ServiceSpec(
        class_name=cls.__name__,
        entry=f"{cls.__module__}:{cls.__qualname__}",
        models=_bind_models(cls, _distinct(cls, models), startup),
        startup_name=startup.__name__ if startup else None,
        shutdown_name=shutdown.__name__ if shutdown else None,
        endpoints=specs,
        **_with_room_for_batches(cls, specs, options),
    )
    spec = _with_calls(cls, spec)
    try:
        return complete_spec(cls, spec)
    except UnresolvedNameError:
        return spec


def complete_spec(cls: type, spec: ServiceSpec) -> ServiceSpec:
    """`spec` with the schemas of its endpoints, forward references resolved. Raises InvalidInputError."""
    signatures = [
        client_signature(
            getattr(cls, endpoint.method_name), f"{cls.__name__}.{endpoint.method_name}", endpoint.batch
        )
        for endpoint in spec.endpoints
    ]
    made = endpoint_schemas(signatures)
    endpoints = tuple(
        msgspec.structs.replace(
            endpoint,
            stream=signature.stream,
            is_async=signature.on_loop,
            input_schema=_input_schema(endpoint, signature, schemas),
            output_schema=schemas.output_schema,
            components=schemas.components,
        )
        for endpoint, signature, schemas in zip(spec.endpoints, signatures, made, strict=True)
    )
    # Once more: a module may name a reference below the class.
    return _with_calls(cls, msgspec.structs.replace(spec, endpoints=endpoints))


def _with_calls(cls: type, spec: ServiceSpec) -> ServiceSpec:
    """`spec` with the deployments that `cls` and its module have references of."""
    values = [value for owner in cls.__mro__ for value in vars(owner).values()]
    values += vars(sys.modules.get(cls.__module__, sys)).values() if cls.__module__ != "builtins" else []
    return with_calls(spec, values)


def with_calls(spec: ServiceSpec, values: Iterable[object]) -> ServiceSpec:
    """`spec` with the deployments that there are references of among `values`."""
    names = {name for name in map(name_of_ref, values) if name}
    return msgspec.structs.replace(spec, calls=tuple(sorted({*spec.calls, *names})))


def _input_schema(endpoint: EndpointSpec, signature: Signature, schemas: Schemas) -> dict[str, Any]:
    """Where OpenAI's dialect is spoken the whole body is the only parameter."""
    if endpoint.path not in OPENAI_PATHS:
        return schemas.input_schema
    check_whole_body(signature)
    schema: dict[str, Any] = schemas.input_schema["properties"][signature.parameters[0].name]
    return schema


def spec_of(cls: type) -> ServiceSpec | None:
    """The spec that the decorator left on exactly this class, if it did."""
    spec = vars(cls).get(SERVICE_ATTRIBUTE)
    return spec if isinstance(spec, ServiceSpec) else None


def _marked_methods(cls: type) -> Iterator[tuple[Method, Mark]]:
    seen: set[str] = set()
    for owner in cls.__mro__:
        for name, value in vars(owner).items():
            if name in seen:
                continue
            seen.add(name)
            mark = getattr(value, STAGE_ATTRIBUTE, None)
            if not isinstance(mark, tuple):
                continue
            if isinstance(value, staticmethod | classmethod) or not inspect.isfunction(value):
                raise InvalidInputError(
                    f"{cls.__name__}.{name} is marked `{mark[0]}` but is no plain method",
                    where=f"{cls.__name__}.{name}",
                    next_step="make it a method with `self`, and the mark its outermost decorator",
                )
            yield value, mark


def _find_marked(cls: type) -> tuple[dict[str, Method], Method | None, Method | None]:
    endpoints: dict[str, Method] = {}
    stages: dict[str, Method] = {}
    for method, mark in _marked_methods(cls):
        where = f"{cls.__name__}.{method.__name__}"
        if len(mark) > 1:
            path = mark[1]
            if path in endpoints:
                raise InvalidInputError(
                    f"{where} and {cls.__name__}.{endpoints[path].__name__} both answer {path}",
                    where=where,
                    next_step="give each endpoint its own path",
                )
            endpoints[path] = method
        elif mark[0] in stages:
            raise InvalidInputError(
                f"{where} is a second `{mark[0]}` beside {stages[mark[0]].__name__}",
                where=where,
                next_step="call one from the other",
            )
        else:
            stages[mark[0]] = method
    shutdown = stages.get("shutdown")
    if shutdown is not None and check_parameters(shutdown, f"{cls.__name__}.{shutdown.__name__}"):
        raise InvalidInputError(
            f"{cls.__name__}.{shutdown.__name__} takes parameters",
            where=f"{cls.__name__}.{shutdown.__name__}",
            next_step="a shutdown method takes `self` alone",
        )
    return endpoints, stages.get("startup"), shutdown


def check_path(path: str, where: str) -> None:
    """Raises InvalidInputError unless `path` can be an endpoint's."""
    problem = ""
    if not path.startswith("/"):
        problem, step = "does not begin with a slash", f'write "/{path}"'
    elif path.startswith(RESERVED_PREFIX) or path == RESERVED_PREFIX.rstrip("/"):
        problem, step = f"lies under {RESERVED_PREFIX}, which the platform keeps for itself", "choose another path"
    elif any(mark in path for mark in "?#{} \t\r\n"):
        problem, step = "has a query, a fragment, a pattern or a blank", "use a plain path as in /embed"
    if problem:
        raise InvalidInputError(f"the path {path!r} of {where} {problem}", where=where, next_step=step)


def _check_constructor(cls: type) -> None:
    try:
        parameters = inspect.signature(cls).parameters.values()
    except ValueError:  # a base class in C that does not say what it takes
        return
    for parameter in parameters:
        variadic = parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if parameter.default is inspect.Parameter.empty and not variadic:
            raise InvalidInputError(
                f"{cls.__name__}.__init__ needs the argument `{parameter.name}`, and nobody gives it",
                where=f"{cls.__name__}.__init__({parameter.name})",
                next_step="give it a default, or do the work in a `@sd.startup` method",
            )


def _endpoint_spec(cls: type, path: str, method: Method) -> EndpointSpec:
    where = f"{cls.__name__}.{method.__name__}"
    check_path(path, where)
    check_annotated(method, where)
    mark: Mark = getattr(method, STAGE_ATTRIBUTE)
    batch = mark[2] if len(mark) > 2 else None
    return EndpointSpec(path=path, method_name=method.__name__, doc=inspect.getdoc(method) or "", batch=batch)


def _with_room_for_batches(
    cls: type, endpoints: Sequence[EndpointSpec], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """`options` with a `concurrency` that lets batches fill. Raises InvalidInputError if the given one cannot.

    Each request of a batch counts, those that run and those that gather meanwhile.
    """
    sizes = {each.method_name: each.batch.size_max for each in endpoints if each.batch is not None}
    if not sizes:
        return options
    if "concurrency" not in options:
        rooms = [
            each.batch.size_max * (each.batch.in_flight_max + 1) for each in endpoints if each.batch is not None
        ]
        return {**options, "concurrency": min(max(rooms), CONCURRENCY_MAX)}
    name = max(sizes, key=lambda each: sizes[each])
    if options["concurrency"] < sizes[name]:
        raise InvalidInputError(
            f"no batch of {cls.__name__}.{name} can ever be full: `concurrency` lets in {options['concurrency']} "
            f"requests at a time, `size_max` is {sizes[name]}",
            where=f"{cls.__name__}.{name}",
            next_step=f"set it to {2 * sizes[name]} or more, drop it (it then follows from the batch), or lower "
            "`size_max`",
        )
    return options


def _distinct(cls: type, models: Sequence[Model]) -> tuple[Model, ...]:
    params = [model.param for model in models]
    for model in models:
        if params.count(model.param) > 1:
            raise InvalidInputError(
                f"several models of {cls.__name__} go to the startup parameter `{model.param}`",
                where=f"{cls.__name__}: {model.name}",
                next_step='name one each, as in `models={"encoder": sd.Model("a"), "ranker": sd.Model("b")}`',
            )
    return tuple(models)


def _bind_models(cls: type, models: tuple[Model, ...], startup: Method | None) -> tuple[Model, ...]:
    """Models by startup parameter; a single model goes to the single parameter, whatever its name.

    Looks at names alone: the annotations may name types whose module is costly to import.
    """
    if startup is None:
        if models:
            raise InvalidInputError(
                f"{cls.__name__} has the model {models[0].name!r} but no startup method to take it",
                where=cls.__name__,
                next_step=f"add `@sd.startup` above `def load(self, {models[0].param}: sd.LoadedModel) -> None:`",
            )
        return models
    where = f"{cls.__name__}.{startup.__name__}"
    parameters = check_parameters(startup, where)
    if len(models) == len(parameters) == 1 and models[0].param == "model":
        return (msgspec.structs.replace(models[0], param=parameters[0].name),)
    known = {model.param for model in models}
    for parameter in parameters:
        if parameter.name not in known and parameter.default is inspect.Parameter.empty:
            raise InvalidInputError(
                f"{where} has the parameter `{parameter.name}`, but the service has no model of that name",
                where=f"{where}({parameter.name})",
                next_step=f'add `models={{"{parameter.name}": sd.Model("...")}}` to `@sd.service`, or drop it',
            )
    taken = {parameter.name for parameter in parameters}
    for model in models:
        if model.param not in taken:
            raise InvalidInputError(
                f"{where} has no parameter `{model.param}` for the model {model.name!r}",
                where=where,
                next_step=f"add `{model.param}: sd.LoadedModel` to it",
            )
    return models
