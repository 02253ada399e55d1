"""The billing stand-in is as strict as the endpoint it stands for, and answers as that does."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import trustme
from demo_client import ULIDS, Client, data, event

from proxy_usage.demo.arrived import MAX_VIOLATIONS, Arrived
from proxy_usage.demo.billing import MAX_SINGLE_BYTES, SINGLE, BillingStandIn
from proxy_usage.demo.checks import DIMENSIONS, METERS
from proxy_usage.demo.faults import Faults


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with BillingStandIn() as billing, aiohttp.ClientSession() as session:
        yield Client(session, billing)


# ── the checks, in their order ──

MISSING, ULID, VALUE = "MISSING_REQUIRED_FIELD", "INVALID_ULID", "INVALID_VALUE_TYPE"
TYPE = "INVALID_DATACONTENTTYPE"
REFUSED = [
    pytest.param(b"7", "", MISSING, id="not an object"),
    pytest.param(b'{"id": "\xff"}', "", MISSING, id="not UTF-8"),
    pytest.param(event(subject=5), "", MISSING, id="subject is a number"),
    pytest.param(event(id=5), "", MISSING, id="id is a number"),
    pytest.param(event(datacontenttype=["application/json"]), "", MISSING, id="content type is a list"),
    pytest.param(event(id=5, specversion=...), "", MISSING, id="wrong type comes before everything"),
    pytest.param(event(id=...), "", ULID, id="no id"),
    pytest.param(event(id=""), "", ULID, id="empty id"),
    pytest.param(event(id=None), "", ULID, id="null id"),
    pytest.param(event(id="01K38Z6N5T"), "01K38Z6N5T", ULID, id="short id"),
    pytest.param(event(id="8" + "0" * 25), "8" + "0" * 25, ULID, id="id beyond the ULIDs"),
    pytest.param(event(id="é" + "0" * 25), "é" + "0" * 25, ULID, id="26 characters, 27 bytes"),
    pytest.param(event(id="short", specversion=...), "short", ULID, id="id comes before specversion"),
    pytest.param(event(specversion=...), ULIDS[0], MISSING, id="no specversion"),
    pytest.param(event(type=""), ULIDS[0], MISSING, id="empty type"),
    pytest.param(event(source=None), ULIDS[0], MISSING, id="null source"),
    pytest.param(event(subject=...), ULIDS[0], MISSING, id="no subject"),
    pytest.param(event(subject="alpha"), ULIDS[0], MISSING, id="subject without its prefix"),
    pytest.param(event(subject="projects/"), ULIDS[0], MISSING, id="subject without a name"),
    pytest.param(
        event(subject="x", datacontenttype=...), ULIDS[0], MISSING, id="subject before content type"
    ),
    pytest.param(event(datacontenttype=...), ULIDS[0], TYPE, id="no content type"),
    pytest.param(
        event(datacontenttype="application/json; charset=utf-8"), ULIDS[0], TYPE, id="content type charset"
    ),
    pytest.param(event(datacontenttype="", data=...), ULIDS[0], TYPE, id="content type before data"),
    pytest.param(event(data=...), ULIDS[0], VALUE, id="no data"),
    pytest.param(event(data="42"), ULIDS[0], VALUE, id="data is text"),
    pytest.param(event(data={}), ULIDS[0], VALUE, id="no value"),
    pytest.param(event(data=data(None)), ULIDS[0], VALUE, id="null value"),
    pytest.param(event(data=data(42)), ULIDS[0], VALUE, id="value is a number"),
    pytest.param(event(data=data("")), ULIDS[0], VALUE, id="empty value"),
    pytest.param(event(data=data("abc")), ULIDS[0], VALUE, id="value without digits"),
    pytest.param(event(data=data("9223372036854775808")), ULIDS[0], VALUE, id="value beyond int64"),
]


@pytest.mark.parametrize(("sent", "id_", "reason"), REFUSED)
async def test_refused_event_in_a_batch(client: Client, sent: Any, id_: str, reason: str) -> None:
    raw = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
    status, answer = await client.send(b"[" + raw + b"," + json.dumps(event(1)).encode() + b"]")
    assert status == 207
    assert answer["accepted"] == 1
    assert [(entry["id"], entry["reason"]) for entry in answer["rejected"]] == [(id_, reason)]
    assert set(answer["rejected"][0]) == {"id", "reason", "detail"}
    assert list(client.billing.stored) == [ULIDS[1]]


@pytest.mark.parametrize(("sent", "id_", "reason"), REFUSED)
async def test_refused_single_event(client: Client, sent: Any, id_: str, reason: str) -> None:
    status, answer = await client.send(sent, SINGLE)
    assert (status, answer["code"], set(answer)) == (400, reason, {"code", "message"})
    assert client.billing.stored == {}


# What the endpoint lets through, and what a strict reader says about it.
TOLERATED = [
    pytest.param(event(data=data("0")), "value", 0, id="zero"),
    pytest.param(event(data=data("-5")), "value", -5, id="negative"),
    pytest.param(event(data=data("+5")), "value", 0, id="plus sign"),
    pytest.param(event(data=data(" 42")), "value", 0, id="space"),
    pytest.param(event(data=data("42abc")), "value", 0, id="letters behind"),
    pytest.param(event(data=data("1.5")), "value", 0, id="fraction"),
    pytest.param(event(data=data("0x10")), "value", 0, id="hexadecimal"),
    pytest.param(event(data=data("1_000")), "value", 0, id="underscore"),
    pytest.param(event(data=data("007")), "value", 7, id="leading zeros"),
    pytest.param(event(time=...), "time", 42, id="no time"),
    pytest.param(event(time=5), "time", 42, id="time is a number"),
    pytest.param(event(time="2026-08-22T10:14:59.999"), "time", 42, id="time without a zone"),
    pytest.param(event(time="2026-08-22T10:14:59Z"), "time", 42, id="time without milliseconds"),
    pytest.param(event(time="2026-13-22T10:14:59.999Z"), "time", 42, id="no such month"),
    pytest.param(event(type="networking.datumapis.com/gateway/unknown"), "type", 42, id="unknown type"),
    pytest.param(event(subject="projects/Alpha"), "subject", 42, id="upper-case project"),
    pytest.param(event(subject="projects/a.b"), "subject", 42, id="dot in the project"),
    pytest.param(event(subject="projects/" + "a" * 64), "subject", 42, id="long project"),
    pytest.param(event(source="gateway"), "source", 42, id="source without a host"),
    pytest.param(event(specversion="0.3"), "specversion", 42, id="old specversion"),
    pytest.param(event(id=ULIDS[0].lower()), "id", 42, id="lower-case id"),
    pytest.param(event(id="0" * 25 + "U"), "id", 42, id="letter that no ULID has"),
    pytest.param(event(billingaccountref="x"), "extension", 42, id="the consumer's extension"),
    pytest.param(event(data=data("42", note="x")), "data", 42, id="unknown key under data"),
    pytest.param(event(data={"value": "42"}), "dimension", 42, id="no dimensions"),
    pytest.param(
        event(data={"value": "42", "dimensions": {**dict.fromkeys(DIMENSIONS, ""), "zone": "a"}}),
        "dimension",
        42,
        id="undeclared dimension",
    ),
    pytest.param(
        event(data={"value": "42", "dimensions": dict.fromkeys(DIMENSIONS[1:], "")}),
        "dimension",
        42,
        id="missing dimension",
    ),
    pytest.param(
        event(data={"value": "42", "dimensions": {**dict.fromkeys(DIMENSIONS, ""), "region": 1}}),
        "dimension",
        42,
        id="dimension is a number",
    ),
]


@pytest.mark.parametrize(("sent", "what", "booked"), TOLERATED)
async def test_tolerated_event_is_a_violation(client: Client, sent: Any, what: str, booked: int) -> None:
    assert await client.send([sent]) == (200, {"accepted": 1})
    assert [violation.what for violation in client.billing.arrived.violations] == [what]
    assert list(client.billing.sums().values()) == [booked]


async def test_faultless_events_are_no_violation(client: Client) -> None:
    resource = {"group": "g", "kind": "k", "name": "n", "uid": "u"}
    sent = [
        event(0),
        event(1, time="2026-08-22T10:14:59.999+00:00"),
        event(2, data=data("1", resource=resource)),
    ]
    assert await client.send(sent) == (200, {"accepted": 3})
    assert client.billing.arrived.violations == []
    assert client.billing.stored[ULIDS[2]] == sent[2]


# ── requests ──


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"null",
        b"[",
        b"[1,]",
        b"[{]",
        b"not json",
        b"[NaN]",
        json.dumps(event()).encode(),
    ],
)
async def test_a_batch_must_be_an_array(client: Client, body: bytes) -> None:
    status, answer = await client.send(body)
    assert (status, answer["code"]) == (400, "INVALID_REQUEST")
    assert client.billing.stored == {}


async def test_batch_limits(client: Client) -> None:
    assert await client.send([]) == (200, {"accepted": 0})
    status, answer = await client.send([event(number) for number in range(101)])
    assert (status, answer["code"], client.billing.stored) == (400, "INVALID_REQUEST", {})
    assert await client.send([event(number) for number in range(100)]) == (200, {"accepted": 100})


async def test_oversize_is_cut_and_fails_to_parse() -> None:
    async with BillingStandIn(max_batch_bytes=1000) as billing, aiohttp.ClientSession() as session:
        client = Client(session, billing)
        status, answer = await client.send([event(number) for number in range(5)])
        assert (status, answer["code"], billing.stored) == (400, "INVALID_REQUEST", {})
        status, answer = await client.send(event(source="//h/" + "x" * MAX_SINGLE_BYTES), SINGLE)
        assert (status, answer["code"], billing.stored) == (400, MISSING, {})


async def test_all_rejected_is_still_a_207(client: Client) -> None:
    status, answer = await client.send([event(id=...), event(data=...)])
    assert (status, answer["accepted"], len(answer["rejected"])) == (207, 0, 2)


async def test_single_event(client: Client) -> None:
    assert await client.send(event(), SINGLE) == (200, {"accepted": 1})
    client.billing.faults = Faults(drop_tenants=["alpha"])
    assert await client.send(event(1), SINGLE) == (200, {"accepted": 0})
    assert list(client.billing.stored) == [ULIDS[0]]


async def test_gzip_is_understood(client: Client) -> None:
    assert await client.send([event()], compress="gzip") == (200, {"accepted": 1})


async def test_sums_by_tenant_meter_and_route(client: Client) -> None:
    def routed(number: int, route: str, value: str, **changes: Any) -> dict[str, Any]:
        dimensions = {**dict.fromkeys(DIMENSIONS, ""), "httproute_name": route}
        return event(number, data={"value": value, "dimensions": dimensions}, **changes)

    big = "9007199254740993"  # 2^53 + 1: a float would lose the one
    sent = [
        routed(0, "web", big),
        routed(1, "web", big),
        routed(2, "api", "1", type=METERS[1]),
        routed(3, "api", "5", subject="projects/bravo"),
    ]
    assert (await client.send(sent))[0] == 200
    assert client.billing.sums() == {
        ("alpha", METERS[0]): 2 * int(big),
        ("alpha", METERS[1]): 1,
        ("bravo", METERS[0]): 5,
    }
    assert client.billing.by_route() == {
        ("alpha", "web", METERS[0]): 2 * int(big),
        ("alpha", "api", METERS[1]): 1,
        ("bravo", "api", METERS[0]): 5,
    }
    async with client.session.get(client.billing.base + "/sums") as answer:
        shown = await answer.json()
    assert shown["sums"]["alpha"][METERS[0]] == 2 * int(big)
    assert (shown["events"], shown["answers"]) == (4, {"200": 1})
    async with client.session.get(client.billing.base + "/healthz") as answer:
        assert answer.status == 200


async def test_bearer_token_can_rotate() -> None:
    async with BillingStandIn(token="old") as billing, aiohttp.ClientSession() as session:
        client = Client(session, billing)
        for headers in ({}, {"Authorization": "Bearer older"}, {"Authorization": "old"}):
            status, answer = await client.send([event()], headers=headers)
            assert (status, answer["code"], billing.stored) == (401, "UNAUTHENTICATED", {})
        assert (await client.send([event()], headers={"Authorization": "Bearer old"}))[0] == 200
        billing.token = "new"
        assert (await client.send([event(1)], headers={"Authorization": "Bearer old"}))[0] == 401
        assert (await client.send([event(1)], headers={"Authorization": "Bearer new"}))[0] == 200


async def test_tls() -> None:
    authority = trustme.CA()
    server, trust = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context()
    authority.issue_cert("127.0.0.1").configure_cert(server)
    authority.configure_trust(trust)
    async with BillingStandIn(tls=server) as billing, aiohttp.ClientSession() as session:
        assert billing.url.startswith("https://127.0.0.1:")
        assert await Client(session, billing).send([event()], ssl=trust) == (200, {"accepted": 1})


# ── the same id again ──


async def test_duplicates_are_accepted_and_counted_once(client: Client) -> None:
    assert await client.send([event(0), event(0), event(1)]) == (200, {"accepted": 3})
    assert await client.send(event(1), SINGLE) == (200, {"accepted": 1})
    assert client.billing.sums() == {("alpha", METERS[0]): 84}
    assert client.billing.arrived.duplicates == 2
    assert client.billing.arrived.violations == []


async def test_same_id_other_bytes_or_other_time(client: Client) -> None:
    raw = json.dumps(event()).encode()
    await client.send(b"[" + raw + b"]")
    await client.send(b"[ " + raw + b" ]")  # around the event is not in it
    assert client.billing.arrived.violations == []
    await client.send(b"[" + raw.replace(b": ", b":") + b"]")
    assert [violation.what for violation in client.billing.arrived.violations] == ["bytes changed"]
    await client.send([event(time="2026-08-22T10:15:59.999Z")])
    changed = [violation.what for violation in client.billing.arrived.violations]
    assert changed == ["bytes changed", "time changed", "bytes changed"]
    assert client.billing.sums() == {("alpha", METERS[0]): 42}


async def test_resent_after_the_dedup_window() -> None:
    clock = [1_000]
    async with (
        BillingStandIn(clock_ms=lambda: clock[0], arrived=Arrived(dedup_window_ms=600_000)) as billing,
        aiohttp.ClientSession() as session,
    ):
        client = Client(session, billing)
        await client.send([event()])
        clock[0] += 600_000
        await client.send([event()])
        assert billing.arrived.violations == []
        clock[0] += 1
        await client.send([event()])
        assert [violation.what for violation in billing.arrived.violations] == ["resent too late"]


def test_memory_is_bounded_and_sums_are_not_lost() -> None:
    arrived = Arrived(max_events=3)
    for number in range(10):
        one = event(number, time=...)
        arrived.add(json.dumps(one).encode(), one, 0)
    assert list(arrived.stored) == ULIDS[7:10]
    assert arrived.forgotten == 7
    assert arrived.sums() == {("alpha", METERS[0]): 420}
    known = event(9, time="later")
    for _ in range(MAX_VIOLATIONS):
        arrived.add(json.dumps(known).encode(), known, 0)
    assert len(arrived.violations) == MAX_VIOLATIONS
    assert arrived.violations_total == 10 + 2 * MAX_VIOLATIONS
