"""What a command may say, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import snowdrop as sd
from snowdrop.domain.errors import InvalidInputError
from snowdrop.domain.servers import OPENAI_PATHS, CommandSpec
from snowdrop.domain.service import EndpointSpec, Model, ServiceSpec
from snowdrop.sdk.inspect import describe_service


def test_placeholders_are_filled_and_other_braces_stay() -> None:
    command = CommandSpec(argv=("serve", "{model}", "--port={port}", '{"a": {}}', "{0}", "${HOME}"))
    filled = command.filled({"model": "/models/m", "port": "99"})
    assert filled == ("serve", "/models/m", "--port=99", '{"a": {}}', "{0}", "${HOME}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"argv": ()}, "empty"),
        ({"argv": ("serve",)}, "not told where to listen"),
        ({"argv": ("serve", "{prot}", "{port}")}, "unknown placeholder {prot}"),
        ({"argv": ("serve", "{port}", "{socket}")}, "both a port and a socket"),
        ({"argv": ("serve",), "port": 0}, "port 0"),
        ({"argv": ("serve", "{socket}"), "port": 80}, "port 80"),
        ({"argv": ("serve", "{port}"), "ready": "health"}, "no leading slash"),
        ({"argv": ("serve", "{port}"), "stop_s_max": 0}, "stop_s_max"),
        ({"argv": ("serve\0", "{port}")}, "NUL"),
    ],
)
def test_a_command_that_cannot_work_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message) as refused:
        CommandSpec(**fields)
    assert refused.value.next_step


@pytest.mark.parametrize(
    ("word", "models", "message"),
    [
        ("{model}", (), "the service has 0 models"),
        ("{model}", (Model("a", param="a"), Model("b", param="b")), "the service has 2 models"),
        ("{model:c}", (Model("a"),), "no such model"),
    ],
)
def test_a_model_that_is_not_there_is_refused(word: str, models: tuple[Model, ...], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ServiceSpec(class_name="x", command=CommandSpec(argv=(word, "{port}")), models=models)


def test_a_revision_of_before_still_decodes_and_a_new_one_round_trips() -> None:
    old = msgspec.json.decode(b'{"class_name": "Embed"}', type=ServiceSpec)
    assert (old.command, old.asgi, old.openai_paths) == (None, None, ())
    spec = sd.command(["{python}", "{port}"], openai=True).spec
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ServiceSpec) == spec


def test_who_speaks_the_dialect() -> None:
    assert sd.command(["x", "{port}"], openai=True).spec.openai_paths == OPENAI_PATHS
    assert sd.command(["x", "{port}"], openai=["/v1/embeddings"]).spec.openai_paths == ("/v1/embeddings",)
    assert sd.command(["x", "{port}"]).spec.openai_paths == ()
    with pytest.raises(InvalidInputError, match="no path of OpenAI's dialect"):
        sd.command(["x", "{port}"], openai=["/v1/images"])
    named = ServiceSpec(class_name="X", endpoints=(EndpointSpec(path="/v1/embeddings", method_name="embed"),))
    assert named.openai_paths == ("/v1/embeddings",)


def test_options_are_those_of_a_service_and_models_go_by_name() -> None:
    served = sd.command(
        ["x", "{port}", "{model:big-one}"],
        model=[sd.Model("big-one"), sd.Model("draft")],
        scale=sd.Scale(max=3),
        accelerator="L4",
    )
    assert [(m.name, m.param, m.lazy) for m in served.spec.models] == [
        ("big-one", "big_one", True),
        ("draft", "draft", True),
    ]
    assert (served.spec.scale.max, served.spec.accelerator, served.spec.concurrency) == (3, ("L4",), 16)
    with pytest.raises(InvalidInputError, match="no option `scael`"):
        sd.command(["x", "{port}"], scael=sd.Scale())
    with pytest.raises(InvalidInputError, match="not a list of words"):
        sd.command("x {port}")
    with pytest.raises(InvalidInputError, match="no ASGI app"):
        sd.asgi("app")  # type: ignore[arg-type]


def test_the_chat_example_says_what_its_server_needs() -> None:
    spec = describe_service(Path(__file__).parents[2] / "examples" / "chat" / "service.py", None)
    assert (spec.class_name, spec.openai_paths) == ("chat", OPENAI_PATHS[:2])
    assert spec.command is not None
    assert {name for name, _ in spec.command.placeholders()} == {"python", "model", "deployment", "host", "port"}
