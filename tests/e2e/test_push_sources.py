"""Pushes from other sources than a directory, private and compressed, through the command line and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from content_helpers import noise, safetensors_bytes
from e2e_platform import CommandError, Platform
from remote_helpers import COMMIT, Hub

WEIGHTS = safetensors_bytes({"ones": ("F32", [1024, 64], b"\0\0\x80?" * (1024 * 64)), "n": ("U8", [9], noise(9))})
FILES = {"config.json": b'{"layers": 8}', "model.safetensors": WEIGHTS, "vocab.txt": b"word\n" * 50_000}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(FILES, token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.close()


def facts(platform: Platform) -> object:
    platform.deploy("modelled.py", "modelled")
    return platform.run("call", "modelled/facts", "{}")


def test_a_private_compressed_model_of_a_hub_answers(platform: Platform, hub: Hub) -> None:
    words = ("hf://org/model", "--endpoint", hub.url, "--private", "--compress", "auto")
    pushed = platform.run("model", "push", "e2e-model", *words)
    artefact = pushed["model"]["artefact"]
    assert pushed["model"]["source"] == f"hf://org/model@{COMMIT}"
    assert pushed["new_bytes"] < pushed["read_bytes"] == sum(map(len, FILES.values()))
    assert artefact["key_domain"] in {key["key_domain"] for key in platform.run("model", "keys", "ls")}
    shown = platform.run("model", "show", "e2e-model")
    assert {file["path"] for file in shown["files"]} == set(FILES)
    said = facts(platform)
    assert isinstance(said, dict)
    assert said["config"] == {"layers": 8}
    assert said["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert said["sums"]["ones"] == 1024 * 64


def test_a_rotated_key_names_new_pushes_and_reads_the_old(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    first = platform.run("model", "push", "kept", str(tmp_path), "--private")["model"]["artefact"]
    rotated = platform.run("model", "keys", "rotate")["key_domain"]
    second = platform.run("model", "push", "moved", str(tmp_path), "--private")["model"]["artefact"]
    assert second["key_domain"] == rotated != first["key_domain"]
    assert [file["path"] for file in platform.run("model", "show", "kept")["files"]] == ["config.json"]
    for name in ("kept", "moved"):
        platform.run("model", "rm", name)


def test_what_a_hub_refuses_is_said_and_names_nothing(
    platform: Platform, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CommandError) as failed:
        platform.run("model", "push", "refused", "hf://org/model", "--endpoint", hub.url)
    assert failed.value.error["kind"] == "unauthorised"
    assert "HF_TOKEN" in failed.value.error["next_step"]
    assert "refused" not in {model["name"] for model in platform.run("model", "ls")}
