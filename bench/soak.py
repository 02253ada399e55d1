"""Twenty minutes of everything at once: memory stays flat, the queue drains, and it all adds up.

    python bench/soak.py [MINUTES]      # 20 unless said otherwise

The program as users run it takes rows as fast as it reads them: four connections that are replaced every
few seconds, long streams that begin, report every second and end, a bearer token that changes every minute,
and an endpoint that is away for 20 s of every 2 minutes. At the end it is drained, and these must hold:

- rows read = rows with a fate, and none was lost by a crash;
- what the store calls delivered is what the endpoint has, by meter, each event once; nothing waits;
- conservation of the store, table by table.

Printed beside: rows a second, the sink's CPU, and its resident memory with the slope over the last three
quarters of the time. Exit code 1 when something does not hold, or memory grows by more than 60 MiB an hour.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import yaml
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.sink import sink_config
from proxy_usage.store.reader import Reader

METHOD = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
CONNECTIONS = 4
TENANTS = 200
ROWS = 26
"""Of a message: what Envoy's default buffer holds."""
LONG_STREAMS = 300
SAMPLE_S = 5
OUTAGE_S, OUTAGE_EVERY_S = 20, 120
TOKEN_EVERY_S = 60
MAX_SLOPE_MIB = 60
END, PERIODIC = 6, 5


