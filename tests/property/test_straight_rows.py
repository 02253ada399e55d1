"""The loop for straight rows against the row-by-row way: whatever arrives, both come to the same.

``ProtobufFold.some`` is the row-by-row way alone; ``entries`` asks the loop first.
"""

import random
from collections import Counter

import pytest
from folding import COUNTED, ORIGIN, PROJECT, PROTOBUF, VHOST, plan, whole
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from odd_rows import Writer
from plans import KINDS, ORIGINS, fold_of
from wire import CAPTURES, NOW_MS, captured, http_row, message, tcp_row

from proxy_usage.als.v1 import als_pb2 as als
from proxy_usage.decode import Drained, EnvoySettings, Split, read_identifier
from proxy_usage.decode.fold import ProtobufFold
from proxy_usage.decode.folding import new_fold
from proxy_usage.decode.framing import WHOLE_BYTES, OpenRows, open_rows, protobuf_parts, split
from proxy_usage.model import FieldKind, FoldPlan, Origin, Quantity

NAMES = sorted(path.name.split(".")[0] for path in CAPTURES.glob("*.binpb*"))


def reference(kind: str) -> ProtobufFold:
    fold = fold_of(kind).reference
    assert isinstance(fold, ProtobufFold)
    return fold


def made(fold_plan: FoldPlan | None = None, **settings: object) -> ProtobufFold:
    fold = new_fold(
        fold_plan or plan(),
        **{"accepts": lambda _rule, _text: True, "envoy": EnvoySettings(), "choice": PROTOBUF, **settings},  # type: ignore[arg-type]
    )
    assert isinstance(fold, ProtobufFold)
    return fold


def row_by_row(fold: ProtobufFold, origin: Origin, raw: bytes, now_ms: int) -> None:
    for part in protobuf_parts(raw):
        fold.some(origin, part, enumerate(open_rows(part)), now_ms)


def drained(fold: ProtobufFold) -> Drained:
    """What it drains to, with what does not depend on the order within a part in one order."""
    found = whole(list(fold.drains()))
    found.complaints.sort()
    return found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), oddity=st.sampled_from([0.0, 0.01, 0.05, 0.3]))
def test_both_ways_come_to_the_same(kind: str, seed: int, oddity: float) -> None:
    straight, careful = reference(kind), reference(kind)
    dice, writer = random.Random(seed), Writer(seed, oddity)
    for number in range(6):
        origin, raw, now_ms = dice.choice(ORIGINS), writer.message(8), NOW_MS + number * 30_000
        for part in protobuf_parts(raw):
            straight.entries(origin, part, now_ms)
        row_by_row(careful, origin, raw, now_ms)
        assert straight.full == careful.full
        if dice.random() < 0.3:
            assert drained(straight) == drained(careful)
    assert drained(straight) == drained(careful)


@pytest.mark.parametrize("kind", ["long", "skipping", "everything"])
@pytest.mark.parametrize("name", NAMES)
def test_both_ways_read_alike_what_real_envoys_sent(name: str, kind: str) -> None:
    straight, careful = reference(kind), reference(kind)
    origins: dict[int, Origin] = {}
    for stream, raw in captured(name):
        origin = origins[stream] = read_identifier(raw, "", (("cluster",),)) or origins[stream]
        for part in protobuf_parts(raw):
            straight.entries(origin, part, NOW_MS)
        row_by_row(careful, origin, raw, NOW_MS)
    assert drained(straight) == drained(careful)


def odd_places(fold: ProtobufFold, *rows: object) -> list[int]:
    """The places of rows that the loop leaves to the row-by-row way. The others are folded."""
    (part,) = protobuf_parts(message(*rows))
    source = fold._sums.sources.get(ORIGIN) or fold._source(ORIGIN)
    fold._timing.present(NOW_MS)
    return fold._straight.fold(
        source, open_rows(part), part.http, fold._sums, fold._fates, fold._timing.credible
    )


