"""Processes under measurement: started on a core of their own, watched through /proc."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from bench.building import ROOT, NotBuilt, build_cpp, build_go
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.sink import sink_config

TICK_US = 1_000_000 // os.sysconf("SC_CLK_TCK")
DEADLINE_S = 60
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, OTHER_CORE = CORES[0], CORES[-1]
"""A server has a core for itself; generator, billing stand-in and this program share the other."""


class BenchError(Exception):
    """A process did not do as it should, or counted wrongly."""


def cpu_us(pid: int) -> int:
    """Processor time of a process so far in microseconds, threads that ended included; 10 ms steps."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_US


def cpu_ns(pid: int) -> int:
    """The same in nanoseconds and without steps: the process' clock, as clock_getcpuclockid(3) gives it."""
    return time.clock_gettime_ns(~pid << 3 | 2)


def memory(pid: int, field: str = "VmRSS") -> int:
    """Bytes, by the kernel's name: ``VmRSS`` now, ``VmHWM`` at the most."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise BenchError(f"/proc/{pid}/status has no {field}")


class Server:
    """A sink under measurement. ``command`` gets the port; it says "ready" when it listens."""

    def __init__(self, name: str, command: Sequence[str], *, fold: str | None = None) -> None:
        self.name = name
        self.port = 0
        self.core = SERVER_CORE
        self.sent: list[dict[str, Any]] = []
        self._command, self._fold = command, fold
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "it was not started"
        return self._process.pid

    async def start(self) -> None:
        """Starts it and waits until it listens."""
        self.port = lease_port()
        words = [word.format(port=self.port) for word in self._command]
        self._process = await spawn(words, self.core, fold=self._fold, stdout=asyncio.subprocess.PIPE)
        assert self._process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            line = await self._process.stdout.readline()
        if line.strip() != b"ready":
            raise BenchError(f"{self.name} did not start: {line!r}")

    async def settle(self) -> None:
        """Waits until nothing of what it was sent is still under way."""

    async def stop(self) -> dict[str, Any]:
        """Ends it. Returns what it counted."""
        assert self._process is not None, "it was not started"
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            said, _ = await self._process.communicate()
        counted: dict[str, Any] = json.loads(said.splitlines()[-1])
        return counted

    async def kill(self) -> None:
        """Ends it at once, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


class OurSink(Server):
    """``proxy-usage run``, with a store on disk and delivery to the billing stand-in."""

    def __init__(
        self,
        directory: Path,
        url: str,
        *,
        name: str = "sink",
        window_ms: int = 60_000,
        tenants: int = 1_000,
        fold: str | None = None,
    ) -> None:
        super().__init__(name, ())
        self.directory = directory / name
        self.http_port = 0
        self._url, self._window_ms, self._tenants, self._fold = url, window_ms, tenants, fold

    def configure(self) -> Path:
        """Writes its configuration: everything by default, but for the window and, with very many tenants,
        the bounds that let them in. Returns the file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        # Kept from one start to the next, so that a restart is one.
        self.port, self.http_port = self.port or lease_port(), self.http_port or lease_port()
        document = sink_config(self.directory, grpc_port=self.port, http_port=self.http_port, url=self._url)
        document["windows"] = {"length": f"{self._window_ms}ms"}
        for name in ("batch", "retry"):
            del document["outputs"][0][name]  # as by default
        if self._tenants > 100_000:
            document["tenant"] = {"max_tenants": self._tenants}
            document["windows"]["max_keys"] = 2 * self._tenants
            document["listen"]["limits"] = {"identities": 2 * self._tenants}
        config = self.directory / "proxy-usage.yaml"
        config.write_text(yaml.safe_dump(document))
        return config

    async def start(self) -> None:
        words = [sys.executable, "-m", "proxy_usage", "run", "--config", str(self.configure())]
        with (self.directory / "log").open("ab") as log:
            self._process = await spawn(words, self.core, fold=self._fold, stdout=log, stderr=log)
        async with asyncio.timeout(DEADLINE_S):
            while not await self._ready():
                if self._process.returncode is not None:
                    raise BenchError(f"the sink ended: {(self.directory / 'log').read_text()[-2_000:]}")
                await asyncio.sleep(0.05)

    async def _ready(self) -> bool:
        with contextlib.suppress(aiohttp.ClientConnectionError):
            return (await self.get("/readyz"))[0] == 200
        return False

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of its HTTP port."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status, await answer.text()

    async def settle(self) -> None:
        """A checkpoint and a half, so that what was read is stored; its cost belongs to the rows."""
        await asyncio.sleep(0.4)

    async def stop(self) -> dict[str, Any]:
        """Drains it. Returns what it counted: from its own store, not from what it says."""
        from proxy_usage.store.reader import Reader

        assert self._process is not None, "it was not started"
        self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10 * DEADLINE_S):
            status = await self._process.wait()
        if status:
            raise BenchError(f"the sink ended with {status}: {(self.directory / 'log').read_text()[-2_000:]}")
        with Reader(self.directory / "usage.db") as reader:
            stored = reader.status()
        counted = sum(stored.rows.get("counted", {}).values())
        amounts = [terms.counted for terms in stored.meters]
        names = ("requests", "bytes_in", "bytes_out", "ns")
        return {"entries": counted, **dict(zip(names, amounts, strict=True))}


async def spawn(
    words: Sequence[str], core: int, *, fold: str | None = None, stdout: Any = None, stderr: Any = None
) -> asyncio.subprocess.Process:
    """A process that stays on one core. ``fold`` chooses the implementation, see README."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "GOMAXPROCS": "1"}
    if fold is not None:
        environment["PROXY_USAGE_FOLD"] = fold
    return await asyncio.create_subprocess_exec(
        *("taskset", "-c", str(core), *words), cwd=ROOT, env=environment, stdout=stdout, stderr=stderr
    )


def python_peer(kind: str, window_ms: int, *, fold: str | None = None) -> Server:
    """One of bench/peers/server.py."""
    words = (sys.executable, "-m", "bench.peers.server", kind, "{port}", str(window_ms))
    return Server(kind, words, fold=fold)


def cpp_peer(window_ms: int) -> Server:
    """The C++ sink. Raises NotBuilt."""
    return Server("cpp", (str(build_cpp("sink")), "{port}", str(window_ms)))


def go_peer(window_ms: int) -> Server:
    """The Go sink. Raises NotBuilt."""
    return Server("go", (str(build_go()), "{port}", str(window_ms)))


async def generate(
    port: int, messages: Path, *, connections: int, tenants: int, seconds: float, rate: float, seed: int
) -> dict[str, Any]:
    """Load on a server. Returns what was sent and read to its end; ``rate``: messages a second and
    connection, 0 as many as are taken."""
    try:
        program = [str(build_cpp("generator"))]
    except NotBuilt:  # slower, and said where the results are shown
        program = [sys.executable, "-m", "bench.peers.sender"]
    words = [*program, str(port), str(connections), str(messages), str(tenants)]
    words += [str(seconds), str(rate), str(seed)]
    process = await spawn(words, OTHER_CORE, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(seconds + DEADLINE_S):
        said, _ = await process.communicate()
    if process.returncode:
        raise BenchError(f"the generator failed: {said.decode()}")
    sent: dict[str, Any] = json.loads(said)
    return sent
