"""The audit against a real Envoy: what it says is missing is what nobody was billed for."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sqlite3
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
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
        await eventually(lambda: self.says(state="complete"), "the audit has begun", why=self.said)

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

    async def says(self, **wanted: object) -> bool:
        node = await self.node()
        return all(node.get(name) == value for name, value in wanted.items())

    def last_of(self, *, draining: bool) -> bool:
        """Whether the store says that the Envoy's last reading was its last."""
        with contextlib.closing(sqlite3.connect(f"file:{self.world.sink.store}?mode=ro", uri=True)) as db:
            states = [json.loads(state) for (state,) in db.execute("SELECT state FROM audits")]
        return any(state["final"] is draining for state in states)

    def said(self) -> str:
        return self.world.sink.said()


@contextlib.asynccontextmanager
async def audited(
    directory: Path,
    *,
    envoy: Mapping[str, Any] | None = None,
    audit: Mapping[str, Any] | None = None,
    listener_log: bool = False,
    count: str = "logs",
    record: bool = False,
    workers: int = 1,
) -> AsyncIterator[Audited]:
    admin = lease_port()

    def amend(document: dict[str, Any]) -> None:
        document["admin"]["address"]["socket_address"]["port_value"] = admin
        if not listener_log:
            document["static_resources"]["listeners"][0]["access_log"] = []

    settings = {
        "workers": workers,
        "audit": {
            "envoys": [{"url": f"http://127.0.0.1:{admin}", "count": count}],
            "interval": "100ms",
            "settle": "300ms",
            **(audit or {}),
        },
    }
    async with World(
        directory, tenants=2, settings=settings, envoy=envoy, amend=amend, record=record
    ) as world:
        yield Audited(world)


async def more(world: World, requests: int) -> None:
    """Waits until the load that is under way has made so many more requests."""
    enough = world.truth.requests + requests
    await eventually(lambda: world.truth.requests >= enough, "traffic goes on")


async def test_what_sinks_lose_is_found_to_the_row(tmp_path: Path) -> None:
    """A kill, a stall, and a stall that ends in a kill. Envoy says: everything flushed, nothing dropped."""
    async with audited(tmp_path, envoy={"health_check": False}) as audit:
        world = audit.world
        await audit.begun()
        async with world.load():
            await more(world, 100)
            world.sink.send_signal(signal.SIGSTOP)
            await more(world, 200)
            world.sink.send_signal(signal.SIGCONT)
            await eventually(audit.node, "the sink answers again")
        node = await audit.agrees()
        assert (node["state"], node["missing"], node["crash_lost"]) == ("complete", 0, 0)

        async with world.load():
            await more(world, 100)
            await world.sink.kill()
            await more(world, 200)
            await world.sink.start()
        killed = await audit.agrees()
        assert killed["missing"] > 100
        assert (killed["state"], killed["dropped"], killed["unknown"]) == ("missing", 0, 0)
        assert killed["at_least"] == killed["at_most"] == killed["missing"] == killed["missing_http"]
        assert killed["flushed"] == killed["written"] == world.truth.requests
        # A row a request, but for those that were open when an interval began or ended.
        lost = killed["missing"] + killed["crash_lost"]
        assert lost * 9 // 10 <= killed["requests"] <= lost * 11 // 10
        assert 0 < killed["bytes_in"] < killed["bytes_out"]

        async with world.load():
            world.sink.send_signal(signal.SIGSTOP)
            await more(world, 200)
            await world.sink.kill()
            await world.sink.start()
        stalled = await audit.agrees()
        assert stalled["missing"] >= killed["missing"] + 200
        assert stalled["unknown"] == 0


async def test_what_envoy_drops_and_how_it_ends(tmp_path: Path) -> None:
    """An overflow, an Envoy that is drained, and one that is killed."""
    async with audited(tmp_path, envoy={"buffer_bytes": 20_000}) as audit:
        world = audit.world
        await audit.begun()
        await world.sink.kill()

        async def noticed() -> bool:
            """Until its health check failed, Envoy hands rows to nobody instead of keeping them."""
            stats = await world.envoy.stats(r"^cluster\.usage\.membership_healthy$")
            return list(stats.values()) == [0]

        await eventually(noticed, "Envoy knows that the sink is away")
        await world.send(400)
        await world.sink.start()
        node = await audit.agrees()
        assert node["dropped"] > 100
        assert node["state"] == "missing"

        await world.envoy.admin("POST", "/drain_listeners")
        await eventually(lambda: audit.last_of(draining=True), "its last reading is final", why=audit.said)
        await world.envoy.stop()
        await world.envoy.start()
        await world.send(100)
        drained = await audit.agrees()
        assert (drained["unknown"], drained["dropped"]) == (0, node["dropped"])
        assert drained["at_most"] == drained["missing"]

        await world.send(100)
        world.envoy.kill()
        await world.envoy.stop()
        await eventually(lambda: audit.says(state="unknown", at_most=None), "it is unknown", why=audit.said)
        assert (await audit.node())["reason"] == "the Envoy does not answer"
        await world.envoy.start()
        sent, killed_at = world.truth.requests, world.sink.read()
        await world.send(50)
        await eventually(lambda: world.sink.read() >= killed_at + 50 and world.sink.idle(), "all is settled")
        seen = {"unknown": 1, "under_way": 0, "received": world.sink.read()}
        await eventually(lambda: audit.says(**seen), "it stays unknown", why=audit.said)
        killed = await audit.node()
        assert (killed["state"], killed["at_most"]) == ("unknown", None)
        assert killed["missing"] <= killed["at_least"] <= audit.lost() - killed["dropped"]
        assert killed["written"] + killed["dropped"] <= sent + 50

        said = await world.sink.cli("audit", "--json")
        assert (said.status, json.loads(said.said)["nodes"][0]["unknown"]) == (1, 1)
        said = await world.sink.cli("status")
        assert "audit" in said.said
        assert "1 unknown" in said.said
        metrics = await world.sink.metrics()
        assert metrics['audit_nodes{state="unknown"}'] == 1
        assert metrics[f'audit_dropped_entries{{node="{NODE}"}}'] == killed["dropped"]
        assert metrics[f'node_entries_received{{node="{NODE}"}}'] == world.sink.read()

        assert await world.sink.stop() == 0
        said = await world.sink.cli("audit", "--from", "2020-01-01T00:00:00Z", "--json")
        (kept,) = json.loads(said.said)["nodes"]
        assert {name: kept[name] for name in ("written", "dropped", "received", "unknown", "missing")} == {
            name: killed[name] for name in ("written", "dropped", "received", "unknown", "missing")
        }


