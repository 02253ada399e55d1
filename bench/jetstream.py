"""What an event costs on its way through NATS JetStream, and what it weighs there.

    python bench/jetstream.py [EVENTS]

A real server with its stream on disk, an output that publishes with acknowledgements, and a forwarder that
submits to an endpoint which only counts. All of it shares this machine's cores, so that the processor time of
each is the figure to use, and the events a second are what they reach together. The endpoint is not shown:
it is a stand-in.
"""

import asyncio
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aiohttp import web

from proxy_usage.config import load_text
from proxy_usage.delivery.jetstream import Link, Peer
from proxy_usage.delivery.nats_sender import NatsSender
from proxy_usage.delivery.transport import GZIP_LEVEL
from proxy_usage.delivery.trust import Trust
from proxy_usage.demo.listener import lease_port
from proxy_usage.model import Key
from proxy_usage.outputs.base import Settled
from proxy_usage.outputs.billing import Billing
from proxy_usage.service.build import build_mint, clock_ms
from proxy_usage.service.forwarding import Forwarder
from proxy_usage.store import Queued

BATCH = 100
TENANTS = 1_000
STREAM = "USAGE"
DIMENSIONS = ("eu-central-1", "edge", "gateways", "datum", "shop-frontend", "ns-8d1f", "shop")
CONFIG = "outputs: [{name: none, format: none}]"


def made(count: int) -> list[Queued]:
    """Events of a minute: so many tenants, four meters."""
    mint = build_mint(load_text(CONFIG, origin="bench", base=Path.cwd(), env={}))
    now_ms = clock_ms()
    events = []
    for number in range(count):
        meter, tenant = number % len(mint.meters), f"tenant-{number % TENANTS}"
        id_ = mint._id(now_ms)  # noqa: SLF001  # as it mints, without windows
        body = mint.body(id_, meter, Key(tenant, DIMENSIONS), now_ms, 1_000_000 + number)
        events.append(Queued(number, id_, tenant, mint.meters[meter].name, 1, body))
    return events


def cpu_s(pid: int) -> float:
    """Processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Counted:
    """Bytes that went to a server."""

    def __init__(self, target: int) -> None:
        self.bytes = 0
        self._target = target

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Passes a connection on."""
        far, near = await asyncio.open_connection("127.0.0.1", self._target)

        async def up() -> None:
            while data := await reader.read(1 << 16):
                self.bytes += len(data)
                near.write(data)
            near.close()

        async def down() -> None:
            while data := await far.read(1 << 16):
                writer.write(data)
            writer.close()

        await asyncio.gather(up(), down())


def sender(port: int) -> NatsSender:
    return NatsSender(
        Link(Peer(f"nats://127.0.0.1:{port}", 60_000), None, Trust()),
        stream=STREAM,
        subject="billing.usage.{project}.ingest",
        window=256,
        dedup_window_ms=120_000,
        remembers=lambda _: None,
    )


async def publish(port: int, events: list[Queued]) -> None:
    """All events, two batches at a time."""
    batches = [events[at : at + BATCH] for at in range(0, len(events), BATCH)]
    async with sender(port) as one:
        for at in range(0, len(batches), 2):
            for verdict in await asyncio.gather(*(one.send(batch) for batch in batches[at : at + 2])):
                assert isinstance(verdict, Settled), verdict


async def create(port: int, name: str, subjects: list[str]) -> None:
    link = Link(Peer(f"nats://127.0.0.1:{port}", 60_000), None, Trust())
    body = {"name": name, "subjects": subjects, "storage": "file", "num_replicas": 1}
    await link.api(f"STREAM.CREATE.{name}", body | {"retention": "workqueue", "discard": "new"})
    await link.close()


async def forward(nats: int, endpoint: int, count: int) -> None:
    document = {
        "listen": {"http": "127.0.0.1:0"},
        "forward": {"url": f"nats://127.0.0.1:{nats}", "stream": STREAM, "dead_letters": "dead.{project}"},
        "outputs": [{"name": "billing", "url": f"http://127.0.0.1:{endpoint}/", "concurrency": 4}],
    }
    config = load_text(json.dumps(document), origin="bench", base=Path.cwd(), env={})
    assert config.forward is not None
    forwarder = Forwarder(config, config.forward)
    await forwarder.start()
    labels = {"output": "billing", "fate": "delivered"}
    value = forwarder._metrics.registry.get_sample_value  # noqa: SLF001
    while (value("proxy_usage_events_settled_total", labels) or 0) < count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    await forwarder.drain()


def endpoint(port: int) -> None:
    """Says of every batch that it was accepted."""

    async def take(request: web.Request) -> web.Response:
        return web.json_response({"accepted": (await request.read()).count(b'"specversion"')})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_post("/", take)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


async def measure(count: int, nats: int, server: int, counting: int) -> None:
    await create(nats, STREAM, ["billing.usage.*.ingest"])
    await create(nats, "LETTERS", ["dead.*"])
    events = made(count)
    wire = Counted(nats)
    listening = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    await publish(listening.sockets[0].getsockname()[1], events[:5_000])
    listening.close()
    body = Billing().encode(events[:BATCH]).body
    print(f"an event: {sum(len(event.body) for event in events) / count:.0f} bytes of JSON")
    print(f"  to NATS, with subject, headers and the protocol: {wire.bytes / 5_000:.0f} bytes")
    print(f"  in a batch of {BATCH} over HTTP: {len(body) / BATCH:.0f} bytes", end="")
    print(f", gzip {len(gzip.compress(body, GZIP_LEVEL)) / BATCH:.0f} bytes (these events are alike)")
    for what, work in (
        ("publish with acknowledgements", publish(nats, events[5_000:])),
        ("forward", forward(nats, counting, count)),
    ):
        done = count - 5_000 if what.startswith("publish") else count
        began, own, its = time.perf_counter(), time.process_time(), cpu_s(server)
        await work
        wall, own, its = time.perf_counter() - began, time.process_time() - own, cpu_s(server) - its
        print(
            f"{what}: {done / wall:,.0f} events/s; processor time an event:"
            f" {own / done * 1e6:.0f} µs here, {its / done * 1e6:.0f} µs in nats-server"
        )


def main() -> None:
    if sys.argv[1:2] == ["--endpoint"]:
        endpoint(int(sys.argv[2]))
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    nats, counting = lease_port(), lease_port()
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(sys.executable).with_name("nats-server")
        command = [str(binary), "-js", "-sd", directory, "-a", "127.0.0.1", "-p", str(nats)]
        server = subprocess.Popen([*command, "-l", f"{directory}/log"])
        other = subprocess.Popen([sys.executable, __file__, "--endpoint", str(counting)])
        time.sleep(2)
        try:
            asyncio.run(measure(count, nats, server.pid, counting))
        finally:
            server.kill()
            other.kill()
            server.wait()


if __name__ == "__main__":
    main()
