"""Room: what a store occupies, where new usage ends, and how the reserve gets it out of a full disk."""

import random
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from money import HOUR_MS, MINUTE_MS, T0, Store, cell, key, turn

from proxy_usage.errors import StoreFull
from proxy_usage.store import Batch, Fate, Measure, Merger, OutputSlot, Retention
from proxy_usage.store.reader import Reader
from proxy_usage.store.space import MAX_SHARE, MIN_LIMIT, Reserve, Space

MIB = 1 << 20
LIMIT = 16 * MIB


def keep(store: Store) -> Measure:
    return store.database.space.keep(store.db)


def occupied(store: Store) -> int:
    """What the files really take."""
    return sum(
        path.stat().st_size
        for path in store.path.parent.glob("usage.db*")
        if path.suffix in (".db", ".db-wal", ".reserve")
    )


def add(store: Store, tenants: int, minute: int = 0) -> None:
    """One window for each of so many tenants: two events of each."""
    cells = [
        cell((1, 10, 0, 0), key=key(f"t{number}"), window_ms=T0 + minute * MINUTE_MS)
        for number in range(tenants)
    ]
    store.checkpoints.commit(turn(*cells, counted=(tenants, 10 * tenants, 0, 0)), store.mint, T0)


def fill(store: Store, tenants: int = 50) -> int:
    """Adds usage until the store refuses it. Returns how many windows it took."""
    for minute in range(1_000_000):
        try:
            add(store, tenants, minute)
        except StoreFull:
            return minute
    raise AssertionError("a store without end")


def conserved(store: Store) -> None:
    with Reader(store.path) as reader:
        found = reader.conservation(deep=True)
    assert found.differences == ()
    assert found.balanced


def roll_and_merge(store: Store) -> int:
    """Makes all the room there is. Returns how many rows and events became fewer."""
    keeper = Retention(
        store.database,
        ledger_max_bytes=1 << 30,
        keep_delivered_ms=HOUR_MS,
        keep_sums_ms=HOUR_MS,
        keep_held_ms=HOUR_MS,
    )
    total = 0
    while rolled := keeper.roll(T0, short=True):
        total += rolled
    merger, done = Merger(store.database, store.mint), False
    while not done:
        progress = merger.step(T0)
        total, done = total + progress.merged, progress.done
    return total


# --- the reserve ----------------------------------------------------------------------------------


def test_the_reserve_is_really_allocated_and_can_be_given_up_once(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "usage.db.reserve")
    assert reserve.size == 0
    assert reserve.make(MIB)
    assert reserve.size == MIB
    assert reserve.path.stat().st_blocks * 512 >= MIB
    assert reserve.give_up()
    assert not reserve.give_up()
    assert list(tmp_path.iterdir()) == []


def test_where_space_cannot_be_allocated_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr("os.posix_fallocate", refuse)
    reserve = Reserve(tmp_path / "usage.db.reserve")
    assert reserve.make(3 * MIB + 5)
    assert reserve.size == 3 * MIB + 5
    assert reserve.path.stat().st_blocks * 512 >= 3 * MIB
    assert any(reserve.path.read_bytes()[:4_096])