def test_ordinary_rows_are_straight() -> None:
    """Or the tests above would compare the row-by-row way with itself."""
    fold = made()
    assert odd_places(fold, *[http_row(tags={"project_name": name}) for name in "abca"]) == []
    assert odd_places(fold, tcp_row(tags={"project_name": "a"})) == []
    totals = whole(list(fold.drains())).totals
    assert {identity.value: rows for (identity, _), (rows, *_) in totals.items()} == {
        b"a": 3,
        b"b": 1,
        b"c": 1,
    }


def test_what_a_real_envoy_sends_under_load_is_straight() -> None:
    fold = made(envoy=EnvoySettings(flush_interval_ms=60_000))
    read = left = 0
    origin = ORIGIN
    fold._timing.present(1_795_304_000_000)
    for _, raw in captured("load_cut"):
        origin = read_identifier(raw, "", ()) or origin
        source = fold._sums.sources.get(origin) or fold._source(origin)
        for part in protobuf_parts(raw):
            rows, credible = open_rows(part), fold._timing.credible
            left += len(fold._straight.fold(source, rows, part.http, fold._sums, fold._fates, credible))
            read += len(rows)
    assert (read, left) == (1_544 + 40, 0)


# ── what is remembered ──


def rows_of(tags: list[list[tuple[bytes, bytes]]]) -> list[bytes]:
    """HTTP rows with these tags as they are, repeated or malformed."""
    rows = []
    for entries in tags:
        row = als.HttpRow.FromString(http_row(tags={}).SerializeToString())
        row.common_properties.custom_tags.extend(
            value if key is None else als.Entry(key=key, value=value).SerializeToString()
            for key, value in entries
        )
        rows.append(row.SerializeToString())
    return rows


def values(fold: ProtobufFold) -> Counter[bytes]:
    totals = whole(list(fold.drains())).totals
    return Counter({identity.value: rows for (identity, _), (rows, *_) in totals.items()})


def test_the_last_of_a_repeated_tag_counts_when_it_is_remembered_too() -> None:
    fold = made()
    one, two = (b"project_name", b"one"), (b"project_name", b"two")
    rows = rows_of([[one], [two], [one, two], [two, one], [one, two]])
    fold.entries(ORIGIN, Split(rows, len(rows)), NOW_MS)
    assert values(fold) == {b"one": 2, b"two": 3}


def test_a_malformed_tag_costs_the_row_only_if_a_rule_asks_for_it() -> None:
    fold = made(plan(rules=(PROJECT, VHOST)))
    broken = als.Entry(key=b"vhost_project").SerializeToString() + b"\x12\x7f"
    rows = rows_of([[(b"project_name", b"a"), (None, broken)], [(None, broken)], [(b"project_name", b"a")]])  # type: ignore[list-item]
    fold.entries(ORIGIN, Split(rows, len(rows)), NOW_MS)
    found = whole(list(fold.drains()))
    assert found.fates == {COUNTED: 2, ("invalid", "malformed"): 1}


def test_tags_and_sums_that_are_remembered_are_bounded() -> None:
    fold = made(identity_limit=1 << 20)
    straight = fold._straight
    most = 0
    for first in range(0, 40_000, 50):
        rows = rows_of([[(b"project_name", b"p%d" % number)] for number in range(first, first + 50)])
        fold.entries(ORIGIN, Split(rows, len(rows)), NOW_MS)
        most = max(most, len(straight._opened))
    (source,) = fold._sums.sources.values()
    assert 16_000 < most <= 16_384
    assert fold._sums.seen == sum(map(len, source.seen.values())) == 16_384
    assert len(source.cells) == 40_000
    assert set(values(fold).values()) == {1}
    assert fold._sums.seen == 0


def test_what_a_client_writes_at_length_is_not_remembered() -> None:
    fold = made()
    long = b"x" * 300
    rows = rows_of([[(b"project_name", long)]] * 2 + [[(b"vhost_project", b"short")]])
    fold.entries(ORIGIN, Split(rows, len(rows)), NOW_MS)
    assert list(fold._straight._opened.values()) == [(3, b"short")]
    assert fold._sums.seen == 1
    assert values(fold) == {long: 2, b"short": 1}


