"""The sink as the demo runs it: the real program, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from proxy_usage.demo.listener import lease_port
from proxy_usage.errors import ProxyUsageError

START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 30


class SinkError(ProxyUsageError):
    """The sink did not start, or ended by itself. Carries the end of what it said."""


def sink_config(
    directory: Path,
    *,
    grpc_port: int,
    http_port: int,
    url: str,
    token_file: Path | None = None,
    window_ms: int = 2000,
    grace_ms: int = 1000,
    envoys: Sequence[str] = (),
) -> dict[str, Any]:
    """A configuration for a demo: everything by default, except that windows are short enough to watch.

    Args:
        envoys: admin addresses of the Envoys to be audited.
    """
    output: dict[str, Any] = {
        "name": "billing",
        "format": "billing",
        "url": url,
        "batch": {"linger": "200ms"},
        "retry": {"initial": "200ms", "max": "5s"},
    }
    if token_file is not None:
        output["token_file"] = str(token_file)
    document: dict[str, Any] = {
        "listen": {"grpc": f"127.0.0.1:{grpc_port}", "http": f"127.0.0.1:{http_port}"},
        "windows": {"length": f"{window_ms}ms", "grace": f"{grace_ms}ms"},
        "store": {"path": str(directory / "usage.db")},
        "outputs": [output],
    }
    if envoys:
        document["listen"]["http_tenants"] = True  # the page names them: they are nobody's customers
        document["audit"] = {"envoys": list(envoys), "interval": "1s", "settle": "500ms"}
    return document


class SinkProcess:
    """``proxy-usage run`` as a child. ``async with SinkProcess(directory, url=…) as sink: … sink.grpc_port``.

    Its configuration is written to ``directory/proxy-usage.yaml``, what it says to ``proxy-usage.log``.
    """

    def __init__(
        self,
        directory: Path,
        *,
        url: str,
        token_file: Path | None = None,
        grpc_port: int = 0,
        http_port: int = 0,
        window_ms: int = 2000,
        grace_ms: int = 1000,
        envoys: Sequence[str] = (),
    ) -> None:
        self.grpc_port = lease_port(grpc_port)
        self.http_port = lease_port(http_port)
        self.config = directory / "proxy-usage.yaml"
        self.log = directory / "proxy-usage.log"
        self._document = sink_config(
            directory,
            grpc_port=self.grpc_port,
            http_port=self.http_port,
            url=url,
            token_file=token_file,
            window_ms=window_ms,
            grace_ms=grace_ms,
            envoys=envoys,
        )
        self._process: asyncio.subprocess.Process | None = None

    @property
    def base(self) -> str:
        """Where its metrics and health are: ``http://host:port``."""
        return f"http://127.0.0.1:{self.http_port}"

    async def __aenter__(self) -> SinkProcess:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Starts it and waits until ``/readyz`` says 200. Raises SinkError with the end of its log."""
        self.config.write_text(yaml.safe_dump(self._document, sort_keys=False), encoding="utf-8")
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "proxy_usage", "run", "--config", str(self.config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # Ctrl-C is for us: Envoy is drained before the sink is stopped
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._is_ready():
                    self.check()
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            await self.stop()
            raise self._error(f"the sink was not ready within {START_TIMEOUT_S} s") from error
        except BaseException:  # cancelled, too: no process stays behind
            await self.stop()
            raise

    async def _is_ready(self) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.base}/readyz") as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False

    async def kill(self) -> None:
        """SIGKILL: what a crash looks like. ``start`` brings it back."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    async def audited(self, node: str) -> dict[str, Any]:
        """What the audit says of an Envoy; empty while it, or the sink, says nothing."""
        try:
            async with aiohttp.ClientSession() as session, session.get(f"{self.base}/api/audit") as answer:
                told = await answer.json() if answer.status == 200 else {}
        except (aiohttp.ClientError, ValueError):
            return {}
        return next((one for one in told.get("nodes", ()) if one["node"] == node), {})

    def check(self) -> None:
        """Raises SinkError when it ended by itself."""
        if self._process is not None and self._process.returncode is not None:
            raise self._error(f"the sink ended with status {self._process.returncode}")

    async def stop(self) -> int | None:
        """SIGTERM, and SIGKILL if that does not end it. Returns the exit status; None if it never ran."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.returncode is None:
            process.terminate()
        try:
            return await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            process.kill()
            return await process.wait()

    def _error(self, message: str) -> SinkError:
        tail = self.log.read_text(errors="replace").splitlines()[-12:] if self.log.is_file() else []
        said = "\n".join(f"  sink: {line}" for line in tail)
        return SinkError(f"{message}\n{said}" if said else message, hint=f"its whole log is {self.log}")
