"""What there may be a million of: no container of it grows large, and the collector finds nothing to walk."""

from __future__ import annotations

import gc
import itertools
from array import array
from pathlib import Path

from inner_sink import InnerSink
from money import HOUR_MS, T0, key, windows
from wire import http_row, message

from proxy_usage import bulk
from proxy_usage.bulk import PAGE, SHARDS, SPLIT, Columns, Numbered, Pages, Remembered, Shards
from proxy_usage.model import NS_PER_MS, Identity, Origin
from proxy_usage.pipeline import next_step
from proxy_usage.quota import LET_GO, SETS, Quota
from proxy_usage.store.records import LogFold, records_of

KEYS = 20_000
MOST = 2_048
"""Entries: a dictionary of so many takes less than 0.1 ms to double."""


def large(*roots: object) -> list[tuple[type, int]]:
    """The containers reachable from these that have more than ``MOST`` entries and move when they grow, or
    are walked while they are young."""
    seen: set[int] = set()
    found, left = [], [*roots]
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, type) or type(thing).__name__ in {"module", "function"}:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict | set | list) and len(thing) > MOST:
            found.append((type(thing), len(thing)))
        left += gc.get_referents(thing)
    return found


# --- the containers ---------------------------------------------------------------------------------------


def test_a_mapping_of_many_is_many_small_ones() -> None:
    shards: Shards[str, int] = Shards()
    for number in range(100 * SHARDS):
        shards.put(f"key-{number}", number)
        assert len(shards) == number + 1
        assert (len(shards.parts) > 1) == (number + 1 > SPLIT)
    assert all(shards.get(f"key-{number}") == number for number in range(100 * SHARDS))
    assert max(map(len, shards.parts)) < 200
    shards.put("key-7", 8)
    assert (shards.get("key-7"), shards.pop("key-7"), shards.pop("key-7")) == (8, 8, None)
    assert (shards.get("key-7"), len(shards), sum(map(len, shards.parts))) == (None, *[100 * SHARDS - 1] * 2)


def test_what_is_remembered_is_bounded_and_the_oldest_is_forgotten() -> None:
    small: Remembered[int, str] = Remembered(3)
    for number in range(5):
        small.put(number, str(number))
    assert [small.shards.get(number) for number in range(5)] == [None, None, "2", "3", "4"]
    large: Remembered[str, int] = Remembered(8_000)
    for number in range(20_000):
        large.put(str(number), number)
        assert len(large) == min(number + 1, 8_000)
    known = [number for number in range(20_000) if large.shards.get(str(number)) == number]
    assert len(known) == 8_000
    assert sum(number >= 12_000 for number in known) > 5_600  # all of them, were it one
    nothing: Remembered[str, int] = Remembered(0)
    nothing.put("a", 1)
    assert (nothing.shards.get("a"), len(nothing)) == (None, 0)


def test_numbers_are_kept_in_blocks_that_go_when_they_are_empty() -> None:
    things: Numbered[str] = Numbered()
    for number in range(5_000):
        things[number] = str(number)
    assert len(things) == 5_000
    assert max(map(len, things._blocks.values())) == 1 << bulk.BLOCK_BITS
    assert (things[4_999], things.get(7), things.get(5_000), things.get(1 << 40)) == ("4999", "7", None, None)
    assert [things.pop(number) for number in (0, 0, 1 << 40)] == ["0", None, None]
    assert [*things] == [*range(1, 5_000)]
    assert [*things.items()] == [(number, str(number)) for number in range(1, 5_000)]
    for number in range(1, 4_999):
        things.pop(number)
    assert [*things.values()] == ["4999"]
    assert len(things._blocks) == 1
    assert things.pop(4_999) == "4999"
    assert not things
    assert not things._blocks


def test_rows_of_numbers_come_out_as_they_went_in_and_the_collector_does_not_see_them() -> None:
    columns = Columns()
    assert (len(columns), [*columns]) == (0, [])
    rows = [(number, -number, 1 << 62) for number in range(2 * PAGE + 3)]
    for row in rows:
        columns.add(row)
    assert (len(columns), [*columns], len(columns.pages)) == (len(rows), rows, 3)
    assert {*itertools.chain(*map(gc.get_referents, columns.pages))} <= {array}
    heir = columns.handed_over()
    assert ([*heir], [*columns]) == (rows, [])
    columns.add((7,))
    assert [*columns] == [(7,)]
    first, left = [], []
    for number in heir.take_first():
        first.append(number)
        left.append(len(heir.pages))
    assert first == [row[0] for row in rows]
    assert {*left} == {2, 1, 0}  # a page is let go as soon as it is begun


