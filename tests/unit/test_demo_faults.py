"""Each fault of the billing stand-in does what it says: to the answer, and to what is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from demo_client import ULIDS, Client, event

from proxy_usage.demo.billing import BATCH, SINGLE, BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.faults import Fault, Faults


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with BillingStandIn() as billing, aiohttp.ClientSession() as session:
        yield Client(session, billing)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault.REFUSE, 400, "INVALID_REQUEST"),
        (Fault.UNAUTHENTICATED, 401, "UNAUTHENTICATED"),
        (Fault.FORBIDDEN, 403, "PERMISSION_DENIED"),
        (Fault.NOT_FOUND, 404, "NOT_FOUND"),
        (Fault.TIMEOUT, 408, "DEADLINE_EXCEEDED"),
        (Fault.TOO_LARGE, 413, "TOO_LARGE"),
        (Fault.BUSY, 429, "RESOURCE_EXHAUSTED"),
        (Fault.ERROR, 500, "INTERNAL"),
        (Fault.UNAVAILABLE, 503, "UNAVAILABLE"),
    ],
)
async def test_fault_with_a_status_stores_nothing(
    client: Client, fault: Fault, status: int, code: str
) -> None:
    client.billing.faults = Faults(always=fault, times=2)
    for path, body in ((BATCH, [event()]), (SINGLE, event())):
        answered, answer = await client.send(body, path)
        assert (answered, answer["code"], client.billing.stored) == (status, code, {})
    assert await client.send([event()]) == (200, {"accepted": 1})
    assert client.billing.answers == {str(status): 2, "200": 1}


@pytest.mark.parametrize("retry_after", ["1", "Fri, 21 Aug 2026 10:00:00 GMT", None])
async def test_busy_says_when_to_come_back(client: Client, retry_after: str | None) -> None:
    client.billing.faults = Faults(always=Fault.BUSY, retry_after=retry_after)
    async with client.session.post(client.billing.url, json=[event()]) as answer:
        assert answer.headers.get("Retry-After") == retry_after


async def test_reject_on_demand(client: Client) -> None:
    client.billing.faults = Faults(always=Fault.REJECT, share=300, seed=7)
    status, answer = await client.send([event(number) for number in range(20)])
    refused = {entry["id"] for entry in answer["rejected"]}
    assert status == 207
    assert answer["accepted"] == 20 - len(refused)
    assert 0 < len(refused) < 20
    assert set(client.billing.stored) == set(ULIDS[:20]) - refused
    client.billing.faults = Faults(reject_tenants=["bravo"], reject_types=[METERS[1]])
    sent = [event(30), event(31, subject="projects/bravo"), event(32, type=METERS[1])]
    status, answer = await client.send(sent)
    assert (status, answer["accepted"]) == (207, 1)
    assert [entry["id"] for entry in answer["rejected"]] == ULIDS[31:33]


async def test_short_answer_leaves_out_without_a_word(client: Client) -> None:
    client.billing.faults = Faults(always=Fault.SHORT, times=1)
    status, answer = await client.send([event(number) for number in range(10)])
    assert (status, set(answer)) == (200, {"accepted"})
    assert answer["accepted"] == len(client.billing.stored) == 10 - client.billing.not_accepted < 10
    client.billing.faults = Faults(drop_tenants=["bravo"])
    sent = [event(20), event(21, subject="projects/bravo")]
    assert await client.send(sent) == (200, {"accepted": 1})
    assert ULIDS[21] not in client.billing.stored


async def test_midway_keeps_what_came_before(client: Client) -> None:
    client.billing.faults = Faults(script=[Fault.MIDWAY] * 20, seed=3)
    cuts = set()
    for attempt in range(20):
        sent = [event(number) for number in range(attempt * 10, attempt * 10 + 10)]
        before = len(client.billing.stored)
        status, answer = await client.send(sent)
        assert (status, answer["code"]) == (429, "RESOURCE_EXHAUSTED")
        assert (
            list(client.billing.stored)[before:]
            == ULIDS[attempt * 10 :][: len(client.billing.stored) - before]
        )
        cuts.add(len(client.billing.stored) - before)
    assert len(cuts) > 3
    assert max(cuts) < 10


async def test_midway_does_not_report_rejections(client: Client) -> None:
    client.billing.faults = Faults(script=[Fault.MIDWAY] * 5)
    for _ in range(5):
        _, answer = await client.send([event(id=...), event(0), event(1)])
        assert set(answer) == {"code", "message"}


@pytest.mark.parametrize(("fault", "stored"), [(Fault.LOST, [ULIDS[0]]), (Fault.RESET, [])])
async def test_connection_closed_without_an_answer(client: Client, fault: Fault, stored: list[str]) -> None:
    client.billing.faults = Faults(script=[fault])
    reader, writer = await asyncio.open_connection("127.0.0.1", client.billing.port)
    body = json.dumps([event()]).encode()
    writer.write(
        b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (BATCH.encode(), len(body), body)
    )
    with contextlib.suppress(ConnectionResetError):  # which is as closed as can be
        assert await reader.read() == b""
    writer.close()
    assert list(client.billing.stored) == stored
    assert await client.send([event()]) == (200, {"accepted": 1})


async def test_late_answer_stores_first(client: Client) -> None:
    client.billing.faults = Faults(script=[Fault.LATE], delay_ms=60_000)
    sending = asyncio.create_task(client.send([event()]))
    while not client.billing.stored:
        await asyncio.sleep(0.005)
    assert not sending.done()
    sending.cancel()
    client.billing.faults = Faults(script=[Fault.LATE], delay_ms=1)
    assert await client.send([event(1)]) == (200, {"accepted": 1})


async def test_hang_never_answers_and_ends_with_the_server() -> None:
    async with aiohttp.ClientSession() as session:
        async with BillingStandIn(faults=Faults(always=Fault.HANG)) as billing:
            timeout = aiohttp.ClientTimeout(total=0.2)
            with pytest.raises(TimeoutError):
                await Client(session, billing).send([event()], timeout=timeout)
            hanging = asyncio.create_task(Client(session, billing).send([event()]))
            await asyncio.sleep(0.05)
        with pytest.raises(aiohttp.ClientError):
            await hanging
        assert billing.stored == {}


async def test_pages_in_place_of_answers(client: Client) -> None:
    client.billing.faults = Faults(script=[Fault.HTML, Fault.EMPTY, Fault.REDIRECT])
    status, page = await client.send([event()])
    assert (status, "<title>" in page) == (200, True)
    assert await client.send([event()]) == (200, "")
    async with client.session.post(client.billing.url, json=[event()], allow_redirects=False) as answer:
        assert (answer.status, answer.headers["Location"]) == (302, client.billing.base + "/login")
    assert client.billing.stored == {}


async def test_faults_over_http(client: Client) -> None:
    url = client.billing.base + "/faults"
    setting = {"per_mille": {"429": 200, "lost": 50}, "script": ["503", None], "retry_after": "2", "seed": 9}
    async with client.session.put(url, json=setting) as answer:
        assert answer.status == 200
        shown = await answer.json()
        assert {name: shown[name] for name in setting} == setting
    assert (await client.send([event()]))[0] == 503
    assert (await client.send([event()]))[0] == 200
    mistakes: list[Any] = [
        {"per_mill": {}},
        {"always": "418"},
        {"per_mille": {"429": 1001}},
        [],
        {"script": [1]},
    ]
    for wrong in mistakes:
        async with client.session.put(url, json=wrong) as answer:
            assert (answer.status, (await answer.json())["code"]) == (400, "INVALID_REQUEST")
    async with client.session.put(url, data=b"{") as answer:
        assert answer.status == 400
    assert client.billing.faults.retry_after == "2"  # a refused setting changes nothing
    async with client.session.delete(url) as answer:
        assert (await answer.json())["per_mille"] == {}
    assert (await client.send([event(1)]))[0] == 200


async def test_violations_over_http(client: Client) -> None:
    await client.send([event(time=...)])
    async with client.session.get(client.billing.base + "/violations") as answer:
        shown = await answer.json()
    assert shown["total"] == 1
    assert shown["violations"][0]["what"] == "time"


def test_same_seed_same_faults() -> None:
    shares = {Fault.BUSY: 200, Fault.UNAVAILABLE: 100}
    runs = []
    for _ in range(2):
        faults = Faults(seed=5, per_mille=shares)
        runs.append([faults.decide() for _ in range(1000)])
    assert runs[0] == runs[1]
    assert 150 < runs[0].count(Fault.BUSY) < 250
    assert 60 < runs[0].count(Fault.UNAVAILABLE) < 140
    other = Faults(seed=6, per_mille=shares)
    assert [other.decide() for _ in range(1000)] != runs[0]
