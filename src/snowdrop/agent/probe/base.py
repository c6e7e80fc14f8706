"""One probe: an action that is performed, and what is said of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from snowdrop.domain.errors import SnowdropError

PROBE_S_MAX = 20.0


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """`found` says what works, `missing` what does not, `turn_on` the command or step that changes it."""

    name: str
    ok: bool
    found: str = ""
    missing: str = ""
    turn_on: str = ""


class ProbeFailed(Exception):  # noqa: N818 (an outcome, not a fault)
    """Raised by an action that did not work: what, and how to turn it on."""

    def __init__(self, missing: str, turn_on: str = "") -> None:
        super().__init__(missing)
        self.turn_on = turn_on


Action = Callable[[], str]
"""Performs something and says what it found; raises ProbeFailed, OSError or a SnowdropError."""


def perform(name: str, action: Action, turn_on: str = "") -> Probe:
    """Runs `action`. Never raises: whatever goes wrong is what the probe has to say."""
    try:
        return Probe(name=name, ok=True, found=action())
    except ProbeFailed as error:
        return Probe(name=name, ok=False, missing=str(error), turn_on=error.turn_on or turn_on)
    except SnowdropError as error:
        return Probe(name=name, ok=False, missing=error.message, turn_on=error.next_step or turn_on)
    except (OSError, TimeoutError, subprocess.SubprocessError) as error:
        return Probe(name=name, ok=False, missing=str(error) or type(error).__name__, turn_on=turn_on)
    except Exception as error:  # noqa: BLE001 (one broken probe must not hide the others)
        return Probe(name=name, ok=False, missing=f"{type(error).__name__}: {error}", turn_on=turn_on)


def run_trial(*arguments: str, timeout_s: float = PROBE_S_MAX) -> str:
    """Runs `mount_trial.py` in a process of its own, which takes its namespaces along when it ends.

    Returns what it printed; raises ProbeFailed with its last line.
    """
    script = Path(__file__).with_name("mount_trial.py")
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ProbeFailed(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout.strip()
