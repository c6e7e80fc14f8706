"""The agent's journal: numbers are never given twice, and nothing is half stored."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from platform_helpers import NODE, replica_key
from snowdrop.domain.ids import ReplicaId
from snowdrop.metering.journal import PENDING_MAX, UsageJournal
from snowdrop.metering.meter import UsageDraft


def draft(replica: str = "rep-1", *, to: int = 10, unit: str = "replica_ns") -> UsageDraft:
    return UsageDraft(key=replica_key(replica), unit=unit, quantity=to, detail="", from_unix_ns=0, to_unix_ns=to)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[UsageJournal]:
    opened = UsageJournal(tmp_path / "usage.db", NODE)
    yield opened
    opened.close()


def test_numbers_go_up_and_are_not_given_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    first = UsageJournal(path, NODE)
    first.append([draft(), draft()])
    assert [r.sequence for r in first.pending()] == [1, 2]
    first.acknowledge(2)
    assert first.pending() == ()
    source = first.source
    first.close()
    second = UsageJournal(path, NODE)
    second.append([draft()])
    (record,) = second.pending()
    second.close()
    assert (record.sequence, record.source, record.node) == (3, source, NODE)


def test_another_journal_has_another_name(tmp_path: Path) -> None:
    names = set()
    for number in range(2):
        opened = UsageJournal(tmp_path / f"{number}.db", NODE)
        names.add(opened.source)
        opened.close()
    assert len(names) == 2


def test_what_is_not_acknowledged_is_sent_again(journal: UsageJournal) -> None:
    journal.append([draft(to=n) for n in (1, 2, 3)])
    before = journal.pending()
    journal.acknowledge(1)
    assert journal.pending() == before[1:]
    assert [r.to_unix_ns for r in before] == [1, 2, 3]


def test_batches_are_bounded(journal: UsageJournal) -> None:
    journal.append([draft(to=n + 1) for n in range(PENDING_MAX + 5)])
    batch = journal.pending()
    assert len(batch) == PENDING_MAX
    journal.acknowledge(batch[-1].sequence)
    assert len(journal.pending()) == 5


def test_metered_until_follows_replica_time_alone(journal: UsageJournal) -> None:
    replica = ReplicaId("rep-1")
    assert journal.metered_until(replica) == 0
    journal.append([draft(to=40), draft(to=99, unit="content_bytes")])
    assert journal.metered_until(replica) == 40
    assert journal.metered_until(ReplicaId("rep-2")) == 0
    journal.forget(replica)
    assert journal.metered_until(replica) == 0


def test_metered_until_survives_acknowledge_and_restart(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    first = UsageJournal(path, NODE)
    first.append([draft(to=40)])
    first.acknowledge(1)
    first.close()
    second = UsageJournal(path, NODE)
    assert second.metered_until(ReplicaId("rep-1")) == 40
    second.close()


def test_a_batch_is_stored_whole_or_not_at_all(journal: UsageJournal) -> None:
    journal.append([draft("rep-0", to=5)])
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(sqlite3.OperationalError):
        journal.append([draft(f"rep-{n}", to=50) for n in range(2_000)])
    assert len(journal.pending()) == 1
    assert journal.metered_until(ReplicaId("rep-0")) == 5
    journal._db.execute("PRAGMA max_page_count=100000")
    journal.append([draft(to=60)])
    assert len(journal.pending()) == 2


def test_a_batch_that_fails_half_way_leaves_nothing(journal: UsageJournal) -> None:
    """A full disk rolls back by itself; whatever else ends a batch must, too."""
    with pytest.raises(TypeError):
        journal.append([draft(to=50), cast("Any", object())])
    assert journal.pending() == ()
    assert journal.metered_until(ReplicaId("rep-1")) == 0
    journal.append([draft(to=60)])
    assert len(journal.pending()) == 1
