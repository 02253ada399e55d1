"""docker-compose.yml without containers: each service's command, with the same files and ports.

Grafana apart, which no package registry has. Each service gets an address of its own on loopback in place of
its name, so that all keep their ports; Envoy and Prometheus are the ones that are installed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from program import eventually

from proxy_usage.demo.envoy import envoy_command

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8"),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
RUN = [name for name in SERVICES if name != "grafana"]
NET = f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}"
"""Another run of these tests on this machine has another one: the ports are the same."""
ADDRESSES = {name: f"{NET}.{number}" for number, name in enumerate(RUN, 1)}
METERS = ("requests", "ingress-bytes", "egress-bytes", "connection-seconds")
PROGRAMS = {
    "python": sys.executable,
    "envoy": envoy_command(),
    "prometheus": shutil.which("prometheus") or "",
}


class Stack:
    """The services, each a process in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._running: list[asyncio.subprocess.Process] = []

    async def __aenter__(self) -> Stack:
        for name in sorted(RUN, key=self._order):
            await self._start(name)
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in reversed(self._running):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in self._running:
            await asyncio.wait_for(process.wait(), 60)

    @staticmethod
    def _order(name: str) -> int:
        """Those that others wait for first."""
        waits = SERVICES[name].get("depends_on", {})
        return 0 if not waits else 1 + max(Stack._order(other) for other in waits)

    async def _start(self, name: str) -> None:
        service = SERVICES[name]
        home = self.directory / name
        home.mkdir()
        files = self._files(name, home)
        entrypoint = service.get("entrypoint", [])
        if "build" in service and not entrypoint:
            entrypoint = ["python", "-m", "proxy_usage"]  # the image's own
        command = [*entrypoint, *service["command"]]
        if name == "prometheus":
            command = ["prometheus", *command, f"--web.listen-address={ADDRESSES[name]}:9090"]
        if name == "envoy":
            command.append("--disable-hot-restart")
        command = [
            PROGRAMS.get(command[0], command[0]),
            *(self._here(name, text, files) for text in command[1:]),
        ]
        environment = {
            key: self._here(name, value, {}) for key, value in service.get("environment", {}).items()
        }
        with (home / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *command, cwd=home, env={**os.environ, **environment}, stdout=log, stderr=log
            )
        self._running.append(process)
        if "build" in service and name in ("sink-a", "sink-b", "owner"):
            await eventually(lambda: self.ready(name), f"{name} is ready", why=lambda: self.said(name))

    def _files(self, name: str, home: Path) -> dict[str, str]:
        """Mounted files with addresses in place of names, and where each is here; volumes are directories."""
        places = {}
        for mount in SERVICES[name].get("volumes", []):
            source, target = mount.split(":")[:2]
            place = home / target.strip("/").replace("/", "_")
            if source.startswith("."):
                places[target] = str(place)
            else:
                place.mkdir()
                places[target] = str(place)
        for mount in SERVICES[name].get("volumes", []):
            source, target = mount.split(":")[:2]
            if source.startswith("."):
                text = (ROOT / source).read_text()
                Path(places[target]).write_text(self._here(name, text, places))
        return places

    @staticmethod
    def _here(name: str, text: str, files: dict[str, str]) -> str:
        if files:  # all at once, the longest first: one target may be the beginning of another
            targets = "|".join(re.escape(target) for target in sorted(files, key=len, reverse=True))
            text = re.sub(rf"(?<![\w/])(?:{targets})", lambda found: files[found[0]], text)
        text = text.replace("0.0.0.0", ADDRESSES[name])
        for other, address in ADDRESSES.items():
            text = text.replace(f"//{other}:", f"//{address}:").replace(f'"{other}:', f'"{address}:')
            text = text.replace(f"address: {other},", f"address: {address},")
        return text

    def said(self, name: str) -> str:
        return "\n".join((self.directory / name / "log").read_text(errors="replace").splitlines()[-15:])

    async def ready(self, name: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError, AssertionError):
            return bool((await self.get(f"http://{ADDRESSES[name]}:9090/readyz"))["ready"])
        return False

    @staticmethod
    async def get(url: str, **query: str) -> Any:
        async with aiohttp.ClientSession() as session, session.get(url, params=query) as answer:
            return await answer.json()

    async def billed(self) -> dict[str, int]:
        """What the stand-in has of each tenant's requests and bytes in."""
        sums: dict[str, dict[str, int]] = (await self.get(f"http://{ADDRESSES['billing']}:8080/sums"))["sums"]
        return {
            f"{tenant} {meter.rpartition('/')[2]}": value
            for tenant, of_tenant in sums.items()
            for meter, value in of_tenant.items()
        }

    async def query(self, expression: str) -> list[Any]:
        url = f"http://{ADDRESSES['prometheus']}:9090/api/v1/query"
        with contextlib.suppress(aiohttp.ClientError):  # it is not up, or says so in plain text: 503
            found: list[Any] = (await self.get(url, query=expression))["data"]["result"]
            return found
        return []

    async def counted(self, name: str) -> int:
        """Rows that a sink has counted."""
        url = f"http://{ADDRESSES[name]}:9090/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            lines = (await answer.text()).splitlines()
        (line,) = [line for line in lines if line.startswith("proxy_usage_entries_counted_total ")]
        return int(float(line.split()[1]))


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with Stack(tmp_path) as running:
        yield running


@pytest.mark.timeout(300)
async def test_usage_arrives_and_is_seen(stack: Stack) -> None:
    async def short_rows() -> bool:
        return await stack.counted("sink-a") + await stack.counted("sink-b") > 20

    await eventually(short_rows, "rows of short requests reach the two", why=lambda: stack.said("envoy"))

    async def open_streams() -> bool:
        return await stack.counted("owner") >= 2

    await eventually(open_streams, "rows of open streams reach the owner", why=lambda: stack.said("envoy"))

    async def three_are_up() -> bool:
        up = await stack.query('up{job="proxy-usage"}==1')
        return len(up) == 3 and bool(await stack.query("envoy_access_logs_grpc_access_log_logs_written"))

    await eventually(three_are_up, "Prometheus scrapes them", why=lambda: stack.said("prometheus"))

    async def billed() -> bool:
        sums = await stack.billed()
        return all(sums.get(f"{tenant} {meter}", 0) for tenant in ("alpha", "beta") for meter in METERS)

    await eventually(billed, "both tenants are billed by each meter", why=lambda: stack.said("sink-a"))
    # A WebSocket that is open: billed as it goes, by its owner, and no request yet.

    async def remembered() -> bool:
        return bool(await stack.query('proxy_usage_streams_remembered{instance=~".*:9090"}>0'))

    await eventually(remembered, "Prometheus sees the open stream", why=lambda: stack.said("prometheus"))
    assert not await stack.query('proxy_usage_entries_skipped_total{reason=~"misrouted|early_periodic"}>0')
