"""Another system's usage beside ours: what is added up, what is left out, which differences have a name."""

from typing import Any

import pytest

from proxy_usage import comparison
from proxy_usage.comparison import Line, Ours, Theirs, compare
from proxy_usage.model import NS_PER_SECOND, Meter, Quantity

FROM, TO = 1_800_000_000_000, 1_800_000_600_000
BEGINS = "2027-01-15T08:00:00Z"
UUID = "0b2cb1a4-7d3c-4d52-9d53-0f0a4f0c9b11"


def meter(name: str, quantity: Quantity, divisor: int = 1) -> Meter:
    return Meter(name, f"example.com/{name}", "u", quantity, divisor)


REQUESTS = meter("requests", Quantity.REQUESTS)
INGRESS = meter("ingress_bytes", Quantity.WIRE_IN)
BODIES = meter("ingress_bytes", Quantity.BODY_IN)
SECONDS = meter("connection_seconds", Quantity.OPEN_NS, NS_PER_SECOND)
METERS = (REQUESTS, INGRESS, SECONDS)


def event(value: object = "1", **changes: Any) -> dict[str, Any]:
    made = {
        "specversion": "1.0",
        "id": "A",
        "source": "//example.com",
        "type": REQUESTS.type,
        "subject": "projects/alpha",
        "time": BEGINS,
        "data": {"value": value},
    }
    return made | changes


def theirs(*events: dict[str, Any], meters: tuple[Meter, ...] = METERS) -> Theirs:
    added = Theirs(meters, FROM, TO)
    for one in events:
        added.add_event(one)
    return added


def summed(sums: dict[tuple[str, str], int], meters: tuple[Meter, ...] = METERS) -> Theirs:
    added = Theirs(meters, FROM, TO)
    for (tenant, name), value in sums.items():
        added.add_sum(tenant, name, value)
    return added


def kinds(found: comparison.Comparison) -> dict[tuple[str, str | None], int]:
    return {(hint.kind, hint.meter): hint.amount for hint in found.hints}


# --- their events -----------------------------------------------------------------------------------


def test_events_are_added_up_per_tenant_and_meter() -> None:
    added = theirs(
        event("2"),
        event("3", id="B"),
        event("5", id="C", subject="projects/bravo"),
        event("7", id="D", type=SECONDS.type),
    )
    assert added.sums == {
        ("alpha", "requests"): 5,
        ("bravo", "requests"): 5,
        ("alpha", "connection_seconds"): 7,
    }


def test_the_time_is_from_its_beginning_up_to_and_without_its_end() -> None:
    added = theirs(
        event(id="A", time="2027-01-15T07:59:59.999Z"),
        event(id="B", time=BEGINS),
        event(id="C", time="2027-01-15T09:09:59.999999999+01:00"),  # Go writes nanoseconds
        event(id="D", time="2027-01-15T08:10:00Z"),
    )
    assert added.sums["alpha", "requests"] == 2
    assert added.outside == 2


def test_an_event_that_comes_again_counts_once_if_its_source_is_the_same() -> None:
    added = theirs(event(), event(), event(source="//other"))
    assert added.sums["alpha", "requests"] == 2
    assert added.repeated == 1


