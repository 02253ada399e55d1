"""Events: what a closed window becomes, to the last unit and nanosecond."""

import json
import re
from datetime import UTC, datetime

import pytest
import ulid as reference
from hypothesis import given
from hypothesis import strategies as st
from money import DAY_MS, DIMENSIONS, METERS, MINUTE_MS, SOURCE, T0, cell, key, mint

from proxy_usage.events import RANDOM_BYTES, Mint, Minted, rfc3339, ulid
from proxy_usage.model import MAX_EVENT_VALUE, NS_PER_SECOND, Amounts

NOW_MS = T0 + 70_000
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
NOTHING: Amounts = (0, 0, 0, 0)


def minted(amounts: Amounts, remainders: Amounts = NOTHING, *, maker: Mint | None = None) -> Minted:
    return (maker or mint()).mint(cell(amounts), remainders, NOW_MS)


def values(found: Minted) -> dict[str, int]:
    return {METERS[event.meter].name: event.value for event in found.events}


def test_each_meter_makes_one_event_that_holds_exactly_what_the_endpoint_wants() -> None:
    (requests, ingress, egress, seconds) = minted((3, 100, 2_000, 5 * NS_PER_SECOND)).events
    assert json.loads(egress.body) == {
        "specversion": "1.0",
        "id": egress.id,
        "source": SOURCE,
        "type": "networking.datumapis.com/gateway/egress-bytes",
        "subject": "projects/alpha",
        "time": "2026-11-22T00:00:59.999Z",
        "datacontenttype": "application/json",
        "data": {"value": "2000", "dimensions": {"region": "eu", "httproute_name": "web"}},
    }
    assert [event.value for event in (requests, ingress, egress, seconds)] == [3, 100, 2_000, 5]
    assert [json.loads(event.body)["data"]["value"] for event in (requests, seconds)] == ["3", "5"]


def test_nothing_is_made_of_zero() -> None:
    assert minted(NOTHING) == Minted((), NOTHING)
    assert values(minted((1, 0, 0, 0))) == {"requests": 1}


def test_time_below_a_second_is_carried_and_not_billed_yet() -> None:
    found = minted((1, 0, 0, NS_PER_SECOND - 1))
    assert values(found) == {"requests": 1}
    assert found.remainders == (0, 0, 0, NS_PER_SECOND - 1)


def test_one_nanosecond_completes_a_carried_second() -> None:
    found = minted((0, 0, 0, 1), (0, 0, 0, NS_PER_SECOND - 1))
    assert values(found) == {"connection_seconds": 1}
    assert found.remainders == NOTHING


def test_ten_thousand_requests_of_nine_tenths_of_a_second_are_nine_thousand_seconds() -> None:
    carried, billed = NOTHING, 0
    for _ in range(10_000):
        found = minted((0, 0, 0, 900_000_000), carried)
        carried, billed = found.remainders, billed + values(found).get("connection_seconds", 0)
    assert (billed, carried) == (9_000, NOTHING)


