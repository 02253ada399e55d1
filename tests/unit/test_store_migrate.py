"""Older stores are brought forward step by step, each whole or not at all; other versions are refused."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import leaves, overwrite
from money import T0, Store
from old_stores import made_old
from structlog.testing import capture_logs

from proxy_usage.errors import StoreError, StoreVersion
from proxy_usage.intake import Source
from proxy_usage.store import Checkpoints, Database, aside
from proxy_usage.store.migrate import HISTORY, STEPS, History
from proxy_usage.store.reader import Reader
from proxy_usage.store.schema import VERSION

OLD = VERSION
NEW = VERSION + 2


class Crash(Exception):
    """The process ends here."""


def first(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE events ADD COLUMN colour TEXT NOT NULL DEFAULT 'none'")


def second(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE colours(name TEXT PRIMARY KEY) WITHOUT ROWID")
    db.execute("INSERT INTO colours SELECT DISTINCT colour FROM events")


LATER = History(NEW, {OLD: first, OLD + 1: second})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of the oldest version, with two events."""
    with Store(tmp_path) as store:
        store.add("alpha", "beta")
        return store.path


def version(path: Path) -> int:
    db = sqlite3.connect(path)
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return found


def test_there_is_a_step_for_every_version_there_ever_was() -> None:
    assert (HISTORY.newest, HISTORY.steps) == (VERSION, STEPS)
    assert sorted(STEPS) == list(range(1, VERSION))


@pytest.mark.parametrize("aside_ms", [None, T0])
def test_an_older_store_is_brought_forward_when_it_is_opened(path: Path, aside_ms: int | None) -> None:
    with capture_logs() as logs:
        database = Database(path, history=LATER, aside_ms=aside_ms)
    assert database.db.execute("SELECT colour FROM events").fetchall() == [("none",), ("none",)]
    assert database.db.execute("SELECT name FROM colours").fetchall() == [("none",)]
    database.close()
    assert version(path) == NEW
    assert [(line["event"], line["version"]) for line in logs] == [
        ("store is migrated", OLD),
        ("store migrated", OLD + 1),
        ("store migrated", NEW),
    ]
    assert "copy of the file" in logs[0]["hint"]
    assert aside.files(path) == 0


def test_a_store_of_the_newest_version_is_left_as_it_is(path: Path) -> None:
    Database(path, history=LATER).close()
    with capture_logs() as logs:
        Database(path, history=LATER).close()
    assert logs == []


def test_a_new_store_is_of_the_newest_version(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    Database(path, history=LATER).close()
    assert version(path) == NEW


@pytest.mark.parametrize("step", [OLD, OLD + 1])
def test_a_crash_within_a_step_leaves_the_version_before_it_and_the_next_opening_goes_on(
    path: Path, step: int
) -> None:
    steps: dict[int, Callable[[sqlite3.Connection], None]] = dict(LATER.steps)
    whole = steps[step]

    def cut_short(db: sqlite3.Connection) -> None:
        whole(db)
        raise Crash

    steps[step] = cut_short
    with pytest.raises(Crash):
        Database(path, history=History(NEW, steps))
    assert version(path) == step
    database = Database(path, history=LATER)
    assert database.db.execute("SELECT colour FROM events").fetchall() == [("none",), ("none",)]
    assert database.db.execute("SELECT name FROM colours").fetchall() == [("none",)]
    database.close()
    assert version(path) == NEW


def test_a_step_that_fails_says_so_and_changes_nothing(path: Path) -> None:
    def impossible(db: sqlite3.Connection) -> None:
        first(db)
        db.execute("ALTER TABLE nowhere ADD COLUMN x")

    with pytest.raises(StoreError, match="no such table: nowhere"):
        Database(path, history=History(OLD + 1, {OLD: impossible}))
    assert version(path) == OLD
    Database(path).close()


def test_a_version_without_a_way_forward_is_refused_and_left_alone(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(
        StoreVersion, match=f"version {OLD}, which this program cannot bring to {NEW}"
    ) as caught:
        Database(path, history=History(NEW, {OLD + 1: second}), aside_ms=T0)
    assert caught.value.hint
    assert path.read_bytes() == before
    assert aside.files(path) == 0


def test_programs_and_readers_of_before_refuse_what_is_newer(path: Path) -> None:
    Database(path, history=LATER).close()
    for aside_ms in (None, T0):
        with pytest.raises(
            StoreVersion, match=f"schema version {NEW}, this program knows up to {OLD}"
        ) as caught:
            Database(path, aside_ms=aside_ms)
        assert "newer version" in caught.value.hint
    with pytest.raises(StoreVersion, match=f"schema version {NEW}, this program knows up to {OLD}") as caught:
        Reader(path)
    assert "the version of proxy-usage that the service runs" in caught.value.hint
    assert aside.files(path) == 0


def test_readers_refuse_what_is_older_and_say_who_brings_it_forward(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={VERSION - 1}")
    db.close()
    with pytest.raises(StoreVersion, match=f"schema version {VERSION - 1}, this program reads") as caught:
        Reader(path)
    assert "start the service once" in caught.value.hint


def test_a_damaged_store_is_not_migrated_but_set_aside(path: Path) -> None:
    overwrite(path, leaves(path, "events"))
    database = Database(path, history=LATER, aside_ms=T0)
    assert database.db.execute("SELECT count(*) FROM events").fetchone() == (0,)
    database.close()
    assert [note.at_ms for note in aside.notes(path)] == [T0]
    assert version(aside.notes(path)[0].path) == OLD
    assert version(path) == NEW


@pytest.mark.parametrize("version", [1, 2])
def test_counts_by_node_alone_become_those_of_a_log_without_a_name(tmp_path: Path, version: int) -> None:
    path = tmp_path / "old.db"
    Database(path).close()
    made_old(path, version)
    database, fresh = Database(path), Database(tmp_path / "new.db")
    checkpoints = Checkpoints(database, max_held=1)
    assert checkpoints.recover().intake == {Source("edge-1"): 7, Source("edge-2"): 9}
    schema = "SELECT type, name, sql FROM sqlite_master ORDER BY type, name"
    assert database.db.execute(schema).fetchall() == fresh.db.execute(schema).fetchall()
    database.close()
    fresh.close()
