"""A forwarder between a real NATS server and the strict billing stand-in: each event has one named fate."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from money import Store
from nats_server import NatsServer, Wire
from program import eventually

from proxy_usage.config import load_text
from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.listener import lease_port
from proxy_usage.service.build import clock_ms
from proxy_usage.service.forwarding import Forwarder

STREAM, LETTERS = "USAGE", "LETTERS"


def made(directory: Path, *tenants: str, time: str = "") -> list[tuple[str, bytes]]:
    """Events as a sink makes them, of the present minute: ids and bytes."""
    directory.mkdir(exist_ok=True)
    with Store(directory) as store:
        store.add(*tenants, now_ms=clock_ms())
        rows = list(store.db.execute("SELECT id, body FROM events ORDER BY seq"))
    now = time or datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return [(id_, json.dumps(json.loads(body) | {"time": now}).encode()) for id_, body in rows]


class Around:
    """The server, the endpoint, and forwarders between them."""

    def __init__(self, server: NatsServer, billing: BillingStandIn, directory: Path) -> None:
        self.server = server
        self.billing = billing
        self.directory = directory

    async def publish(self, events: list[tuple[str, bytes]], tenant: str = "shop") -> None:
        async with self.server.client() as client:
            for id_, body in events:
                subject = f"billing.usage.{tenant}.ingest"
                await client.jetstream().publish(subject, body, headers={"Nats-Msg-Id": id_})

    @asynccontextmanager
    async def forwarding(
        self, url: str = "", output: Mapping[str, Any] | None = None, **settings: Any
    ) -> AsyncIterator[Forwarder]:
        """A forwarder in this process, given back to the stream at the end."""
        document = {
            "listen": {"http": f"127.0.0.1:{lease_port()}"},
            "forward": {"url": url or self.server.url, "stream": STREAM, "ack_wait": "2s"} | settings,
            "outputs": [
                {
                    "name": "billing",
                    "url": self.billing.url,
                    "batch": {"linger": "10ms"},
                    "retry": {"initial": "10ms", "max": "50ms"},
                    **(output or {}),
                }
            ],
        }
        config = load_text(json.dumps(document), origin="forward.yaml", base=self.directory, env={})
        assert config.forward is not None
        forwarder = Forwarder(config, config.forward)
        await forwarder.start()
        try:
            yield forwarder
        finally:
            await forwarder.drain()
            balance = counts(forwarder)
            settled = sum(value for name, value in balance.items() if name not in ("read", "returned"))
            assert balance["read"] == settled + balance["returned"], balance

    async def empty(self) -> bool:
        """Whether every event of the stream is acknowledged."""
        info = await self.server.api(f"CONSUMER.INFO.{STREAM}.proxy-usage")
        return "error" not in info and info["num_pending"] + info["num_ack_pending"] == 0


def counts(forwarder: Forwarder) -> dict[str, int]:
    """Events read, given back, and settled by fate."""
    value = forwarder._metrics.registry.get_sample_value
    found = {
        "read": int(value("proxy_usage_forward_read_total") or 0),
        "returned": int(value("proxy_usage_forward_returned_total") or 0),
    }
    for fate in ("delivered", "delivered_ambiguous", "unconfirmed", "dead"):
        labels = {"output": "billing", "fate": fate}
        found[fate] = int(value("proxy_usage_events_settled_total", labels) or 0)
    return found


def fates(forwarder: Forwarder) -> dict[str, int]:
    """Events settled, by fate."""
    return {name: n for name, n in counts(forwarder).items() if n and name not in ("read", "returned")}


def harm(billing: BillingStandIn) -> list[str]:
    """What the endpoint may hold against us beside the dimensions, which the store's tests have few of."""
    return [violation.what for violation in billing.arrived.violations if violation.what != "dimension"]


@pytest.fixture
async def around(tmp_path: Path) -> AsyncIterator[Around]:
    async with NatsServer(tmp_path / "nats") as server, BillingStandIn() as billing:
        await server.create(STREAM)
        await server.create(LETTERS, ["billing.usage.*.quarantine.>"])
        yield Around(server, billing, tmp_path)


async def test_same_ids_and_bytes_arrive(around: Around, tmp_path: Path) -> None:
    events = made(tmp_path / "edge", *["shop", "blog"] * 60)
    await around.publish(events)
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": len(events)}, "all are delivered")
        assert {id_: entry.raw for id_, entry in around.billing.arrived.stored.items()} == dict(events)
        await eventually(around.empty, "all are acknowledged")
        assert forwarder.health().reasons == {}
    assert harm(around.billing) == []


