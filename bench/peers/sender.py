"""The generator where no C++ one can be built: the same arguments, the same JSON, several processes.

    python -m bench.peers.sender PORT CONNECTIONS FILE TENANTS SECONDS RATE SEED

Messages are made ready before the clock starts and sent again and again, so that Python only hands them over;
only their second is overwritten. So a process sends for at most as many tenants as ``POOL`` messages have
rows, and it takes more of the machine than the C++ one: the fastest servers wait for it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc

from bench.messages import DIGITS, Template, read, varint

METHOD = "/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs"
PROCESSES = 3
POOL = 200


class Sender:
    """The connections of one process."""

    def __init__(self, file: Path, tenants: int, seed: int) -> None:
        self.hello, *templates = read(file)
        dice = random.Random(seed)
        self.tenants: set[int] = set()
        self.pool: list[tuple[bytearray, Template]] = []
        for template in itertools.islice(itertools.cycle(templates), POOL):
            raw = bytearray(template.raw)
            for digits, _ in template.places:
                tenant = dice.randrange(tenants)
                self.tenants.add(tenant)
                for place in digits:
                    raw[place : place + DIGITS] = b"%07d" % tenant
            self.pool.append((raw, template))
        self.sent: list[Template] = []
        self.ready: list[bytes] = []
        self.present()

    def present(self) -> None:
        """Makes all messages ones of the last second."""
        second = varint(int(time.time()) - 1)
        for raw, template in self.pool:
            for _, at in template.places:
                raw[at : at + 5] = second
        self.ready = [bytes(raw) for raw, _ in self.pool]

    def stream(self, port: int, seconds: float, rate: float, first: int) -> None:
        """One connection with one stream, read by the server to its end."""
        until = time.monotonic() + seconds

        def requests() -> Iterator[bytes]:
            yield self.hello.raw
            due = time.monotonic()
            for number in itertools.count(first):
                if rate:
                    due += 1 / rate
                    time.sleep(max(0.0, due - time.monotonic()))
                if time.monotonic() >= until:
                    return
                self.sent.append(self.pool[number % POOL][1])
                yield self.ready[number % POOL]

        with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call: Any = channel.stream_unary(METHOD)
            call(requests())

    def run(self, port: int, connections: int, seconds: float, rate: float) -> dict[str, Any]:
        """All connections at once. Returns what they sent."""
        threads = [
            threading.Thread(target=self.stream, args=(port, seconds, rate, 7 * number))
            for number in range(connections)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
            self.present()
        return {
            "messages": len(self.sent),
            "entries": sum(len(one.places) for one in self.sent),
            "bytes_in": sum(one.amounts.received for one in self.sent),
            "bytes_out": sum(one.amounts.sent for one in self.sent),
            "ns": sum(one.amounts.ns for one in self.sent),
            "wire": sum(len(one.raw) for one in self.sent),
            "tenants": sorted(self.tenants),
        }


def _process(work: tuple[str, int, int, int, float, float, int]) -> dict[str, Any]:
    file, tenants, port, connections, seconds, rate, seed = work
    return Sender(Path(file), tenants, seed).run(port, connections, seconds, rate)


def main() -> None:
    port, connections, file, tenants, seconds, rate, seed = sys.argv[1:]
    shares = [len(range(number, int(connections), PROCESSES)) for number in range(PROCESSES)]
    began = time.monotonic()
    with multiprocessing.Pool(PROCESSES) as pool:
        parts = pool.map(
            _process,
            [
                (file, int(tenants), int(port), share, float(seconds), float(rate), int(seed) * 100 + number)
                for number, share in enumerate(shares)
                if share
            ],
            chunksize=1,
        )
    sums = {name: sum(part[name] for part in parts) for name in parts[0] if name != "tenants"}
    known = {tenant for part in parts for tenant in part["tenants"]}
    print(json.dumps({**sums, "tenants": len(known), "seconds": time.monotonic() - began, "ok": True}))


if __name__ == "__main__":
    main()
