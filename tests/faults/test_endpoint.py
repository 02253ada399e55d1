"""Whatever an endpoint does, 1,000 events each: one outcome each, one content each, none invented.

Every behaviour runs against the real courier, store and HTTP client. What an endpoint accepted stays
accepted, what it never said it accepted is not taken for delivered, and no answer makes the sink read on.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from endpoint import Behaviour, Endpoint, Exchange, response
from money import Store

from proxy_usage.delivery import (
    Courier,
    CourierSettings,
    HttpSender,
    Policy,
    RetrySettings,
    StoredBacklog,
    Transport,
)
from proxy_usage.delivery.transport import MAX_ANSWER
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.base import Answer, Verdict
from proxy_usage.outputs.billing import Billing
from proxy_usage.service.build import clock_ms
from proxy_usage.store import Queued
from proxy_usage.store.thread import StoreThread

EVENTS = 1_000
TENANTS = 10
PATIENCE_S = 60.0
SHORT_MS = 100
"""Timeout of a request where the endpoint is one that lets us wait."""
READ_AHEAD = 16 << 20
"""Bytes that kernels and buffers may take before somebody notices that nobody reads."""


class Watched(Billing):
    """The real format, which notes how much of an answer it was ever given."""

    largest = 0

    def read(self, answer: Answer, events: Sequence[Queued]) -> Verdict:
        self.largest = max(self.largest, len(answer.body))
        return super().read(answer, events)


@dataclass
class Delivery:
    store: Store
    thread: StoreThread
    metrics: Metrics
    courier: Courier
    format: Watched
    task: asyncio.Task[None]

    async def until_settled(self) -> dict[str, int]:
        """Waits until nothing is pending. Gives the fates."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    if self.task.done():
                        self.task.result()
                        raise AssertionError("delivery ended by itself")
                    fates = await self.thread.run(self.store.fates)
                    # An attempt is counted after what it comes to is stored.
                    if not fates.get("pending") and not self.courier._under_way:
                        return fates
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"{fates}; {self.courier.policy}: {self.courier.policy.detail}") from None

    def outcomes(self) -> set[str]:
        """The outcomes that batches had, but for a plain delivery."""
        samples = (sample for family in self.metrics.batches.collect() for sample in family.samples)
        return {sample.labels["outcome"] for sample in samples} - {"delivered"}

    async def check(self, endpoint: Endpoint) -> None:
        """One outcome each, one content each, and nothing taken for delivered that was not stored."""
        await self.thread.run(self.store.check_tallies)
        rows = await self.thread.run(
            self.store.rows,
            "SELECT id, fate FROM ledger UNION ALL SELECT e.id, 'dead' FROM dead d JOIN events e USING(seq)"
            " UNION ALL SELECT e.id, 'pending' FROM deliveries d JOIN events e USING(seq)",
        )
        outcomes = dict(rows)
        assert len(rows) == len(outcomes) == EVENTS
        assert endpoint.conflicts == []
        delivered = {id_ for id_, fate in outcomes.items() if fate == "delivered"}
        assert delivered <= endpoint.stored.keys()
        assert self.format.largest <= MAX_ANSWER
        assert endpoint.poured < READ_AHEAD


@asynccontextmanager
async def delivering(
    path: Path, url: str, *, timeout_ms: int = 5_000, ca_file: Path | None = None
) -> AsyncIterator[Delivery]:
    store, thread, metrics, watched = Store(path), StoreThread(), Metrics(), Watched()
    store.add(*(f"t{number % TENANTS}" for number in range(EVENTS)), now_ms=clock_ms())
    courier = Courier(
        CourierSettings("billing", store.output, 100, 0, 2),
        StoredBacklog(store.queue, thread),
        HttpSender(watched, Transport(url, timeout_ms=timeout_ms, concurrency=2, trust=Trust(ca_file))),
        Policy(RetrySettings(1, 8, 600_000), below=random.Random(5).randrange),
        metrics,
        clock_ms,
    )
    task = asyncio.create_task(courier.run())
    try:
        yield Delivery(store, thread, metrics, courier, watched, task)
    finally:
        await courier.stop(0.1)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(task, return_exceptions=True)
        thread.close()
        store.database.close()


# --- behaviours -----------------------------------------------------------------------------------


def says(body: Any, status: str = "200 OK", *headers: str, stores: bool = False) -> Behaviour:
    """Answers so. ``stores``: after it has stored everything."""

    async def behave(exchange: Exchange) -> None:
        if stores:
            exchange.store()
        await exchange.answer(body, status, *headers)

    return behave


