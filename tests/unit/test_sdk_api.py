"""The decorators: what they leave on a class, what they refuse, what importing them costs."""

import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

import snowdrop as sd
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.service import SERVICE_ATTRIBUTE, STAGE_ATTRIBUTE, ServiceSpec

if TYPE_CHECKING:
    from nowhere import Costly  # type: ignore[import-not-found]


def spec_on(cls: type) -> ServiceSpec:
    spec = getattr(cls, SERVICE_ATTRIBUTE)
    assert isinstance(spec, ServiceSpec)
    return spec


def test_a_service_carries_its_spec_and_stays_a_plain_class() -> None:
    @sd.service(
        image=sd.Image.from_packages("numpy"),
        model=sd.Model("minilm"),
        concurrency=16,
        scale=sd.Scale(min=0, max=4, idle_s=60),
        accelerator=["L4", "cpu"],
        env={"A": "1"},
        startup_s_max=30,
    )
    class Embed:
        @sd.startup
        def load(self, weights: "Costly") -> None:
            self.weights = weights

        @sd.endpoint("/embed")
        async def embed(self, texts: list[str]) -> list[int]:
            """Lengths."""
            return [len(text) for text in texts]

        @sd.shutdown
        def close(self) -> None: ...

    spec = spec_on(Embed)
    assert spec.models == (sd.Model("minilm", "weights"),)
    assert (spec.startup_name, spec.shutdown_name, spec.concurrency) == ("load", "close", 16)
    assert (spec.accelerator, spec.env, spec.startup_s_max) == (("L4", "cpu"), {"A": "1"}, 30)
    (endpoint,) = spec.endpoints
    assert (endpoint.path, endpoint.method_name, endpoint.doc) == ("/embed", "embed", "Lengths.")
    assert endpoint.is_async
    assert endpoint.input_schema["required"] == ["texts"]
    marks = [getattr(method, STAGE_ATTRIBUTE) for method in (Embed.load, Embed.embed, Embed.close)]
    assert marks == [("startup",), ("endpoint", "/embed"), ("shutdown",)]
    Embed().load("w")


def test_several_models_go_to_the_parameters_they_name() -> None:
    @sd.service(model=[sd.Model("a", param="encoder"), sd.Model("b", param="ranker")])
    class Two:
        @sd.startup
        def load(self, ranker: object, encoder: object) -> None: ...

        @sd.endpoint("/x")
        def x(self) -> int: ...

    assert {model.name: model.param for model in spec_on(Two).models} == {"a": "encoder", "b": "ranker"}


def test_models_can_be_given_by_parameter() -> None:
    @sd.service(models={"encoder": sd.Model("a"), "ranker": sd.Model("b")})
    class Two:
        @sd.startup
        def load(self, ranker: object, encoder: object) -> None: ...

        @sd.endpoint("/x")
        def x(self) -> int: ...

    assert {model.name: model.param for model in spec_on(Two).models} == {"a": "encoder", "b": "ranker"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": sd.Model("a"), "models": {"b": sd.Model("b")}}, "both"),
        ({"models": [sd.Model("a")]}, "models"),
        ({"models": {"a": "b"}}, "'b'"),
    ],
)
def test_models_given_wrongly_are_told_how(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidInputError, match=told) as caught:
        sd.service(**given)
    assert "sd.Model(" in caught.value.next_step


def test_endpoints_of_a_base_class_are_served_unless_overridden() -> None:
    class Base:
        @sd.endpoint("/a")
        def a(self) -> int: ...

        @sd.endpoint("/b")
        def b(self) -> int: ...

    @sd.service()
    class Derived(Base):
        @sd.endpoint("/c")
        def b(self) -> int: ...

    assert {each.path for each in spec_on(Derived).endpoints} == {"/a", "/c"}


class HasEndpoint:
    @sd.endpoint("/x")
    def x(self) -> int: ...


def no_endpoint() -> type:
    return type("Empty", (), {})