@pytest.mark.parametrize(
    ("limit", "share"), [(8 << 30, MAX_SHARE), (512 * MIB, 64 * MIB), (LIMIT, 2 * MIB), (1, MIN_LIMIT // 8)]
)
def test_the_reserve_is_an_eighth_and_at_most_64_mib(tmp_path: Path, limit: int, share: int) -> None:
    assert Space(tmp_path / "usage.db", limit).share == share


def test_the_reserve_is_made_at_the_first_look_and_counts(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=LIMIT) as store:
        assert not (tmp_path / "usage.db.reserve").exists()
        measure = keep(store)
        assert (tmp_path / "usage.db.reserve").stat().st_size == measure.reserve == LIMIT // 8
        assert measure.limit == LIMIT
        assert measure.occupied == measure.file + measure.wal + measure.reserve
        assert measure.used == measure.file - measure.free
        assert measure.room == LIMIT - LIMIT // 8 - LIMIT // 8 - LIMIT // 16
    with Store(tmp_path, max_bytes=2 * LIMIT) as store:  # a larger one is made anew
        assert keep(store).reserve == LIMIT // 4


# --- the limit ------------------------------------------------------------------------------------


def test_a_store_never_takes_more_than_its_limit(tmp_path: Path) -> None:
    dice = random.Random(7)
    with Store(tmp_path, max_bytes=LIMIT) as store:
        most, minute, refused = 0, 0, 0
        while refused < 30:
            keep(store)
            minute += 1
            try:
                add(store, dice.randrange(10, 200), minute)
            except StoreFull:
                refused += 1
            if dice.random() < 0.1 and isinstance(batch := store.lease(T0), Batch):
                fates = {event.seq: Fate("delivered", 200) for event in batch.events}
                store.queue.settle(batch, fates, T0)
            most = max(most, occupied(store))
        assert most <= LIMIT
        assert most >= LIMIT * 3 // 4
        conserved(store)


def test_new_usage_ends_before_what_makes_room_does(tmp_path: Path) -> None:
    """At its limit everything is settled, merged and rolled up without the reserve."""
    with Store(tmp_path, max_bytes=4 * MIB) as store:
        keep(store)
        fill(store)
        assert keep(store).reserve == 4 * MIB // 8
        before = store.fates()["pending"]
        batch = store.batch(events=100)
        store.queue.settle(batch, {event.seq: Fate("delivered", 200) for event in batch.events}, T0)
        assert roll_and_merge(store) >= before * 3 // 4
        conserved(store)
        assert keep(store).reserve == 4 * MIB // 8
        assert fill(store) > 5
        assert occupied(store) <= 4 * MIB


def test_the_reserve_is_given_up_when_even_that_finds_no_room_and_comes_back(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=4 * MIB) as store:
        keep(store)
        fill(store)
        with pytest.raises(StoreFull), store.database.transaction() as db:  # not new usage: into the headroom
            db.execute("INSERT INTO meta VALUES('large', ?)", ("x" * MIB,))
        assert store.database.space.reserve.size == 0
        with store.database.transaction() as db:  # now it is there to be used
            db.execute("INSERT INTO meta VALUES('large', ?)", ("x" * (600 << 10),))
        measure = keep(store)
        assert measure.reserve == 0  # its place is taken
        with pytest.raises(StoreFull):
            add(store, 50, 1_000_000)
        with store.database.transaction() as db:
            db.execute("DELETE FROM meta WHERE name='large'")
        assert keep(store).wasteful
        keeper = Retention(
            store.database, ledger_max_bytes=1, keep_delivered_ms=1, keep_sums_ms=1, keep_held_ms=1
        )
        while keep(store).wasteful and keeper.vacuum():
            continue
        assert keep(store).reserve == 4 * MIB // 8
        assert occupied(store) <= 4 * MIB


def test_a_reader_that_holds_the_log_is_named_and_the_limit_kept(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=LIMIT) as store:
        keep(store)
        add(store, 10)
        reader = sqlite3.connect(f"file:{store.path}?mode=ro", uri=True, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM meta").fetchall()
        fill(store)
        with pytest.raises(StoreFull, match="write-ahead log"):
            add(store, 50)
        assert occupied(store) <= LIMIT
        reader.close()
        add(store, 50, 200_000)
        assert (tmp_path / "usage.db-wal").stat().st_size <= LIMIT // 8
        conserved(store)


def test_a_smaller_limit_than_what_is_there_refuses_and_shrinks(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=LIMIT) as store:
        for minute in range(60):
            add(store, 60, minute)
    with Store(tmp_path, max_bytes=2 * MIB) as store:
        keep(store)
        with pytest.raises(StoreFull):
            add(store, 50, 100)
        assert roll_and_merge(store) > 0
        keeper = Retention(
            store.database, ledger_max_bytes=1, keep_delivered_ms=1, keep_sums_ms=1, keep_held_ms=1
        )
        while keep(store).wasteful and keeper.vacuum():
            continue
        store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        keep(store)
        add(store, 50, 100)
        assert occupied(store) <= 2 * MIB
        conserved(store)


# --- a disk that is full --------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def take_all(place: Path) -> Path:
    """Somebody else's file, as large as the disk allows."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    continue
            except OSError:
                continue
    return filler


def test_on_a_full_disk_nothing_can_be_removed_without_the_reserve(disk: Path) -> None:
    """What the reserve is for: SQLite's own behaviour, so that a change of it is noticed."""
    with Store(disk) as store:
        add(store, 200)
        store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        take_all(disk)
        for statement in ("DELETE FROM deliveries", "UPDATE events SET minted_ms=0"):
            with pytest.raises(sqlite3.OperationalError, match="full"):
                store.db.execute(statement)


def test_on_a_full_disk_the_reserve_lets_go_on_what_makes_room(disk: Path) -> None:
    with Store(disk, outputs=(OutputSlot(0, "billing"),)) as store:
        for minute in range(20):
            add(store, 100, minute)
        assert keep(store).reserve == 2 * MIB  # an eighth of the disk, which is smaller than the limit
        store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        filler = take_all(disk)
        minute = fill(store) + 1_000
        assert store.database.space.reserve.size == 0
        conserved(store)
        # New usage does not get what the reserve held.
        with pytest.raises(StoreFull):
            add(store, 2_000, minute)
        batch = store.batch(events=100)
        store.queue.settle(batch, {event.seq: Fate("delivered", 200) for event in batch.events}, T0)
        assert roll_and_merge(store) > 3_000
        conserved(store)
        # What was freed within the file is room for new usage, while the disk is as full as before.
        add(store, 50, minute)
        measure = keep(store)
        assert measure.reserve == 0
        filler.unlink()
        assert keep(store).reserve == 2 * MIB
        add(store, 2_000, minute + 1)
        conserved(store)


def test_the_reserve_is_not_made_and_unmade_in_turn(disk: Path) -> None:
    with Store(disk) as store:
        assert keep(store).reserve == 2 * MIB
        filler = take_all(disk)
        assert keep(store).reserve == 0  # the disk is short
        assert keep(store).reserve == 0  # though as much is free as it takes

        def leave(free: int) -> None:
            size = filler.stat().st_size
            with filler.open("r+b") as file:
                file.truncate(size - free)

        leave(MIB * 3 // 4)
        assert keep(store).reserve == 0
        leave(MIB // 2)
        assert keep(store).reserve == 2 * MIB
        assert keep(store).reserve == 2 * MIB


def test_a_disk_without_room_for_the_reserve_is_no_reason_to_stop(disk: Path) -> None:
    taken = disk / "taken"
    taken.write_bytes(bytes(13 * MIB))
    with Store(disk) as store:
        assert keep(store).reserve == 0
        add(store, 100)
        conserved(store)
