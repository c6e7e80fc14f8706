"""An endpoint method's signature: what it takes, what it returns, and how requests are held against it.

The SDK makes schemas from it at deploy time; the replica validates requests with it. Both get their rules from
here, so that a request that fits the published schema is never refused, and the other way round.
"""

import collections.abc
import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from snowdrop.domain.errors import InvalidInputError

FIELDS_REPORTED_MAX = 32
"""Most problems named in one refusal."""
SCHEMA_REF = "#/components/schemas/{name}"

StreamKind = Literal["no", "sse", "chunked"]

_ASYNC_STREAMS = (collections.abc.AsyncIterator, collections.abc.AsyncGenerator, collections.abc.AsyncIterable)
_SYNC_STREAMS = (collections.abc.Iterator, collections.abc.Generator)
_MANY = (list, tuple, set, frozenset, collections.abc.Sequence, collections.abc.Collection)
_PLACE = re.compile(r" - at (?:`(?P<part>key|tag)` in )?`\$(?P<path>[^`]*)`$")
_NAMED_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class UnresolvedNameError(InvalidInputError):
    """An annotation names something that does not exist (yet): a forward reference at decoration time."""

    kind = "unresolved_name"


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """One argument of an endpoint. `default` is msgspec.NODEFAULT where the request must have it."""

    name: str
    annotation: Any
    default: Any = msgspec.NODEFAULT

    @property
    def required(self) -> bool:
        return self.default is msgspec.NODEFAULT


class Signature(msgspec.Struct, frozen=True, kw_only=True):
    """`returns` is the type of the answer, or of one item where the endpoint streams."""

    where: str
    parameters: tuple[Parameter, ...]
    returns: Any
    stream: StreamKind
    on_loop: bool


class Schemas(msgspec.Struct, frozen=True, kw_only=True):
    """JSON Schemas of one endpoint; `components` holds what their references name."""

    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    components: dict[str, Any]


def check_parameters(function: Callable[..., object], where: str) -> tuple[inspect.Parameter, ...]:
    """The parameters after `self`; raises InvalidInputError for those that no JSON object can fill."""
    parameters = tuple(inspect.signature(function).parameters.values())
    if not parameters:
        raise InvalidInputError(f"{where} takes no `self`", where=where, next_step="make it a plain method")
    for parameter in parameters[1:]:
        if parameter.kind not in _NAMED_KINDS:
            raise InvalidInputError(
                f"{where} has the parameter `{parameter}`, which a request can't fill by name",
                where=f"{where}({parameter.name})",
                next_step="replace it with named parameters, or with one `dict[str, T]`",
            )
    return parameters[1:]


def check_annotated(function: Callable[..., object], where: str) -> None:
    """Raises InvalidInputError unless every parameter and the return value are annotated."""
    for parameter in check_parameters(function, where):
        if parameter.annotation is inspect.Parameter.empty:
            raise InvalidInputError(
                f"{where} has no annotation for its parameter `{parameter.name}`",
                where=f"{where}({parameter.name})",
                next_step=f"say its type, as in `{parameter.name}: str`",
            )
    if inspect.signature(function).return_annotation is inspect.Signature.empty:
        raise InvalidInputError(
            f"{where} has no return annotation",
            where=where,
            next_step="say what it returns, as in `-> dict[str, float]`, or `-> AsyncIterator[str]` to stream",
        )


def read_signature(
    function: Callable[..., object], where: str, shape: Callable[[Signature], Signature] | None = None
) -> Signature:
    """The signature of an unbound method, its forward references resolved; `shape` makes it what clients see.

    Raises UnresolvedNameError if an annotation names what is not defined (yet), InvalidInputError for anything
    that can't be sent as JSON.
    """
    check_annotated(function, where)
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise UnresolvedNameError(
            f"{where} has an annotation that can't be resolved: {error}",
            where=where,
            next_step="import the type in the service's module (not under `if TYPE_CHECKING`), or define it there",
        ) from error
    parameters = []
    for parameter in check_parameters(function, where):
        missing = parameter.default is inspect.Parameter.empty
        default = msgspec.NODEFAULT if missing else parameter.default
        parameters.append(Parameter(name=parameter.name, annotation=hints[parameter.name], default=default))
    returns, stream, on_loop = _read_return(function, hints["return"], where)
    signature = Signature(
        where=where, parameters=tuple(parameters), returns=returns, stream=stream, on_loop=on_loop
    )
    if shape is not None:
        signature = shape(signature)
    for each in signature.parameters:
        _check_type(each.annotation, f"{where}({each.name})")
    _check_type(signature.returns, f"{where} -> {_name_of(signature.returns)}")
    return signature


