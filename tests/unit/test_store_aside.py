"""A store that cannot be used makes room for a fresh one: whole, under another name, and nothing is lost."""

import sqlite3
from pathlib import Path

import pytest
from damage import leaves, overwrite
from inner_sink import InnerSink
from money import T0, Store
from wire import http_row

from proxy_usage.errors import StoreForeign, StoreUnavailable, StoreVersion
from proxy_usage.intake import by_node
from proxy_usage.store import Database, aside
from proxy_usage.store.reader import Reader
from proxy_usage.store.schema import VERSION

NAME = "usage.db.aside-20261122T000000Z"
TENANTS = [f"tenant-{number}" for number in range(300)]


def made(tmp_path: Path) -> Path:
    """A sound store with 300 events, closed."""
    with Store(tmp_path) as store:
        store.add(*TENANTS)
        return store.path


def header(path: Path) -> None:
    overwrite(path, [1])


def zeroes(path: Path) -> None:
    path.write_bytes(bytes(8192))


def text(path: Path) -> None:
    path.write_text("this was never a database, and it is long enough to be read as one " * 200)


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def a_leaf(path: Path) -> None:
    overwrite(path, leaves(path, "events")[4:5])


def an_index(path: Path) -> None:
    overwrite(path, leaves(path, "deliveries")[:1])


