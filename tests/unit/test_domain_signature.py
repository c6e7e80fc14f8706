"""Endpoint signatures: what is accepted, refused and published."""

import dataclasses
import datetime
import enum
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import copy_context
from typing import Any, Literal, TypedDict

import msgspec
import pytest

from snowdrop.domain.cancel import CANCEL_FLAG, cancelled
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.openapi import openapi_document
from snowdrop.domain.service import EndpointSpec, ServiceSpec
from snowdrop.domain.signature import (
    RequestDecoder,
    UnresolvedNameError,
    encode_json,
    endpoint_schemas,
    read_signature,
)


@dataclasses.dataclass
class Point:
    x: int
    label: str = "p"


class Colour(enum.Enum):
    RED = "red"


class Options(TypedDict):
    top: int


class Node(msgspec.Struct):
    value: int
    child: "Node | None" = None


class FakeModelError(ValueError):
    def errors(self) -> list[dict[str, Any]]:
        return [{"loc": ("a",), "msg": "not a number"}, {"loc": ("tags", 0), "msg": "no text"}]


class FakeModel:
    """Looks like a model of pydantic."""

    def __init__(self, a: int) -> None:
        self.a = a

    @classmethod
    def model_validate(cls, value: Any) -> "FakeModel":
        if not isinstance(value.get("a"), int):
            raise FakeModelError
        return cls(value["a"])

    @classmethod
    def model_json_schema(cls, *, ref_template: str) -> dict[str, Any]:
        ref = ref_template.format(model="Part")
        return {"type": "object", "properties": {"a": {"$ref": ref}}, "$defs": {"Part": {"type": "integer"}}}

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        return {"a": self.a, "mode": mode}


class Array:
    def tolist(self) -> list[float]:
        return [1.0, 2.5]


class Service:
    def many(self, texts: list[str], k: int = 3, mode: Literal["a", "b"] = "a") -> list[list[float]]: ...
    def kinds(
        self,
        point: Point,
        colour: Colour,
        options: Options,
        node: Node,
        data: bytes,
        when: datetime.datetime,
        pair: tuple[int, str],
        table: dict[str, float],
        maybe: int | None = None,
    ) -> Node: ...
    def query(self, n: int, xs: list[int] | None = None, flag: bool = False) -> None: ...
    def model(self, item: FakeModel, items: list[FakeModel]) -> FakeModel: ...
    def anything(self, value: Any) -> Any: ...
    async def sse(self) -> AsyncIterator[Point]:
        yield Point(1)

    def chunked(self) -> Iterator[bytes]:
        yield b""

    async def one(self) -> str: ...
    def starred(self, *texts: str) -> str: ...
    def open_ended(self, **options: str) -> str: ...
    def bare(self, text) -> str: ...  # type: ignore[no-untyped-def]
    def no_return(self, text: str): ...  # type: ignore[no-untyped-def]
    def strange(self, call: Callable[[], int]) -> str: ...
    def later(self, value: "Undefined") -> str: ...  # type: ignore[name-defined]  # noqa: F821
    def mislabelled(self) -> str:  # type: ignore[misc]
        yield "a"


def decoder(name: str) -> RequestDecoder:
    return RequestDecoder(read_signature(getattr(Service, name), f"Service.{name}"))


def refused_fields(call: Callable[[], object]) -> list[dict[str, Any]]:
    with pytest.raises(InvalidInputError) as caught:
        call()
    assert caught.value.http_status == 422
    return caught.value.fields


def test_every_supported_type_is_decoded() -> None:
    body = {
        "point": {"x": 1},
        "colour": "red",
        "options": {"top": 2},
        "node": {"value": 1, "child": {"value": 2}},
        "data": "aGk=",
        "when": "2024-01-02T03:04:05Z",
        "pair": [1, "a"],
        "table": {"a": 1.5},
    }
    assert decoder("kinds").from_body(json.dumps(body).encode()) == {
        "point": Point(1),
        "colour": Colour.RED,
        "options": {"top": 2},
        "node": Node(1, Node(2)),
        "data": b"hi",
        "when": datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC),
        "pair": (1, "a"),
        "table": {"a": 1.5},
    }


def test_an_absent_parameter_is_left_to_its_default() -> None:
    assert decoder("many").from_body(b'{"texts": []}') == {"texts": []}


def test_an_empty_body_is_an_empty_object() -> None:
    assert decoder("one").from_body(b"") == {}


@pytest.mark.parametrize(
    ("body", "field", "problem"),
    [
        (b'{"texts": ["a", 3]}', "texts[1]", "Expected `str`, got `int`"),
        (b'{"texts": [], "k": "x"}', "k", "Expected `int`, got `str`"),
        (b'{"texts": [], "mode": "c"}', "mode", "Invalid enum value 'c'"),
        (b"{}", "texts", "missing required field"),
        (b'{"texts": [], "extra": 1}', "extra", "unknown field; known: texts, k, mode"),
        (b"[]", "", "Expected `object`, got `array`"),
        (b"{", "", "not JSON: Input data was truncated"),
    ],
)
def test_a_refusal_names_field_and_problem(body: bytes, field: str, problem: str) -> None:
    assert refused_fields(lambda: decoder("many").from_body(body)) == [{"field": field, "problem": problem}]


def test_all_wrong_fields_are_named_at_once() -> None:
    fields = refused_fields(lambda: decoder("many").from_body(b'{"texts": [1], "k": "x", "more": 0}'))
    assert {each["field"] for each in fields} == {"texts[0]", "k", "more"}


def test_a_nested_field_is_named_by_its_path() -> None:
    fields = refused_fields(
        lambda: decoder("kinds").from_body(b'{"point": {"x": 1}, "node": {"value": 1, "child": {"value": "a"}}}')
    )
    assert {"field": "node.child.value", "problem": "Expected `int`, got `str`"} in fields


