"""Helpers for end-to-end tests: the platform's commands and calls."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from snowdrop.cli.client import Client
from snowdrop.domain.errors import SnowdropError
from snowdrop.domain.layout import StateLayout
from snowdrop.domain.receipt import Receipt
from snowdrop.wire.api import DeploymentView, Description

SERVICES = Path(__file__).parent / "e2e" / "services"
SNOWDROP = Path(sys.executable).with_name("snowdrop")
COMMAND_S_MAX = 120.0
WAIT_S_MAX = 30.0


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for unix sockets."""
    folder = Path(tempfile.mkdtemp(prefix="sd-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class CommandError(AssertionError):
    """A command ended with an error; `error` is its typed body."""

    def __init__(self, words: tuple[str, ...], code: int, output: str, errors: str) -> None:
        super().__init__(f"{words} ended with {code}: {output} {errors}")
        self.code = code
        try:
            self.error: dict[str, Any] = json.loads(output)["error"]
        except (ValueError, KeyError):
            self.error = {}


class Platform:
    """A running platform; `with` starts and stops it."""

    def __init__(self, state: Path, *up: str) -> None:
        self.state = state
        self.url = ""
        self._up = up
        self._deployed: set[str] = set()

    def __enter__(self) -> Platform:
        try:
            self.up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.run("down")
        assert not list(self.run_folder.glob("r/*.sock")), "replicas' sockets are left"

    def up(self) -> None:
        self.url = self.run("up", "--port", "0", *self._up)["gateway_url"]

    @property
    def run_folder(self) -> Path:
        return self.state / "run"

    def run(self, *words: str) -> Any:
        """A command's JSON; raises CommandError."""
        done = subprocess.run(
            [SNOWDROP, "--state", str(self.state), "--json", *words],
            check=False,
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
        )
        if done.returncode:
            raise CommandError(words, done.returncode, done.stdout, done.stderr)
        return json.loads(done.stdout) if done.stdout.strip() else None

    def deploy(self, target: str, name: str) -> dict[str, Any]:
        """Deploys `service.py:Class` of tests/e2e/services under `name`."""
        self._deployed.add(name)
        found: dict[str, Any] = self.run("deploy", str(SERVICES / target), "--name", name)
        return found

    def note_deployed(self, name: str) -> None:
        """To be deleted with the others."""
        self._deployed.add(name)

    def ask(self, kind: Any, *path: str, **query: Any) -> Any:
        """What a command would print of control's answer, without a process for it: for what is asked again and
        again. Raises CommandError."""
        try:
            found = Client(StateLayout(self.state), "default").get(kind, *path, **query)
        except SnowdropError as error:
            told = msgspec.json.encode({"error": error.body()}).decode()
            raise CommandError(path, 1, told, str(error)) from error
        return json.loads(msgspec.json.encode(found))

    def view(self, name: str) -> dict[str, Any]:
        return next(view for view in self.ask(list[DeploymentView], "deployments") if view["name"] == name)

    def describe(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(Description, "deployments", name)
        return found

    def replicas(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.describe(name)["replicas"]
        return found

    def receipts(self, name: str, *, at_least: int = 0) -> list[dict[str, Any]]:
        """Newest first, once `at_least` are written: an answer may be there before its replica's receipt."""

        def found() -> list[dict[str, Any]] | None:
            made: list[dict[str, Any]] = self.ask(list[Receipt], "receipts", deployment=name, limit=20)
            return made if len(made) >= at_least else None

        if not at_least:
            return found() or []
        written: list[dict[str, Any]] = wait_until(found, f"{at_least} receipts of {name}")
        return written

    def pids(self) -> dict[str, int]:
        found: dict[str, int] = json.loads((self.run_folder / "platform.json").read_text())["pids"]
        return found

    def kill(self, process: str) -> int:
        """kill -9 of one of the platform's processes; its pid."""
        pid = self.pids()[process]
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_agent(self) -> None:
        """kill -9 of the agent; returns when the next one answers."""
        old = self.kill("agent")

        def answers() -> bool:
            try:
                return self.pids()["agent"] != old and bool(self.run("store", "stats"))
            except CommandError:
                return False

        wait_until(answers, "the agent is started again")

    def delete_all(self) -> None:
        for name in sorted(self._deployed):
            try:
                self.run("delete", name)
            except CommandError as failed:
                if failed.error.get("kind") != "not_found":
                    raise
        self._deployed.clear()


def wait_until(condition: Callable[[], Any], what: str, *, wait_s_max: float = WAIT_S_MAX) -> Any:
    """The first true value of `condition`; an AssertionError that says `what` if it takes too long."""
    limit_s = time.monotonic() + wait_s_max
    while time.monotonic() < limit_s:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {wait_s_max:g} s: {what}")


def session() -> aiohttp.ClientSession:
    """A session whose calls are bounded."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=WAIT_S_MAX * 2)
    )
