"""The parts of the benchmarks that can be wrong without being slow."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from benchmarks import checkpoint, harness, links, plot
from benchmarks.harness import Contestant, Metric, PeerError, Results, Round

from snowdrop.content.safetensors import Header, read_header

TINY_GIB = 0.001
METRICS = (Metric(name="all_s", better="lower", plot=True),)


def header(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return read_header(lambda offset, length: os.pread(fd, length, offset), size, where=str(path))
    finally:
        os.close(fd)


def test_a_checkpoint_has_the_tensors_and_the_size_that_were_asked_for(tmp_path: Path) -> None:
    tensors = checkpoint.model(0.1)
    assert len(tensors) == 291
    assert sum(tensor.size for tensor in tensors) == pytest.approx(0.1 * (1 << 30), rel=0.1)
    made = checkpoint.write(tmp_path / "made", checkpoint.model(TINY_GIB), shards=2)
    found = [entry.name for path in made.files for entry in header(path).tensors]
    assert len(made.files) == 2
    assert found == [tensor.name for tensor in checkpoint.model(TINY_GIB)]


def test_other_shards_hold_the_same_tensors_and_other_seeds_do_not(tmp_path: Path) -> None:
    tensors = checkpoint.model(TINY_GIB)
    two = checkpoint.write(tmp_path / "two", tensors, shards=2)
    five = checkpoint.write(tmp_path / "five", tensors, shards=5)
    other = checkpoint.write(tmp_path / "other", checkpoint.model(TINY_GIB, seed="other"), shards=2)
    assert two.checksum == five.checksum
    assert two.checksum != other.checksum


def options(*words: str) -> harness.Options:
    return harness.options(harness.parser("test", rounds=2, warmups=0), words)


def test_a_peer_that_fails_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[str] = []

    def fails() -> Round:
        turns.append("peer")
        raise PeerError("it needs what this machine lacks")

    contestants = [Contestant(name="raw", run=lambda: {"all_s": 1.0}), Contestant(name="peer", run=fails)]
    results = harness.measure(contestants, METRICS, options())
    report = harness.publish("test", results, [], options(), baseline="raw")
    assert turns == ["peer"]
    assert report.missing == {"peer": "it needs what this machine lacks"}
    assert "it needs what this machine lacks" in capsys.readouterr().out
    assert results.values("raw", "all_s") == [1.0, 1.0]


def test_a_plot_has_a_bar_for_each_contestant_as_long_as_its_value(tmp_path: Path) -> None:
    results = Results(METRICS)
    results.rounds = {"a < b": [{"all_s": 2.0}], "snowdrop": [{"all_s": 1.0}], "no value": [{}]}
    drawn = tmp_path / "drawn.svg"
    harness.publish("test", results, [], options("--plot", str(drawn)), baseline="snowdrop")
    root = ET.fromstring(drawn.read_text())
    bars = {
        element.get("fill"): float(element.get("width", "0"))
        for element in root.iter("{http://www.w3.org/2000/svg}rect")
        if element.get("fill") != "#ffffff"
    }
    assert bars[plot.OTHER] == pytest.approx(2 * bars[plot.OWN])
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a < b" in texts
    assert "no value" not in texts


def test_the_parts_of_a_report_have_files_of_their_own(tmp_path: Path) -> None:
    chosen = options("--json", str(tmp_path / "out.json"))
    assert harness.part(chosen, "loopback").json == tmp_path / "out-loopback.json"
    assert harness.part(chosen, "loopback").plot is None


def test_a_link_is_named_by_bandwidth_and_round_trip() -> None:
    assert links.parse_shape("2000:5") == links.Shape(mbit_s=2000, rtt_ms=5)
    assert links.parse_shape("2000:5").bytes_per_s == 250e6
    with pytest.raises(ValueError, match="negative"):
        links.parse_shape("-1:5")


def test_namespaces_of_benchmarks_that_are_gone_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(links, "_remove", removed.append)
    netns, proc = tmp_path / "netns", tmp_path / "proc"
    for name in ("sdbench-17-c", "sdbench-17-s", "sdbench-18-c", "other-17-c", "sdbench-x-c"):
        (netns / name).mkdir(parents=True)
    (proc / "18").mkdir(parents=True)
    links._remove_left_over(netns, proc)
    assert sorted(removed) == ["sdbench-17-c", "sdbench-17-s"]
