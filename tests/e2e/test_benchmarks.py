"""The weights benchmarks still run: ours and the raw limit, tiny, without peers. Their figures here are noise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN_S_MAX = 240.0

pytestmark = pytest.mark.e2e


def report_of(folder: Path, name: str, *words: str) -> dict[str, Any]:
    shared = ["--gib", "0.002", "--rounds", "1", "--warmups", "0", "--without-peers", "--scratch", str(folder)]
    out = folder / "out.json"
    command = [sys.executable, "-m", "benchmarks", name, *shared, "--json", str(out), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_S_MAX, check=False)
    assert done.returncode == 0, done.stderr
    left = [path.name for path in folder.iterdir() if path.is_dir()]
    assert left == [], "the scratch folder is gone"
    files = sorted(folder.glob("out*.json"))
    return {path.stem: msgspec.json.decode(path.read_bytes()) for path in files}


def value(report: dict[str, Any], contestant: str, metric: str) -> float:
    found = [
        cell["median"]
        for cell in report["results"]
        if (cell["contestant"], cell["metric"]) == (contestant, metric)
    ]
    assert len(found) == 1, report["results"]
    return float(found[0])


def test_weights_local_reads_from_disk_and_then_from_memory(tmp_path: Path) -> None:
    report = report_of(tmp_path, "weights_local")["out"]
    assert value(report, "snowdrop", "origin_mib") == 0
    for contestant in ("snowdrop", "snowdrop load_file"):
        assert value(report, contestant, "cold_s") > 0
        assert value(report, contestant, "again_s") > 0
    assert value(report, "raw O_DIRECT", "cold_s") > 0


def test_weights_origin_loads_over_http_and_s3_and_restarts_from_disk(tmp_path: Path) -> None:
    words = ["--links", "loopback", "--server", "python", "--only", "snowdrop", "snowdrop s3"]
    report = report_of(tmp_path, "weights_origin", *words)["out"]
    for contestant in ("snowdrop", "snowdrop s3"):
        assert 0 < value(report, contestant, "first_s") <= value(report, contestant, "all_s")
    assert value(report, "raw C client", "all_s") > 0
    assert value(report, "snowdrop", "restart_origin_mib") == 0


def test_weights_dedupe_says_what_is_moved(tmp_path: Path) -> None:
    report = report_of(tmp_path, "weights_dedupe", "--cases", "re-shard", "--gib", "0.02")["out-re-shard"]
    for metric in ("pushed_share", "fetched_share"):
        assert 0 <= value(report, "snowdrop", metric) < value(report, "files", metric) <= 1
        assert value(report, "ideal", metric) == 0
