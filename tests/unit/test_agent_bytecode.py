"""The runtime's byte code is kept in advance, also where imports do not keep it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from snowdrop.agent.bytecode import keep_bytecode

pytestmark = pytest.mark.anyio


async def test_byte_code_is_kept_although_the_agent_itself_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some_runtime.py").write_text("value = 1\n")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    await keep_bytecode(sys.executable, "import some_runtime")
    assert [path.name.split(".")[0] for path in (tmp_path / "__pycache__").iterdir()] == ["some_runtime"]


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python"])
async def test_what_cannot_be_compiled_is_said_and_harms_nothing(
    python: str, caplog: pytest.LogCaptureFixture
) -> None:
    await keep_bytecode(python, "import there_is_no_such_module")
    assert "could not be compiled in advance" in caplog.text
