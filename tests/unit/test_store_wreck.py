"""Whatever is damaged: what can be read is true, and what cannot is said, to the event."""

import json
import random
import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from damage import GARBAGE, leaves, overwrite, page_size, tree
from hypothesis import given
from hypothesis import strategies as st
from made_store import START, MadeStore
from salvaging import BOTH, LATER, bodies, check_sums, letters, many, replaced, salvage_of

from proxy_usage.store import Fate
from proxy_usage.store.reader import Reader
from proxy_usage.store.records import Record, encode
from proxy_usage.store.report import Report, asides
from proxy_usage.store.torn import TornLog
from proxy_usage.store.wreck import Wreck

# --- damage ---------------------------------------------------------------------------------------------


def test_events_on_pages_that_cannot_be_read_are_missing_to_the_event(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    made = many(path)
    pages = leaves(path, "events")
    assert len(pages) > 30
    overwrite(path, [pages[0], pages[7], pages[8], pages[20], pages[-1]])
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        found = bodies(path)
        assert found.items() <= made.items()
        lost = [json.loads(body) for event_id, body in made.items() if event_id not in found]
        assert 5 <= len(lost) <= 75
        assert report.missing == {
            "billing/requests": (len(lost), sum(int(event["data"]["value"]) for event in lost))
        }
        assert report.gaps == 4
        check_sums(store)


def test_a_page_that_leads_to_others_takes_those_with_it_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path, 6_000)
    interior = [page for page, kind in tree(path, "events") if kind == 5]
    assert len(interior) == 3
    overwrite(path, interior[1:2])
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        found = len(bodies(path))
        assert 0 < found < 6_000
        assert report.missing is not None
        assert report.missing["billing/requests"][0] == 6_000 - found
        check_sums(store)


def test_bytes_that_are_not_the_events_own_are_not_brought_over(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path, 30)
    db = sqlite3.connect(path)
    db.execute(
        'UPDATE events SET body=replace(CAST(body AS TEXT), \'"value":"3"\', \'"value":"9"\') WHERE value=3'
    )
    db.execute("UPDATE events SET body=CAST(replace(CAST(body AS TEXT), id, 'x') AS BLOB) WHERE value=4")
    db.execute("UPDATE events SET body=x'00ff' WHERE value=5")
    db.execute("UPDATE events SET value='many' WHERE value=6")
    db.execute("UPDATE events SET id=x'ff' WHERE value=7")
    db.commit()
    db.close()
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        assert sorted(one.value for one in letters(store)) == [1, 2, *range(8, 31)]
        assert report.senseless == 5
        assert report.missing is not None
        assert report.missing["billing/requests"] == (5, 25)
        check_sums(store)


def test_where_it_cannot_be_read_what_became_of_an_event_it_is_a_dead_letter_everywhere(
    tmp_path: Path,
) -> None:
    path = tmp_path / "usage.db"
    made = many(path, 50, BOTH)
    overwrite(path, [page for page, _ in tree(path, "deliveries")])
    with replaced(path, BOTH) as store:
        report = salvage_of(store).run(LATER)
        assert Counter(one.output for one in letters(store)) == {"billing": 50, "mirror": 50}
        assert {one.answer for one in letters(store)} == {"what became of it cannot be read"}
        assert report.unclear == 50
        assert bodies(path) == made
        check_sums(store)


@pytest.mark.parametrize("table", ["outputs", "meta", "tallies", "keys", "dead", "batches", "log", "held"])
def test_any_other_table_may_be_lost(tmp_path: Path, table: str) -> None:
    path = tmp_path / "usage.db"
    with MadeStore(path) as store:
        for number in range(40):
            store.use(f"tenant-{number}", 1 + number, 0)
        store.close_windows()
        store.use("open", 5, 0)
        store.turn()
    also = ["sqlite_autoindex_outputs_1"] if table == "outputs" else []  # it holds names and numbers, too
    overwrite(path, [page for each in (table, *also) for page, _ in tree(path, each)])
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        assert report.state == "done"
        found = Counter(one.answer == "was an open window" for one in letters(store))
        assert found[False] == 40
        assert found[True] == (table != "log")
        assert (report.missing is None) == (table in ("outputs", "tallies"))
        assert (report.remainders is None) == (table == "keys")
        assert (report.held is None) == (table == "held")
        assert report.gaps > 0 or table in ("tallies", "keys", "held", "dead", "batches")
        check_sums(store)


