"""Whatever is dropped, closed or mapped again, and in whatever order: what user code holds is there and right.

The walk runs in a process of its own: a view that dangles ends it by a signal, which is reported with its seed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
SEEDS = 6
STEPS = 250


def walk(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(TESTS / "ownership_fuzz.py"), *map(str, arguments)]
    path = os.pathsep.join([str(TESTS), *sys.path])
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": path}
    )


def test_no_view_dangles_and_no_write_reaches_another_mapping() -> None:
    done = walk(1, SEEDS, STEPS)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise AssertionError(f"{name} in {done.stdout.split(chr(10))[-2]}\n{done.stderr}")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("seed ") == SEEDS


def test_a_dangling_view_would_be_seen() -> None:
    done = walk(1, SEEDS, STEPS, "sabotage")
    assert done.returncode != 0
