"""A store from a backup sends nothing by itself, knows what it cannot know, and goes on metering."""

import shutil
from pathlib import Path

import pytest
from inner_sink import InnerSink, settings
from made_store import START, MadeStore
from wire import http_row

from proxy_usage.errors import StoreError
from proxy_usage.service.build import open_storage
from proxy_usage.store import Fate, Idle
from proxy_usage.store import restore as restore_module
from proxy_usage.store.reader import Reader
from proxy_usage.store.restore import Restored, finish, restore

LATER = START + 3_600_000


def waiting(path: Path) -> MadeStore:
    """Ten events at two outputs: some sent, one a dead letter, the others waiting; and an open window."""
    store = MadeStore(path, ("billing", "mirror"))
    for number in range(10):
        store.use(f"tenant-{number}", 1 + number, 0)
    store.close_windows()
    batch = store.send(4)
    store.queue.postpone(batch.id, START, "503 away")
    store.answer(store.send(1, output=1), Fate("dead", 200, "not_accepted"))
    store.use("open", 3, 0)
    store.turn()
    return store


def letters(path: Path) -> list[tuple[str, str, str]]:
    with Reader(path) as reader:
        assert reader.conservation(deep=True).balanced
        return [(one.output, one.reason, one.answer) for one in reader.dead_letters(limit=1_000)]


def test_all_that_waits_becomes_a_dead_letter_before_anything_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with waiting(path) as store:
        begun = restore(store.database, LATER, wanted=True)
        assert begun == Restored(LATER, 19, done=False)
        for slot in store.slots:
            leased = store.queue.lease(slot.output, LATER, events=10, max_bytes=1 << 20, linger_ms=0)
            assert leased == Idle(None)
        found = letters(path)
        assert found.count(("billing", "restored", "was sent, attempts that failed: 1: 503 away")) == 4
        assert found.count(("billing", "restored", "was waiting")) == 6
        assert found.count(("mirror", "restored", "was waiting")) == 9
        assert found.count(("mirror", "not_accepted", "")) == 1
        assert len(store.windows) == 1
        assert store.close_windows()  # what is open goes on
        assert letters(path) == found


@pytest.mark.parametrize("steps", range(4))
def test_a_start_that_was_cut_short_is_gone_on_with_though_nobody_says_so_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    path = tmp_path / "usage.db"
    monkeypatch.setattr(restore_module, "STEP", 5)
    with waiting(path) as store:
        store.database.db.execute(
            "CREATE TEMP TRIGGER crash BEFORE INSERT ON main.dead"
            f" WHEN (SELECT count(*) FROM main.dead) > {2 + 5 * steps}"
            " BEGIN SELECT RAISE(ABORT, 'the process ends here'); END"
        )
        with pytest.raises(StoreError, match="ends here"):
            restore(store.database, LATER, wanted=True)
        store.database.db.execute("DROP TRIGGER crash")
        assert len(letters(path)) == 1 + 5 * steps
        begun = restore(store.database, LATER + 1, wanted=False)
        assert begun == Restored(LATER, 19, done=False)
        assert len(letters(path)) == 20
        assert finish(store.database, begun) == Restored(LATER, 19, done=True)
        assert restore(store.database, LATER + 2, wanted=False) is None
        with Reader(path) as reader:
            assert reader.status().restored == Restored(LATER, 19, done=True)


def test_a_store_that_is_not_from_a_backup_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with waiting(path) as store:
        assert restore(store.database, LATER, wanted=False) is None
        assert len(letters(path)) == 1
        with Reader(path) as reader:
            assert reader.status().restored is None


def row(tenant: str) -> object:
    return http_row(tags={"project_name": tenant})


@pytest.mark.parametrize("newer_counts", [False, True], ids=["file and store of one copy", "file is newer"])
def test_a_backup_says_nothing_of_losses(tmp_path: Path, newer_counts: bool) -> None:
    """The process went on after the copy was made: no difference of counts is a loss."""
    live, copy = tmp_path / "live", tmp_path / "copy"
    live.mkdir()
    with InnerSink(live) as sink:
        sink.read(*[row("alpha")] * 3)
        sink.close_all()
        sink.read(*[row("beta")] * 2)
        sink.turn()
        shutil.copytree(live, copy)
        sink.read(*[row("alpha")] * 4)
        sink.close_all()
    if newer_counts:
        shutil.copy(live / "usage.db.intake", copy)
    config = settings(copy)
    storage = open_storage(config, from_backup=True)
    try:
        assert storage.past.restored is not None
        assert storage.past.restored.done
        assert storage.past.restored.events > 0
        assert storage.loss.rows == {}
        assert storage.loss.unknown == ("envoy-1",)
        assert len(storage.recovered.cells) == 1
    finally:
        storage.close()
    with Reader(config.store.path) as reader:
        status = reader.status()
        assert status.crash_unknown == {"envoy-1": 1}
        assert status.crash_lost == {}
        assert status.outputs[0].pending == 0
        assert {one.reason for one in reader.dead_letters()} == {"restored"}
        assert reader.conservation(deep=True).balanced
    storage = open_storage(config)  # from here on it is exact again
    try:
        assert storage.past.restored is None
        assert (storage.loss.rows, storage.loss.unknown) == ({}, ())
    finally:
        storage.close()
