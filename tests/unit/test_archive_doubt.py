"""What an archive says of events that were attempted before: found, never written, or perhaps there twice."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from archives import HOUR_MS, NOON_MS, events, ids, opened, settled, stamped
from money import T0, Store

from proxy_usage.delivery.archive import TAIL, Archive
from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.store import Batch, Queued
from proxy_usage.store.letters import Letters, Wanted
from proxy_usage.store.restore import finish, restore

DELIVERED, AMBIGUOUS = "delivered", "delivered_ambiguous"
SIZE = 60_000
PAST_TAIL = 2 * TAIL // SIZE


def policy() -> Policy:
    return Policy(RetrySettings(500, 60_000, 600_000), below=lambda _: 0)


def resent(one: Archive, sent: Sequence[Queued], first_ms: int, now_ms: int) -> list[str]:
    """The fates of events that are sent again, and were first sent at ``first_ms``."""
    batch = Batch(1, 1, tuple(sent), 1, first_ms, confirm=False, resent=True)
    fates = policy().decide(batch, one.append(batch.events, now_ms), now_ms).fates
    return [fates[event.seq].name for event in sent]


def written(directory: Path, *sent: Sequence[Queued], now_ms: int = NOON_MS) -> None:
    """By a process that ended at ``now_ms``."""
    one = opened(directory)
    for batch in sent:
        assert one.append(batch, now_ms) == settled(*(event.seq for event in batch))
    one.close()
    stamped(directory / "usage.ndjson", now_ms)


def test_what_is_further_back_than_can_be_seen_is_in_doubt_and_what_is_seen_is_not(tmp_path: Path) -> None:
    many = [events(number, size=SIZE) for number in range(PAST_TAIL)]
    written(tmp_path, *many)
    one = opened(tmp_path)
    last = PAST_TAIL - 1
    for sent, fates in (
        (events(0), [AMBIGUOUS]),
        (events(0, last), [AMBIGUOUS, DELIVERED]),
        (events(last - 1), [DELIVERED]),
    ):
        assert resent(one, sent, NOON_MS - HOUR_MS, NOON_MS + HOUR_MS) == fates
    assert ids(tmp_path).count("E0") > 1
    assert ids(tmp_path).count(f"E{last}") == ids(tmp_path).count(f"E{last - 1}") == 1
    one.close()


@pytest.mark.parametrize("openings", [1, 3])
def test_a_crash_before_the_first_byte_leaves_no_doubt_however_late_it_is_found(
    tmp_path: Path, openings: int
) -> None:
    written(tmp_path, events(1))
    for _ in range(openings):
        one = opened(tmp_path)
        one.rotate(NOON_MS)
        assert one.append([], NOON_MS) == settled()
        one.close()
    one = opened(tmp_path)
    assert resent(one, events(2, 3), NOON_MS + 5, NOON_MS + 24 * HOUR_MS) == [DELIVERED] * 2
    assert ids(tmp_path) == ["E1", "E2", "E3"]
    one.close()


@pytest.mark.parametrize("whole", [0, 1])
def test_a_crash_in_the_midst_of_a_batch_leaves_no_doubt(tmp_path: Path, whole: int) -> None:
    """``whole``: so many of its lines are; of the next one there is half."""
    sent = events(2, 3, 4, size=100)
    written(tmp_path, events(1))
    with (tmp_path / "usage.ndjson").open("ab") as file:
        file.write(b"".join(event.body + b"\n" for event in sent[:whole]) + sent[whole].body[:60])
    stamped(tmp_path / "usage.ndjson", NOON_MS + 6)
    one = opened(tmp_path)
    assert resent(one, sent, NOON_MS + 5, NOON_MS + HOUR_MS) == [DELIVERED] * 3
    assert ids(tmp_path) == ["E1", "E2", "E3", "E4"]
    one.close()


def test_a_crash_after_a_file_was_finished_leaves_no_doubt(tmp_path: Path) -> None:
    written(tmp_path, events(1))
    one = opened(tmp_path)
    one.append([], NOON_MS)
    one.rotate(NOON_MS + HOUR_MS)
    assert len(one.finished()) == 1
    one.close()
    stamped(tmp_path / "usage.ndjson", NOON_MS + HOUR_MS)
    one = opened(tmp_path)
    assert resent(one, events(2), NOON_MS + HOUR_MS + 5, NOON_MS + 9 * HOUR_MS) == [DELIVERED]
    one.close()


def test_what_may_be_in_a_file_that_was_taken_away_is_in_doubt(tmp_path: Path) -> None:
    written(tmp_path, events(1))
    one = opened(tmp_path)
    one.append([], NOON_MS)
    one.rotate(NOON_MS + HOUR_MS)
    one.append(events(2), NOON_MS + HOUR_MS)
    one.close()
    (tmp_path / "usage.ndjson").rename(tmp_path / "taken")
    one = opened(tmp_path)
    assert resent(one, events(1, 2), NOON_MS, NOON_MS + 2 * HOUR_MS) == [DELIVERED, AMBIGUOUS]
    one.append(events(3), NOON_MS + 2 * HOUR_MS)
    one.rotate(NOON_MS + 3 * HOUR_MS)
    one.close()
    one.finished()[-1].unlink()
    stamped(tmp_path / "usage.ndjson", NOON_MS + 3 * HOUR_MS)
    one = opened(tmp_path)
    assert resent(one, events(3), NOON_MS + 2 * HOUR_MS, NOON_MS + 3 * HOUR_MS) == [AMBIGUOUS]
    one.close()


def test_an_attempt_that_lies_ahead_says_nothing(tmp_path: Path) -> None:
    written(tmp_path, events(1))
    one = opened(tmp_path)
    assert resent(one, events(2), NOON_MS + HOUR_MS, NOON_MS + 5) == [AMBIGUOUS]
    one.close()


def test_a_first_attempt_is_in_no_doubt(tmp_path: Path) -> None:
    written(tmp_path, events(1))
    one = opened(tmp_path)
    batch = Batch(1, 1, tuple(events(2)), 0, NOON_MS - HOUR_MS, confirm=False)
    (fate,) = policy().decide(batch, one.append(batch.events, NOON_MS), NOON_MS).fates.values()
    assert fate.name == DELIVERED
    one.close()


@pytest.mark.parametrize(("more", "fate", "lines"), [(0, DELIVERED, 1), (PAST_TAIL, AMBIGUOUS, 2)])
def test_what_a_backup_does_not_know_to_be_delivered_is_in_doubt_unless_it_is_found(
    tmp_path: Path, more: int, fate: str, lines: int
) -> None:
    """``more`` events were written after it."""
    place, backup = tmp_path / "archive", tmp_path / "backup"
    backup.mkdir()
    with Store(tmp_path) as store:
        store.add("alpha")
        store.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy(store.path, backup / "usage.db")
        batch = store.batch()
    written(place, batch.events, *(events(number, size=SIZE) for number in range(more)), now_ms=T0 + 5)
    with Store(backup) as store:
        begun = restore(store.database, T0 + 9, wanted=True)
        assert begun is not None
        finish(store.database, begun)
        assert Letters(store.database).replay(Wanted()).taken == 1
        again = store.batch(T0 + 10)
        one = opened(place)
        step = policy().decide(again, one.append(again.events, T0 + 10), T0 + 10)
        store.queue.settle(again, step.fates, T0 + 10)
        one.close()
        assert store.fates() == {fate: 1}
    assert ids(place).count(again.events[0].id) == lines