async def test_rows_of_connections_are_in_what_envoy_flushed_and_are_told_apart(tmp_path: Path) -> None:
    """They are in none of Envoy's counters of rows written or dropped."""
    async with audited(tmp_path, envoy={"health_check": False}, listener_log=True) as audit:
        world = audit.world
        await audit.begun()
        await world.send(60)

        async def all_saved() -> bool:
            """Each connection has a row: what is not durable yet would be lost by the kill."""
            seen = await world.envoy.stats("^listener.*downstream_cx_total$")
            connections = sum(seen[name] for name in seen if not re.search("admin|worker", name))
            return connections > 0 and world.sink.saved() == 60 + connections

        await eventually(all_saved, "rows of connections came, too", why=audit.said)
        await world.sink.kill()
        await world.send(60)
        await world.sink.start()

        async def told_apart() -> bool:
            node = await audit.node()
            with world.sink.reader() as reader:
                listener = reader.status().rows.get("skipped", {}).get("listener", 0)
            return (
                node.get("under_way") == 0
                and node["written"] == world.truth.requests
                and node["missing_http"] == world.truth.requests - (node["received"] - listener) >= 60
                and node["missing_tcp"] == node["flushed"] - node["written"] - listener > 0
            )

        await eventually(told_apart, "both kinds are told apart", why=audit.said)


async def test_workers_are_audited_together_and_so_are_fewer_of_them(tmp_path: Path) -> None:
    """Worker 0 counts what all received; what another had received it takes over with its store."""
    async with audited(tmp_path, envoy={"health_check": False}, workers=2) as audit:
        world = audit.world

        async def agreed() -> bool:
            node = await audit.node()
            told = node.get("missing", 0) + node.get("crash_lost", 0)
            decided = node.get("under_way") == 0 and node["written"] == world.truth.requests
            return decided and told == audit.lost() and node["unknown"] == 0

        await eventually(audit.node, "the audit knows the Envoy", why=audit.said)
        await world.send(100)
        await eventually(agreed, "all came", why=audit.said)
        assert (await audit.node())["state"] == "complete"
        status, text = await world.sink.get("/api/intake")
        assert status == 200
        assert sum(one["nodes"].get(NODE, {}).get("http", 0) for one in json.loads(text)) == 100
        assert len({one["sink"] for one in json.loads(text)}) == 2

        assert await world.sink.stop() == 0
        await world.send(50)  # to nobody
        world.sink.document["workers"] = 1
        world.sink.config.write_text(yaml.safe_dump(world.sink.document), encoding="utf-8")
        await world.sink.start()
        assert world.sink.events("store adopted")
        await world.send(60)
        await eventually(agreed, "what is missing is known to the row", why=audit.said)
        node = await audit.node()
        assert (node["state"], node["missing"] > 0) == ("missing", True)
        assert node["received"] == 210 - node["missing"]


async def test_another_logger_and_rows_of_connections_do_not_blur_it(tmp_path: Path) -> None:
    """Each request is logged twice, to another sink, too: Envoy's counters of rows mean both."""
    async with audited(
        tmp_path, envoy={"health_check": False}, record=True, count="requests", listener_log=True
    ) as audit:
        world = audit.world
        await audit.begun()
        async with world.load():
            await more(world, 100)
            world.sink.send_signal(signal.SIGSTOP)
            await more(world, 200)
            await world.sink.kill()
            await world.sink.start()

        async def bounded() -> bool:
            node = await audit.node()
            told = node.get("at_least", 0)
            settled = node.get("under_way") == 0 and world.sink.idle()
            # What a killed sink had read and lost is in the loss, and of end rows it is not known.
            crash = node.get("crash_lost", 0)
            all_seen = node.get("written") == world.truth.requests
            return bool(settled and all_seen and 0 <= audit.lost() - told <= crash)

        await eventually(bounded, "the loss is within its bounds", why=audit.said)
        assert audit.lost() >= 200
