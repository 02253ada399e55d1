"""Looking into a store: what is shown is what was done, sums add up, and a lie in any table is found."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from made_store import MINUTE, START, MadeStore

from proxy_usage.errors import StoreForeign, StoreUnavailable, UsageError
from proxy_usage.model import Key
from proxy_usage.store import Fate
from proxy_usage.store.reader import Reader
from proxy_usage.store.views import Tally

DEAD = Fate("dead", 200, "rejected", "unknown meter")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


def lively(path: Path) -> tuple[str, ...]:
    """A store with something in every place; the ids of its four events, in the order of their making."""
    with MadeStore(path, ("billing", "shadow")) as store:
        store.use("alpha", 2, 1_500_000_000)
        store.use("beta", 3, 2_000_000_000)
        store.hold("unmapped", b"gam\xffma", 1, 7)
        ids = store.close_windows()
        delivered = store.send(2)
        store.answer(delivered, Fate("delivered", 200), DEAD)
        waiting = store.send(1)
        store.queue.postpone(waiting.id, START + 10 * MINUTE, "503 busy")
        store.use("alpha", 5, 250_000_000, now_ms=START + 2 * MINUTE)
        store.turn(START + 2 * MINUTE)
        store.queue.pause(store.slots[0].output, "refused", "401 no token", START + 5 * MINUTE)
    return ids


def test_status_shows_every_place(path: Path) -> None:
    lively(path)
    with Reader(path) as reader:
        status = reader.status()
    billing, shadow = status.outputs
    assert (billing.name, billing.pending, billing.attempted, billing.batches) == ("billing", 2, 1, 1)
    assert (billing.delivered, billing.dead, billing.unconfirmed, billing.recorded) == (1, 1, 0, 0)
    assert (billing.paused, billing.paused_ms, billing.detail) == (
        "refused",
        START + 5 * MINUTE,
        "401 no token",
    )
    assert billing.oldest_ms == START + 2 * MINUTE
    assert (shadow.pending, shadow.attempted, shadow.paused, shadow.paused_ms) == (4, 0, None, None)
    assert status.rows == {"counted": {"": 6}, "skipped": {"upstream": 2}}
    assert (status.intake, status.crash_lost) == ({"node-a": 4}, {})
    assert (status.open_windows, status.keys, status.unattributed) == (1, 2, 1)
    assert status.schema_version == 2
    assert status.sizes["database"] == path.stat().st_size > 0


def test_the_terms_of_each_meter_add_up(path: Path) -> None:
    lively(path)
    with Reader(path) as reader:
        requests, seconds = reader.conservation().meters
    assert (requests.counted, requests.open, requests.held, requests.minted) == (11, 5, 1, Tally(2, 5))
    assert (requests.remainders, requests.written_off, requests.difference) == (0, 0, 0)
    assert (seconds.counted, seconds.open, seconds.held) == (3_750_000_007, 250_000_000, 7)
    assert (seconds.remainders, seconds.minted, seconds.divisor) == (500_000_000, Tally(2, 3), 10**9)
    assert seconds.difference == 0


@pytest.mark.parametrize("deep", [False, True])
def test_a_sound_store_is_balanced(path: Path, deep: bool) -> None:
    lively(path)
    with Reader(path) as reader:
        conservation = reader.conservation(deep=deep)
    assert conservation.balanced
    assert conservation.deep is deep
    assert conservation.differences == ()
    assert {terms.balanced for terms in conservation.outputs} == {True}


def test_every_change_of_fate_keeps_the_balance(path: Path) -> None:
    ids = lively(path)
    with MadeStore(path, ("billing", "shadow")) as store:
        assert store.queue.replay("billing", [ids[1]], None) == 1
        store.checkpoints.write_off(START + 40 * 86_400_000)
        store.checkpoints.fold()
        batch = store.send(1, output=1)
        store.answer(batch, Fate("unconfirmed"))
    with Reader(path) as reader:
        conservation = reader.conservation(deep=True)
    assert conservation.balanced
    assert [terms.written_off for terms in conservation.meters] == [0, 500_000_000]
    assert [terms.remainders for terms in conservation.meters] == [0, 0]


def corrupt(path: Path, statement: str) -> None:
    db = sqlite3.connect(path)
    with db:
        assert db.execute(statement).rowcount > 0
    db.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE counters SET value='10' WHERE name='counted' AND label='requests'",
        "UPDATE keys SET remainders='{}'",
        "DELETE FROM held",
        "DELETE FROM log",
        "UPDATE tallies SET value='9' WHERE fate='minted' AND meter='requests'",
        "UPDATE tallies SET events=events+1 WHERE fate='pending' AND output=1",
        "DELETE FROM tallies WHERE fate='delivered'",
    ],
)
def test_a_sum_that_lies_is_found_at_a_glance(path: Path, statement: str) -> None:
    lively(path)
    corrupt(path, statement)
    with Reader(path) as reader:
        assert not reader.conservation().balanced


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("DELETE FROM deliveries WHERE output=2 AND seq=1", "shadow: pending requests"),
        ("DELETE FROM dead", "billing: dead connection_seconds"),
        ("UPDATE ledger SET value=value+1", "billing: delivered requests"),
        ("UPDATE ledger SET fate='unconfirmed'", "billing: unconfirmed requests"),
        ("UPDATE events SET value=value+1 WHERE seq=4", "store: minted connection_seconds"),
    ],
)
def test_a_table_that_lies_is_found_by_counting(path: Path, statement: str, named: str) -> None:
    lively(path)
    corrupt(path, statement)
    with Reader(path) as reader:
        assert reader.conservation().balanced
        deep = reader.conservation(deep=True)
    assert not deep.balanced
    assert named in {difference.what for difference in deep.differences}


def test_an_output_added_later_is_given_what_is_minted_since(path: Path) -> None:
    with MadeStore(path) as store:
        store.use("alpha", 1, 0)
        store.close_windows()
        store.slots = store.queue.register([store.slots[0], store.slots[0]._replace(name="late")], START + 1)
        store.checkpoints.outputs = store.slots
        store.use("alpha", 1, 0, now_ms=START + 2 * MINUTE)
        store.turn(START + 9 * MINUTE)
    with Reader(path) as reader:
        conservation = reader.conservation(deep=True)
        late = next(t for t in conservation.outputs if (t.output, t.meter) == ("late", "requests"))
    assert conservation.balanced
    assert (late.minted, late.missing, late.balanced) == (Tally(2, 2), Tally(1, 1), None)


def test_sums_beyond_64_bits_are_exact(path: Path) -> None:
    with MadeStore(path) as store:
        for _ in range(20):
            store.windows.add(Key("alpha", ("eu",)), START, 1, (1 << 61, 0), START)
        store.count((20 << 61, 0))
        store.close_windows()
    with Reader(path) as reader:
        conservation = reader.conservation(deep=True)
    assert conservation.meters[0].minted.value == 20 << 61 > 1 << 63
    assert conservation.balanced


def test_a_meter_that_is_gone_is_shown_and_not_judged(path: Path) -> None:
    lively(path)
    corrupt(path, "INSERT INTO counters VALUES('counted', 'former', '5')")
    with Reader(path) as reader:
        conservation = reader.conservation(deep=True)
    former = conservation.meters[-1]
    assert (former.meter, former.counted, former.divisor, former.difference) == ("former", 5, None, None)
    assert conservation.balanced


def test_the_queue_in_order_and_by_output(path: Path) -> None:
    ids = lively(path)
    with Reader(path) as reader:
        billing = reader.queue("billing")
        shadow = reader.queue("shadow", limit=3)
        everything = reader.queue()
    assert [(one.id, one.state, one.attempts) for one in billing] == [
        (ids[2], "attempted", 1),
        (ids[3], "pending", 0),
    ]
    assert (billing[0].not_before_ms, billing[0].first_attempt_ms) == (
        START + 10 * MINUTE,
        START + 3 * MINUTE,
    )
    assert (billing[1].tenant, billing[1].meter, billing[1].value) == ("beta", "connection_seconds", 2)
    assert [one.id for one in shadow] == list(ids[:3])
    assert len(everything) == 6


def test_batches_say_why_they_wait(path: Path) -> None:
    lively(path)
    with Reader(path) as reader:
        (batch,) = reader.batches("billing")
        assert reader.batches("shadow") == ()
    assert (batch.events, batch.attempts, batch.not_before_ms) == (1, 1, START + 10 * MINUTE)
    assert (batch.answer, batch.confirm, batch.first_attempt_ms) == ("503 busy", False, START + 3 * MINUTE)


def test_an_event_and_its_places(path: Path) -> None:
    ids = lively(path)
    with Reader(path) as reader:
        delivered, dead, attempted, pending = (reader.event(one) for one in ids)
        assert reader.event("01ARZ3NDEKTSV4RRFFQ69G5FAV") is None
    assert delivered is not None
    assert dead is not None
    assert attempted is not None
    assert pending is not None
    assert (delivered.tenant, delivered.dimensions, delivered.value) == ("alpha", {"region": "eu"}, 2)
    assert {(place.output, place.state, place.status) for place in delivered.places} == {
        ("billing", "delivered", 200),
        ("shadow", "pending", None),
    }
    assert [(p.output, p.state, p.reason, p.answer) for p in dead.places][-1] == (
        "billing",
        "dead",
        "rejected",
        "unknown meter",
    )
    waiting = attempted.places[0]
    assert (waiting.state, waiting.attempts, waiting.answer) == ("attempted", 1, "503 busy")
    assert [p.state for p in pending.places] == ["pending", "pending"]
    assert pending.body is not None
    assert ids[3].encode() in pending.body


def test_an_event_that_all_outputs_settled_is_in_the_ledger(path: Path) -> None:
    with MadeStore(path) as store:
        store.use("alpha", 2, 0)
        (event_id,) = store.close_windows()
        store.answer(store.send(), Fate("delivered", 207))
    with Reader(path) as reader:
        event = reader.event(event_id)
    assert event is not None
    assert (event.body, event.minted_ms, event.value, event.tenant) == (None, None, 2, "alpha")
    assert [(p.state, p.status, p.at_ms) for p in event.places] == [("delivered", 207, START + 4 * MINUTE)]


def test_dead_letters_by_output_and_reason(path: Path) -> None:
    ids = lively(path)
    with Reader(path) as reader:
        (letter,) = reader.dead_letters()
        assert reader.dead_letters("billing", "rejected") == (letter,)
        assert reader.dead_letters("shadow") == ()
        assert reader.dead_letters(reason="other") == ()
        assert reader.dead_letters(limit=0) == ()
    assert (letter.id, letter.output, letter.reason, letter.answer) == (
        ids[1],
        "billing",
        "rejected",
        "unknown meter",
    )
    assert (letter.at_ms, letter.first_attempt_ms) == (START + 4 * MINUTE, START + 3 * MINUTE)


def test_unattributed_usage_latest_hour_first(path: Path) -> None:
    with MadeStore(path, max_held=2) as store:
        store.hold("unmapped", b"gam\xffma", 1, 7)
        store.hold("unmapped", b"delta", 1, 0, hour_ms=START + 60 * MINUTE)
        store.turn()
        store.hold("unmapped", b"one too many", 2, 0)
        store.turn()
    with Reader(path) as reader:
        latest, first, overflow = sorted(
            reader.unattributed(), key=lambda one: (-one.hour_ms, one.identity is None)
        )
        assert [one.hour_ms for one in reader.unattributed()] == [START + 60 * MINUTE, START, START]
        assert len(reader.unattributed(limit=2)) == 2
    assert latest.identity is not None
    assert first.identity is not None
    assert latest.identity.value == b"delta"
    assert (first.identity.value, first.identity.origin.node_id) == (b"gam\xffma", "node-a")
    assert first.amounts == {"requests": 1, "connection_seconds": 7}
    assert (overflow.identity, overflow.amounts["requests"], overflow.rows) == (None, 2, 1)


@pytest.mark.parametrize(
    "look",
    [
        lambda reader: reader.queue("nope"),
        lambda reader: reader.batches("nope"),
        lambda reader: reader.dead_letters("nope"),
    ],
)
def test_an_output_that_does_not_exist_is_named_with_those_that_do(
    path: Path, look: Callable[[Reader], object]
) -> None:
    lively(path)
    with Reader(path) as reader, pytest.raises(UsageError, match="no output 'nope'") as caught:
        look(reader)
    assert "billing, shadow" in caught.value.hint


def test_a_store_is_read_while_its_owner_writes(path: Path) -> None:
    with MadeStore(path) as store, Reader(path) as reader:
        assert reader.status().outputs[0].pending == 0
        store.use("alpha", 1, 0)
        with store.database.transaction() as db:
            db.execute("UPDATE meta SET value=value")
            assert reader.queue() == ()
        (event_id,) = store.close_windows()
        assert [one.id for one in reader.queue()] == [event_id]


def test_reading_changes_nothing(path: Path) -> None:
    lively(path)
    before = path.read_bytes()
    with Reader(path) as reader:
        reader.status()
        reader.conservation(deep=True)
    assert path.read_bytes() == before


def test_a_missing_store_is_named(path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store"):
        Reader(path)
    assert not path.exists()


def test_a_store_of_a_newer_version_is_refused(path: Path) -> None:
    lively(path)
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version=3")
    db.close()
    with pytest.raises(StoreForeign, match="schema version 3"):
        Reader(path)


def test_a_file_of_another_kind_is_refused(path: Path) -> None:
    path.write_text("no database " * 100)
    with pytest.raises(StoreForeign):
        Reader(path)
    path.unlink()
    sqlite3.connect(path).execute("CREATE TABLE t(x)").connection.close()
    with pytest.raises(StoreForeign, match="not a store of proxy-usage"):
        Reader(path)
