"""Delivery over real sockets: whatever an endpoint answers, each event ends once and goes out unchanged."""

import asyncio
import gzip
import json
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trustme
from money import METERS, Store, cell, key
from pki import Authority

from proxy_usage.delivery import (
    Courier,
    CourierSettings,
    HttpSender,
    Policy,
    RetrySettings,
    StoredBacklog,
    Transport,
)
from proxy_usage.delivery.policy import REFUSING_EVERYTHING
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.listener import lease_port
from proxy_usage.errors import ConfigError
from proxy_usage.metrics import Metrics
from proxy_usage.outputs.billing import Billing
from proxy_usage.service.build import clock_ms
from proxy_usage.store.thread import StoreThread

PATIENCE_S = 60.0
TYPES = tuple(meter.type for meter in METERS)


@dataclass
class Delivery:
    """A store whose one output is being delivered."""

    store: Store
    thread: StoreThread
    metrics: Metrics
    courier: Courier
    task: asyncio.Task[None]
    looks: list[int] = field(default_factory=list)
    """Grows each time the loop looks at the clock."""

    async def fates(self) -> dict[str, int]:
        return await self.thread.run(self.store.fates)

    async def until(self, condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
        """Waits for a condition; fails when delivery ends, or after a minute."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if self.task.done():
                    self.task.result()
                    raise AssertionError("delivery ended by itself")
                met = condition()
                if met if isinstance(met, bool) else await met:
                    return
                await asyncio.sleep(0.002)

    async def until_fates(self, **wanted: int) -> None:
        async def reached() -> bool:
            return await self.fates() == wanted

        try:
            await self.until(reached)
        except TimeoutError:
            assert await self.fates() == wanted
        await self.thread.run(self.store.check_tallies)

    async def add(self, *tenants: str) -> list[str]:
        ids = await self.thread.run(self.store.add, *tenants, now_ms=clock_ms())
        self.courier.notify()
        return ids

    async def counted(self) -> dict[str, int]:
        """Batches by outcome, when no attempt is under way: one is counted after its fate is stored."""
        await self.until(lambda: not self.courier._under_way)
        return self.outcomes()

    def outcomes(self) -> dict[str, int]:
        """Batches by outcome."""
        return {
            sample.labels["outcome"]: int(sample.value)
            for found in self.metrics.batches.collect()
            for sample in found.samples
            if sample.name.endswith("_total")
        }


@asynccontextmanager
async def delivering(
    tmp_path: Path,
    url: str,
    *,
    tenants: Sequence[str] = (),
    timeout_ms: int = 30_000,
    concurrency: int = 2,
    batch_events: int = 100,
    token: TokenFile | None = None,
    trust: Trust | None = None,
    compress: bool = False,
    dedup_window_ms: int = 600_000,
) -> AsyncIterator[Delivery]:
    store, thread, metrics = Store(tmp_path), StoreThread(), Metrics()
    store.add(*tenants, now_ms=clock_ms())
    looks: list[int] = []

    def clock() -> int:
        looks.append(1)
        return clock_ms()

    courier = Courier(
        CourierSettings("billing", store.output, batch_events, 0, concurrency),
        StoredBacklog(store.queue, thread),
        HttpSender(
            Billing(),
            Transport(
                url,
                timeout_ms=timeout_ms,
                concurrency=concurrency,
                token=token,
                trust=trust,
                compress=compress,
            ),
        ),
        Policy(RetrySettings(1, 8, dedup_window_ms), below=random.Random(5).randrange),
        metrics,
        clock,
    )
    task = asyncio.create_task(courier.run())
    try:
        yield Delivery(store, thread, metrics, courier, task, looks)
    finally:
        await courier.stop(0.1)
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.gather(task, return_exceptions=True)
        thread.close()
        store.database.close()


def stand_in(faults: Faults | None = None, **settings: object) -> BillingStandIn:
    arrived = Arrived(types=TYPES, dimensions=("region", "httproute_name"))
    return BillingStandIn(faults=faults, arrived=arrived, **settings)  # type: ignore[arg-type]


# --- the strict stand-in and its faults -----------------------------------------------------------


async def test_what_is_minted_arrives_once_and_sound(tmp_path: Path) -> None:
    async with stand_in() as billing, delivering(tmp_path, billing.url) as delivery:
        cells = [
            cell((n + 1, n * 10, n * 100, n * 300_000_000), key=key(f"t{n % 30}", route=f"r{n}"), id=n)
            for n in range(300)
        ]
        events = await delivery.thread.run(delivery.store.close_window, *cells, now_ms=clock_ms())
        delivery.courier.notify()
        await delivery.until_fates(delivered=len(events))
        assert billing.arrived.violations == []
        assert billing.arrived.duplicates == 0
        assert {id_: entry.raw for id_, entry in billing.arrived.stored.items()} == {
            event.id: event.body for event in events
        }
        assert sum(billing.sums().values()) == sum(event.value for event in events)
        assert await delivery.counted() == {"delivered": -(-len(events) // 100)}


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        (Fault.REDIRECT, "redirected"),
        (Fault.UNAUTHENTICATED, "unauthorized"),
        (Fault.FORBIDDEN, "unauthorized"),
        (Fault.NOT_FOUND, "misconfigured"),
        (Fault.TIMEOUT, "timeout"),
        (Fault.BUSY, "throttled"),
        (Fault.ERROR, "server_error"),
        (Fault.UNAVAILABLE, "server_error"),
        (Fault.MIDWAY, "throttled"),
        (Fault.LOST, "broken_answer"),
        (Fault.RESET, "broken_answer"),
        (Fault.HTML, "ambiguous"),
        (Fault.EMPTY, "ambiguous"),
    ],
)
async def test_what_may_pass_is_sent_again_unchanged_until_it_is_accepted(
    tmp_path: Path, fault: Fault, outcome: str
) -> None:
    faults = Faults(script=[fault] * 4, retry_after="0")
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url) as delivery:
        ids = await delivery.add(*(f"t{number}" for number in range(30)))
        await delivery.until_fates(delivered=30)
        assert await delivery.counted() == {outcome: 4, "delivered": 1}
        assert set(billing.stored) == set(ids)
        assert billing.arrived.violations == []  # a second sending with other bytes or time would be one
        assert delivery.courier.policy.paused is None


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault.REDIRECT, "redirected"),
        (Fault.UNAUTHENTICATED, "unauthorized"),
        (Fault.NOT_FOUND, "misconfigured"),
        (Fault.HTML, "ambiguous"),
        (Fault.REFUSE, REFUSING_EVERYTHING),
    ],
)
async def test_what_a_person_must_mend_pauses_the_output_says_so_and_moves_nothing(
    tmp_path: Path, fault: Fault, reason: str
) -> None:
    faults = Faults(always=fault)
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url, batch_events=4) as delivery:
        await delivery.add(*(f"t{number}" for number in range(10)))
        attempts = delivery.metrics.batches.labels(output="billing", outcome=reason)
        await delivery.until(lambda: attempts._value.get() >= 40)
        assert delivery.courier.policy.paused == reason
        assert await delivery.fates() == {"pending": 10}
        look = "SELECT paused, detail FROM outputs"
        ((noted, detail),) = await delivery.thread.run(delivery.store.rows, look)
        assert noted == reason
        assert detail
        faults.always = None
        await delivery.until_fates(delivered=10)

        async def noted_end() -> bool:
            return await delivery.thread.run(delivery.store.rows, look) == [(None, "")]

        await delivery.until(noted_end)


async def test_a_207_ends_each_event_as_it_says(tmp_path: Path) -> None:
    faults = Faults(reject_tenants=["bad"])
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url) as delivery:
        good_1, bad, good_2 = await delivery.add("good", "bad", "good")
        await delivery.until_fates(delivered=2, dead=1)
        assert set(billing.stored) == {good_1, good_2}
        dead = "SELECT e.id, d.reason, d.answer FROM dead d JOIN events e USING(seq)"
        found = await delivery.thread.run(delivery.store.rows, dead)
        assert found == [(bad, "INVALID_VALUE_TYPE", "refused on demand")]
        faults.reject_tenants = frozenset()
        await delivery.thread.run(delivery.store.queue.replay, "billing", [bad], None)
        delivery.courier.notify()
        await delivery.until_fates(delivered=3)
        assert billing.arrived.violations == []


async def test_tenants_that_are_swallowed_in_silence_are_found_out_one_by_one(tmp_path: Path) -> None:
    faults = Faults(drop_tenants=["t3", "t7"])
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url) as delivery:
        await delivery.add(*(f"t{number % 10}" for number in range(50)))
        await delivery.until_fates(delivered=40, dead=10)
        reasons = await delivery.thread.run(delivery.store.rows, "SELECT DISTINCT reason FROM dead")
        assert reasons == [("not_accepted",)]
        assert billing.arrived.violations == []
        assert len(billing.stored) == 40


async def test_what_was_swallowed_beyond_the_endpoints_memory_is_unconfirmed_never_delivered(
    tmp_path: Path,
) -> None:
    faults = Faults(drop_tenants=["gone"])
    async with (
        stand_in(faults) as billing,
        delivering(tmp_path, billing.url, dedup_window_ms=0) as delivery,
    ):
        await delivery.add("gone", "here")
        await delivery.until_fates(unconfirmed=2)


async def test_a_batch_found_too_large_is_halved_until_it_fits(tmp_path: Path) -> None:
    faults = Faults(script=[Fault.TOO_LARGE] * 3)
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url, concurrency=1) as delivery:
        ids = await delivery.add(*(f"t{number}" for number in range(16)))
        await delivery.until_fates(delivered=16)
        assert set(billing.stored) == set(ids)
        before = delivery.courier.policy.max_bytes
        assert before < 1 << 13


async def test_a_token_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old\n")
    async with (
        stand_in(token="new") as billing,
        delivering(tmp_path, billing.url, token=TokenFile(path)) as delivery,
    ):
        await delivery.add("alpha")
        await delivery.until(lambda: billing.answers["401"] >= 3)
        assert delivery.courier.policy.paused == "unauthorized"
        path.write_text("a token of\ntwo lines")  # nothing a header can carry: no token, no crash
        seen = billing.answers["401"]
        await delivery.until(lambda: billing.answers["401"] >= seen + 3)
        path.unlink()
        seen = billing.answers["401"]
        await delivery.until(lambda: billing.answers["401"] >= seen + 3)
        path.write_text("new\n")
        await delivery.until_fates(delivered=1)


async def test_an_endpoint_that_hangs_is_a_timeout(tmp_path: Path) -> None:
    faults = Faults(script=[Fault.HANG, Fault.HANG])
    async with (
        stand_in(faults) as billing,
        delivering(tmp_path, billing.url, timeout_ms=50, concurrency=1) as delivery,
    ):
        await delivery.add("alpha", "beta")
        await delivery.until(lambda: delivery.outcomes().get("timeout", 0) >= 2)
        await delivery.until_fates(delivered=2)


async def test_a_poisoned_event_alone_waits_for_evidence_and_does_not_block_those_behind_it(
    tmp_path: Path,
) -> None:
    async with (
        Scripted(poisoned=b"projects/bad") as endpoint,
        delivering(tmp_path, endpoint.url, batch_events=10) as delivery,
    ):
        await delivery.add("bad-1")
        await delivery.until(lambda: delivery.courier.policy.paused == REFUSING_EVERYTHING)
        await delivery.add("bad-2")  # the next to be tried is poisoned, too
        await delivery.until(lambda: endpoint.saw(b"projects/bad-2"))
        assert await delivery.fates() == {"pending": 2}
        await delivery.add("good")
        await delivery.until_fates(delivered=1, dead=2)


async def test_a_busy_courier_that_is_told_of_new_events_waits_instead_of_spinning(tmp_path: Path) -> None:
    """A wait that returns at once, again and again, would hold the whole event loop."""
    faults = Faults(always=Fault.HANG)
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url, concurrency=1) as delivery:
        await delivery.add("alpha")
        await delivery.until(lambda: len(delivery.courier._under_way) == 1)
        before = len(delivery.looks)
        for _ in range(100):
            delivery.courier.notify()
            for _ in range(10):
                await asyncio.sleep(0)
        assert len(delivery.looks) - before <= 2 * 100


async def test_stopping_leaves_what_was_not_answered_marked_and_it_is_resent_unchanged(
    tmp_path: Path,
) -> None:
    faults = Faults(always=Fault.HANG)
    async with stand_in(faults) as billing:
        async with delivering(tmp_path, billing.url) as delivery:
            await delivery.add("alpha", "beta")
            await delivery.until(lambda: bool(delivery.courier._under_way))
        with Store(tmp_path) as store:
            assert store.fates() == {"pending": 2}
            assert store.rows("SELECT count(*) FROM deliveries WHERE first_attempt_ms IS NOT NULL") == [(2,)]
        faults.always = None
        async with delivering(tmp_path, billing.url) as delivery:
            await delivery.until_fates(delivered=2)
        assert billing.arrived.violations == []


async def test_a_disk_that_fails_while_an_answer_is_read_does_not_lose_the_answer(tmp_path: Path) -> None:
    gate = asyncio.Event()
    async with Scripted(gate=gate) as endpoint, delivering(tmp_path, endpoint.url) as delivery:
        await delivery.add("alpha")
        await delivery.until(lambda: bool(endpoint.requests))
        await delivery.thread.run(delivery.store.db.execute, "PRAGMA query_only=1")
        gate.set()
        await delivery.until(lambda: endpoint.answered == 1)
        for _ in range(20):
            await asyncio.sleep(0)
        await delivery.thread.run(delivery.store.database.reopen)  # as the next turn does
        await delivery.until_fates(delivered=1)
        assert len(endpoint.requests) == 1


async def test_an_endpoint_that_is_not_there_yet_is_tried_until_it_is(tmp_path: Path) -> None:
    port = lease_port()  # not of those that the kernel gives to whoever connects meanwhile
    async with delivering(tmp_path, f"http://127.0.0.1:{port}/v1/usage/events:batchIngest") as delivery:
        await delivery.add("alpha")
        await delivery.until(lambda: delivery.outcomes().get("connect", 0) >= 3)
        async with stand_in(port=port) as billing:
            await delivery.until_fates(delivered=1)
            assert len(billing.stored) == 1


# --- TLS ------------------------------------------------------------------------------------------


async def test_a_certificate_nobody_vouches_for_pauses_and_an_own_authority_is_trusted(
    tmp_path: Path,
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    async with stand_in(tls=context) as billing:
        async with delivering(tmp_path, billing.url) as delivery:
            await delivery.add("alpha")
            await delivery.until(lambda: delivery.courier.policy.paused == "tls")
            assert billing.stored == {}
        async with delivering(tmp_path, billing.url, trust=Trust(ca_file)) as delivery:
            await delivery.until_fates(delivered=1)


def test_an_authority_that_cannot_be_read_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    for name in ("ca.pem", "absent.pem"):
        with pytest.raises(ConfigError, match=name):
            Trust(tmp_path / name)


async def test_an_endpoint_that_asks_who_we_are_is_shown_a_certificate_and_its_renewal(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path, "site")
    server = authority.issue("endpoint", ip=["127.0.0.1"])
    ours = authority.issue("sink", dns=["sink.example.org"])
    strange = Authority(tmp_path, "strange").issue("stranger")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority.file)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(server.cert, server.key)
    async with stand_in(tls=context) as billing:
        async with delivering(tmp_path, billing.url, trust=Trust(authority.file)) as delivery:
            await delivery.add("alpha")
            await delivery.until(lambda: delivery.courier.policy.failures > 1)
            assert billing.stored == {}
        trust = Trust(authority.file, ours.cert, ours.key)
        async with delivering(tmp_path, billing.url, trust=trust) as delivery:
            await delivery.until_fates(delivered=1)
            before = trust.context()
            ours.key.write_bytes(strange.key.read_bytes())  # half of a renewal
            assert trust.context() is before
            authority.issue("sink", dns=["sink.example.org"])
            assert trust.context() is not before
            await delivery.add("beta")
            await delivery.until_fates(delivered=2)


def test_a_client_certificate_that_cannot_be_used_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "site")
    one, other = authority.issue("one"), authority.issue("other")
    for of_another in (other.key, tmp_path / "absent.pem"):
        with pytest.raises(ConfigError, match=r"cannot use .*one\.pem with"):
            Trust(authority.file, one.cert, of_another)


# --- answers no endpoint should give --------------------------------------------------------------


class Scripted:
    """A server that answers byte for byte what it is told, one request a connection; then it is sane."""

    def __init__(
        self, *script: bytes, poisoned: bytes | None = None, gate: asyncio.Event | None = None
    ) -> None:
        self.script = list(script)
        self.requests: list[tuple[bytes, bytes]] = []
        """Head and body of each."""
        self.answered = 0
        self._poisoned = poisoned
        self._gate = gate

    async def __aenter__(self) -> "Scripted":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        host, port = self._server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}/events"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def saw(self, text: bytes) -> bool:
        return any(text in body for _, body in self.requests)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            )
            body = await reader.readexactly(length)
            self.requests.append((head, body))
            if self._gate is not None:
                await self._gate.wait()
            writer.write(self.script.pop(0) if self.script else self._sane(head, body))
            await writer.drain()
            self.answered += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def _sane(self, head: bytes, body: bytes) -> bytes:
        events = json.loads(gzip.decompress(body) if b"content-encoding: gzip" in head.lower() else body)
        if self._poisoned is not None and self._poisoned in body:
            return response(b'{"code":"INVALID_REQUEST","message":"no"}', "400 Bad Request")
        return response(json.dumps({"accepted": len(events)}).encode())


def response(body: bytes, status: str = "200 OK", *headers: bytes) -> bytes:
    lines = [f"HTTP/1.1 {status}".encode(), b"Content-Length: %d" % len(body), b"Connection: close", *headers]
    return b"\r\n".join([*lines, b"", body])


ACCEPTED = b'{"accepted":1}'

ODD = {
    "nothing at all": (b"", "broken_answer"),
    "half an answer": (response(ACCEPTED)[:-5], "broken_answer"),
    "half a header": (b"HTTP/1.1 200 OK\r\nContent-Le", "broken_answer"),
    "another protocol": (b"SSH-2.0-OpenSSH_9.2\r\n", "broken_answer"),
    "half an answer of no length": (
        b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + ACCEPTED[:9],
        "ambiguous",
    ),
    "a length too short": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + ACCEPTED,
        "ambiguous or broken_answer",
    ),
    "a length that is none": (b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n" + ACCEPTED, "broken_answer"),
    "chunks that break off": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\ne\r\n" + ACCEPTED + b"\r\n",
        "broken_answer",
    ),
    "chunks that are none": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + ACCEPTED,
        "broken_answer",
    ),
    "a header without end": (
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n" + ACCEPTED,
        "broken_answer",
    ),
    "ten megabytes": (response(b'{"accepted":1,"pad":"' + b"x" * (10 << 20) + b'"}'), "ambiguous"),
    "compressed unasked": (
        response(gzip.compress(ACCEPTED), "200 OK", b"Content-Encoding: gzip"),
        "ambiguous",
    ),
    "bytes that are not UTF-8": (response(b"\xff\xfe" + ACCEPTED), "ambiguous"),
    "JSON nested without end": (response(b"[" * 500_000), "ambiguous"),
    "a refusal nested without end": (response(b"[" * 500_000, "503 Down"), "server_error"),
    "a redirect to bytes": (response(b"", "302 Found", b"Location: /\xff\xfe\xed\xa0\x80"), "redirected"),
    "a date out of this world": (
        response(b"", "429 Later", b"Retry-After: Sun, 22 Nov 99999999999999999999 10:00:00 GMT"),
        "throttled",
    ),
    "a status out of range": (response(b"", "999 What"), "server_error"),
    "no content": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", "ambiguous"),
    "one too many": (response(b'{"accepted":2}'), "ambiguous"),
}


@pytest.mark.parametrize("name", ODD)
async def test_an_odd_answer_costs_one_attempt_and_the_event_goes_out_again_unchanged(
    tmp_path: Path, name: str
) -> None:
    answer, outcome = ODD[name]
    async with Scripted(answer) as endpoint, delivering(tmp_path, endpoint.url) as delivery:
        await delivery.add("alpha")
        await delivery.until_fates(delivered=1)
        outcomes = await delivery.counted()
        assert outcomes.pop("delivered") == 1
        assert [f"{name}: {count}" for name, count in outcomes.items()] in (
            [f"{allowed}: 1"] for allowed in outcome.split(" or ")
        )
        first, second = endpoint.requests
        assert first[1] == second[1]


async def test_an_interim_answer_is_not_the_answer(tmp_path: Path) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\n\r\n" + response(ACCEPTED)
    async with Scripted(interim) as endpoint, delivering(tmp_path, endpoint.url) as delivery:
        await delivery.add("alpha")
        await delivery.until_fates(delivered=1)
        assert len(endpoint.requests) == 1


async def test_a_compressed_request_says_so_and_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    async with (
        Scripted(response(b"", "503 Down")) as endpoint,
        delivering(tmp_path, endpoint.url, compress=True) as delivery,
    ):
        await delivery.add("alpha", "beta")
        await delivery.until_fates(delivered=2)
        (head, body), again = endpoint.requests
        assert b"content-encoding: gzip" in head.lower()
        assert len(json.loads(gzip.decompress(body))) == 2
        assert again[1] == body


async def test_a_request_carries_what_the_endpoint_asks_for_and_no_more(tmp_path: Path) -> None:
    async with Scripted() as endpoint, delivering(tmp_path, endpoint.url) as delivery:
        await delivery.add("alpha")
        await delivery.until_fates(delivered=1)
        head = endpoint.requests[0][0].lower()
        assert head.startswith(b"post /events http/1.1\r\n")
        assert b"content-type: application/json\r\n" in head
        assert b"authorization" not in head
        assert b"cookie" not in head


async def test_a_storm_of_faults_ends_with_every_event_in_one_place(tmp_path: Path) -> None:
    """Delivered and dead letters add up; a replay against the healed endpoint delivers the rest."""
    shares = dict.fromkeys(
        (Fault.BUSY, Fault.UNAVAILABLE, Fault.REJECT, Fault.LOST, Fault.RESET, Fault.MIDWAY, Fault.SHORT), 70
    )
    faults = Faults(seed=3, per_mille=shares, retry_after=None)
    async with stand_in(faults) as billing, delivering(tmp_path, billing.url, concurrency=4) as delivery:
        ids: list[str] = []
        for _ in range(20):
            ids += await delivery.add(*(f"t{number}" for number in range(100)))

        async def settled() -> bool:
            return "pending" not in await delivery.fates()

        await delivery.until(settled)
        found = await delivery.fates()
        assert sum(found.values()) == len(ids) == 2_000
        assert found.get("unconfirmed", 0) == 0
        assert found["dead"] > 0
        await delivery.thread.run(delivery.store.check_tallies)
        billing.faults = Faults()
        await delivery.thread.run(delivery.store.queue.replay, None, [], None)
        delivery.courier.notify()
        await delivery.until_fates(delivered=2_000)
        assert set(billing.stored) == set(ids)
        assert billing.arrived.violations == []
