"""The audit against a real Envoy: what it says is missing is what nobody was billed for."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from harness import World
from program import eventually

from proxy_usage.demo.checks import METERS
from proxy_usage.demo.listener import lease_port

pytestmark = pytest.mark.e2e

REQUESTS = METERS[0]
NODE = "demo-envoy"


class Audited:
    """A world whose sink audits its Envoy, all of whose rows are requests."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def node(self) -> dict[str, Any]:
        """What /api/audit says of the Envoy."""
        with contextlib.suppress(OSError):
            status, text = await self.world.sink.get("/api/audit")
            if status == 200:
                return next((one for one in json.loads(text)["nodes"] if one["node"] == NODE), {})
        return {}

    def lost(self) -> int:
        """Requests that the client made and nobody is billed for."""
        delivered = sum(
            amount for (_, meter), amount in self.world.billing.arrived.sums().items() if meter == REQUESTS
        )
        return self.world.truth.requests - delivered

    async def begun(self) -> None:
        """Waits until there is something to begin from."""
        await eventually(lambda: self._says(state="complete"), "the audit has begun", why=self.said)

    async def agrees(self) -> dict[str, Any]:
        """Waits until everything is decided, and the audit's figure is the loss, to the row."""
        last: dict[str, Any] = {}

        async def same() -> bool:
            last.clear()
            last.update(await self.node())
            told = sum(last.get(name, 0) for name in ("missing", "dropped", "crash_lost"))
            sent = last.get("written", 0) + last.get("dropped", 0)
            decided = last.get("under_way") == 0 and sent == self.world.truth.requests
            return decided and self.world.sink.idle() and told == self.lost()

        await eventually(same, "the audit says what is missing", why=lambda: (last, self.lost(), self.said()))
        return dict(last)

    async def _says(self, **wanted: object) -> bool:
        node = await self.node()
        return all(node.get(name) == value for name, value in wanted.items())

    def said(self) -> str:
        return self.world.sink.said()


@contextlib.asynccontextmanager
async def audited(
    directory: Path,
    *,
    envoy: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    listener_log: bool = False,
) -> AsyncIterator[Audited]:
    admin = lease_port()

    def amend(document: dict[str, Any]) -> None:
        document["admin"]["address"]["socket_address"]["port_value"] = admin
        if not listener_log:
            document["static_resources"]["listeners"][0]["access_log"] = []

    settings = {
        "audit": {
            "envoys": [f"http://127.0.0.1:{admin}"],
            "interval": "300ms",
            "settle": "500ms",
            **(audit or {}),
        }
    }
    async with World(directory, tenants=2, settings=settings, envoy=envoy, amend=amend) as world:
        yield Audited(world)


async def test_what_a_sink_that_is_killed_costs_is_found_to_the_row(tmp_path: Path) -> None:
    """Envoy says that everything was flushed, and nothing dropped."""
    async with audited(tmp_path, envoy={"health_check": False}) as audit:
        world = audit.world
        await audit.begun()
        await world.send(100)
        assert (await audit.agrees())["missing"] == 0
        async with world.load():
            await world.sink.kill()
            sent = world.truth.requests
            await eventually(lambda: world.truth.requests > sent + 300, "traffic goes on")
            await world.sink.start()
        node = await audit.agrees()
        assert node["missing"] > 100
        assert (node["state"], node["dropped"], node["unknown"]) == ("missing", 0, 0)
        assert node["at_least"] == node["at_most"] == node["missing"] == node["missing_http"]
        assert node["requests"] > 0
        assert node["bytes_in"] > node["requests"]
        print(node)


async def test_stall(tmp_path: Path) -> None:
    async with audited(tmp_path, envoy={"health_check": False}) as audit:
        world = audit.world
        await audit.begun()
        async with world.load():
            world.sink.send_signal(signal.SIGSTOP)
            sent = world.truth.requests
            await eventually(lambda: world.truth.requests > sent + 300, "traffic goes on")
            world.sink.send_signal(signal.SIGCONT)
            await eventually(audit.node, "the sink answers")
        node = await audit.agrees()
        assert (node["state"], node["missing"]) == ("complete", 0)
        async with world.load():
            world.sink.send_signal(signal.SIGSTOP)
            sent = world.truth.requests
            await eventually(lambda: world.truth.requests > sent + 300, "traffic goes on")
            await world.sink.kill()
        await world.sink.start()
        node = await audit.agrees()
        assert node["missing"] > 100
        print(node)


async def test_overflow(tmp_path: Path) -> None:
    async with audited(tmp_path, envoy={"buffer_bytes": 20_000}) as audit:
        world = audit.world
        await audit.begun()
        await world.sink.kill()
        await asyncio.sleep(1)
        await world.send(600)
        await world.sink.start()
        node = await audit.agrees()
        assert node["dropped"] > 100
        print(node)


async def test_restart(tmp_path: Path) -> None:
    async with audited(tmp_path) as audit:
        world = audit.world
        await audit.begun()
        await world.send(300)
        await world.envoy.admin("POST", "/drain_listeners")
        node = await audit.agrees()
        await asyncio.sleep(2)
        await world.envoy.stop()
        await world.envoy.start()
        await world.send(200)
        node = await audit.agrees()
        print(node)
        assert (node["state"], node["missing"], node["unknown"]) == ("complete", 0, 0)
        world.envoy.kill()
        await world.envoy.stop()
        await eventually(lambda: audit._says(state="unknown"), "unknown", why=audit.said)
        print(await audit.node())
        await world.envoy.start()
        await world.send(200)
        await eventually(lambda: audit._says(unknown=1, under_way=0, written=700), "decided", why=audit.said)
        print(await audit.node())
