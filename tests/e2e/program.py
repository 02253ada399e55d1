"""The program as an operator runs it: started, stopped, killed, and looked at from outside.

    async with Sink(tmp_path, url=billing.url) as sink:
        await sink.kill()
        await sink.start()               # on the same ports and the same store
        assert await sink.stop() == 0

Nothing waits for a time to pass: ``eventually`` waits for a condition, and names it when it is never true.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import signal
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import aiohttp
import yaml

from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.sink import sink_config
from proxy_usage.intake import MAGIC, SLOT
from proxy_usage.store.reader import Reader

DEADLINE_S = 60
"""How long a condition may take on a slow machine. Nothing that is right takes so long."""
PROGRAM = (sys.executable, "-m", "proxy_usage")
FAST_OUTPUT: Mapping[str, Any] = {
    "batch": {"linger": "50ms"},
    "retry": {"initial": "50ms", "max": "500ms"},
}


async def eventually(
    condition: Callable[[], object | Awaitable[object]],
    what: str,
    *,
    why: Callable[[], object] = lambda: "",
    poll_s: float = 0.05,
) -> None:
    """Waits until ``condition()`` is true. AssertionError with ``what`` and ``why()`` when it never is."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DEADLINE_S
    while True:
        value = condition()
        if await value if inspect.isawaitable(value) else value:
            return
        assert loop.time() < end, f"not within {DEADLINE_S} s: {what}. {why()}"
        await asyncio.sleep(poll_s)


def merged(base: Any, changes: Any) -> Any:
    """``base`` with ``changes`` laid over it, mapping by mapping; all other values are replaced."""
    if not isinstance(base, Mapping) or not isinstance(changes, Mapping):
        return changes
    return {**base, **{name: merged(base.get(name), value) for name, value in changes.items()}}


class Ended(NamedTuple):
    """A process that ended: its exit status and what it said on both streams together."""

    status: int
    said: str