def sends(*pieces: bytes, stores: bool = True, pause_s: float = 0) -> Behaviour:
    """Sends these bytes and ends the connection."""

    async def behave(exchange: Exchange) -> None:
        if stores:
            exchange.store()
        await exchange.raw(*pieces, pause_s=pause_s)

    return behave


def pours(piece: bytes, head: bytes = b"") -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.raw(head)
        await exchange.pour(piece)

    return behave


async def closes_before(exchange: Exchange) -> None:
    exchange.keep = False


async def closes_after(exchange: Exchange) -> None:
    exchange.store()
    exchange.keep = False


async def closes_midway(exchange: Exchange) -> None:
    exchange.store(0, len(exchange.ids) // 2)
    exchange.keep = False


async def resets_after(exchange: Exchange) -> None:
    exchange.store()
    exchange.reset()


async def hangs_before(exchange: Exchange) -> None:
    await asyncio.sleep(PATIENCE_S)


async def hangs_after(exchange: Exchange) -> None:
    exchange.store()
    await asyncio.sleep(PATIENCE_S)


async def trickles(exchange: Exchange) -> None:
    """Byte by byte, but it arrives."""
    whole = response(json.dumps({"accepted": exchange.store()}).encode())
    await exchange.raw(*(bytes([byte]) for byte in whole))


async def trickles_too_slowly(exchange: Exchange) -> None:
    whole = response(json.dumps({"accepted": exchange.store()}).encode())
    await exchange.raw(*(bytes([byte]) for byte in whole), pause_s=0.02)


async def half_an_answer(exchange: Exchange) -> None:
    await exchange.raw(response(json.dumps({"accepted": exchange.store()}).encode())[:-4])


async def a_length_too_long_on_an_open_connection(exchange: Exchange) -> None:
    await exchange.raw(
        response(json.dumps({"accepted": exchange.store()}).encode(), "200 OK", "Content-Length: 99")
    )
    await asyncio.sleep(PATIENCE_S)


async def fails_midway(exchange: Exchange) -> None:
    """As the endpoint does when its log fills up: what came before stays stored."""
    exchange.store(0, len(exchange.ids) // 2)
    body = {"code": "RESOURCE_EXHAUSTED", "message": "log full"}
    await exchange.answer(body, "429 Too Many Requests", "Retry-After: 0")


async def old_and_closing(exchange: Exchange) -> None:
    """HTTP/1.0 without a length: the end of the connection is the end of the answer."""
    body = json.dumps({"accepted": exchange.store()}).encode()
    await exchange.raw(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + body)


async def interim_first(exchange: Exchange) -> None:
    await exchange.raw(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n")
    await exchange.accept()


async def a_second_answer_nobody_asked_for(exchange: Exchange) -> None:
    """Were it taken for the answer to the next request, that one's events would be lost."""
    good = response(json.dumps({"accepted": exchange.store()}).encode())
    lie = response(json.dumps({"accepted": len(exchange.ids)}).encode())
    await exchange.raw(good + lie)
    exchange.keep = True


async def drops_a_tenant(exchange: Exchange) -> None:
    """As for a project without an account: 200, and missing from ``accepted``."""
    kept = [place for place, tenant in enumerate(exchange.tenants) if tenant != "t3"]
    for place in kept:
        exchange.store(place, place + 1)
    await exchange.answer({"accepted": len(kept)})


def rejects(listed: Any = None, *, reason: Any = "INVALID_VALUE_TYPE") -> Behaviour:
    """207: stores all but the events of a tenant, and lists what ``listed`` makes of their ids."""

    async def behave(exchange: Exchange) -> None:
        bad = [id_ for id_, tenant in zip(exchange.ids, exchange.tenants, strict=True) if tenant == "t3"]
        for place, tenant in enumerate(exchange.tenants):
            if tenant != "t3":
                exchange.store(place, place + 1)
        ids = bad if listed is None else listed(bad)
        rejected = [{"id": id_, "reason": reason, "detail": "no"} for id_ in ids]
        accepted = len(exchange.ids) - len(bad)
        await exchange.answer({"accepted": accepted, "rejected": rejected}, "207 Multi-Status")

    return behave


REFUSING = {"code": "INVALID_REQUEST", "message": "not an array"}
PAGE = b"<!doctype html><title>Sign in</title>" + b"<p>" * 20
HTML = "Content-Type: text/html"
BOMB = gzip.compress(bytes(64 << 20), 9)
DEEP = b"[" * 400_000
NO_STORE = b"HTTP/1.1 200 OK\r\n"


class Case(NamedTuple):
    behave: Behaviour
    outcomes: str = ""
    """Which must have been seen, separated by |: any of them; empty: none but plain deliveries."""
    times: int | None = 3
    fates: dict[str, int] | None = None
    """None: all delivered."""
    timeout_ms: int = 5_000


LOST = EVENTS // TENANTS
CASES = {
    # connections
    "closes before it stores": Case(closes_before, "broken_answer"),
    "closes after it stored": Case(closes_after, "broken_answer"),
    "closes with half stored": Case(closes_midway, "broken_answer"),
    "resets after it stored": Case(resets_after, "broken_answer"),
    "hangs before it stores": Case(hangs_before, "timeout", 2, None, SHORT_MS),
    "hangs after it stored": Case(hangs_after, "timeout", 2, None, SHORT_MS),
    "answers byte by byte": Case(trickles),
    "answers byte by byte, too slowly": Case(trickles_too_slowly, "timeout", 2, None, SHORT_MS),
    "fails with half stored": Case(fails_midway, "throttled", 9),
    # HTTP
    "half an answer": Case(half_an_answer, "broken_answer"),
    "a length too long, open": Case(a_length_too_long_on_an_open_connection, "timeout", 2, None, SHORT_MS),
    "a length too short": Case(
        says({"accepted": 100}, "200 OK", "Content-Length: 5", stores=True), "ambiguous|broken_answer"
    ),
    "a length that is none": Case(says({}, "200 OK", "Content-Length: -3", stores=True), "broken_answer"),
    "two lengths": Case(
        says({}, "200 OK", "Content-Length: 2", "Content-Length: 1", stores=True), "broken_answer|ambiguous"
    ),
    "chunks that break off": Case(
        sends(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{"accepted":100}\r\n'),
        "broken_answer",
    ),
    "chunks that are none": Case(
        sends(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}"), "broken_answer"
    ),
    "HTTP/1.0, ended by its end": Case(old_and_closing),
    "HTTP/1.0, cut": Case(sends(b'HTTP/1.0 200 OK\r\n\r\n{"accepted":'), "ambiguous"),
    "another protocol": Case(sends(b"SSH-2.0-OpenSSH_9.2\r\n"), "broken_answer"),
    "interim answers first": Case(interim_first),
    "interim answers without end": Case(
        pours(b"HTTP/1.1 102 Processing\r\n\r\n" * 64), "timeout|broken_answer", 1, None, 300
    ),
    "switches protocols": Case(
        sends(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
        "broken_answer|misconfigured|ambiguous|timeout",
        2,
        None,
        SHORT_MS,
    ),
    "a second answer nobody asked for": Case(a_second_answer_nobody_asked_for, "broken_answer|", None),
    "headers without end": Case(
        pours(b"X-Pad: " + b"x" * 999 + b"\r\n", NO_STORE), "broken_answer|timeout", 1, None, 500
    ),
    "one header without end": Case(
        pours(b"x" * 4_096, NO_STORE + b"X-Pad: "), "broken_answer|timeout", 1, None, 500
    ),
    "a body without end": Case(
        pours(b"<p>" * 4_096, NO_STORE + b"Content-Type: text/html\r\nConnection: close\r\n\r\n"),
        "ambiguous",
        2,
    ),
    "10 MiB of HTML": Case(says(PAGE * (10 << 10), "200 OK", HTML), "ambiguous", 2),
    "10 MiB of a server's error": Case(says(PAGE * (10 << 10), "502 Bad Gateway", HTML), "server_error", 2),
    "a gzip bomb": Case(says(BOMB, "200 OK", "Content-Encoding: gzip"), "ambiguous"),
    "an encoding nobody knows": Case(
        says({"accepted": 100}, "200 OK", "Content-Encoding: rot13", stores=True), ""
    ),
    # statuses
    "a redirect to itself": Case(
        says(b"", "302 Found", "Location: /v1/usage/events:batchIngest"), "redirected"
    ),
    "a permanent redirect": Case(
        says(b"", "308 Permanent Redirect", "Location: http://127.0.0.1:1/"), "redirected"
    ),
    "a redirect to nowhere": Case(says(b"", "307 Temporary Redirect"), "redirected"),
    "400 to everything for a while": Case(says(REFUSING, "400 Bad Request"), "split", 20),
    "401": Case(says({"code": "UNAUTHENTICATED"}, "401 Unauthorized"), "unauthorized"),
    "403": Case(says(b"", "403 Forbidden"), "unauthorized"),
    "404": Case(says(PAGE, "404 Not Found", HTML), "misconfigured"),
    "405": Case(says(b"", "405 Method Not Allowed"), "misconfigured"),
    "408": Case(says(b"", "408 Request Timeout"), "timeout"),
    "413": Case(says(b"", "413 Content Too Large"), "split"),
    "422": Case(says(b"", "422 Unprocessable Content"), "misconfigured"),
    "429 with seconds": Case(says(b"", "429 Too Many Requests", "Retry-After: 0"), "throttled"),
    "429 with a date": Case(
        says(b"", "429 Later", "Retry-After: Sun, 06 Nov 1994 08:49:37 GMT"), "throttled"
    ),
    "429 with nonsense": Case(says(b"", "429 Later", "Retry-After: -1e9, soon"), "throttled"),
    "451": Case(says(b"", "451 Unavailable For Legal Reasons"), "misconfigured"),
    "500": Case(says(b"", "500 Internal Server Error"), "server_error"),
    "501": Case(says(b"", "501 Not Implemented"), "misconfigured"),
    "503 after it stored": Case(says(b"", "503 Service Unavailable", stores=True), "server_error"),
    "504 after it stored": Case(says(b"", "504 Gateway Timeout", stores=True), "server_error"),
    "a status of its own": Case(says(b"", "799 What"), "server_error"),
    "204 after it stored": Case(sends(b"HTTP/1.1 204 No Content\r\n\r\n"), "ambiguous"),
    # what it says it accepted
    "nothing said": Case(says({}, stores=True), "ambiguous"),
    "an empty body": Case(says(b"", stores=True), "ambiguous"),
    "too many": Case(says({"accepted": 101}, stores=True), "ambiguous"),
    "a negative number": Case(says({"accepted": -1}, stores=True), "ambiguous"),
    "a boolean": Case(says({"accepted": True}, stores=True), "ambiguous"),
    "a float": Case(says(b'{"accepted":100.0}', stores=True), "ambiguous"),
    "a text": Case(says({"accepted": "100"}, stores=True), "ambiguous"),
    "null": Case(says({"accepted": None}, stores=True), "ambiguous"),
    "a number beyond all bounds": Case(
        says(b'{"accepted":1' + b"0" * 4_000 + b"}", stores=True), "ambiguous"
    ),
    "a list": Case(says([100], stores=True), "ambiguous"),
    "NaN": Case(says(b'{"accepted":NaN}', stores=True), "ambiguous"),
    "a byte order mark": Case(says(b'\xef\xbb\xbf{"accepted":100}', stores=True), "ambiguous"),
    "UTF-16": Case(says('{"accepted":100}'.encode("utf-16"), stores=True), "ambiguous"),
    "not UTF-8": Case(says(b'{"accepted":100,"x":"\xff"}', stores=True), "ambiguous"),
    "nested without end": Case(says(DEEP, stores=True), "ambiguous"),
    "a refusal nested without end": Case(says(DEEP, "400 Bad Request"), "split", 2),
    "something behind the JSON": Case(says(b'{"accepted":100} and so on', stores=True), "ambiguous"),
    "fewer, for a while": Case(says({"accepted": 7}, stores=True), "asked_one_by_one", 2),
    "none, for a while": Case(says({"accepted": 0}, stores=True), "asked_one_by_one", 2),
    "a tenant is dropped": Case(
        drops_a_tenant, "asked_one_by_one", None, {"delivered": EVENTS - LOST, "dead": LOST}
    ),
    # what it says it rejected
    "a tenant is rejected": Case(rejects(), "partial", None, {"delivered": EVENTS - LOST, "dead": LOST}),
    "rejected for a reason that is none": Case(
        rejects(reason={"deep": [None]}), "partial", None, {"delivered": EVENTS - LOST, "dead": LOST}
    ),
    "rejected without ids": Case(
        rejects(lambda bad: [""] * len(bad)),
        "asked_one_by_one",
        None,
        {"delivered": EVENTS - LOST, "dead": LOST},
    ),
    "rejected under ids nobody sent": Case(
        rejects(lambda bad: [f"01ARZ3NDEKTSV4RRFFQ69G5F{n:02}" for n in range(len(bad))]),
        "asked_one_by_one",
        None,
        {"delivered": EVENTS - LOST, "dead": LOST},
    ),
    "one rejected for all": Case(
        rejects(lambda bad: [bad[0]] * len(bad) if bad else []),
        "asked_one_by_one",
        None,
        {"delivered": EVENTS - LOST, "dead": LOST},
    ),
    "rejected more than there are": Case(rejects(lambda bad: [*bad, *bad]), "ambiguous|asked_one_by_one"),
    "rejected is no list": Case(says({"accepted": 0, "rejected": {"id": 1}}), "ambiguous"),
    "rejected is a list of nothing": Case(
        says({"accepted": 0, "rejected": [None, 1, "x"]}), "asked_one_by_one", 2
    ),
    "all rejected for a while, listed by none": Case(
        says({"accepted": 0, "rejected": []}, "207 Multi-Status"), "asked_one_by_one", 2
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_every_event_has_one_outcome_whatever_the_endpoint_does(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    async with (
        Endpoint(case.behave, times=case.times) as endpoint,
        delivering(tmp_path, endpoint.url, timeout_ms=case.timeout_ms) as delivery,
    ):
        fates = await delivery.until_settled()
        assert fates == (case.fates or {"delivered": EVENTS})
        await delivery.check(endpoint)
        outcomes = delivery.outcomes()
        assert outcomes & set(case.outcomes.split("|")) or (not outcomes and "" in case.outcomes.split("|"))


# --- before there is a request --------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def certified(authority: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.mark.parametrize(
    "fault", ["speaks plainly", "ends the handshake", "another's certificate", "an unknown authority"]
)
async def test_a_tls_that_fails_keeps_everything_and_the_next_that_works_delivers_it(
    tmp_path: Path, authority: trustme.CA, fault: str
) -> None:
    wrong = {
        "another's certificate": certified(authority, "elsewhere.example"),
        "an unknown authority": certified(trustme.CA(), "127.0.0.1"),
    }.get(fault)

    async def greet(_: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if wrong is not None:
            await writer.start_tls(wrong)
            return True
        await reader.read(1)
        if fault == "speaks plainly":
            writer.write(response(b'{"accepted":100}'))
            await writer.drain()
        return False

    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    async with (
        Endpoint(times=4, greet=greet, tls=certified(authority, "127.0.0.1")) as endpoint,
        delivering(tmp_path, endpoint.url, ca_file=ca_file) as delivery,
    ):
        assert await delivery.until_settled() == {"delivered": EVENTS}
        assert delivery.outcomes() <= {"tls", "connect", "broken_answer"}
        assert delivery.outcomes()
        await delivery.check(endpoint)


@pytest.mark.parametrize("fault", ["closes", "resets", "answers before it is asked"])
async def test_a_connection_that_ends_before_the_request_costs_nothing(tmp_path: Path, fault: str) -> None:
    async def greet(_: Endpoint, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if fault == "resets":
            writer.transport.abort()
        elif fault == "answers before it is asked":
            writer.write(response(b"", "503 Service Unavailable"))
            await writer.drain()
        return False

    async with (
        Endpoint(times=5, greet=greet) as endpoint,
        delivering(tmp_path, endpoint.url) as delivery,
    ):
        assert await delivery.until_settled() == {"delivered": EVENTS}
        await delivery.check(endpoint)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x", "http://no-such-host.invalid/x"])
async def test_an_endpoint_that_is_not_there_costs_the_backlog_nothing(tmp_path: Path, url: str) -> None:
    """Refused, or without an address: only the head of the queue was ever tried."""
    async with delivering(tmp_path, url, timeout_ms=500) as delivery:
        failures = delivery.courier.policy
        async with asyncio.timeout(PATIENCE_S):
            while failures.failures < 5:
                await asyncio.sleep(0.005)
        assert delivery.outcomes() <= {"connect", "timeout"}
        untouched = await delivery.thread.run(
            delivery.store.rows, "SELECT count(*) FROM deliveries WHERE first_attempt_ms IS NULL"
        )
        assert untouched[0][0] >= EVENTS - 200
        assert await delivery.thread.run(delivery.store.fates) == {"pending": EVENTS}
        async with Endpoint() as endpoint:
            await delivery.check(endpoint)


async def test_faults_of_every_kind_in_any_order_leave_one_outcome_each(tmp_path: Path) -> None:
    """One request after the other meets another behaviour; then the endpoint is well."""
    lasting = {"hangs", "without end", "byte by byte", "open", "switches"}
    kinds = [
        case.behave
        for name, case in CASES.items()
        if case.fates is None and not any(word in name for word in lasting) and case.times is not None
    ]
    random.Random(7).shuffle(kinds)
    turn = count()

    async def behave(exchange: Exchange) -> None:
        await kinds[next(turn) % len(kinds)](exchange)

    async with (
        Endpoint(behave, times=2 * len(kinds)) as endpoint,
        delivering(tmp_path, endpoint.url) as delivery,
    ):
        fates = await delivery.until_settled()
        assert sum(fates.values()) == EVENTS
        assert set(fates) <= {"delivered", "dead"}
        await delivery.check(endpoint)


def test_the_behaviours_are_many() -> None:
    assert len(CASES) >= 30