@pytest.mark.parametrize("content", [b"no database at all " * 500, bytes(8192)])
def test_of_what_is_no_database_nothing_can_be_read_and_that_is_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "usage.db"
    path.write_bytes(content)
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        assert report.state == "unreadable"
        assert "not a database" in report.trouble
        assert letters(store) == []
        check_sums(store)


def test_a_database_of_another_program_and_a_file_that_is_gone_are_said(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE events(seq INTEGER PRIMARY KEY, body)")
    db.close()
    with replaced(path) as store:
        assert salvage_of(store).run(LATER).trouble == "it is a database of another program"
    path = tmp_path / "other.db"
    many(path, 1)
    with replaced(path) as store:
        salvage = salvage_of(store)
        salvage.path.unlink()
        assert salvage.run(LATER).state == "gone"


damages = st.lists(
    st.tuples(st.integers(min_value=0), st.sampled_from(["garbage", "zeroes", "noise", "torn", "copy"])),
    min_size=1,
    max_size=6,
)


@given(damages, st.integers(0, 2**32))
def test_whatever_is_damaged_what_is_brought_over_is_true_and_adds_up(
    tmp_path_factory: pytest.TempPathFactory, damages: list[tuple[int, str]], seed: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "usage.db"
    with MadeStore(path, BOTH) as store:
        for number in range(120):
            store.use(f"tenant-{number}", 1 + number, 0)
        store.close_windows()
        store.answer(store.send(50), *[Fate("delivered", 200)] * 30, *[Fate("dead", 200, "refused")] * 20)
        store.use("open", 5, 3 * 10**9)
        store.turn()
    made = bodies(path)
    spoil(path, damages, random.Random(seed))
    with replaced(path, BOTH) as store:
        report = salvage_of(store).run(LATER)
        assert report.state in ("done", "unreadable")
        found = letters(store)
        windows = {one.id for one in found if one.answer == "was an open window"}
        for event_id, body in bodies(path).items():
            assert event_id in windows or made[event_id] == body
        assert len({(one.id, one.output) for one in found}) == len(found)
        assert {(one.meter, one.value) for one in found if one.id in windows} <= {
            ("requests", 5),
            ("connection_seconds", 3),
        }
        check_sums(store)


def spoil(path: Path, damages: Iterable[tuple[int, str]], dice: random.Random) -> None:
    """Damages pages, the first one left out: with garbage, zeroes, noise, half a page, or another page."""
    size = page_size(path)
    content = bytearray(path.read_bytes())
    pages = len(content) // size
    for number, kind in damages:
        start = (1 + number % (pages - 1)) * size
        other = dice.randrange(pages) * size
        content[start : start + size] = {
            "garbage": bytes([GARBAGE]) * size,
            "zeroes": bytes(size),
            "noise": dice.randbytes(size),
            "torn": content[start : start + size // 2] + bytes(size - size // 2),
            "copy": content[other : other + size],
        }[kind]
    path.write_bytes(content)


# --- the log of open windows ----------------------------------------------------------------------------

ALPHA, BETA = (1, START, "alpha", ("eu",), 0), (2, START, "beta", ("eu",), 0)


def record(
    born: Iterable[tuple[int, int, str, tuple[str, ...], int]] = (),
    changed: Iterable[tuple[int, ...]] = (),
    closed: Iterable[int] = (),
) -> bytes:
    return encode(Record(list(born), list(changed), list(closed)))


def torn(*records: bytes | None) -> tuple[dict[str, int], dict[str, int], int]:
    """Requests by tenant: certainly open, and perhaps; and how many have no name. None: a lost record."""
    log = TornLog()
    for packed in records:
        if packed is None or not log.add(packed):
            log.doubt()
    left = log.left()
    certain, uncertain = (
        {cell.key.tenant: cell.amounts[0] for cell in cells} for cells in (left.cells, left.uncertain)
    )
    return certain, uncertain, left.nameless


BOTH_BORN = record([ALPHA, BETA], [(1, 1, 10), (2, 1, 20)])


@pytest.mark.parametrize(
    ("records", "left"),
    [
        ([BOTH_BORN], ({"alpha": 10, "beta": 20}, {}, 0)),
        ([BOTH_BORN, record(closed=[1])], ({"beta": 20}, {}, 0)),
        ([BOTH_BORN, None], ({}, {"alpha": 10, "beta": 20}, 0)),
        ([BOTH_BORN, None, record(changed=[(1, 2, 11)])], ({"alpha": 11}, {"beta": 20}, 0)),
        ([BOTH_BORN, None, record(closed=[1])], ({}, {"beta": 20}, 0)),
        ([BOTH_BORN, None, record(changed=[(1, 2, 11)]), record(closed=[1])], ({}, {"beta": 20}, 0)),
        ([None, record(changed=[(3, 2, 11)])], ({}, {}, 1)),
        ([None, record(changed=[(3, 2, 11)]), None], ({}, {}, 1)),
        ([None, record(changed=[(3, 2, 11)]), None, record(closed=[3])], ({}, {}, 0)),
        # A number that is given anew is another window: the former one was closed.
        (
            [BOTH_BORN, None, record([(1, START, "gamma", ("eu",), 0)], [(1, 1, 5)])],
            ({"gamma": 5}, {"beta": 20}, 0),
        ),
        ([BOTH_BORN, b"\xc1", record(changed=[(2, 2, 21)])], ({"beta": 21}, {"alpha": 10}, 0)),
    ],
)
def test_a_window_counts_as_open_only_if_it_certainly_was(
    records: list[bytes | None], left: tuple[dict[str, int], dict[str, int], int]
) -> None:
    assert torn(*records) == left


def test_windows_that_may_have_been_billed_are_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with MadeStore(path) as store:
        for number in range(3):
            store.use(f"tenant-{number}", 10 + number, 0)
            store.turn()
        db = store.database.db
        ((first,), *_) = db.execute("SELECT seq FROM log ORDER BY seq").fetchall()
        db.execute("DELETE FROM log WHERE seq=?", (first + 1,))
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        assert [(one.tenant, one.value) for one in letters(store)] == [("tenant-2", 12)]
        assert report.uncertain == {"requests": 10, "connection_seconds": 0}
        check_sums(store)


def test_a_file_is_not_changed_by_being_read(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path, 50)
    overwrite(path, leaves(path, "events")[2:4])
    before = path.read_bytes()
    with Wreck(path) as wreck:
        assert wreck.trouble() is None
        assert len(list(wreck.events())) > 20
        assert wreck.verdict()
    assert path.read_bytes() == before
    assert {part.name for part in tmp_path.iterdir()} == {"usage.db", "usage.db.lock"}


def test_what_the_write_ahead_log_holds_is_read(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    with MadeStore(path) as store:
        store.use("alpha", 5, 0)
        store.close_windows()
        # Killed: the log is not written back.
        for suffix in ("", "-wal"):
            copy = tmp_path / f"copy.db{suffix}"
            copy.write_bytes(path.with_name(path.name + suffix).read_bytes())
    with Wreck(tmp_path / "copy.db") as wreck:
        assert [event.tenant for event in wreck.events()] == ["alpha"]


def test_a_report_is_the_same_after_it_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "usage.db"
    many(path, 5)
    with replaced(path) as store:
        report = salvage_of(store).run(LATER)
        (kept,) = asides(store.database.db)
        assert kept.report == report
        assert isinstance(kept.report, Report)
        with Reader(path) as reader:
            assert reader.status().asides == (kept,)
