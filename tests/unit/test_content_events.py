from pathlib import Path

from snowdrop.content.diskio import DiskIo
from snowdrop.content.events import EVENTS_MAX, ContentEvent, EventLog


def event(chunk: int, kind: str = "quarantined") -> ContentEvent:
    return ContentEvent(
        time_unix_ns=chunk,
        kind="replaced" if kind == "replaced" else "quarantined",
        artefact="blake3:" + "0" * 64,
        chunk=chunk,
        digest="1" * 64,
        file="a/b",
        seen_by="load",
    )


def test_events_outlive_the_process_and_stay_bounded(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.open()
    for chunk in range(EVENTS_MAX + 30):
        log.add(event(chunk))
    log.add(event(7, "replaced"))
    assert log.counts == {"quarantined": EVENTS_MAX + 30, "replaced": 1}
    again = EventLog(path)
    again.open()
    assert again.recent() == log.recent()
    assert len(again.recent()) == EVENTS_MAX == len(path.read_bytes().splitlines())
    assert again.counts == {"quarantined": EVENTS_MAX - 1, "replaced": 1}


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.add(event(1))
    log.add(event(2))
    good = path.read_bytes()
    path.write_bytes(b"\xff\xfe{\n" + good[:-20] + b"\n" + good[-20:] + b"[]\n{}\n")
    again = EventLog(path)
    again.open()
    assert [found.chunk for found in again.recent()] == [1]


class FullDisk(DiskIo):
    def create(self, path: Path, size: int, mode: int) -> None:
        raise OSError(28, "full")


def test_a_full_disk_loses_no_count_and_stops_nobody(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", FullDisk())
    log.add(event(1))
    assert log.counts == {"quarantined": 1, "replaced": 0}