def test_long_texts_of_a_row_together_are_not_remembered_and_counted() -> None:
    fold = made(plan(dimensions=(PROJECT._replace(kind=FieldKind.AUTHORITY, path=()),)))
    row = http_row(tags={"project_name": "a"})
    row.request.authority = "h" * 2_000
    assert odd_places(fold, row, row) == []
    assert fold._sums.seen == 0
    assert values(fold) == {b"a": 2}


# ── rows opened with their message ──


def test_one_malformed_row_has_the_others_opened_one_by_one() -> None:
    good = http_row(tags={"project_name": "a"}).SerializeToString()
    raw = als.Message(http_logs=als.Rows(log_entry=[good, b"\x0a\x7f", good])).SerializeToString()
    (part,) = protobuf_parts(raw)
    assert not isinstance(part.entries, OpenRows)
    assert [row is None for row in open_rows(part)] == [False, True, False]
    fold = made()
    fold.entries(ORIGIN, part, NOW_MS)
    assert whole(list(fold.drains())).fates == {COUNTED: 2, ("invalid", "malformed"): 1}


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), rows=st.integers(0, 120))
def test_opened_rows_are_those_of_the_bytes(seed: int, rows: int) -> None:
    raw = Writer(seed, 0.0).message(rows)
    assume(len(raw) <= WHOLE_BYTES)
    found = list(protobuf_parts(raw))
    assert all(isinstance(part.entries, OpenRows) for part in found)
    expected = split(raw)
    assert [entry for part in found for entry in part.entries] == expected.entries
    assert sum(part.http for part in found) == expected.http
    for part in found:
        closed = [row.SerializeToString() for row in open_rows(part)]
        again = [row.SerializeToString() for row in open_rows(part._replace(entries=list(part.entries)))]
        assert closed == again
        assert list(part.entries[1:3]) == list(part.entries)[1:3]


def test_an_invalid_row_that_was_opened_with_its_message_is_named_by_its_size() -> None:
    row = http_row(tags={"project_name": "a"})
    row.request.request_body_bytes = 1 << 61
    fold = made(plan(quantities=(Quantity.REQUESTS,)))
    fold.message(ORIGIN, message(row), NOW_MS)
    (complaint,) = whole(list(fold.drains())).complaints
    assert f"invalid row (bytes): row 0 of its part, {row.ByteSize()} bytes" in complaint


# ── edges that generated rows seldom meet ──


def both_ways(now_ms: int, *rows: object) -> Drained:
    straight, careful = made(), made()
    straight.message(ORIGIN, message(*rows), now_ms)
    row_by_row(careful, ORIGIN, message(*rows), now_ms)
    found = drained(straight)
    assert found == drained(careful)
    return found


@pytest.mark.parametrize("nanos", [-1, 1_000_000_000])
def test_a_credible_second_does_not_excuse_impossible_nanoseconds(nanos: int) -> None:
    row = http_row()
    row.common_properties.start_time.nanos = nanos
    assert both_ways(NOW_MS, row).fates == {("invalid", "start_time"): 1}


def test_a_row_behind_what_is_credible_is_no_part_of_the_window_of_the_row_before_it() -> None:
    latest_ns = (NOW_MS + 300_000) * 1_000_000
    rows = []
    for end_ns in (latest_ns, latest_ns + 1):
        row = http_row()
        start, duration = row.common_properties.start_time, row.common_properties.duration
        duration.seconds, duration.nanos = 0, 1_000
        start.seconds, start.nanos = divmod(end_ns - 1_000, 1_000_000_000)
        rows.append(row)
    assert latest_ns // 1_000_000 % 60_000 != 59_999
    assert both_ways(NOW_MS, *rows).notes == {"future": 1}


@pytest.mark.parametrize("seconds", [0, -1])
def test_a_clock_that_has_hardly_begun_makes_no_start_credible(seconds: int) -> None:
    row = http_row()
    row.common_properties.start_time.seconds, row.common_properties.start_time.nanos = seconds, 0
    row.common_properties.duration.seconds = 2
    found = both_ways(5_000, row)
    assert found.notes == ({} if seconds else {"no_start_time": 1})
    assert found.fates == ({("invalid", "start_time"): 1} if seconds else {COUNTED: 1})