async def test_refused_alone_becomes_a_dead_letter_with_its_reason(around: Around, tmp_path: Path) -> None:
    around.billing.faults = Faults(reject_tenants=["blog"])
    events = made(tmp_path / "edge", "shop", "blog", "shop")
    await around.publish(events)
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": 2, "dead": 1}, "each has its fate")
        await eventually(around.empty, "the dead letter is acknowledged, too")
    (letter,) = await around.server.stored(LETTERS)
    assert letter.subject == "billing.usage.blog.quarantine.proxy-usage"
    assert letter.data == events[1][1]
    assert letter.headers["Proxy-Usage-Reason"] == "INVALID_VALUE_TYPE"


async def test_dropped_without_a_word_is_found_one_by_one(around: Around, tmp_path: Path) -> None:
    around.billing.faults = Faults(drop_tenants=["blog"])
    await around.publish(made(tmp_path / "edge", "shop", "blog", "shop"))
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": 2, "dead": 1}, "each has its fate")
    (letter,) = await around.server.stored(LETTERS)
    assert letter.headers["Proxy-Usage-Reason"] == "not_accepted"


async def test_refused_batch_is_split(around: Around, tmp_path: Path) -> None:
    around.billing.faults = Faults(script=[Fault.TOO_LARGE, Fault.TOO_LARGE])
    events = made(tmp_path / "edge", *["shop"] * 8)
    await around.publish(events)
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": len(events)}, "all are delivered")
    assert around.billing.answers["413"] == 2


async def test_not_an_event_is_a_dead_letter_and_holds_nothing_up(around: Around, tmp_path: Path) -> None:
    await around.publish([("a", b"not JSON"), ("b", b'{"id":"x"}'), *made(tmp_path / "edge", "shop")])
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": 1, "dead": 2}, "each has its fate")
        await eventually(around.empty, "all are acknowledged")
    letters = await around.server.stored(LETTERS)
    assert [letter.headers["Proxy-Usage-Reason"] for letter in letters] == ["malformed", "malformed"]
    assert {letter.data for letter in letters} == {b"not JSON", b'{"id":"x"}'}


async def test_too_old_is_not_sent(around: Around, tmp_path: Path) -> None:
    old = made(tmp_path / "old", "shop", time="2020-01-01T00:00:59.999Z")
    await around.publish([*old, *made(tmp_path / "edge", "shop")])
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": 1, "dead": 1}, "each has its fate")
    (letter,) = await around.server.stored(LETTERS)
    assert (letter.headers["Proxy-Usage-Reason"], letter.data) == ("too_late", old[0][1])
    assert old[0][0] not in around.billing.stored


async def test_shut_out_it_keeps_all_and_says_so(around: Around, tmp_path: Path) -> None:
    around.billing.faults = Faults(always=Fault.UNAUTHENTICATED)
    events = made(tmp_path / "edge", *["shop"] * 300)
    await around.publish(events)
    async with around.forwarding() as forwarder:
        url = f"http://127.0.0.1:{forwarder._web.port}"
        await eventually(lambda: "output billing paused" in forwarder.health().reasons, "it is not ready")
        async with aiohttp.ClientSession() as session, session.get(f"{url}/readyz") as answer:
            assert (answer.status, (await answer.json())["reasons"]) == (
                503,
                {"output billing paused": "unauthorized"},
            )
        assert counts(forwarder)["read"] <= 400  # what it holds is bounded: a batch or two, and as many ready
        around.billing.faults = Faults()
        await eventually(lambda: fates(forwarder) == {"delivered": len(events)}, "all are delivered")
    assert around.billing.arrived.duplicates == 0


async def test_held_for_longer_than_ack_wait_is_still_its_own(around: Around, tmp_path: Path) -> None:
    """While the endpoint is away an event stays with its forwarder: the server hands it to nobody else."""
    around.billing.faults = Faults(always=Fault.UNAVAILABLE)
    await around.publish(made(tmp_path / "edge", *["shop"] * 5))
    async with around.forwarding(ack_wait="5s") as first, around.forwarding(ack_wait="5s") as second:
        at_ms = clock_ms()
        await eventually(lambda: clock_ms() - at_ms > 11_000, "ack_wait has passed twice")
        around.billing.faults = Faults()
        await eventually(around.empty, "all are acknowledged")
        both = (first, second)  # a fate is counted after it is acknowledged
        await eventually(lambda: sum(counts(one)["delivered"] for one in both) == 5, "each is delivered")
        assert sum(counts(one)["read"] for one in both) == 5