def duplicate_path() -> type:
    class Bad(HasEndpoint):
        @sd.endpoint("/x")
        def other(self) -> int: ...

    return Bad


def two_startups() -> type:
    class Bad(HasEndpoint):
        @sd.startup
        def one(self) -> None: ...

        @sd.startup
        def two(self) -> None: ...

    return Bad


def startup_without_model() -> type:
    class Bad(HasEndpoint):
        @sd.startup
        def load(self, model: object) -> None: ...

    return Bad


def shutdown_with_parameter() -> type:
    class Bad(HasEndpoint):
        @sd.shutdown
        def close(self, why: str) -> None: ...

    return Bad


def static_endpoint() -> type:
    class Bad:
        @sd.endpoint("/x")
        @staticmethod
        def x() -> int: ...

    return Bad


def constructor_argument() -> type:
    class Bad(HasEndpoint):
        def __init__(self, size: int) -> None: ...

    return Bad


def unannotated() -> type:
    class Bad:
        @sd.endpoint("/x")
        def x(self, text) -> int: ...  # type: ignore[no-untyped-def]

    return Bad


@pytest.mark.parametrize(
    ("make", "where", "fix"),
    [
        (no_endpoint, "Empty", "@sd.endpoint"),
        (duplicate_path, "Bad.", "its own path"),
        (two_startups, "Bad.two", "one from the other"),
        (startup_without_model, "Bad.load(model)", 'models={"model": '),
        (shutdown_with_parameter, "Bad.close", "`self` alone"),
        (static_endpoint, "Bad.x", "with `self`"),
        (constructor_argument, "Bad.__init__(size)", "a default"),
        (unannotated, "Bad.x(text)", "`text: str`"),
    ],
)
def test_a_class_that_cannot_serve_is_refused(make: Callable[[], type], where: str, fix: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        sd.service()(make())
    assert caught.value.where.startswith(where)
    assert fix in caught.value.next_step


def test_a_model_needs_a_startup_parameter() -> None:
    with pytest.raises(InvalidInputError, match="no startup method"):
        sd.service(model=sd.Model("m"))(HasEndpoint)

    class NoParameter(HasEndpoint):
        @sd.startup
        def load(self) -> None: ...

    with pytest.raises(InvalidInputError) as caught:
        sd.service(model=sd.Model("m"))(NoParameter)
    assert caught.value.next_step == "add `model: sd.LoadedModel` to it"


def test_two_models_for_one_parameter_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="`model`"):
        sd.service(model=[sd.Model("a"), sd.Model("b")])(HasEndpoint)


@pytest.mark.parametrize("path", ["embed", "", "/-/stats", "/-", "/a b", "/a?b=1", "/{name}"])
def test_a_path_that_cannot_be_served_is_refused(path: str) -> None:
    with pytest.raises(InvalidInputError, match="path"):
        sd.endpoint(path)


def test_a_method_marked_twice_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="marked twice"):
        sd.shutdown(sd.endpoint("/x")(lambda self: None))


@pytest.mark.parametrize(
    "options",
    [
        {"concurrency": "16"},
        {"concurrency": True},
        {"concurrency": 0},
        {"scale": 4},
        {"image": "requirements.txt"},
        {"model": "minilm"},
        {"accelerator": [1]},
        {"accelerator": []},
        {"env": {"A": 1}},
        {"startup_s_max": 0},
    ],
)
def test_an_option_of_the_wrong_kind_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        sd.service(**options)(HasEndpoint)


def test_importing_the_decorators_loads_no_server_and_no_framework() -> None:
    code = (
        "import sys, snowdrop; snowdrop.service; snowdrop.Image; snowdrop.cancelled\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "numpy", "aiohttp", "uvicorn", "uvloop", "anyio", "asyncio", "typer", "rich", "watchfiles"}
    assert "snowdrop" in loaded
    assert not heavy & set(loaded)