class Sink:
    """The program as an operator runs it: ``proxy-usage run`` on a configuration file in ``directory``.

    It keeps its ports and its store from one start to the next, so that a restart is a restart. Windows are
    as short as they may be. ``settings`` is laid over the configuration, ``output`` over its one output.
    """

    def __init__(
        self,
        directory: Path,
        *,
        url: str,
        settings: Mapping[str, Any] | None = None,
        output: Mapping[str, Any] | None = None,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.grpc_port = lease_port()
        self.http_port = lease_port()
        self.config = directory / "proxy-usage.yaml"
        self.log = directory / "proxy-usage.log"
        document = sink_config(
            directory,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
            url=url,
            window_ms=1000,
            grace_ms=200,
        )
        document = merged(document, settings or {})
        document["outputs"] = [merged(merged(document["outputs"][0], FAST_OUTPUT), output or {})]
        self.document: dict[str, Any] = document
        """The configuration; a change takes effect at the next start."""
        self.arguments: tuple[str, ...] = ()
        """More arguments of ``run``, from the next start on."""
        self.verb = "run"
        self.wrapper: tuple[str, ...] = ()
        """A command that runs it, from the next start on."""
        self._process: asyncio.subprocess.Process | None = None

    # --- its life ---------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None, "the sink was not started"
        return self._process.pid

    async def start(self, *, ready: bool = True) -> None:
        """Starts it and waits until it is ready, or (``ready=False``) until it answers at all."""
        process = await self._spawn()
        path = "/readyz" if ready else "/healthz"

        async def serves() -> bool:
            assert process.returncode is None, f"the sink ended with {process.returncode}:\n{self.said()}"
            with contextlib.suppress(aiohttp.ClientConnectionError):
                return (await self.get(path))[0] == 200
            return False

        try:
            await eventually(serves, f"{path} says 200", why=self.said)
        except AssertionError:
            self.send_signal(signal.SIGABRT)  # its log says where each of its threads was
            await process.wait()
            raise AssertionError(f"{path} never said 200:\n{self.log.read_text()[-8_000:]}") from None

    async def run(self) -> Ended:
        """Starts it where it must end by itself, and waits for that."""
        at = self.log.stat().st_size if self.log.exists() else 0
        process = await self._spawn()
        async with asyncio.timeout(DEADLINE_S):
            status = await process.wait()
        return Ended(status, self.log.read_bytes()[at:].decode())

    async def _spawn(self) -> asyncio.subprocess.Process:
        self.config.write_text(yaml.safe_dump(self.document, sort_keys=False), encoding="utf-8")
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*self.wrapper, *PROGRAM, self.verb, "--config", str(self.config), *self.arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
            )
        return self._process

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the sink was not started"
        self._process.send_signal(number)

    async def wait(self) -> int:
        """Its exit status, once it ended."""
        assert self._process is not None, "the sink was not started"
        async with asyncio.timeout(DEADLINE_S):
            return await self._process.wait()

    async def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.send_signal(signal.SIGTERM)
        return await self.wait()

    async def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    # --- what it says -----------------------------------------------------------------------------------

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of its HTTP port."""
        url = f"http://127.0.0.1:{self.http_port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            return answer.status, await answer.text()

    async def reasons(self) -> dict[str, str]:
        """Why /readyz says that it is not ready; empty when it is."""
        status, text = await self.get("/readyz")
        reasons: dict[str, str] = json.loads(text)["reasons"]
        assert status == (503 if reasons else 200)
        return reasons

    async def is_ready(self) -> bool:
        """Whether /readyz says yes. What ended a trouble can be seen before: wait for this."""
        return not await self.reasons()

    async def metrics(self) -> dict[str, int]:
        """/metrics as ``{'proxy_usage_entries_read_total': 7, 'name{label="x"}': 1}``; fractions are cut."""
        _, text = await self.get("/metrics")
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name.removeprefix("proxy_usage_"): int(float(value)) for name, _, value in lines}

    def said(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def events(self, text: str) -> list[dict[str, Any]]:
        """Log lines of one kind, over all of its starts."""
        # Without a last line of which the file system shows only a part yet.
        lines = self.log.read_text(errors="replace").rpartition("\n")[0].splitlines()
        parsed = (json.loads(line) for line in lines if line.startswith("{"))
        return [line for line in parsed if line["event"] == text]

    async def cli(self, *arguments: str) -> Ended:
        """Another verb of the program, with the sink's configuration."""
        process = await asyncio.create_subprocess_exec(
            *(*PROGRAM, *arguments, "--config", str(self.config)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        assert process.returncode is not None
        return Ended(process.returncode, said.decode())

    # --- what it keeps ----------------------------------------------------------------------------------

    @property
    def store(self) -> Path:
        return Path(self.document["store"]["path"])

    def reader(self) -> Reader:
        """Its store, read beside it."""
        return Reader(self.store)

    def read(self) -> int:
        """Rows read over the life of the store, from the file that a crash cannot take back."""
        return sum(intake_rows(self.store).values())

    def saved(self) -> int:
        """Rows read as of the last checkpoint."""
        with self.reader() as reader:
            return sum(reader.status().intake.values())

    def counted(self) -> int:
        """Rows that were counted, as of the last checkpoint; rows of listeners are not among them."""
        with self.reader() as reader:
            return sum(reader.status().rows.get("counted", {}).values())

    def with_a_fate(self) -> int:
        """Rows that were counted, skipped or found invalid."""
        with self.reader() as reader:
            return sum(rows for reasons in reader.status().rows.values() for rows in reasons.values())

    def lost(self) -> int:
        """Rows that crashes lost, as reported over the life of the store."""
        with self.reader() as reader:
            return sum(reader.status().crash_lost.values())

    def idle(self) -> bool:
        """Whether every window is closed and every event settled."""
        with self.reader() as reader:
            status = reader.status()
        return status.open_windows == 0 and all(output.pending == 0 for output in status.outputs)


def intake_rows(store: Path) -> dict[str, int]:
    """Rows read per node as the mapped file beside the store has them, read without mapping it."""
    counts: Counter[str] = Counter()
    path = store.with_name(store.name + ".intake")
    if not path.exists():
        return counts
    with path.open("rb") as file:
        file.seek(len(MAGIC))
        while name := (slot := file.read(SLOT))[8:].rstrip(b"\0"):
            counts[name.split(b"\0")[0].decode()] += struct.unpack_from("<Q", slot)[0]
    return counts