@pytest.mark.parametrize("above", [0, 1, MAX_EVENT_VALUE, MAX_EVENT_VALUE + 7])
def test_what_is_above_an_int64_is_split_and_adds_up(above: int) -> None:
    found = minted((0, MAX_EVENT_VALUE + above, 0, 0))
    parts = [event.value for event in found.events]
    assert sum(parts) == MAX_EVENT_VALUE + above
    assert all(1 <= part <= MAX_EVENT_VALUE for part in parts)
    assert len({event.id for event in found.events}) == len(parts) == 1 + -(-above // MAX_EVENT_VALUE)


@given(
    st.lists(
        st.tuples(*[st.integers(0, 1 << 61)] * 3, st.integers(0, 3 * NS_PER_SECOND)), min_size=1, max_size=30
    )
)
def test_no_unit_is_lost_over_any_row_of_windows(windows: list[Amounts]) -> None:
    maker, carried = mint(), NOTHING
    billed = [0, 0, 0, 0]
    ids: list[str] = []
    for amounts in windows:
        found = maker.mint(cell(amounts), carried, NOW_MS)
        carried = found.remainders
        for event in found.events:
            assert re.fullmatch(r"[1-9][0-9]{0,18}", json.loads(event.body)["data"]["value"])
            billed[event.meter] += event.value
            ids.append(event.id)
        assert all(0 <= rest < meter.divisor for rest, meter in zip(carried, METERS, strict=True))
    for index, meter in enumerate(METERS):
        assert sum(amounts[index] for amounts in windows) == billed[index] * meter.divisor + carried[index]
    assert len(set(ids)) == len(ids)


def test_ids_are_ulids_of_the_moment_and_differ() -> None:
    ids = [event.id for _ in range(500) for event in minted((1, 1, 1, 1)).events]
    assert len(set(ids)) == len(ids) == 1_500
    assert all(ULID.fullmatch(id_) for id_ in ids)
    assert len({id_[:10] for id_ in ids}) == 1  # 48 bits of time


def test_ids_of_a_later_moment_sort_behind() -> None:
    early, late = (mint().mint(cell(), NOTHING, at).events[0].id for at in (NOW_MS, NOW_MS + 1))
    assert early < late


def test_the_bits_of_an_id_are_the_moment_and_the_dice() -> None:
    maker = Mint(METERS, DIMENSIONS, SOURCE, MINUTE_MS, random=lambda n: b"\xff" * n)
    assert maker.mint(cell((1, 0, 0, 0)), NOTHING, 0).events[0].id == "0000000000ZZZZZZZZZZZZZZZZ"


@given(st.integers(0, (1 << 48) - 1), st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES))
def test_an_id_is_written_as_the_reference_writes_it(time_ms: int, randomness: bytes) -> None:
    assert ulid(time_ms, randomness) == str(
        reference.ULID.from_bytes(time_ms.to_bytes(6, "big") + randomness)
    )


def test_no_id_has_randomness_of_another() -> None:
    drawn: list[bytes] = []

    def random(count: int) -> bytes:
        numbers = range(len(drawn) * 1_000, len(drawn) * 1_000 + count // RANDOM_BYTES)
        fresh = b"".join(number.to_bytes(RANDOM_BYTES) for number in numbers)
        drawn.append(fresh)
        return fresh

    maker = Mint(METERS, DIMENSIONS, SOURCE, MINUTE_MS, random=random)
    ids = [maker.mint(cell((1, 0, 0, 0)), NOTHING, 0).events[0].id for _ in range(350)]
    taken = b"".join(reference.ULID.from_str(id_).bytes[-RANDOM_BYTES:] for id_ in ids)
    assert taken == b"".join(drawn)[: len(taken)]


@pytest.mark.parametrize("window_ms", [T0 - MINUTE_MS, T0, T0 + DAY_MS - MINUTE_MS, 0])
def test_the_time_of_an_event_is_the_last_millisecond_of_its_window(window_ms: int) -> None:
    (event,) = mint().mint(cell((1, 0, 0, 0), window_ms=window_ms), NOTHING, NOW_MS).events
    said = datetime.fromisoformat(json.loads(event.body)["time"])
    assert said.utcoffset() == datetime.now(UTC).utcoffset()
    assert int(said.timestamp()) * 1_000 + said.microsecond // 1_000 == event.time_ms
    assert event.time_ms == window_ms + MINUTE_MS - 1


def test_the_last_window_of_a_day_stays_in_that_day() -> None:
    (event,) = mint().mint(cell((1, 0, 0, 0), window_ms=T0 - MINUTE_MS), NOTHING, NOW_MS).events
    assert json.loads(event.body)["time"] == "2026-11-21T23:59:59.999Z"


@pytest.mark.parametrize(
    ("at_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (1, "1970-01-01T00:00:00.001Z"),
        (1_709_251_199_999, "2024-02-29T23:59:59.999Z"),
        (T0, "2026-11-22T00:00:00.000Z"),
    ],
)
def test_times_are_rfc_3339_with_three_digits_whatever_the_digits(at_ms: int, text: str) -> None:
    assert rfc3339(at_ms) == text


def test_every_declared_dimension_is_there_though_it_be_empty() -> None:
    (event,) = mint().mint(cell((1, 0, 0, 0), key=key(region="", route="")), NOTHING, NOW_MS).events
    assert json.loads(event.body)["data"]["dimensions"] == {"region": "", "httproute_name": ""}


def test_dimensions_say_anything_and_the_event_stays_json() -> None:
    odd = '"\\\u2028é\U0001f600</script>'
    (event,) = mint().mint(cell((1, 0, 0, 0), key=key(route=odd)), NOTHING, NOW_MS).events
    assert json.loads(event.body)["data"]["dimensions"]["httproute_name"] == odd