def another_program(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE precious(x)")
    db.execute("PRAGMA application_id=7")
    db.close()


DAMAGES = [header, zeroes, text, half, a_leaf, an_index, another_program]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_that_cannot_be_used_lies_aside_byte_for_byte(tmp_path: Path, damage: object) -> None:
    path = made(tmp_path)
    assert callable(damage)
    damage(path)
    before = path.read_bytes()
    with Store(tmp_path, aside_ms=T0) as store:
        assert store.add("fresh")
        (note,) = aside.notes(path)
        assert note.path.name == NAME
        assert note.at_ms == T0
        assert str(path) in note.reason
        assert aside.files(path) == 1
    assert (tmp_path / NAME).read_bytes() == before


def test_a_sound_store_stays_where_it_is(tmp_path: Path) -> None:
    path = made(tmp_path)
    database = Database(path, aside_ms=T0)
    assert database.db.execute("SELECT count(*) FROM events").fetchone() == (300,)
    database.close()
    assert aside.notes(path) == []
    assert aside.files(path) == 0


def test_a_store_of_a_newer_version_is_refused_and_stays(tmp_path: Path) -> None:
    path = made(tmp_path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version={VERSION + 1}")
    db.close()
    before = path.read_bytes()
    with pytest.raises(StoreVersion, match=f"version {VERSION + 1}") as caught:
        Database(path, aside_ms=T0)
    assert "newer version" in caught.value.hint
    assert path.read_bytes() == before
    assert aside.files(path) == 0


def test_a_place_that_cannot_be_used_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    path.mkdir()
    with pytest.raises(StoreUnavailable):
        Database(path, aside_ms=T0)
    assert path.is_dir()
    assert aside.files(path) == 0


def test_all_that_belongs_to_it_goes_with_it(tmp_path: Path) -> None:
    path = made(tmp_path)
    parts = {suffix: path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", ".intake")}
    for suffix, part in parts.items():
        part.write_text(suffix)
    text(path)
    aside.set_aside(path, "a test", T0)
    assert not any(part.exists() for part in (path, *parts.values()))
    for suffix in parts:
        assert (tmp_path / f"{NAME}{suffix}").read_text() == suffix


def test_nothing_that_lies_aside_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    for number in range(3):  # within one second
        path.write_text(f"damaged {number}")
        aside.set_aside(path, f"reason {number}", T0 + number)
    assert [note.reason for note in aside.notes(path)] == ["reason 0", "reason 1", "reason 2"]
    assert [note.path.read_text() for note in aside.notes(path)] == ["damaged 0", "damaged 1", "damaged 2"]
    assert aside.files(path) == 3


@pytest.mark.parametrize("moved", range(len(aside.MOVED)))
def test_a_move_that_was_cut_short_is_taken_back(tmp_path: Path, moved: int) -> None:
    path = made(tmp_path)
    for suffix in ("-wal", "-shm", ".intake"):
        path.with_name(path.name + suffix).write_text(suffix)
    parts = {part.name: part.read_bytes() for part in tmp_path.iterdir()}
    whole = aside.set_aside(path, "cut short", T0)
    for suffix in aside.MOVED[moved:]:  # as far as it had come
        whole.with_name(whole.name + suffix).rename(path.with_name(path.name + suffix))
    aside.take_back(path)
    assert {part.name: part.read_bytes() for part in tmp_path.iterdir()} == parts


def test_a_move_that_was_completed_is_not_taken_back(tmp_path: Path) -> None:
    path = made(tmp_path)
    aside.set_aside(path, "complete", T0)
    Database(path, aside_ms=T0 + 1).close()
    assert [note.reason for note in aside.notes(path)] == ["complete"]


def test_a_note_that_cannot_be_read_is_a_note(tmp_path: Path) -> None:
    path = made(tmp_path)
    lies = aside.set_aside(path, "a reason", T0)
    lies.with_name(lies.name + aside.NOTE).write_bytes(b"")
    (note,) = aside.notes(path)
    assert note.path == lies
    assert "reason was lost" in note.reason


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"cannot set .*proc.* aside") as caught:
        aside.set_aside(Path("/proc/usage.db"), "a test", T0)
    assert caught.value.hint


def test_check_reads_the_whole_file(tmp_path: Path) -> None:
    path = made(tmp_path)
    overwrite(path, leaves(path, "events")[-1:])
    db = sqlite3.connect(path)
    with pytest.raises(StoreForeign, match="is damaged"):
        aside.check(db, path)
    db.close()


# --- at the start of a service ---------------------------------------------------------------------------


def unknown(sink: InnerSink) -> list[str]:
    """Nodes of which the last start could not say what was lost."""
    return list(sink.storage.loss.unknown)


def row(tenant: str) -> object:
    return http_row(tags={"project_name": tenant})


def test_the_service_goes_on_and_the_store_remembers(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(row("alpha"), node="envoy-1")
        sink.read(row("beta"), node="envoy-2")
        sink.close_all()
    path = sink.config.store.path
    overwrite(path, [1])
    with InnerSink(tmp_path) as sink:
        (adopted,) = sink.storage.past.adopted
        assert adopted.nodes == ("envoy-1", "envoy-2")
        assert sink.storage.loss.rows == {}
        assert unknown(sink) == ["envoy-1", "envoy-2"]
        assert aside.notes(path) == []
        sink.read(row("gamma"), node="envoy-1")
        sink.close_all()
        sink.crash()  # a later start has nothing new to tell
        assert not sink.storage.past.adopted
        assert unknown(sink) == []
        with Reader(path) as reader:
            status = reader.status()
        assert status.crash_unknown == {"envoy-1": 1, "envoy-2": 1}
        assert status.crash_lost == {}
        assert [known.file for known in status.asides] == [adopted.file]
        sink.check_books()


def test_content_that_makes_no_sense_is_damage_though_sqlite_can_read_it(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(row("alpha"))
        sink.turn()
        sink.books.db.execute("UPDATE log SET record=x'c1c1c1'")
    with InnerSink(tmp_path) as sink:
        (adopted,) = sink.storage.past.adopted
        assert "holds what nobody wrote" in adopted.reason
        sink.read(row("alpha"))
        sink.close_all()
        sink.check_books()


def test_a_start_that_ended_between_setting_aside_and_learning_of_it(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(row("alpha"))
        sink.close_all()
    path = sink.config.store.path
    overwrite(path, [1])
    Database(path, aside_ms=T0).close()  # as far as it came
    with InnerSink(tmp_path) as sink:
        assert [known.file for known in sink.storage.past.adopted] == [NAME]
        assert unknown(sink) == ["envoy-1"]


def test_what_the_file_of_counts_of_a_lost_store_says_is_no_loss(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(*[row("alpha")] * 5)
        sink.close_all()
    path = sink.config.store.path
    for part in tmp_path.glob("usage.db*"):
        if part.suffix != ".intake":
            part.unlink()
    with InnerSink(tmp_path) as sink:
        assert sink.storage.loss.rows == {}
        assert unknown(sink) == ["envoy-1"]
        with Reader(path) as reader:
            assert reader.status().crash_unknown == {"envoy-1": 1}
            assert reader.status().crash_lost == {}
        sink.read(*[row("alpha")] * 2)  # and from here on it is exact again
        sink.crash()
        assert by_node(sink.storage.loss.rows) == {"envoy-1": 2}
        assert unknown(sink) == []


def test_a_store_without_its_file_of_counts_knows_of_no_loss(tmp_path: Path) -> None:
    with InnerSink(tmp_path) as sink:
        sink.read(*[row("alpha")] * 5)
        sink.close_all()
    sink.storage.intake.path.unlink()
    with InnerSink(tmp_path) as sink:
        assert sink.storage.loss.rows == {}
        assert unknown(sink) == ["envoy-1"]
        with Reader(sink.config.store.path) as reader:
            assert reader.status().crash_unknown == {"envoy-1": 1}
        sink.read(*[row("alpha")] * 3)
        sink.crash()
        assert by_node(sink.storage.loss.rows) == {"envoy-1": 3}
