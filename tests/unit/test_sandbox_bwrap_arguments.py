"""Pure parts of the bubblewrap launcher: options, environments, uids, exit codes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from snowdrop.agent.sandbox.bubblewrap import UidPool, exit_status
from snowdrop.agent.sandbox.bwrap_arguments import Privileges, bwrap_options, drop_prefix
from snowdrop.agent.sandbox.environment import Environment, _outermost
from snowdrop.agent.sandbox.launcher import LaunchSpec, Mount, Output, replica_entry, resolve_entry
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId

SPEC = LaunchSpec(
    replica=ReplicaId("rep-1"),
    entry=replica_entry("/venv/bin/python"),
    output=Output(stdout_fd=1, stderr_fd=2),
    mounts=(Mount(source=9, target="/models/m"), Mount(source=Path("/data/out"), target="/out", read_only=False)),
    env={"A": "b c"},
)
ENVIRONMENT = Environment(python="/venv/bin/python", folders=(Path("/srv/u/venv"),))


def _options(privileges: Privileges) -> list[str]:
    return bwrap_options(SPEC, ENVIRONMENT, privileges, (b"one", b"two"), lambda _name, _content: 77)


def _pairs(options: list[str], name: str, count: int) -> list[list[str]]:
    return [options[at + 1 : at + 1 + count] for at, word in enumerate(options) if word == name]


def test_a_root_agent_s_replica_keeps_only_what_dropping_needs() -> None:
    options = _options(Privileges(drop_to=700_001))
    assert "--unshare-user" not in options
    assert _pairs(options, "--cap-drop", 1) == [["ALL"]]
    assert {name for (name,) in _pairs(options, "--cap-add", 1)} == {"CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"}
    assert "700001" in drop_prefix(Privileges(drop_to=700_001))


def test_a_rootless_replica_gets_a_user_namespace_and_no_capability() -> None:
    options = _options(Privileges(drop_to=None))
    assert {"--unshare-user", "--disable-userns"} <= set(options)
    assert "--cap-add" not in options
    assert drop_prefix(Privileges(drop_to=None)) == ()


def test_mounts_come_after_their_parents_and_before_the_root_is_closed() -> None:
    options = _options(Privileges(drop_to=None))
    assert ["9", "/models/m"] in _pairs(options, "--ro-bind-fd", 2)
    assert ["/data/out", "/out"] in _pairs(options, "--bind", 2)
    assert ["/srv/u/venv"] * 2 in _pairs(options, "--ro-bind", 2)
    closed = max(at for at, word in enumerate(options) if word == "--remount-ro" and options[at + 1] == "/")
    assert options.index("/srv/u") < options.index("/srv/u/venv") < closed
    assert ["A", "b c"] in _pairs(options, "--setenv", 2)


def test_every_filter_is_installed() -> None:
    assert len(_pairs(_options(Privileges(drop_to=None)), "--add-seccomp-fd", 1)) == 2


def test_descriptor_numbers_are_filled_in() -> None:
    assert resolve_entry(SPEC, {"lifecycle": 12})[-2:] == ("--fd", "12")


def test_folders_inside_others_are_mounted_once() -> None:
    folders = [Path("/usr/lib/py"), Path("/a/b"), Path("/a"), Path("/a/b/c"), Path("/")]
    assert _outermost(folders) == (Path("/a"),)


def test_uids_are_not_shared_and_come_back() -> None:
    pool = UidPool(base=10, count=2)
    assert [pool.take(), pool.take()] == [10, 11]
    with pytest.raises(SandboxError, match="in use"):
        pool.take()
    pool.give_back(10)
    assert pool.take() == 10


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, (0, None)),
        (3, (3, None)),
        (128, (128, None)),
        (255, (255, None)),
        (137, (None, signal.SIGKILL)),
        (-9, (None, signal.SIGKILL)),
    ],
)
def test_exit_codes(code: int, expected: tuple[int | None, int | None]) -> None:
    status = exit_status(code, oom_killed=False)
    assert (status.code, status.signal) == expected


def test_an_oom_kill_of_a_helper_process_does_not_explain_another_end() -> None:
    assert not exit_status(1, oom_killed=True).oom_killed
    assert exit_status(137, oom_killed=True).oom_killed
