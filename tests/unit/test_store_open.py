"""Opening a store: one owner, no file of somebody else, and disks that are full or cannot be written."""

import contextlib
import os
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from money import T0, Store, cell

from proxy_usage.errors import StoreBusy, StoreError, StoreForeign, StoreFull, StoreLocked, StoreUnavailable
from proxy_usage.store import Batch, Database, Fate
from proxy_usage.store.audits import Audits
from proxy_usage.store.schema import APPLICATION_ID, VERSION, Lock, connect_readonly

OWNER = """
import sys
from pathlib import Path
from proxy_usage.store import Database
database = Database(Path(sys.argv[1]))
print("owned", flush=True)
sys.stdin.read()
"""


@contextmanager
def other_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that owns the store until it is killed or its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "owned\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_who_owns_the_store(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with other_process(path) as process:
        for _ in range(2):  # a refused attempt must not disturb what the lock file says
            with pytest.raises(StoreLocked, match=f"in use by pid {process.pid} on host ") as caught:
                Database(path)
            assert caught.value.hint
        connect_readonly(path).close()  # looking is allowed


def test_a_killed_owner_leaves_the_store_free(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with other_process(path) as process:
        process.kill()
        process.wait()
        Database(path).close()


def test_the_same_process_cannot_own_a_store_twice_and_can_own_it_again(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    first = Database(path)
    with pytest.raises(StoreLocked):
        Database(path)
    first.close()
    first.close()
    Database(path).close()


def test_a_store_is_made_with_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "usage.db"
    Database(path).close()
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()


def test_turns_are_written_through_to_the_disk(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        assert store.rows("PRAGMA synchronous") == [(2,)]  # FULL


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE precious(x)")
    db.close()
    before = path.read_bytes()
    for _ in range(2):  # the refusal gives the lock up
        with pytest.raises(StoreForeign, match="a database of another program") as caught:
            Database(path)
        assert "store.path" in caught.value.hint
    assert path.read_bytes() == before
    with pytest.raises(StoreForeign, match="not a store"):
        connect_readonly(path)


@pytest.mark.parametrize("content", [b"not a database, but long enough to be read" * 200, b"\0" * 4096])
def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "usage.db"
    path.write_bytes(content)
    with pytest.raises(StoreForeign, match="not a database"):
        Database(path)
    assert path.read_bytes() == content


def test_a_store_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    Database(path).close()
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={VERSION + 1}")
    db.close()
    with pytest.raises(
        StoreForeign, match=f"schema version {VERSION + 1}, this program knows up to {VERSION}"
    ):
        Database(path)


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.add(*(f"t{number}" for number in range(500)))
        store.rows("PRAGMA wal_checkpoint(TRUNCATE)")
        path = store.path
    content = bytearray(path.read_bytes())
    content[4096:] = b"\x5a" * (len(content) - 4096)
    path.write_bytes(bytes(content))
    with pytest.raises(StoreForeign, match="damaged"):
        Store(tmp_path)


def test_there_is_nothing_to_read_where_no_store_is(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store at"):
        connect_readonly(tmp_path / "usage.db")
    assert list(tmp_path.iterdir()) == []


def unusable(tmp_path: Path) -> Iterator[Path]:
    """Places where nobody, not even root, can make a store."""
    (tmp_path / "file").write_text("")
    yield tmp_path / "file" / "usage.db"
    (tmp_path / "directory.db").mkdir()
    yield tmp_path / "directory.db"
    yield Path("/proc/usage/usage.db")


def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    for path in unusable(tmp_path):
        with pytest.raises(StoreUnavailable, match=str(path.parent)) as caught:
            Database(path)
        assert caught.value.hint
        assert caught.value.retriable


def test_a_store_that_became_read_only_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        ids = store.add("alpha")
        store.db.execute("PRAGMA query_only=1")  # SQLITE_READONLY, as on a remounted disk
        with pytest.raises(StoreUnavailable, match="readonly"):
            store.add("beta")
        with pytest.raises(StoreUnavailable, match="waits to be opened anew"):
            store.batch()
        store.database.reopen()
        assert [event.id for event in store.batch().events] == ids


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow past a size: writing fails as it does on a disk with a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill(store: Store, made: list[str], at_once: int = 50) -> None:
    """Closes windows until the store refuses."""
    for number in range(100_000):
        cells = [cell((1, 0, 0, 0), id=id_) for id_ in range(at_once)]
        made += [event.id for event in store.close_window(*cells, now_ms=T0 + number)]


def test_a_disk_that_takes_no_more_refuses_the_turn_and_takes_it_later(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        made: list[str] = []
        with file_size_limit(1 << 20), pytest.raises(StoreError) as caught:
            fill(store, made)
        assert caught.value.retriable
        assert caught.value.hint
        assert len(made) >= 50
        store.database.reopen()
        assert store.fates() == {"pending": len(made)}
        store.check_tallies()
        made += store.add("after")
    with Store(tmp_path) as store:
        assert [row[0] for row in store.rows("SELECT id FROM events ORDER BY seq")] == made


def test_a_store_at_its_own_limit_is_full(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=1 << 20) as store:
        with pytest.raises(StoreFull, match="is full") as caught:
            fill(store, [])
        assert "store.max_bytes" in caught.value.hint
        assert caught.value.retriable


def test_a_full_store_can_still_be_emptied(tmp_path: Path) -> None:
    with Store(tmp_path, max_bytes=1 << 20) as store:
        made: list[str] = []
        with pytest.raises(StoreFull):
            fill(store, made, at_once=1)  # until not even a page is left
        while isinstance(batch := store.lease(), Batch):
            fates = {event.seq: Fate("delivered", 200) for event in batch.events}
            store.queue.settle(batch, fates, T0)
        assert store.fates() == {"delivered": len(made)}
        store.check_tallies()
        store.add("after")


def test_a_store_reached_by_a_link_has_the_same_owner(tmp_path: Path) -> None:
    with contextlib.closing(Database(tmp_path / "usage.db")):
        (tmp_path / "link.db").symlink_to(tmp_path / "usage.db")
        with pytest.raises(StoreLocked):
            Database(tmp_path / "link.db")


def test_a_lock_is_taken_anew_where_another_disk_was_mounted_in_place(tmp_path: Path) -> None:
    with contextlib.closing(Database(tmp_path / "usage.db")) as database:
        database.reopen()
        (tmp_path / "usage.db.lock").rename(tmp_path / "former")
        database.reopen()
        with pytest.raises(StoreLocked):
            Database(tmp_path / "usage.db")
        # Somebody else was quicker: nothing of the file is touched any more.
        (tmp_path / "usage.db.lock").unlink()
        other = Lock(tmp_path / "usage.db")
        with pytest.raises(StoreUnavailable, match=f"in use by pid {os.getpid()}"):  # and tried again
            database.reopen()
        other.release()
        database.reopen()


def moved(path: Path, to: Path) -> None:
    """As a disk that is unmounted, or mounted: the store and all that belongs to it."""
    to.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(to / file.name)


def test_a_store_that_is_not_there_any_more_is_not_made_anew(tmp_path: Path) -> None:
    with Store(tmp_path / "disk") as store:
        ids = store.add("alpha")
        moved(store.database.path, tmp_path / "away")
        for _ in range(2):
            with pytest.raises(StoreUnavailable, match="not there any more") as caught:
                store.database.reopen()
            assert caught.value.retriable
            assert list((tmp_path / "disk").iterdir()) == []
            with pytest.raises(StoreUnavailable):
                store.lease()
        (tmp_path / "disk").rmdir()
        moved(tmp_path / "away" / "usage.db", tmp_path / "disk")
        store.database.reopen()
        assert [event.id for event in store.batch().events] == ids


def test_an_empty_file_in_the_place_of_a_store_stays_empty(tmp_path: Path) -> None:
    with Store(tmp_path / "disk") as store:
        store.add("alpha")
        moved(store.database.path, tmp_path / "away")
        store.database.path.touch()
        with pytest.raises(StoreUnavailable, match="not there any more"):
            store.database.reopen()
        assert store.database.path.stat().st_size == 0


def test_another_store_or_an_older_copy_is_not_taken_for_the_one_that_was_open(tmp_path: Path) -> None:
    with Store(tmp_path / "disk") as store:
        Audits(store.database, keep_ms=1).sink(T0)
        store.add("alpha")
        store.database.db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        copy = store.database.path.read_bytes()
        ids = store.add("beta")
        moved(store.database.path, tmp_path / "away")
        store.database.path.write_bytes(copy)
        with pytest.raises(StoreUnavailable, match="older copy: it ends with turn 1, and turn 2 was saved"):
            store.database.reopen()
        assert store.database.path.read_bytes() == copy
        moved(store.database.path, tmp_path / "older")
        with Store(tmp_path / "disk") as other:
            Audits(other.database, keep_ms=1).sink(T0)
            other.add("gamma")
            other.add("delta")
        with pytest.raises(StoreUnavailable, match="another store lies at"):
            store.database.reopen()
        moved(store.database.path, tmp_path / "other")
        (tmp_path / "disk").rmdir()
        moved(tmp_path / "away" / "usage.db", tmp_path / "disk")
        store.database.reopen()
        assert [event.id for event in store.batch().events][-len(ids) :] == ids


def test_a_path_that_leads_elsewhere_is_noticed_by_the_next_transaction(tmp_path: Path) -> None:
    """A disk was mounted over the directory: what is written under it, no later start would find."""
    with Store(tmp_path / "disk") as store:
        ids = store.add("alpha")
        moved(store.database.path, tmp_path / "under")
        with pytest.raises(StoreUnavailable, match="not there any more"):
            store.add("beta")
        with Store(tmp_path / "disk") as other:
            other.add("gamma", "delta")
            log = (tmp_path / "disk" / "usage.db-wal").read_bytes()
            with pytest.raises(StoreUnavailable, match="waits to be opened anew"):
                store.lease()
            with pytest.raises(StoreUnavailable):
                store.database.reopen()
            assert (tmp_path / "disk" / "usage.db-wal").read_bytes() == log != b""
        moved(tmp_path / "disk" / "usage.db", tmp_path / "over")
        (tmp_path / "disk").rmdir()
        moved(tmp_path / "under" / "usage.db", tmp_path / "disk")
        store.database.reopen()
        assert [event.id for event in store.batch().events] == ids


def test_a_store_that_must_be_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="not there any more"):
        Database(tmp_path / "disk" / "usage.db", make=False)
    assert list(tmp_path.iterdir()) == []
    Database(tmp_path / "disk" / "usage.db").close()
    Database(tmp_path / "disk" / "usage.db", make=False).close()


def test_a_place_that_cannot_be_looked_at_is_an_error_of_the_store(tmp_path: Path) -> None:
    """As on a file system that shut itself down: whatever is asked of it, the answer is an error."""
    with Store(tmp_path / "disk") as store:
        ids = store.add("alpha")
        moved(store.database.path, tmp_path / "away")
        (tmp_path / "disk").rmdir()
        (tmp_path / "disk").symlink_to("disk")
        for refused in (store.lease, store.database.reopen, partial(connect_readonly, store.path)):
            with pytest.raises(StoreUnavailable):
                refused()
        with pytest.raises(StoreUnavailable, match="cannot be reached: Too many levels of symbolic links"):
            store.database.reopen()
        (tmp_path / "disk").unlink()
        moved(tmp_path / "away" / "usage.db", tmp_path / "disk")
        store.database.reopen()
        assert [event.id for event in store.batch().events] == ids


@pytest.mark.parametrize("what", ["junk", "foreign", "newer"])
def test_what_is_no_store_of_ours_is_waited_out_like_another_store(tmp_path: Path, what: str) -> None:
    """It may lie there until the right disk is mounted; a start would set it aside."""
    with Store(tmp_path / "disk") as store:
        ids = store.add("alpha")
        moved(store.database.path, tmp_path / "away")
        if what == "junk":
            store.path.write_bytes(b"junk" * 4_096)
        else:
            with contextlib.closing(sqlite3.connect(store.path)) as db:
                db.execute("CREATE TABLE t(a)")
                db.execute(f"PRAGMA application_id={APPLICATION_ID if what == 'newer' else 1}")
                db.execute("PRAGMA user_version=99")
        content = store.path.read_bytes()
        with pytest.raises(StoreUnavailable, match="another store lies at"):
            store.lease()
        with pytest.raises(StoreUnavailable, match=r"the one that was open \(.*usage\.db"):
            store.database.reopen()
        closed = store.db
        for refused in (store.database.reopen, store.database.check_beside):
            with pytest.raises(StoreUnavailable, match="another store lies at") as caught:
                refused()
            assert caught.value.retriable
        assert store.path.read_bytes() == content
        assert store.db is closed  # each try leaves nothing more behind
        moved(store.path, tmp_path / "other")
        (tmp_path / "disk").rmdir()
        moved(tmp_path / "away" / "usage.db", tmp_path / "disk")
        store.database.reopen()
        assert [event.id for event in store.batch().events] == ids


def test_a_store_that_another_program_holds_for_a_while_works_again_by_itself(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.db.execute("PRAGMA busy_timeout=1")
        with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreBusy):
                store.add("alpha")
            other.execute("ROLLBACK")
        store.add("beta")


def test_a_store_that_was_set_aside_may_have_a_successor_made(tmp_path: Path) -> None:
    """The process ended between the two."""
    path = tmp_path / "usage.db"
    Database(path).close()
    path.rename(tmp_path / "usage.db.aside-20261122T052452Z")
    Database(path, make=False).close()
    assert path.exists()
