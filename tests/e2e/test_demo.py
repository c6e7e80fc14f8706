"""`make demo` as a newcomer runs it: a real model, compared with transformers inside the script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_demo_ends_well() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "demo.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "largest difference to the model run directly with transformers" in done.stdout
    assert "87.4 MiB origin" in done.stdout, "the first start takes the weights from the origin"
    assert " ram" in done.stdout, "the second one from the node"
    assert "Snowdrop is down" in done.stdout