def test_ids_are_remembered_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "REMEMBERED_IDS", 2)
    added = theirs(*(event(id=id_) for id_ in "ABCA"))
    assert (added.sums["alpha", "requests"], added.repeated, len(added._ids)) == (4, 0, 2)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"time": "yesterday"}, "time"),
        ({"time": "2027-01-15T08:00:00"}, "time"),
        ({"time": None}, "time"),
        ({"subject": None}, "subject"),
        ({"subject": "projects/"}, "subject"),
        ({"data": {"value": 42}}, "data.value"),
        ({"data": {"value": "42abc"}}, "data.value"),
        ({"data": {"value": "9223372036854775808"}}, "data.value"),
        ({"data": None}, "data.value"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_makes_the_sides_unequal(
    changes: dict[str, Any], what: str
) -> None:
    added = theirs(event(**changes))
    assert added.unreadable == {what: 1}
    assert not added.sums
    found = compare(METERS, added, Ours("o", {}))
    assert not found.equal
    assert kinds(found) == {("unreadable", None): 1}


def test_events_of_other_meters_are_named_and_change_nothing() -> None:
    found = compare(METERS, theirs(event(type="compute/cpu"), event(type=None)), Ours("o", {}))
    assert found.equal
    assert kinds(found) == {("other_type", None): 2}
    assert "None, compute/cpu" in found.hints[0].text


def test_requests_that_straddle_the_time_are_seen_where_an_event_is_a_request() -> None:
    per_request = "0123456789ABCDEF0123456789"
    added = theirs(
        event("5", id=per_request, type=SECONDS.type, time="2027-01-15T07:59:57Z"),
        event("2", id=per_request[::-1].replace("F", "0"), type=SECONDS.type, time="2027-01-15T07:59:57Z"),
        event("1", id=per_request.replace("F", "E"), type=SECONDS.type, time="2027-01-15T08:09:59Z"),
        # An event of many requests says nothing of when they ended.
        event("900", id="01K38Z6N5T0000000000000000", type=SECONDS.type, time="2027-01-15T08:09:59.999Z"),
    )
    assert (added.began_before, added.ended_after) == (1, 1)
    found = kinds(compare(METERS, added, Ours("o", {})))
    assert (found["began_before", None], found["ended_after", None]) == (1, 1)


# --- both sides -------------------------------------------------------------------------------------


def test_equal_sides_are_equal_and_need_no_hint() -> None:
    sums = {("alpha", "requests"): 3, ("bravo", "connection_seconds"): 4}
    found = compare(METERS, summed(sums), Ours("o", sums))
    assert found.equal
    assert found.hints == ()
    assert found.lines == (Line("alpha", "requests", 3, 3), Line("bravo", "connection_seconds", 4, 4))


@pytest.mark.parametrize(
    ("their", "our"), [({("a", "requests"): 1}, {}), ({}, {("a", "requests"): 1})], ids=["theirs", "ours"]
)
def test_what_only_one_side_has_is_a_difference(
    their: dict[tuple[str, str], int], our: dict[tuple[str, str], int]
) -> None:
    found = compare(METERS, summed(their), Ours("o", our))
    assert not found.equal
    assert [line.difference for line in found.lines] == [1 if our else -1]


def test_two_differences_do_not_cancel_out() -> None:
    found = compare(
        METERS,
        summed({("a", "requests"): 1, ("b", "requests"): 3}),
        Ours("o", {("a", "requests"): 2, ("b", "requests"): 2}),
    )
    assert not found.equal


def test_wire_bytes_explain_that_ours_is_more_and_nothing_else() -> None:
    key = ("a", "ingress_bytes")
    assert kinds(compare(METERS, summed({key: 10}), Ours("o", {key: 25}))) == {
        ("wire_bytes", "ingress_bytes"): 15
    }
    assert kinds(compare(METERS, summed({key: 25}), Ours("o", {key: 10}))) == {}


def test_bodies_explain_that_theirs_is_more_and_nothing_else() -> None:
    key = ("a", "ingress_bytes")
    assert kinds(compare((BODIES,), summed({key: 25}), Ours("o", {key: 10}))) == {
        ("body_bytes", "ingress_bytes"): 15
    }
    assert kinds(compare((BODIES,), summed({key: 10}), Ours("o", {key: 25}))) == {}


def test_floored_seconds_explain_less_than_one_a_request() -> None:
    sums = {("a", "requests"): 10}
    found = compare(
        METERS,
        summed(sums | {("a", "connection_seconds"): 100}),
        Ours("o", sums | {("a", "connection_seconds"): 108}),
    )
    assert kinds(found) == {("floored_seconds", "connection_seconds"): 8}
    beyond = compare(
        METERS,
        summed(sums | {("a", "connection_seconds"): 100}),
        Ours("o", sums | {("a", "connection_seconds"): 150}),
    )
    assert kinds(beyond) == {("floored_seconds", "connection_seconds"): 10}
    assert "40 is more than that explains" in beyond.hints[0].text


def test_other_seconds_are_not_floored_ones() -> None:
    connections = meter("connection_seconds", Quantity.CONNECTION_NS, NS_PER_SECOND)
    found = compare((connections,), summed({}), Ours("o", {("a", "connection_seconds"): 9}))
    assert kinds(found) == {("other_seconds", "connection_seconds"): 9}
    assert "count: " not in found.hints[0].text
    assert "counts connections" in found.hints[0].text


def test_a_second_a_key_is_carried() -> None:
    key = ("a", "connection_seconds")
    found = compare(METERS, summed({key: 12}), Ours("o", {key: 10}, keys={"a": 2}))
    assert kinds(found) == {("carried_seconds", "connection_seconds"): 2}
    assert kinds(compare(METERS, summed({key: 13}), Ours("o", {key: 10}, keys={"a": 2}))) == {}


def test_rows_without_a_route_and_without_a_request_id_share_what_is_missing_there() -> None:
    key = ("a", "requests")
    found = compare(METERS, summed({key: 90}), Ours("o", {key: 100}, no_route={key: 4}))
    assert kinds(found) == {("no_route", "requests"): 4, ("no_request_id", "requests"): 6}
    only_routes = compare(METERS, summed({key: 96}), Ours("o", {key: 100}, no_route={key: 4}))
    assert kinds(only_routes) == {("no_route", "requests"): 4}
    equal = compare(METERS, summed({key: 100}), Ours("o", {key: 100}, no_route={key: 4}))
    assert kinds(equal) == {}


def test_a_log_without_request_ids_yields_no_request_at_all() -> None:
    found = compare(METERS, summed({}), Ours("o", {("a", "requests"): 5}))
    assert "theirs has no request at all" in found.hints[0].text
    some = compare(METERS, summed({("b", "requests"): 1}), Ours("o", {("a", "requests"): 5}))
    assert "no request at all" not in some.hints[0].text


@pytest.mark.parametrize("tenant", [UUID, f"ns-{UUID}"])
def test_what_they_bill_to_a_uuid_is_named_and_not_missing(tenant: str) -> None:
    found = compare(METERS, summed({(tenant, "requests"): 5}), Ours("o", {("a", "requests"): 5}))
    assert kinds(found) == {("uuid_tenant", "requests"): 5}
    assert not found.equal


def test_what_is_held_is_a_line_of_its_own_and_a_difference() -> None:
    held = {"requests": 2, "connection_seconds": 3 * NS_PER_SECOND + 1, "ingress_bytes": 0}
    found = compare(METERS, summed({}), Ours("o", {}, held=held))
    assert found.lines == (Line(None, "requests", 0, 2), Line(None, "connection_seconds", 0, 3))
    assert not found.equal
    assert kinds(found) == {("unattributed", "requests"): 2, ("unattributed", "connection_seconds"): 3}
    assert "whole hours" not in found.hints[0].text
    vague = compare(METERS, summed({}), Ours("o", {}, held=held, whole_hours=False))
    assert "whole hours" in vague.hints[0].text


def test_what_the_ledger_may_lack_is_said() -> None:
    ours = Ours(
        "billing",
        {},
        elsewhere={"requests": 4},
        open_windows=2,
        late_start="2027-01-15T08:05:00.000Z",
        forgotten=True,
        set_aside=1,
    )
    found = compare(METERS, summed({}), ours)
    assert set(kinds(found)) == {
        ("elsewhere", "requests"),
        ("open_windows", None),
        ("late_start", None),
        ("forgotten", None),
        ("set_aside", None),
    }