def _read_return(
    function: Callable[..., object], annotation: object, where: str
) -> tuple[object, StreamKind, bool]:
    origin = typing.get_origin(annotation) or annotation
    on_loop = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    is_async, is_sync = origin in _ASYNC_STREAMS, origin in _SYNC_STREAMS
    if inspect.isasyncgenfunction(function) and not is_async:
        raise _wrong_generator(where, annotation, "AsyncIterator")
    if inspect.isgeneratorfunction(function) and not is_sync:
        raise _wrong_generator(where, annotation, "Iterator")
    if not (is_async or is_sync):
        return annotation, "no", on_loop
    items = typing.get_args(annotation)
    if not items:
        raise InvalidInputError(
            f"{where} streams, but its return annotation does not say what",
            where=where,
            next_step="name the type of one item, as in `AsyncIterator[str]`",
        )
    return items[0], "chunked" if items[0] is bytes else "sse", on_loop or is_async


def _wrong_generator(where: str, annotation: object, wanted: str) -> InvalidInputError:
    return InvalidInputError(
        f"{where} yields, but its return annotation is {_name_of(annotation)}",
        where=where,
        next_step=f"annotate it `-> {wanted}[T]` where T is the type of one item",
    )


def _check_type(annotation: object, where: str) -> None:
    try:
        msgspec.json.schema_components((annotation,), schema_hook=_schema_hook)
        msgspec.json.Decoder(typing.cast("type[object]", annotation), dec_hook=decode_hook)
    except (TypeError, NotImplementedError) as error:
        raise InvalidInputError(
            f"{_name_of(annotation)} can't be sent as JSON{_reason(error)}",
            where=where,
            next_step="use str, int, float, bool, bytes, datetime, Enum, Literal, list, dict, a dataclass, a "
            "TypedDict, a msgspec.Struct or a pydantic model",
        ) from error


def _reason(error: Exception) -> str:
    """Nothing where msgspec speaks of its own hooks, which is no help to the author of a service."""
    text = str(error)
    return "" if "custom type" in text else f": {text.splitlines()[-1]}"


def endpoint_schemas(signatures: Sequence[Signature]) -> list[Schemas]:
    """Schemas of several endpoints of one service, made together so that component names are unique among them."""
    types = [p.annotation for signature in signatures for p in signature.parameters]
    types += [signature.returns for signature in signatures]
    schemas, components = msgspec.json.schema_components(types, schema_hook=_schema_hook, ref_template=SCHEMA_REF)
    for schema in [*schemas, *list(components.values())]:
        _hoist_definitions(schema, components)
    parameters, returns = (
        iter(schemas[: -len(signatures)] if signatures else ()),
        schemas[len(types) - len(signatures) :],
    )
    made = []
    for signature, output in zip(signatures, returns, strict=True):
        properties = {p.name: _with_default(next(parameters), p) for p in signature.parameters}
        required = [p.name for p in signature.parameters if p.required]
        given: dict[str, Any] = {"type": "object", "properties": properties, "additionalProperties": False}
        if required:
            given["required"] = required
        used = _referenced([given, output], components)
        made.append(Schemas(input_schema=given, output_schema=output, components=used))
    return made


def _with_default(schema: dict[str, Any], parameter: Parameter) -> dict[str, Any]:
    if parameter.required:
        return schema
    try:
        default = msgspec.json.decode(encode_json(parameter.default))
    except TypeError:
        return schema  # a default without a JSON form applies all the same, it is only not shown
    # `$ref` may have siblings in this draft (2020-12).
    return {**schema, "default": default}


def _hoist_definitions(schema: Any, components: dict[str, Any]) -> None:
    """Moves `$defs` that a foreign schema carries (pydantic's do) to the components its references name."""
    if isinstance(schema, dict):
        for name, definition in schema.pop("$defs", {}).items():
            components.setdefault(name, definition)
            _hoist_definitions(definition, components)
        for value in schema.values():
            _hoist_definitions(value, components)
    elif isinstance(schema, list):
        for value in schema:
            _hoist_definitions(value, components)


def _referenced(schemas: list[Any], components: dict[str, Any]) -> dict[str, Any]:
    """The components that `schemas` need, directly or through others."""
    found: dict[str, Any] = {}
    pending: list[Any] = list(schemas)
    prefix = SCHEMA_REF.format(name="")
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            name = str(item.get("$ref", "")).removeprefix(prefix)
            if name in components and name not in found:
                found[name] = components[name]
                pending.append(components[name])
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return dict(sorted(found.items()))