def test_pages_keep_an_order_and_are_small() -> None:
    pages: Pages[int] = Pages()
    assert (len(pages), [*pages]) == (0, [])
    for number in range(2 * PAGE + 3):
        pages.add(number)
    assert ([*pages], len(pages)) == ([*range(2 * PAGE + 3)], 2 * PAGE + 3)
    assert [*map(len, pages.pages)] == [PAGE, PAGE, 3]


# --- who holds a million ------------------------------------------------------------------------------------


def test_nothing_between_the_fold_and_the_store_grows_large(tmp_path: Path) -> None:
    """Not while keys come, not in a turn at any step, not when it is refused; but for the queue by due time,
    which is a list of old: it moves by no more than its pointers, and the collector knows it."""
    with InnerSink(tmp_path, now_ms=T0, windows={"max_keys": 4 * KEYS}) as sink:
        pipeline = sink.pipeline
        holders = (pipeline.windows, pipeline.origins, pipeline._quota, pipeline._attributor)
        start_ns = (T0 - 1_000) * NS_PER_MS
        for first in range(0, KEYS, 1_000):
            rows = (
                http_row(start_ns=start_ns, tags={"project_name": f"t-{number}"})
                for number in range(first, first + 1_000)
            )
            sink.read_raw(message(*rows))
            sink.pipeline.drain(T0)
        queue = (list, KEYS)
        for _ in range(2):
            steps, made = pipeline.beginning(T0), None
            for number in itertools.count():
                if (made := next_step(steps)) is not None:
                    break
                if number % 16 == 0:
                    assert large(*holders) == [queue]
            assert made is not None
            assert len(made.windows.changed) == len(made.windows.born) == KEYS
            assert large(made, *holders) == [queue]
            pipeline.rollback(made)
            assert large(made, *holders) == [queue]


def test_usage_of_known_keys_makes_nothing_that_the_collector_has_to_walk() -> None:
    """Or all that changed since it last looked would be walked at once: in a quarter of a second at a
    million, since what replaces something never makes it look."""
    open_windows = windows(max_keys=KEYS, max_tenants=KEYS)
    names = [key(f"t-{number}") for number in range(KEYS)]
    for name in names:
        open_windows.add(name, T0, 1, (1, 2), T0)
    open_windows.commit(open_windows.begin(T0))
    gc.collect()
    gc.disable()
    try:
        for name in names:
            open_windows.add(name, T0, 1, (1, 2), T0)
        open_windows.cut()
        for _ in open_windows.pack():
            pass
        turn = open_windows.turn([])
        young = gc.get_objects(generation=0)
        assert len(turn.changed) == KEYS
        assert len(young) + sum(len(each) for each in young if isinstance(each, list | dict)) < 1_000
    finally:
        gc.enable()


def test_births_and_the_places_of_cells_are_nothing_to_the_collector_once_it_looked() -> None:
    open_windows = windows()
    open_windows.add(key(), T0, 1, (1, 2), T0)
    turn = open_windows.begin(T0)
    gc.collect()  # what is in a tuple
    gc.collect()  # the tuple
    for things in (turn.born, open_windows._queue):
        assert len(things) == 1
        assert not any(map(gc.is_tracked, things))


def test_identities_of_a_past_hour_are_let_go_a_few_at_a_time() -> None:
    some = Quota(1_000_000)

    def identity(number: int) -> Identity:
        return Identity(Origin("", "a", "http"), 0, b"%d" % number, (), routed=True)

    for number in range(KEYS):
        assert some.admits(identity(number), hash(identity(number)), 0)
    assert max(map(len, some._seen)) < 200
    left = [KEYS]
    for number in range(KEYS // LET_GO + SETS):
        assert some.admits(identity(number), hash(identity(number)), HOUR_MS)
        left.append(sum(map(len, some._former)))
        assert left[-1] == some._forgotten
    assert all(before - after <= LET_GO for before, after in itertools.pairwise(left))
    assert left[-1] == 0
    assert sum(map(len, some._seen)) == some._tracked == KEYS // LET_GO + SETS


def test_what_was_not_let_go_in_time_counts_in_no_later_hour() -> None:
    some = Quota(1)
    first, second = (Identity(Origin("", "a", "http"), 0, value, (), routed=True) for value in (b"x", b"y"))
    for hour, one in enumerate([first, second, first, first, second]):
        assert some.admits(one, hash(one), hour * HOUR_MS)
        other = second if one is first else first
        assert not some.admits(other, hash(other), hour * HOUR_MS)


def test_the_log_is_folded_in_blocks() -> None:
    births = [(number, T0, f"t-{number}", ("a",), T0) for number in range(1, KEYS + 1)]
    states = [(number, 1, 2) for number in range(1, KEYS + 1)]
    fold = LogFold()
    for record in records_of(births, states, [KEYS + 1]):
        fold.add(record)
    assert [*fold.births.values()] == births
    assert [*fold.states.values()] == states
    assert large(fold) == []