def test_bottomless_nesting_is_refused() -> None:
    body = b'{"value": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert refused_fields(lambda: decoder("anything").from_body(body)) == [
        {"field": "", "problem": "nested too deeply"}
    ]


def test_a_query_string_is_converted() -> None:
    found = decoder("query").from_query([("n", "4"), ("xs", "1"), ("xs", "2"), ("flag", "true")])
    assert found == {"n": 4, "xs": [1, 2], "flag": True}


def test_one_value_makes_a_list_for_an_optional_list() -> None:
    assert decoder("query").from_query([("n", "4"), ("xs", "1")])["xs"] == [1]


def test_a_query_string_is_refused_by_field() -> None:
    fields = refused_fields(lambda: decoder("query").from_query([("n", "x"), ("m", "1")]))
    assert {each["field"] for each in fields} == {"n", "m"}
    assert refused_fields(lambda: decoder("query").from_query([("n", "1"), ("n", "2")]))[0]["field"] == "n"


def test_a_pydantic_like_model_is_validated_by_itself() -> None:
    found = decoder("model").from_body(b'{"item": {"a": 1}, "items": [{"a": 2}]}')
    assert (found["item"].a, found["items"][0].a) == (1, 2)
    fields = refused_fields(lambda: decoder("model").from_body(b'{"item": {"a": 1}, "items": [{"a": 1}, {}]}'))
    assert fields == [
        {"field": "items[1].a", "problem": "not a number"},
        {"field": "items[1].tags[0]", "problem": "no text"},
    ]


def test_results_are_encoded() -> None:
    assert encode_json({"m": FakeModel(1), "v": Array(), "p": Point(1), "b": b"hi"}) == (
        b'{"m":{"a":1,"mode":"json"},"v":[1.0,2.5],"p":{"x":1,"label":"p"},"b":"aGk="}'
    )
    with pytest.raises(TypeError, match="object has no JSON form"):
        encode_json(object())


def test_schemas_say_what_is_required_and_what_is_default() -> None:
    (schemas,) = endpoint_schemas([read_signature(Service.many, "Service.many")])
    assert schemas.input_schema == {
        "type": "object",
        "properties": {
            "texts": {"type": "array", "items": {"type": "string"}},
            "k": {"type": "integer", "default": 3},
            "mode": {"enum": ["a", "b"], "default": "a"},
        },
        "required": ["texts"],
        "additionalProperties": False,
    }
    assert schemas.output_schema == {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}


def test_named_types_become_components_that_references_reach() -> None:
    signatures = [read_signature(getattr(Service, name), name) for name in ("kinds", "model")]
    kinds, model = endpoint_schemas(signatures)
    assert kinds.output_schema == {"$ref": "#/components/schemas/Node"}
    assert set(kinds.components) == {"Point", "Colour", "Options", "Node"}
    assert set(model.components) == {"Part"}
    assert "$defs" not in json.dumps(model.input_schema)


@pytest.mark.parametrize(
    ("name", "stream", "on_loop"),
    [("many", "no", False), ("one", "no", True), ("sse", "sse", True), ("chunked", "chunked", False)],
)
def test_the_return_annotation_says_whether_it_streams(name: str, stream: str, on_loop: bool) -> None:
    signature = read_signature(getattr(Service, name), name)
    assert (signature.stream, signature.on_loop) == (stream, on_loop)


@pytest.mark.parametrize(
    ("name", "where", "fix"),
    [
        ("starred", "Service.starred(texts)", "named parameters"),
        ("open_ended", "Service.open_ended(options)", "named parameters"),
        ("bare", "Service.bare(text)", "`text: str`"),
        ("no_return", "Service.no_return", "say what it returns"),
        ("strange", "Service.strange(call)", "dataclass"),
        ("mislabelled", "Service.mislabelled", "-> Iterator[T]"),
    ],
)
def test_a_method_that_no_request_can_call_is_refused(name: str, where: str, fix: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        read_signature(getattr(Service, name), f"Service.{name}")
    assert caught.value.where == where
    assert fix in caught.value.next_step


def test_an_unknown_name_in_an_annotation_is_said() -> None:
    with pytest.raises(UnresolvedNameError, match="Undefined"):
        read_signature(Service.later, "Service.later")


def test_the_openapi_document_resolves_its_references() -> None:
    endpoints = []
    names = ("kinds", "sse", "chunked", "model")
    made = endpoint_schemas([read_signature(getattr(Service, name), name) for name in names])
    for name, schemas in zip(names, made, strict=True):
        stream = read_signature(getattr(Service, name), name).stream
        endpoints.append(
            EndpointSpec(
                path=f"/{name}",
                method_name=name,
                stream=stream,
                input_schema=schemas.input_schema,
                output_schema=schemas.output_schema,
                components=schemas.components,
            )
        )
    document = openapi_document(ServiceSpec(class_name="Service", endpoints=tuple(endpoints)))
    text = json.dumps(document)
    names_used = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names_used <= set(document["components"]["schemas"])
    assert document["openapi"].startswith("3.1")
    assert "text/event-stream" in document["paths"]["/sse"]["post"]["responses"]["200"]["content"]
    assert "application/octet-stream" in document["paths"]["/chunked"]["post"]["responses"]["200"]["content"]


def test_cancelled_answers_from_the_flag_of_its_context() -> None:
    def inside() -> tuple[bool, bool]:
        flag = threading.Event()
        CANCEL_FLAG.set(flag)
        before = cancelled()
        flag.set()
        return before, cancelled()

    assert not cancelled()
    assert copy_context().run(inside) == (False, True)
    assert not cancelled()