class RequestDecoder:
    """Turns the body or the query string of a request into keyword arguments for the endpoint's method."""

    def __init__(self, signature: Signature) -> None:
        self._parameters = {parameter.name: parameter for parameter in signature.parameters}
        self._single = {
            p.name: msgspec.json.Decoder(p.annotation, dec_hook=decode_hook) for p in signature.parameters
        }
        fields = [
            (p.name, p.annotation) if p.required else (p.name, p.annotation, msgspec.field(default=msgspec.UNSET))
            for p in signature.parameters
        ]
        struct = msgspec.defstruct("Request", fields, forbid_unknown_fields=True, kw_only=True)
        self._whole = msgspec.json.Decoder(struct, dec_hook=decode_hook)

    def from_body(self, body: bytes) -> dict[str, Any]:
        """Arguments from a JSON object; an empty body is an empty one. Raises InvalidInputError with `fields`."""
        try:
            request = self._whole.decode(body or b"{}")
        except msgspec.ValidationError as error:
            raise self._refusal(self._body_problems(body or b"{}", error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._refusal([_problem("", f"not JSON: {error}")]) from error
        except RecursionError as error:
            raise self._refusal([_problem("", "nested too deeply")]) from error
        values = ((name, getattr(request, name)) for name in self._parameters)
        return {name: value for name, value in values if value is not msgspec.UNSET}

    def from_query(self, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """Arguments from a query string's pairs; a repeated name makes a list. Raises as `from_body`."""
        given: dict[str, list[str]] = {}
        for name, value in pairs:
            given.setdefault(name, []).append(value)
        arguments: dict[str, Any] = {}
        problems = self._key_problems(given)
        for name, values in given.items():
            if name not in self._parameters:
                continue
            annotation = self._parameters[name].annotation
            raw = values if _takes_many(annotation) or len(values) > 1 else values[0]
            try:
                arguments[name] = msgspec.convert(raw, annotation, strict=False, dec_hook=decode_hook)
            except msgspec.ValidationError as error:
                problems += _problems(name, error)
        if problems:
            raise self._refusal(problems)
        return arguments

    def _key_problems(self, given: collections.abc.Iterable[str]) -> list[dict[str, str]]:
        names = set(given)
        known = ", ".join(self._parameters) or "none"
        unknown = [
            _problem(name, f"unknown field; known: {known}") for name in names if name not in self._parameters
        ]
        missing = [
            _problem(p.name, "missing required field")
            for p in self._parameters.values()
            if p.required and p.name not in names
        ]
        return missing + sorted(unknown, key=lambda problem: problem["field"])

    def _body_problems(self, body: bytes, error: msgspec.ValidationError) -> list[dict[str, str]]:
        """Every field's problem, where the decoder of the whole stops at the first."""
        try:
            given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        except msgspec.DecodeError:
            return _problems("", error)
        problems = self._key_problems(given)
        for name, raw in given.items():
            if name in self._single:
                try:
                    self._single[name].decode(raw)
                except msgspec.DecodeError as problem:
                    problems += _problems(name, problem)
        return problems or _problems("", error)

    def _refusal(self, problems: list[dict[str, str]]) -> InvalidInputError:
        first = problems[0]
        place = f"`{first['field']}`: " if first["field"] else ""
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return InvalidInputError(
            f"the request does not fit: {place}{first['problem']}{more}",
            where=first["field"] or "body",
            next_step="send a JSON object with the fields of the schema at /-/openapi.json",
            fields=list(problems[:FIELDS_REPORTED_MAX]),
        )


def encode_json(value: object) -> bytes:
    """JSON of an answer; raises TypeError for what has no JSON form."""
    return msgspec.json.encode(value, enc_hook=_encode_hook)


def _problem(field: str, problem: str) -> dict[str, str]:
    return {"field": field, "problem": problem}


def _problems(name: str, error: msgspec.DecodeError) -> list[dict[str, str]]:
    """A decoder's complaint, its path (`$[0].a`) behind the parameter's name; pydantic makes several at once."""
    message = str(error)
    match = _PLACE.search(message)
    path, text = (match["path"], message[: match.start()]) if match else ("", message)
    nested = getattr(error.__cause__, "errors", None)
    found = nested() if callable(nested) else [{"loc": (), "msg": text}]
    return [_problem(_joined(f"{name}{path}", each["loc"]), str(each["msg"])) for each in found]


def _joined(base: str, parts: Sequence[str | int]) -> str:
    shown = base + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return shown.removeprefix(".")


def _takes_many(annotation: object) -> bool:
    """Whether a type is of several items: a list, an optional or annotated list, a tuple, a set."""
    origin = typing.get_origin(annotation) or annotation
    if origin is typing.Annotated:
        return _takes_many(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return any(_takes_many(each) for each in typing.get_args(annotation))
    return origin in _MANY


def _schema_hook(kind: type) -> dict[str, Any]:
    # Duck typing: a pydantic model is known by its methods, so that this package never imports pydantic.
    make = getattr(kind, "model_json_schema", None)
    if make is None:
        raise NotImplementedError(f"{_name_of(kind)} has no JSON form")
    schema: dict[str, Any] = make(ref_template=SCHEMA_REF.replace("{name}", "{model}"))
    return schema


def decode_hook(kind: type, value: object) -> object:
    """For msgspec decoders: makes what a type validates for itself (pydantic models)."""
    validate = getattr(kind, "model_validate", None)
    if validate is None:
        raise NotImplementedError(f"{_name_of(kind)} has no JSON form")
    result: object = validate(value)  # its ValidationError is a ValueError, to which the decoder adds the path
    return result


def _encode_hook(value: object) -> object:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if hasattr(value, "tolist"):  # arrays and scalars of numpy, tensors of torch
        return value.tolist()
    raise TypeError(f"{_name_of(type(value))} has no JSON form")


def _name_of(annotation: object) -> str:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return annotation.__qualname__
    return str(annotation).replace("typing.", "").replace("collections.abc.", "")
