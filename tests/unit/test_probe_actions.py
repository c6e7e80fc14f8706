"""The probes of `snowdrop doctor`: they perform, they never raise, and a failure says what to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from descriptors import open_descriptors
from snowdrop.agent.probe import Probe, isolation, machine, run_all, storage
from snowdrop.agent.probe.base import ProbeFailed, perform, run_trial
from snowdrop.agent.sandbox.limits import Resource
from snowdrop.domain.errors import SandboxError


def test_all_probes_answer_and_leave_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    state = tmp_path / "state" / "not-made-yet"
    probes = {probe.name: probe for probe in run_all(state)}
    assert {"sandbox", "seccomp", "memory limit", "fuse", "erofs", "accelerators"} <= probes.keys()
    for probe in probes.values():
        assert probe.found if probe.ok else probe.missing, probe
    for name in ("sandbox", "fuse", "erofs"):
        assert probes[name].ok or probes[name].turn_on
    assert probes["kernel"].ok
    assert probes["descriptor passing"].ok
    assert probes["sealed memory"].ok
    assert list(tmp_path.iterdir()) == []
    assert open_descriptors() <= before


@pytest.mark.parametrize(
    ("error", "turn_on"),
    [
        (ProbeFailed("gone", "do this"), "do this"),
        (SandboxError("gone", next_step="do that"), "do that"),
        (OSError(2, "gone"), "else"),
        (TimeoutError("gone"), "else"),
        (subprocess.TimeoutExpired("gone", 1), "else"),
        (ZeroDivisionError("gone"), "else"),
    ],
)
def test_no_failure_escapes_and_each_says_what_to_do(error: Exception, turn_on: str) -> None:
    def action() -> str:
        raise error

    probe = perform("name", action, "else")
    assert (probe.ok, probe.turn_on) == (False, turn_on)
    assert "gone" in probe.missing


def test_a_failed_trial_is_told_in_its_own_words() -> None:
    with pytest.raises(ProbeFailed, match=r"No such file|Operation not permitted"):
        run_trial("erofs", "/nonexistent/image", "/nonexistent")


def test_without_cgroups_the_fallback_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "find_trees", lambda _instance: ())
    probe = perform("cpu limit", lambda: isolation.cgroup(Resource.CPU))
    assert "cpu not bounded" in probe.missing
    assert "Delegate=yes" in probe.turn_on


def test_a_sandbox_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def inside(_code: str, _bwrap: str) -> tuple[str, str]:
        return "bwrap: Operation not permitted", ""

    monkeypatch.setattr(isolation, "_run_inside", inside)
    for action in (isolation.sandbox, isolation.seccomp):
        probe = perform("sandbox", action)
        assert "Operation not permitted" in probe.missing
        assert "unsafe-no-sandbox" in probe.turn_on


def test_missing_erofs_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "which", lambda _name: None)
    assert "erofs-utils" in perform("erofs", storage.erofs).turn_on


def test_a_full_disk_is_not_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "DISK_FREE_BYTES_MIN", 1 << 62)
    probe: Probe = perform("disk", lambda: storage.disk_space(tmp_path))
    assert not probe.ok
    assert "--state" in probe.turn_on


def test_memory_limit_is_at_most_what_a_cgroup_says() -> None:
    limit = storage.memory_limit_bytes()
    assert limit is None or limit > 0
    assert "GB" in storage.memory()


def test_cpu_flags() -> None:
    assert "avx2" in machine._cpu_flags("processor : 0\nflags\t\t: fpu avx avx2\n")
    assert machine._cpu_flags("nothing") == frozenset()


def test_a_user_namespace_is_made_or_refused_with_a_reason() -> None:
    probe = perform("user namespaces", isolation.user_namespace, "sysctl")
    assert probe.ok or probe.turn_on == "sysctl"
