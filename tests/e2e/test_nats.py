"""Edge sinks publish to a real NATS server, a few forwarders submit: whatever breaks, sums are exact.

Three sinks and two forwarders, all of them the real program, a real server, and a wire to it that is cut.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from listening import Client
from nats_server import NatsServer, Wire
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.faults import Fault, Faults

pytestmark = pytest.mark.e2e

STREAM, LETTERS = "USAGE", "LETTERS"
TENANTS = tuple(f"shop-{number}" for number in range(8))
TYPES = {
    "networking.datumapis.com/gateway/requests": 1,
    "networking.datumapis.com/gateway/ingress-bytes": 1_000_003,
    "networking.datumapis.com/gateway/egress-bytes": 7,
}
"""What one row adds to each sum."""


class Forwarder(Sink):
    """``proxy-usage forward``, started, killed and looked at as a sink is."""

    def __init__(self, directory: Path, *, url: str, nats: str, **forward: Any) -> None:
        super().__init__(directory, url=url)
        self.verb = "forward"
        listen = {"http": self.document["listen"]["http"]}
        output = self.document["outputs"][0] | {"batch": {"events": 4, "linger": "20ms"}, "concurrency": 1}
        settings = {"url": nats, "stream": STREAM, "ack_wait": "2s", "timeout": "2s", **forward}
        self.document = {"listen": listen, "forward": settings, "outputs": [output]}

    async def balance(self) -> dict[str, int]:
        """What it read, settled, gave back and holds, by its own count."""
        metrics = await self.metrics()
        settled = sum(value for name, value in metrics.items() if name.startswith("events_settled_total"))
        return {
            "read": metrics["forward_read_total"],
            "settled": settled,
            "returned": metrics["forward_returned_total"],
            "held": metrics["forward_held"],
        }

    async def balanced(self) -> bool:
        """What is acknowledged is in its counts a moment later."""
        balance = await self.balance()
        return balance["read"] == balance["settled"] + balance["returned"] + balance["held"]


def edge(directory: Path, url: str) -> Sink:
    """A sink that publishes."""
    nats = {"format": "nats", "nats": {"stream": STREAM}, "timeout": "2s"}
    return Sink(directory, url=url, output=nats | {"batch": {"events": 20, "linger": "50ms"}})


class Fleet:
    """All of it, and what was sent."""

    def __init__(self, directory: Path) -> None:
        self.server = NatsServer(directory / "nats")
        self.wire = Wire(self.server.port)
        self.billing = BillingStandIn()
        self.edges: list[Sink] = []
        self.forwarders: list[Forwarder] = []
        self.rows: Counter[str] = Counter()
        self._sent: Counter[int] = Counter()
        self._directory = directory

    async def start(self, stack: AsyncExitStack) -> None:
        await stack.enter_async_context(self.server)
        await stack.enter_async_context(self.wire)
        await stack.enter_async_context(self.billing)
        await self.server.create(STREAM, retention="workqueue")
        await self.server.create(LETTERS, ["billing.usage.*.quarantine.>"])
        self.edges = [edge(self._directory / f"edge-{n}", self.wire.url) for n in range(3)]
        self.forwarders = [
            Forwarder(self._directory / f"forwarder-{n}", url=self.billing.url, nats=self.server.url)
            for n in range(2)
        ]
        for program in (*self.edges, *self.forwarders):
            stack.push_async_callback(program.kill)
        await asyncio.gather(*(program.start() for program in (*self.edges, *self.forwarders)))

    async def send(self) -> None:
        """A row of each tenant to each edge; returns when the rows are durable there."""
        for number, sink in enumerate(self.edges):
            rows = [http_row(tags={"project_name": tenant}, wire=(1_000_003, 7)) for tenant in TENANTS]
            async with Client(sink.grpc_port) as client:
                await client.send(message(*rows, node_id=f"envoy-{number}"))
            self._sent[number] += len(rows)
            self.rows.update(TENANTS)
        for number, sink in enumerate(self.edges):
            await eventually(
                lambda sink=sink, number=number: sink.saved() == self._sent[number],  # type: ignore[misc]
                "the edge has saved its rows",
                why=sink.said,
            )

    def due(self) -> Mapping[tuple[str, str], int]:
        return {(tenant, kind): rows * TYPES[kind] for tenant, rows in self.rows.items() for kind in TYPES}

    def billed(self) -> Mapping[tuple[str, str], int]:
        return {key: value for key, value in self.billing.sums().items() if key[1] in TYPES}

    async def settled(self) -> None:
        """Waits until everything that was sent is billed, to the unit, and nobody has anything left."""
        await eventually(lambda: self.billed() == self.due(), "all is billed", why=self.state)
        await eventually(lambda: all(sink.idle() for sink in self.edges), "the edges are idle")

        async def empty() -> bool:
            return await self.server.count(STREAM) == 0

        await eventually(empty, "every event is acknowledged", why=self.state)

    def state(self) -> str:
        """What is not billed as it should be, for a failure."""
        off = {key: (self.billed().get(key), due) for key, due in self.due().items()}
        wrong = {key: both for key, both in off.items() if both[0] != both[1]}
        said = [program.said() for program in (*self.forwarders, *self.edges)]
        return f"{len(wrong)} sums differ: {dict(list(wrong.items())[:3])}\n" + "\n".join(said)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        running = Fleet(tmp_path)
        await running.start(stack)
        yield running


async def test_whatever_breaks_the_sums_are_exact(fleet: Fleet) -> None:
    billing, server, wire = fleet.billing, fleet.server, fleet.wire

    async def both_worked() -> bool:
        await fleet.send()
        await fleet.settled()
        return all([(await forwarder.balance())["settled"] for forwarder in fleet.forwarders])

    await eventually(both_worked, "both forwarders do some of the work", why=fleet.state)

    # A forwarder dies between the endpoint's commit and its answer: another one sends the events again.
    before = billing.answers["late"] + len(billing.stored)
    billing.faults = Faults(always=Fault.LATE, delay_ms=60_000)
    await fleet.send()

    async def both_wait() -> bool:
        held = [(await forwarder.balance())["held"] for forwarder in fleet.forwarders]
        return all(held) and billing.answers["late"] + len(billing.stored) > before

    await eventually(both_wait, "both forwarders wait for an answer")
    await fleet.forwarders[0].kill()
    billing.faults = Faults()
    await fleet.forwarders[0].start()
    await fleet.forwarders[1].kill()
    await fleet.forwarders[1].start()
    await fleet.settled()
    assert billing.arrived.duplicates > 0, "nothing was sent again: the kill hit nothing"

    # What edges publish is stored and the answers are lost; then the wire is cut, and an edge dies.
    wire.mute = True
    stored = (await server.api(f"STREAM.INFO.{STREAM}"))["state"]["last_seq"]
    await fleet.send()

    async def published() -> bool:
        state = (await server.api(f"STREAM.INFO.{STREAM}"))["state"]
        return bool(state["last_seq"] > stored)

    await eventually(published, "something is stored that was not acknowledged")
    await wire.cut()
    await fleet.edges[0].kill()
    await fleet.edges[0].start()
    await fleet.send()
    wire.mute = False
    await wire.heal()
    await fleet.settled()

    # Somebody publishes again what was published.
    assert await _again(fleet)

    # The server dies and comes back.
    await server.kill()
    await fleet.send()
    await server.start()
    await fleet.settled()

    # A work queue that was restarted has forgotten what it handed out. The endpoint has not.
    duplicates = billing.arrived.duplicates
    assert not await _again(fleet)
    await eventually(lambda: billing.arrived.duplicates > duplicates, "it is submitted again")
    await fleet.settled()

    assert billing.arrived.violations == []
    assert await server.count(LETTERS) == 0
    for forwarder in fleet.forwarders:
        await eventually(forwarder.balanced, "all that it read is accounted for", why=forwarder.said)
        assert await forwarder.stop() == 0
    for sink in fleet.edges:
        assert sink.lost() == 0
        with sink.reader() as reader:
            (output,) = reader.status().outputs
        assert output.delivered > 0
        assert (output.ambiguous, output.unconfirmed, output.dead, output.pending) == (0, 0, 0, 0)


async def _again(fleet: Fleet) -> bool:
    """Publishes an event that was billed; whether the stream recognised it."""
    id_, entry = next(iter(fleet.billing.arrived.stored.items()))
    subject = f"billing.usage.{entry.tenant}.ingest"
    async with fleet.server.client() as client:
        ack = await client.jetstream().publish(subject, entry.raw, headers={"Nats-Msg-Id": id_})
    return bool(ack.duplicate)
