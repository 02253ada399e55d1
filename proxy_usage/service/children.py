"""A worker as its supervisor sees it: a process that is started, asked, told to end, and started again.

start ──▶ running ──answers──▶ serving ──ends by itself──▶ waits: 0.5 s, twice as long each time, at most 30 s
  ▲                                                                │
  └────────────────────────────────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from proxy_usage.control import NotRunning, ask, socket_path
from proxy_usage.errors import ProxyUsageError
from proxy_usage.page.snapshot import Snapshot
from proxy_usage.places import place
from proxy_usage.service.worker import Part

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Patience:
    """How long is waited for what, in seconds."""

    first_wait: float = 0.5
    """Before the first start in place of a process that ended; then twice as long each time."""
    last_wait: float = 30.0
    steady: float = 60.0
    """A process that lived for so long was well: the next wait is a first one."""
    answer: float = 5.0
    page: float = 2.0
    """For what the operator's page shows, which is asked for every few seconds."""
    hung: float = 300.0
    """A process that gave no answer for so long, having given some, is killed."""
    lifeless: float = 30.0
    """So is one that says for so long that a stage shows no life: a clock that was set makes all look so for
    a moment."""


class Child:
    """One worker's process, and those that follow it.

    Args:
        path: the configuration file.
        store: the worker's.
        on_end: called when a process has ended.
        program: what is run with the arguments of a worker.
    """

    def __init__(
        self,
        part: Part,
        path: Path,
        env: Mapping[str, str],
        store: Path,
        on_end: Callable[[int], None],
        *,
        program: Sequence[str] = (sys.executable, "-m", "proxy_usage"),
        patience: Patience = Patience(),
    ) -> None:
        self.part = part
        self.restarts = 0
        self.ended: int | None = None
        """Exit code of the last process; negative: the signal that ended it."""
        self.reasons: Mapping[str, str] = {"starting": "it was not started yet"}
        """Why it is not ready; empty when it is."""
        self.answered_ms: int | None = None
        """When any process of it answered last, by the wall clock; None: never."""
        self.serving = asyncio.Event()
        """Set once any process of it has opened all its ports."""
        self._path, self._env, self._on_end = path, env, on_end
        self._store, self._socket = store, socket_path(store)
        self._program, self._patience = program, patience
        self._process: asyncio.subprocess.Process | None = None
        self._answered = 0.0  # monotonic time of the last answer of this process; 0: none yet
        self._alive = 0.0  # … of the last that said it lives, or of its start
        self._stop = asyncio.Event()

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.returncode is None

    async def keep(self, *, restored: bool = False) -> int:
        """Runs it, again and again, until it is told to stop or must not be started again.

        Returns the exit code: of a process that ended after ``stop``; of one that ended before any of them
        ever served; or 78, since a configuration with mistakes gets no better by another start.
        """
        patience = self._patience
        wait_s = patience.first_wait
        while True:
            began = time.monotonic()
            code = await self._run(restored=restored)
            # Killed while it started says nothing of whether it can start.
            failed = code > 0 and not self.serving.is_set()
            if self._stop.is_set() or code == 78 or failed:
                return code
            if time.monotonic() - began > patience.steady or code == 0:
                wait_s = patience.first_wait
            self.reasons = {"down": f"it ended with {describe(code)}, and is started again in {wait_s:g} s"}
            log.error("worker ended", number=self.part.number, ended=describe(code), again_in_s=wait_s)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), wait_s)
                return 0  # there was nothing to drain
            restored = restored and not self.serving.is_set()
            wait_s = min(2 * wait_s, patience.last_wait)
            self.restarts += 1

    async def _run(self, *, restored: bool) -> int:
        self._answered, self._alive = 0.0, time.monotonic()
        self.reasons = {"starting": "it has not answered yet"}
        more = ["--restored"] if restored else []
        # Where it served there is a store, or its disk is away: an empty one would forget what waits in it.
        part = msgspec.structs.replace(self.part, again=self.serving.is_set())
        self._process = process = await asyncio.create_subprocess_exec(
            *(*self._program, "run", "--config", str(self._path), "--worker", part.encode(), *more),
            stdin=asyncio.subprocess.PIPE,
            env=dict(self._env),
            start_new_session=True,  # Ctrl-C is for the supervisor
        )
        if self._stop.is_set():
            self.signal(signal.SIGTERM)
        try:
            self.ended = await process.wait()
        finally:
            if process.stdin is not None:
                process.stdin.close()
        self._on_end(self.part.number)
        return self.ended

    def stop(self) -> None:
        """Lets it drain, and not be started again. It may be asked for more than once."""
        self._stop.set()
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it at once."""
        self._stop.set()
        self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process, if there is one."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    # --- asked ------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Asks how it is. One that hangs, or says so, is killed."""
        process = self._process
        if not self.running:
            return
        try:
            answer = await ask(self._socket, "health", self._patience.answer)
        except ProxyUsageError as error:
            if process is not self._process or not self.running:
                return
            if self._answered:
                self.reasons = {"silent": error.message}
                if isinstance(error, NotRunning) and place(self._store) is None:
                    # Its socket lies beside its store: where their disk is away nobody can say that it hangs,
                    # and it counts on in memory.
                    self._answered = time.monotonic()
                    return
                if time.monotonic() - self._answered > self._patience.hung:
                    self._end_hung("it does not answer")
            return
        if process is not self._process or not self.running or not isinstance(answer, dict):
            return
        self._answered, self.answered_ms = time.monotonic(), time.time_ns() // 1_000_000
        self.reasons = answer["reasons"]
        if "starting" not in self.reasons:
            self.serving.set()
        if answer["alive"]:
            self._alive = self._answered
        elif self._answered - self._alive > self._patience.lifeless:
            self._end_hung("a stage of it shows no sign of life")

    def _end_hung(self, why: str) -> None:
        log.error("worker is killed", number=self.part.number, reason=why)
        self.signal(signal.SIGKILL)

    @property
    def silent(self) -> str:
        """Why its process does not answer; empty when it does."""
        if self.running and self._answered:
            return self.reasons.get("silent", "")
        return next(iter(self.reasons.values()), "it ended")

    async def metrics(self) -> str | None:
        """Its /metrics; None when it does not answer."""
        text = await self.ask("metrics")
        return text if isinstance(text, str) else None

    async def snapshot(self) -> Snapshot | None:
        """What an operator's page of it would be made of; None when it does not answer."""
        said = await self.ask("page.snapshot", self._patience.page)
        try:
            return None if said is None else msgspec.convert(said, Snapshot)
        except msgspec.ValidationError:  # of another version: it was started after an upgrade
            return None

    async def ask(self, verb: str, patience_s: float | None = None) -> object:
        """What its present process answers; None when it does not, within ``Patience.answer`` by default."""
        process = self._process
        if not self.running:
            return None
        try:
            said = await ask(self._socket, verb, patience_s or self._patience.answer)
        except ProxyUsageError:
            return None
        return said if process is self._process and self.running else None


def describe(code: int) -> str:
    """How a process ended, in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"
