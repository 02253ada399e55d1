"""A large store is used before it was read whole; one that somebody doubts is not."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from damage import leaves, overwrite
from money import T0, Store

from proxy_usage.errors import StoreError, StoreForeign
from proxy_usage.service.checking import check_beside
from proxy_usage.store import Database, aside
from proxy_usage.store.schema import translated

TENANTS = [f"tenant-{number}" for number in range(300)]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A sound store with 300 events, closed."""
    with Store(tmp_path) as made:
        made.add(*TENANTS)
        return made.path


def opened(path: Path, at_once_bytes: int = 1_000) -> contextlib.closing[Database]:
    return contextlib.closing(Database(path, aside_ms=T0, at_once_bytes=at_once_bytes))


def mark(path: Path) -> Path:
    return path.with_name(path.name + ".unchecked")


def test_a_small_store_is_read_at_once(store: Path) -> None:
    overwrite(store, leaves(store, "events")[2:3])
    with opened(store, at_once_bytes=store.stat().st_size) as database:
        assert not database.unchecked
        assert aside.files(store) == 1


def test_a_large_one_is_used_first_and_trusted_once_it_was_read(store: Path) -> None:
    with opened(store) as database:
        assert [database.unchecked, mark(store).exists()] == [True, True]
        database.check_beside()
        assert [database.unchecked, mark(store).exists()] == [False, False]
    with opened(store) as database:
        assert database.unchecked  # a start trusts nothing that may have happened since


def test_damage_found_beside_is_set_aside_by_the_next_start(store: Path) -> None:
    overwrite(store, leaves(store, "events")[2:3])
    with opened(store) as database:
        assert database.unchecked
        with pytest.raises(StoreForeign, match="damaged"):
            database.check_beside()
    assert mark(store).exists()
    with opened(store) as database:
        assert not database.unchecked
        assert aside.files(store) == 1
        assert not mark(store).exists()
        assert database.db.execute("SELECT count(*) FROM events").fetchone() == (0,)


def test_damage_met_while_running_is_set_aside_by_the_next_start(store: Path) -> None:
    overwrite(store, leaves(store, "events")[2:3])
    with opened(store) as database:
        database._doubt.settle()
        with pytest.raises(StoreForeign), database.reading() as db:
            db.execute("SELECT sum(length(body)) FROM events").fetchone()
    with opened(store):
        assert aside.files(store) == 1


def test_a_start_that_ended_before_the_check_makes_the_next_one_check(store: Path) -> None:
    with opened(store) as database:
        assert database.unchecked
    with opened(store) as database:
        assert not database.unchecked
        assert aside.files(store) == 0
        assert not mark(store).exists()


def test_a_check_that_is_stopped_leaves_the_doubt(store: Path) -> None:
    with Store(store.parent) as large:
        large.db.execute("CREATE TABLE ballast(x)")
        large.db.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<20000)"
            " INSERT INTO ballast SELECT randomblob(3000) FROM n"
        )
    with opened(store) as database:
        raised: list[BaseException] = []

        def check() -> None:
            try:
                database.check_beside()
            except StoreError as error:
                raised.append(error)

        thread = threading.Thread(target=check)
        thread.start()
        while thread.is_alive():
            database.stop_checking()
            time.sleep(0.001)
        thread.join()
        assert [str(error) for error in raised] == [f"store {store}: interrupted"]
        assert database.unchecked
        assert mark(store).exists()


def test_a_check_that_is_stopped_before_it_began_reads_nothing(store: Path) -> None:
    with opened(store) as database:
        database.stop_checking()
        with pytest.raises(StoreError, match="interrupted"):
            database.check_beside()
        assert database.unchecked
        assert mark(store).exists()


class Endless(Database):
    """Whose check begins to read when it was told to stop, and ends if it is told so again.

    (Or at some time, so that a test fails instead of hanging.)
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, aside_ms=T0, at_once_bytes=1_000)
        self.connected, self.stopped = threading.Event(), threading.Event()

    def check_beside(self) -> None:
        self._beside = sqlite3.connect(":memory:", check_same_thread=False)
        self.connected.set()
        assert self.stopped.wait(60)
        time.sleep(0.02)
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 100000000)"
        with translated(self.path), contextlib.closing(self._beside):
            self._beside.execute(f"{numbers} SELECT count(*) FROM n").fetchone()
        self.unchecked = False

    def stop_checking(self) -> None:
        super().stop_checking()
        self.stopped.set()


async def test_a_stop_that_comes_before_the_check_reads_does_not_wait_for_all_of_it(store: Path) -> None:
    with contextlib.closing(Endless(store)) as database:
        stage = asyncio.create_task(check_beside(database))
        while not database.connected.is_set():
            await asyncio.sleep(0.001)
        stage.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stage
        assert database.unchecked


async def test_the_stage_goes_on_when_all_is_well_and_ends_when_not(store: Path) -> None:
    with opened(store) as database:
        stage = asyncio.create_task(check_beside(database))
        while database.unchecked:
            await asyncio.sleep(0.01)
        assert not stage.done()
        stage.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await stage
    overwrite(store, leaves(store, "events")[2:3])
    with opened(store) as database, pytest.raises(StoreForeign):
        await check_beside(database)