class Rows:
    """Messages of the present second, made once and sent many times."""

    def __init__(self) -> None:
        self._dice = random.Random(1)
        self._numbers = itertools.count(1)
        self._open: list[tuple[int, int, int]] = []  # connection, start in ns, bytes so far
        self.short: list[bytes] = []

    def refresh(self) -> list[bytes]:
        """New short rows in ``short``; returns the messages of long streams, each to be sent once."""
        now_ns = time.time_ns()
        self.short = [
            packed([self._row(END, now_ns - 3_000_000, 2_000_000, 700, 1_300) for _ in range(ROWS)])
            for _ in range(20)
        ]
        return [packed(list(rows)) for rows in batched(self._long(now_ns), ROWS)]

    def _long(self, now_ns: int) -> Iterator[Any]:
        going_on = []
        for number, start_ns, before in self._open:
            ends = self._dice.random() < 0.05
            size = before + self._dice.randrange(2_000)
            yield self._row(END if ends else PERIODIC, start_ns, now_ns - start_ns, size, size, number)
            if not ends:
                going_on.append((number, start_ns, size))
        while len(going_on) < LONG_STREAMS:
            going_on.append((next(self._numbers), now_ns, 0))
        self._open = going_on

    def _row(self, kind: int, start_ns: int, open_ns: int, received: int, sent: int, number: int = 0) -> Any:
        row = accesslog_pb2.HTTPAccessLogEntry()
        common = row.common_properties
        common.access_log_type = kind
        common.start_time.seconds, common.start_time.nanos = divmod(start_ns, 1_000_000_000)
        if kind == END:
            common.duration.seconds, common.duration.nanos = divmod(open_ns, 1_000_000_000)
        common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent = received, sent
        tenant = number or self._dice.randrange(TENANTS)
        common.custom_tags["project_name"] = f"tenant-{tenant % TENANTS}"
        common.custom_tags["conn_id"] = str(number)
        if kind == PERIODIC:
            common.custom_tags["dur_ms"] = str(open_ns // 1_000_000)
            common.custom_tags["emit_us"] = str((start_ns + open_ns) // 1_000)
        common.route_name = f"httproute/ns-{tenant % 7}/web/rule/0/match/0/example"
        common.upstream_cluster = common.route_name
        common.stream_id = f"stream-{number}" if number else f"{self._dice.getrandbits(64):x}"
        row.request.path = "/a/path/of/usual/length?with=a&query=string"
        row.request.user_agent = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
        row.response.response_code.value = 200
        row.response.response_code_details = "via_upstream"
        return row


def packed(rows: list[Any]) -> bytes:
    whole = als_pb2.StreamAccessLogsMessage()
    whole.http_logs.log_entry.extend(rows)
    return bytes(whole.SerializeToString())


def batched(rows: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    while batch := tuple(itertools.islice(rows, size)):
        yield batch


class Soak:
    """The sink, its senders, its endpoint."""

    def __init__(self, place: Path, seconds: float) -> None:
        self.place, self.seconds = place, seconds
        self.rows = Rows()
        self.sent = self.reconnects = self.tokens = self.outages = self.broken = 0
        self.memory: list[tuple[float, int]] = []
        self._token = place / "token"
        self._long: asyncio.Queue[bytes] = asyncio.Queue()
        self._stop = asyncio.Event()
        self._grpc_port = lease_port()

    async def run(self) -> bool:
        """Runs it all. Returns whether everything held."""
        async with BillingStandIn() as billing:
            process = await self._start(billing)
            started, cpu = time.monotonic(), 0
            try:
                work = [self._refresh(), self._rotate(), self._outages(billing), self._watch(process)]
                tasks = [asyncio.create_task(one) for one in work]
                senders = [asyncio.create_task(self._send(number)) for number in range(CONNECTIONS)]
                await asyncio.wait([*tasks, *senders], timeout=self.seconds, return_when="FIRST_COMPLETED")
                self._stop.set()
                took = time.monotonic() - started
                cpu = cpu_ticks(process.pid)
                await asyncio.gather(*senders)
                for task in tasks:
                    task.cancel()
                for ended in await asyncio.gather(*tasks, return_exceptions=True):
                    if isinstance(ended, Exception):
                        raise ended
                billing.faults = Faults()
                drained_s = await self._drained()
            finally:
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                status = await asyncio.wait_for(process.wait(), 60)
            return self._report(billing, took, cpu, drained_s, status)

    async def _start(self, billing: BillingStandIn) -> asyncio.subprocess.Process:
        self._token.write_text("token-0")
        document = sink_config(
            self.place, grpc_port=self._grpc_port, http_port=lease_port(), url=billing.url, window_ms=10_000
        )
        document["envoy"] = {"flush_interval": "1s"}
        document["listen"] |= {"token_file": str(self._token), "limits": {"connection_age": "45s"}}
        config = self.place / "proxy-usage.yaml"
        config.write_text(yaml.safe_dump(document))
        with (self.place / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy_usage", "run", "--config", str(config)), stdout=log, stderr=log
            )
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self._grpc_port)
                writer.close()
                return process
            await asyncio.sleep(0.1)

    async def _refresh(self) -> None:
        while True:
            for message in self.rows.refresh():
                self._long.put_nowait(message)
            await asyncio.sleep(1)

    async def _rotate(self) -> None:
        while True:
            await asyncio.sleep(TOKEN_EVERY_S)
            self.tokens += 1
            self._token.write_text(f"token-{self.tokens}")

    async def _outages(self, billing: BillingStandIn) -> None:
        while True:
            await asyncio.sleep(OUTAGE_EVERY_S - OUTAGE_S)
            self.outages += 1
            billing.faults = Faults(always=Fault.UNAVAILABLE)
            await asyncio.sleep(OUTAGE_S)
            billing.faults = Faults(per_mille={Fault.BUSY: 20, Fault.LOST: 20})

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        started = time.monotonic()
        while True:
            await asyncio.sleep(SAMPLE_S)
            self.memory.append((time.monotonic() - started, resident(process.pid)))
            if len(self.memory) % 12 == 0:
                minutes, size = self.memory[-1][0] / 60, self.memory[-1][1] >> 20
                print(f"  {minutes:4.0f} min  {self.sent:>12,} rows sent  {size} MiB", flush=True)

    async def _send(self, number: int) -> None:
        """Streams one after the other, each on a connection of its own."""
        dice = random.Random(number)
        hello = als_pb2.StreamAccessLogsMessage()
        hello.identifier.node.id, hello.identifier.log_name = f"envoy-{number}", "http"
        while not self._stop.is_set():
            metadata = [("authorization", f"Bearer {self._token.read_text()}")]
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{self._grpc_port}", options) as channel:
                call: Any = channel.stream_unary(METHOD)(metadata=metadata)
                until = time.monotonic() + dice.uniform(3, 15)
                self.reconnects += 1
                try:
                    await call.write(hello.SerializeToString())
                    while time.monotonic() < until and not self._stop.is_set():
                        # Long streams have one sender: their rows are running totals of one Envoy.
                        if number == 0 and not self._long.empty():
                            await call.write(self._long.get_nowait())
                            self.sent += ROWS
                        for message in dice.sample(self.rows.short, min(5, len(self.rows.short))):
                            await call.write(message)
                            self.sent += ROWS
                        await asyncio.sleep(0)
                    await call.done_writing()
                    await call
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
                    self.broken += 1  # refused for a token that was just changed, or ended for its age
                    await asyncio.sleep(0.1)

    async def _drained(self) -> float:
        started = time.monotonic()
        while time.monotonic() - started < 300:
            with Reader(self.place / "usage.db") as reader:
                status = reader.status()
            if status.open_windows == 0 and all(one.pending == 0 for one in status.outputs):
                break
            await asyncio.sleep(0.5)
        return time.monotonic() - started

    def _report(self, billing: BillingStandIn, took: float, cpu: int, drained_s: float, status: int) -> bool:
        with Reader(self.place / "usage.db") as reader:
            stored, sums = reader.status(), reader.conservation(deep=True)
        read = sum(stored.intake.values())
        fates = sum(rows for reasons in stored.rows.values() for rows in reasons.values())
        sums_there = billing.arrived.sums()
        arrived = [
            sum(value for (_, type_), value in sums_there.items() if type_ == meter) for meter in METERS
        ]
        delivered = [terms.minted.value for terms in stored.meters]
        slope = slope_per_hour(self.memory[len(self.memory) // 4 :])
        held = {
            "the sink drained and ended with 0": status == 0,
            "every row read has a fate": read == fates and not sum(stored.crash_lost.values()),
            "rows sent are at least rows read": self.sent >= read > 0,
            "what was made into events is what the endpoint has": delivered == arrived,
            "each event is there once": stored.outputs[0].delivered == len(billing.arrived.stored),
            "nothing waits": all(one.pending == 0 for one in stored.outputs),
            "it is conserved": sums.balanced,
            "the endpoint was sent nothing unsound": not billing.arrived.violations,
            f"memory grows by at most {MAX_SLOPE_MIB} MiB an hour": slope <= MAX_SLOPE_MIB,
        }
        ticks = os.sysconf("SC_CLK_TCK")
        print(f"{took / 60:.1f} min, {read:,} rows read ({read / took:,.0f} a second), {fates:,} with a fate")
        print(f"CPU {cpu / ticks / took * 100:.0f} % of a core, {cpu / ticks / read * 1e6:.2f} µs a row")
        print(f"{self.reconnects} connections ({self.broken} broken), {self.tokens} tokens")
        print(f"{self.outages} outages of the endpoint")
        print(f"delivered: {delivered} by meter; queue empty after {drained_s:.1f} s")
        first, last = self.memory[len(self.memory) // 4][1] >> 20, self.memory[-1][1] >> 20
        print(f"resident: {first} MiB after a quarter, {last} MiB at the end, slope {slope:+.1f} MiB an hour")
        for what, true in held.items():
            print(f"  {'ok ' if true else 'NOT'} {what}")
        return all(held.values())


def resident(pid: int) -> int:
    """Resident memory in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_ticks(pid: int) -> int:
    """User and system time so far, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def slope_per_hour(samples: list[tuple[float, int]]) -> float:
    """Least squares, in MiB an hour."""
    count = len(samples)
    mean_t = sum(t for t, _ in samples) / count
    mean_m = sum(m for _, m in samples) / count
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    return sum((t - mean_t) * (m - mean_m) for t, m in samples) / spread * 3_600 / (1 << 20)


def main() -> None:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    with tempfile.TemporaryDirectory() as directory:
        if not asyncio.run(Soak(Path(directory), minutes * 60).run()):
            sys.exit(1)


if __name__ == "__main__":
    main()
