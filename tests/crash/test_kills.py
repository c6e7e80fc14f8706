"""The process is killed at every call that changes the disk, and a new one takes over in the same boot.

The page cache lives on, so everything that was done is there; what the earlier process had proven may be believed.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from crash_disk import RecordingIo
from crash_work import BLOCK_BYTES, WORKLOADS, Model, Work, bring_held, small_model
from test_crash_points import NoSync, found_files, places_right

from snowdrop.content.disk import DiskTier
from snowdrop.content.diskio import DiskIo
from snowdrop.content.landing import Landing

BOOT = "the one boot"


class Killed(BaseException):
    """No handler may hold it up: a kill asks nobody."""


class KillingIo(RecordingIo):
    """Dies at the call number `at`; a write is then half done."""

    def __init__(self, root: Path, at: int) -> None:
        super().__init__(root)
        self.at = at
        self.calls = 0

    def fail(self, call: str, path: Path, size: int) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise Killed

    def write(self, fd: int, view: memoryview, offset: int) -> None:
        try:
            super().write(fd, view, offset)
        except Killed:
            DiskIo.write(self, fd, view[: len(view) // 8192 * 4096], offset)
            raise


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snowdrop.content.behind.BLOCK_BYTES_MAX", BLOCK_BYTES)


def run(root: Path, name: str, at: int, models: list[Model]) -> bool:
    """The workload up to the call `at`, within one boot; whether it was killed there."""
    root.mkdir()
    work = Work(KillingIo(root, at), models, random.Random(name), boot=BOOT, is_one_boot=True)
    try:
        work.start()
        WORKLOADS[name](work)
    except Killed:
        return True
    finally:
        work.stop()
    return False


def check(root: Path, models: list[Model]) -> int:
    """Takes over; returns how many files were believed without being read."""
    tier = DiskTier(root, 1 << 30, NoSync(), boot_id=BOOT)
    tier.open()
    believed = 0
    for model in models:
        if not tier.has(model.digest):
            continue
        landing = tier.open_landing(model.digest, model.manifest)
        believed += check_tree(landing, model)
        for chunk in range(len(model.chunks)):
            assert places_right(landing, model, chunk) or not landing.holds(chunk)
        assert not bring_held(landing, model)
        check_tree(landing, model)
        for chunk, data in enumerate(model.chunks):
            landing.write(chunk, memoryview(data))
        landing.sync()
        assert landing.is_complete
        assert found_files(landing.tree) == model.files
    tier.close()
    return believed


def check_tree(landing: Landing, model: Model) -> int:
    found = found_files(landing.tree)
    for path, data in found.items():
        assert data == model.files[path]
    return len(found)


@pytest.mark.parametrize("name", ["plain", "eviction", "repair", "sharing", "resumed"])
def test_a_kill_at_any_call_leaves_nothing_wrong_and_what_was_proven_stays(tmp_path: Path, name: str) -> None:
    first = small_model(1)
    models = [first, small_model(1001, first.chunks[3])]
    believed = []
    at, was_killed = 1, True
    while was_killed:
        root = tmp_path / f"{at}"
        was_killed = run(root, name, at, models)
        try:
            believed.append(check(root, models))
        except AssertionError as error:
            raise AssertionError(f"killed at call {at} of {name}") from error
        shutil.rmtree(root)
        at += 1 if name == "plain" else 5
    assert len(believed) > 20
    assert believed[-1] >= len(first.files)
