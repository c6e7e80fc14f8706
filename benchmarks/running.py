"""A real platform for a benchmark: started in a temporary state folder, stopped and removed afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from snowdrop.domain.layout import StateLayout
from snowdrop.domain.replica import ReplicaState
from snowdrop.wire.api import Deployed, Description, Info

COMMAND_S_MAX = 120.0
READY_S_MAX = 60.0


class Platform:
    """The command line of one running platform."""

    def __init__(self, layout: StateLayout) -> None:
        self.layout = layout
        self.gateway = ""

    def command(self, *arguments: str) -> bytes:
        """Runs `snowdrop ARGUMENTS --json`; raises RuntimeError with what it said if it fails."""
        program = Path(sys.executable).parent / "snowdrop"
        command = [str(program), "--state", str(self.layout.root), *arguments, "--json"]
        # Settings of whoever runs the benchmark are not to be measured.
        env = {name: value for name, value in os.environ.items() if not name.startswith("SNOWDROP_")}
        done = subprocess.run(command, env=env, capture_output=True, timeout=COMMAND_S_MAX, check=False)
        if done.returncode != 0:
            said = (done.stdout + done.stderr).decode(errors="replace")
            raise RuntimeError(f"`snowdrop {' '.join(arguments)}` failed: {said}")
        return done.stdout

    def up(self, *arguments: str) -> None:
        info = msgspec.json.decode(self.command("up", "--port", "0", *arguments), type=Info)
        self.gateway = info.gateway_url.removeprefix("http://")

    def deploy(self, service: Path, name: str) -> Deployed:
        """Deploys and waits until a replica is ready; the service must have scale.min of at least 1."""
        deployed = msgspec.json.decode(self.command("deploy", str(service), "--name", name), type=Deployed)
        limit_s = time.monotonic() + READY_S_MAX
        while self.describe(name).view.ready == 0:
            if time.monotonic() > limit_s:
                raise TimeoutError(f"{name} was not ready in {READY_S_MAX:g} s")
            time.sleep(0.2)
        return deployed

    def describe(self, name: str) -> Description:
        return msgspec.json.decode(self.command("describe", name), type=Description)

    def replica_socket(self, name: str) -> Path:
        """The unix socket of the deployment's first replica that is ready."""
        ready = [replica for replica in self.describe(name).replicas if replica.state is ReplicaState.READY]
        return Path(ready[0].socket_path)

    def gateway_pids(self) -> list[int]:
        """The gateway's process and its workers."""
        running = msgspec.json.decode(self.layout.platform.read_bytes(), type=_Running)
        return with_children(running.pids["gateway"])


class _Running(msgspec.Struct):
    pids: dict[str, int]


@contextmanager
def running_platform(*arguments: str, config: str = "") -> Iterator[Platform]:
    """`snowdrop up ARGUMENTS` while inside, with `config` as its settings file."""
    folder = Path(tempfile.mkdtemp(prefix="snowdrop-bench-"))
    platform = Platform(StateLayout(folder))
    platform.layout.config.write_text(config)
    try:
        platform.up(*arguments)
        yield platform
    finally:
        platform.command("down")
        shutil.rmtree(folder)


def with_children(pid: int) -> list[int]:
    """A process and its direct children (proc(5): children of its main thread)."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [pid, *map(int, listed.split())]


def cpu_ns(pids: list[int]) -> int:
    """CPU time that the main threads of `pids` have used (proc(5): schedstat)."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids)
