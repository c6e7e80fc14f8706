"""What `snowdrop run` makes of a model, without a platform; and files read back from the origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from snowdrop.cli import run as cli
from snowdrop.content.ingest import PushOptions, SourceOptions, open_source, push_source
from snowdrop.content.keys import PUBLIC_HASHER
from snowdrop.content.layout import manifest_key
from snowdrop.content.manifest import decode_manifest
from snowdrop.content.origin import open_origin
from snowdrop.content.readback import SMALL_FILE_BYTES_MAX, read_small_file
from snowdrop.domain.deployment import NodeRecord
from snowdrop.domain.errors import IntegrityError, InvalidInputError, SnowdropError, TooLargeError
from snowdrop.domain.service import Scale
from snowdrop.policy.engines import ModelFacts, choose
from snowdrop.wire.api import Info

INFO = Info(
    version="1",
    state="/s",
    gateway_url="http://127.0.0.1:8000",
    origin_url="/o",
    sandbox="",
    nodes=(NodeRecord(id="n", instance_type="local", memory_bytes=1 << 34, cpus=6.5),),
    gateways=(),
)
GGUF = ModelFacts(files=(("tiny.Q4_1.gguf", 90 << 20),))


def wanted(**more: Any) -> cli.Wanted:
    return cli.Wanted(
        **{
            "concurrency": None,
            "context": 512,
            "scale": Scale(),
            "cpus": None,
            "memory": None,
            "extra": (),
            **more,
        }
    )


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf://org/SmolLM2-135M_x@main", "smollm2-135m-x"),
        ("/models/My Model/", "my-model"),
        ("./a.Q4_1.gguf", "a-q4-1"),
        ("chat", "chat"),
        ("...", "model"),
        ("x" * 100, "x" * 63),
    ],
)
def test_a_name_comes_of_the_models_own(model: str, name: str) -> None:
    assert cli._slug(model) == name


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 << 30), ("1.5m", 3 << 19), ("4096", 4096), ("2 GiB", 2 << 30)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert cli.parse_bytes(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "G", "8X", "-1G", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="is no size"):
        cli.parse_bytes(text, "--memory")


def test_a_gguf_becomes_a_command_that_is_told_all_it_needs() -> None:
    spec = cli._spec(choose(GGUF), "tiny", "chat", GGUF, wanted=wanted(extra=("--gpu-layers", "0")), info=INFO)
    assert spec.command is not None
    values = {"python": "py", "code": "/c", "model": "/m", "deployment": "chat", "host": "h", "port": "1"}
    assert " ".join(spec.command.filled(values)) == (
        "py /c/serve.py --model /m/tiny.Q4_1.gguf --alias chat --host h --port 1 --context 512 --parallel 4"
        " --threads 6 --gpu-layers 0"
    )
    assert spec.openai_paths == ("/v1/chat/completions", "/v1/completions")
    assert (spec.resources.cpus, spec.resources.memory_bytes_max, spec.concurrency) == (6.5, 4 << 30, 4)
    assert [(model.name, model.lazy) for model in spec.models] == [("tiny", True)]
    assert msgspec.json.decode(msgspec.json.encode(spec), type=type(spec)) == spec


def test_memory_follows_the_weights_or_the_command_line() -> None:
    large = ModelFacts(files=(("a.gguf", 10 << 30), ("b-Q8_0.gguf", 20 << 30)))
    spec = cli._spec(choose(large), "m", "m", large, wanted=wanted(cpus=2), info=INFO)
    assert spec.resources.memory_bytes_max == 22 << 30, "of the file that is served, and 2 GiB"
    spec = cli._spec(choose(large), "m", "m", large, wanted=wanted(memory="7G", concurrency=2), info=INFO)
    assert (spec.resources.memory_bytes_max, spec.concurrency) == (7 << 30, 2)


def test_vllm_is_told_by_its_own_options() -> None:
    facts = ModelFacts(files=(("m.safetensors", 1),), architectures=("LlamaForCausalLM",))
    spec = cli._spec(choose(facts, has_vllm=True), "m", "chat", facts, wanted=wanted(), info=INFO)
    assert spec.command is not None
    assert spec.command.argv[:3] == ("vllm", "serve", "{model}")
    assert "--served-model-name" in spec.command.argv
    assert (spec.command.ready, spec.image.requirements) == ("/health", ("vllm",))


def test_of_a_hub_only_what_an_engine_reads_is_pushed() -> None:
    hub = cli.wanted_files(None, is_hub=True)
    names = [
        "model.safetensors",
        "pytorch_model.bin",
        "onnx/m.onnx",
        "a.gguf",
        "original/x.safetensors",
        "config.json",
    ]
    assert [name for name in names if hub.takes(name)] == ["model.safetensors", "a.gguf", "config.json"]
    one = cli.wanted_files("a-Q8_0.gguf", is_hub=True)
    assert [name for name in ("a-Q8_0.gguf", "a-F16.gguf", "config.json") if one.takes(name)] == [
        "a-Q8_0.gguf",
        "config.json",
    ]
    assert cli.wanted_files(None, is_hub=False).takes("pytorch_model.bin")


def test_facts_are_read_from_files_and_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.bin").write_bytes(b"123")
    facts = cli._local_facts(tmp_path)
    assert (facts.architectures, facts.model_type) == (("BertModel",), "bert")
    assert ("sub/x.bin", 3) in facts.files
    for odd in (b"[]", b'{"architectures": 5}', None):
        assert cli.facts_of((), odd).architectures == ()
    with pytest.raises(InvalidInputError, match=r"config.json is no JSON"):
        cli.facts_of((), b"{")


def test_a_small_file_is_read_back_whole_and_checked(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text('{"a": "' + "b" * 5_000 + '"}')
    (source / "empty").touch()
    (source / "large.bin").write_bytes(bytes(SMALL_FILE_BYTES_MAX + 1))
    folder = tmp_path / "origin"
    folder.mkdir()
    origin = open_origin(folder.as_uri())
    pushed = push_source(open_source(str(source), SourceOptions()), origin, PushOptions(compress="zstd"))
    raw = bytearray(origin.size(manifest_key("public", pushed.artefact.manifest)))
    origin.read_range(manifest_key("public", pushed.artefact.manifest), 0, memoryview(raw))
    manifest = decode_manifest(bytes(raw), expected=pushed.artefact.manifest, hasher=PUBLIC_HASHER)

    assert read_small_file(origin, manifest, "config.json", PUBLIC_HASHER) == (source / "config.json").read_bytes()
    assert read_small_file(origin, manifest, "empty", PUBLIC_HASHER) == b""
    assert read_small_file(origin, manifest, "nothing", PUBLIC_HASHER) is None
    with pytest.raises(TooLargeError):
        read_small_file(origin, manifest, "large.bin", PUBLIC_HASHER)

    entry = next(each for each in manifest.files if each.path == "config.json")
    chunk = manifest.chunks[entry.extents[0].chunk]
    broken = msgspec.structs.replace(chunk, digest="0" * 64)
    chunks = tuple(broken if each is chunk else each for each in manifest.chunks)
    with pytest.raises(SnowdropError) as wrong:
        read_small_file(origin, msgspec.structs.replace(manifest, chunks=chunks), "config.json", PUBLIC_HASHER)
    assert isinstance(wrong.value, IntegrityError)