async def test_a_cut_wire_lets_go_of_what_another_one_delivers(around: Around, tmp_path: Path) -> None:
    """Held behind a cut wire for longer than ack_wait: it must not be sent from here any more."""
    around.billing.faults = Faults(always=Fault.UNAVAILABLE)
    events = made(tmp_path / "edge", *["shop"] * 6)
    one = {"batch": {"events": 1, "linger": "0s"}, "concurrency": 4}
    async with (
        Wire(around.server.port) as wire,
        around.forwarding(wire.url, one, ack_wait="1s", timeout="1s") as cut_off,
    ):
        await around.publish(events)
        await eventually(lambda: counts(cut_off)["read"] >= 4, "it holds some")
        await wire.cut()
        await eventually(lambda: counts(cut_off)["returned"] > 0, "it has let go of what it had not sent")
        around.billing.faults = Faults()
        async with around.forwarding(ack_wait="1s") as other:
            await eventually(around.empty, "all are acknowledged")
            await eventually(lambda: counts(other)["delivered"] > 0, "some of them by the other one")
        await wire.heal()
        await eventually(lambda: not cut_off._taking.held, "what it had sent is acknowledged")
    assert set(around.billing.stored) == {id_ for id_, _ in events}
    assert harm(around.billing) == []


async def test_perhaps_sent_before_and_too_long_ago_is_ambiguous(around: Around, tmp_path: Path) -> None:
    """A forwarder died with an event that was published before the endpoint's memory begins."""
    around.billing.faults = Faults(always=Fault.LOST)
    around.billing.arrived = Arrived(dedup_window_ms=10_000_000)
    await around.publish(made(tmp_path / "edge", "shop", "blog"))
    async with around.forwarding() as first:
        await eventually(lambda: len(around.billing.stored) == 2, "both are stored, and nobody said so")
        assert counts(first)["delivered"] == 0
    assert counts(first)["returned"] == 2
    around.billing.faults = Faults()
    short = {"dedup_window": "4s"}
    at_ms = clock_ms()
    await eventually(lambda: clock_ms() - at_ms > 4_000, "the endpoint may have forgotten")
    async with around.forwarding(output=short, ack_wait="1s") as second:
        await eventually(lambda: fates(second) == {"delivered_ambiguous": 2}, "it is said that nobody knows")


async def test_what_cannot_work_is_said_and_nothing_is_lost(around: Around, tmp_path: Path) -> None:
    async with around.forwarding(stream="OTHER") as forwarder:
        await eventually(lambda: forwarder.health().reasons == {"stream": "misconfigured"}, "no such stream")
    async with around.forwarding(dead_letters="nobody.{project}") as forwarder:
        await eventually(lambda: forwarder.health().reasons == {"stream": "misconfigured"}, "no letters")
    same = "billing.usage.{project}.ingest"
    async with around.forwarding(dead_letters=same) as forwarder:
        await eventually(lambda: forwarder.health().reasons == {"stream": "misconfigured"}, "a circle")
    config = {"durable_name": "lossy", "name": "lossy", "ack_policy": "explicit", "max_deliver": 3}
    body = {"stream_name": STREAM, "config": config | {"filter_subject": "billing.usage.*.ingest"}}
    assert "error" not in await around.server.api(f"CONSUMER.DURABLE.CREATE.{STREAM}.lossy", body)
    async with around.forwarding(durable="lossy") as forwarder:
        await eventually(lambda: forwarder.health().reasons == {"stream": "misconfigured"}, "it gives up")
        assert forwarder._taking.problem is not None
        assert "max_deliver 3" in forwarder._taking.problem[1]


async def test_two_share_and_a_stop_gives_back_at_once(around: Around, tmp_path: Path) -> None:
    around.billing.faults = Faults(always=Fault.UNAVAILABLE)
    await around.publish(made(tmp_path / "edge", *["shop"] * 3))
    async with around.forwarding(ack_wait="150s") as first:
        await eventually(lambda: counts(first)["read"] == 3, "the first has them")
    assert counts(first)["returned"] == 3
    around.billing.faults = Faults()
    async with around.forwarding(ack_wait="150s") as second:  # it need not wait so long for them
        await eventually(lambda: fates(second) == {"delivered": 3}, "the second delivers them")


async def test_server_restarted_meanwhile(around: Around, tmp_path: Path) -> None:
    await around.publish(made(tmp_path / "edge", *["shop"] * 5))
    async with around.forwarding() as forwarder:
        await eventually(lambda: fates(forwarder) == {"delivered": 5}, "the first are delivered")
        await around.server.kill()
        await eventually(lambda: "stream" in forwarder.health().reasons, "it says that nothing comes")
        await around.server.start()
        await around.publish(again := made(tmp_path / "again", *["shop"] * 5))
        # What was acknowledged just before the crash may come again: the server had not flushed that.
        await eventually(lambda: {id_ for id_, _ in again} <= set(around.billing.stored), "so are the others")
        await eventually(around.empty, "all are acknowledged")
    assert len(around.billing.stored) == 10
    assert harm(around.billing) == []
