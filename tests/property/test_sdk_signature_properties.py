"""Signatures hold for any input: what fits the schema is taken, what does not is refused in order."""

import json
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.signature import RequestDecoder, encode_json, endpoint_schemas, read_signature
from snowdrop.sdk.example import EndpointSpec, example_body

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
TYPES: dict[str, Any] = {
    "int": (int, st.integers(-(2**63), 2**63 - 1)),
    "str": (str, st.text()),
    "bool": (bool, st.booleans()),
    "list": (list[int], st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4)),
    "dict": (dict[str, str], st.dictionaries(st.text(), st.text(), max_size=4)),
    "optional": (str | None, st.none() | st.text()),
}


class Service:
    def fixed(self, texts: list[str], k: int = 1, more: dict[str, int] | None = None) -> Any: ...


FIXED = RequestDecoder(read_signature(Service.fixed, "Service.fixed"))


@st.composite
def methods(draw: st.DrawFn) -> tuple[Any, dict[str, Any]]:
    """A method of some parameters, and arguments for it: all required ones and some of the others."""
    names = draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=4))
    annotations: dict[str, Any] = {"return": Any}
    arguments: dict[str, Any] = {}
    parts = []
    for name in names:
        kind = draw(st.sampled_from(sorted(TYPES)))
        annotations[name], values = TYPES[kind]
        is_required = draw(st.booleans())
        parts.append(name if is_required else f"{name}=None")
        if is_required or draw(st.booleans()):
            arguments[name] = draw(values)
    scope: dict[str, Any] = {}
    exec(f"def method(self, *, {', '.join(parts)}): ..." if parts else "def method(self): ...", scope)
    method = scope["method"]
    method.__annotations__ = annotations
    return method, arguments


@given(methods())
def test_arguments_come_through_json_unchanged(made: tuple[Any, dict[str, Any]]) -> None:
    method, arguments = made
    decoder = RequestDecoder(read_signature(method, "method"))
    assert decoder.from_body(encode_json(arguments)) == arguments


@given(methods())
def test_the_example_of_a_schema_is_accepted(made: tuple[Any, dict[str, Any]]) -> None:
    signature = read_signature(made[0], "method")
    (schemas,) = endpoint_schemas([signature])
    spec = EndpointSpec(
        path="/m", method_name="m", input_schema=schemas.input_schema, components=schemas.components
    )
    body = example_body(spec)
    assert RequestDecoder(signature).from_body(json.dumps(body).encode()) == body


def outcome(call: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Arguments, or the fields of a refusal; any other exception is a failure."""
    try:
        return call(), []
    except InvalidInputError as error:
        return None, error.fields


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_gives_arguments_or_a_refusal_with_fields(body: bytes) -> None:
    arguments, fields = outcome(lambda: FIXED.from_body(body))
    assert (arguments is None) == bool(fields)
    assert all(set(field) == {"field", "problem"} for field in fields)
    if arguments is not None:
        assert set(arguments) <= {"texts", "k", "more"}
        assert all(isinstance(text, str) for text in arguments["texts"])


@given(st.lists(st.tuples(st.sampled_from(["texts", "k", "more", "x", ""]), st.text(max_size=4)), max_size=5))
def test_any_query_gives_arguments_or_a_refusal_with_fields(pairs: list[tuple[str, str]]) -> None:
    arguments, fields = outcome(lambda: FIXED.from_query(pairs))
    assert (arguments is None) == bool(fields)
    if arguments is not None:
        assert arguments["texts"] == [value for name, value in pairs if name == "texts"]
