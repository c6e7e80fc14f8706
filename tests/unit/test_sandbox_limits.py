"""Limits: what is written for each cgroup version, where groups go, what falls to rlimits, sweeping."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from snowdrop.agent.sandbox import cgroups, detect
from snowdrop.agent.sandbox.cgroups import CgroupBackend, CgroupTree, find_roots, read_oom_kills, settings_for
from snowdrop.agent.sandbox.detect import (
    CgroupMount,
    candidate_bases,
    detect_limits,
    parse_mountinfo,
    parse_own_cgroups,
)
from snowdrop.agent.sandbox.limits import (
    ALL_RESOURCES,
    CombinedLimits,
    Resource,
    RlimitBackend,
    rlimits_for,
)
from snowdrop.domain.errors import SandboxError
from snowdrop.domain.ids import ReplicaId
from snowdrop.domain.service import ResourceSpec

SPEC = ResourceSpec(memory_bytes_max=1 << 30, cpus=1.5, pids_max=100)
REPLICA = ReplicaId("rep-1")


def _kernel_files(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    """Makes plain folders behave like cgroups: a new one has files, and goes with them."""
    mkdir = Path.mkdir

    def make(self: Path, *args: object, **more: object) -> None:
        mkdir(self, *args, **more)  # type: ignore[arg-type]
        for name, text in files.items():
            (self / name).write_text(text)

    monkeypatch.setattr(Path, "mkdir", make)
    monkeypatch.setattr(cgroups, "_rmdir", shutil.rmtree)


V2_FILES = {
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "memory.max": "",
    "memory.swap.max": "",
    "memory.oom.group": "",
    "memory.events": "low 0\noom 1\noom_kill 0\n",
    "cpu.max": "",
    "pids.max": "",
}


def test_v2_group_is_limited_attached_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("")
    _kernel_files(monkeypatch, V2_FILES)
    backend = CgroupBackend(CgroupTree(version=2, base=tmp_path, controllers=ALL_RESOURCES), "x")
    group = backend.create(REPLICA, SPEC)
    path = tmp_path / "snowdrop-x" / "rep-1"
    assert (path / "memory.max").read_text() == str(1 << 30)
    assert (path / "memory.swap.max").read_text() == "0"
    assert (path / "cpu.max").read_text() == "150000 100000"
    assert (path / "pids.max").read_text() == "100"
    group.attach([42])
    assert group.members() == {42}
    assert not group.oom_killed()
    (path / "memory.events").write_text("oom_kill 2\n")
    assert group.oom_killed()
    group.close()
    group.close()
    assert not path.exists()


def test_v1_settings_limit_memory_and_swap_together() -> None:
    tree = CgroupTree(version=1, base=Path("/x"), controllers=frozenset({Resource.MEMORY, Resource.CPU}))
    written = {setting.file: setting.value for setting in settings_for(tree, SPEC)}
    assert written == {
        "memory.limit_in_bytes": str(1 << 30),
        "memory.memsw.limit_in_bytes": str(1 << 30),
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "150000",
    }


def test_a_limit_that_cannot_be_set_leaves_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kernel_files(monkeypatch, {"cgroup.procs": ""})  # no pids.max
    tree = CgroupTree(version=1, base=tmp_path, controllers=frozenset({Resource.PIDS}))
    with pytest.raises(SandboxError, match="rep-1"):
        CgroupBackend(tree, "x").create(REPLICA, SPEC)
    assert list((tmp_path / "snowdrop-x").glob("rep-*")) == []


def test_a_group_that_another_backend_made_is_removed_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kernel_files(monkeypatch, {"cgroup.procs": "", "cpu.cfs_period_us": "", "cpu.cfs_quota_us": ""})
    trees = [
        CgroupTree(version=1, base=tmp_path / name, controllers=frozenset({which}))
        for name, which in (("cpu", Resource.CPU), ("pids", Resource.PIDS))
    ]
    for tree in trees:
        tree.base.mkdir()
    combined = CombinedLimits([CgroupBackend(tree, "x") for tree in trees])
    with pytest.raises(SandboxError):
        combined.create(REPLICA, SPEC)
    assert list(tmp_path.rglob("rep-1")) == []


def test_sweep_finds_groups_of_an_earlier_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "old.scope" / "snowdrop-x" / "rep-9"
    other = tmp_path / "snowdrop-y" / "rep-8"
    for path in (elsewhere, other):
        path.mkdir(parents=True)
    monkeypatch.setattr(cgroups, "_rmdir", shutil.rmtree)
    monkeypatch.setattr(cgroups, "hierarchy_root", lambda base: base)
    tree = CgroupTree(version=2, base=tmp_path, controllers=ALL_RESOURCES)
    assert CgroupBackend(tree, "x").sweep() == 1
    assert not elsewhere.exists()
    assert other.exists()


def test_sweep_kills_what_a_killed_agent_left() -> None:
    limits = detect_limits(f"sweep-{os.getpid()}")
    if "cgroup" not in limits.describe:
        pytest.skip("no cgroup here")
    group = limits.create(REPLICA, SPEC)
    with subprocess.Popen(["sleep", "600"]) as process:
        group.attach([process.pid])
        assert process.pid in group.members()
        # The zombie is reaped by Popen only, so the group may outlive one sweep by its process.
        assert limits.sweep() >= 0
        assert process.wait(timeout=20) == -9
    limits.sweep()
    roots = [root for root in Path("/sys/fs/cgroup").iterdir() if root.is_dir()]
    assert [found for root in roots for found in find_roots(root, f"snowdrop-sweep-{os.getpid()}")] == []


def test_detection_leaves_nothing_and_bounds_all_that_it_names() -> None:
    limits = detect_limits(f"detect-{os.getpid()}")
    assert Resource.MEMORY in limits.bounds
    roots = [root for root in Path("/sys/fs/cgroup").iterdir() if root.is_dir()]
    assert [found for root in roots for found in find_roots(root, f"snowdrop-detect-{os.getpid()}")] == []


def test_without_cgroups_everything_falls_to_rlimits_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_trees", lambda *_: ())
    limits = detect_limits("x", own_uid=False)
    assert limits.bounds == {Resource.MEMORY}
    assert "RLIMIT_DATA" in limits.describe
    assert "cpu not bounded" in limits.describe
    assert "pids not bounded" in limits.describe


def test_a_configured_parent_is_the_only_place_tried(tmp_path: Path) -> None:
    assert detect.find_trees("x", tmp_path) == ()


def test_rlimits_set_on_a_process_are_what_it_has() -> None:
    backend = RlimitBackend(falls_here=frozenset({Resource.MEMORY, Resource.PIDS}))
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            backend.create(REPLICA, SPEC).attach([process.pid])
            assert resource.prlimit(process.pid, resource.RLIMIT_DATA) == (1 << 30, 1 << 30)
            assert resource.prlimit(process.pid, resource.RLIMIT_NPROC) == (100, 100)
            assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0)
        finally:
            process.kill()
    with pytest.raises(SandboxError, match="died"):
        backend.create(REPLICA, SPEC).attach([process.pid])


def test_processes_are_counted_by_rlimit_only_for_a_uid_of_their_own() -> None:
    assert resource.RLIMIT_NPROC not in rlimits_for(SPEC, ALL_RESOURCES, own_uid=False)
    assert resource.RLIMIT_DATA not in rlimits_for(SPEC, frozenset(), own_uid=True)


MOUNTINFO = """\
30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw
33 30 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
short line
"""


def test_mountinfo() -> None:
    v2, cpu = parse_mountinfo(MOUNTINFO)
    assert (v2.version, v2.mount_point) == (2, Path("/sys/fs/cgroup/unified"))
    assert (cpu.version, cpu.root) == (1, "/docker/abc")
    assert {"cpu", "cpuacct"} <= cpu.controllers


def test_own_cgroups() -> None:
    own = parse_own_cgroups("4:cpu,cpuacct:/a\n3:memory:/b:c\n0::/user.slice/x.scope\n")
    assert own == {"cpu": "/a", "cpuacct": "/a", "memory": "/b:c", "": "/user.slice/x.scope"}


def test_candidates_are_our_own_place_then_beside_it_then_the_top(tmp_path: Path) -> None:
    (tmp_path / "user.slice" / "x.scope").mkdir(parents=True)
    mount = CgroupMount(version=2, mount_point=tmp_path, root="/", controllers=frozenset())
    bases = list(candidate_bases(mount, "/user.slice/x.scope"))
    assert bases == [tmp_path / "user.slice" / "x.scope", tmp_path / "user.slice", tmp_path]
    inside = CgroupMount(version=1, mount_point=tmp_path, root="/docker/abc", controllers=frozenset())
    assert list(candidate_bases(inside, "/docker/abc")) == [tmp_path]
    assert list(candidate_bases(mount, "/not/here")) == [tmp_path]


@pytest.mark.parametrize(
    ("text", "count"),
    [("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3), ("low 0\noom 7\noom_kill 0\n", 0), ("", 0)],
)
def test_oom_counter(tmp_path: Path, text: str, count: int) -> None:
    (tmp_path / "events").write_text(text)
    assert read_oom_kills(tmp_path / "events") == count
    assert read_oom_kills(tmp_path / "none") == 0
