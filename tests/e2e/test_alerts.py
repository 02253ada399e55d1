"""A real Prometheus scrapes a real sink with the rules that are shipped: alerts fire, and end."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
import yaml
from harness import AlsClient, World
from program import Sink, eventually
from wire import DOWNSTREAM_PERIODIC, http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.faults import Faults
from proxy_usage.demo.listener import lease_port

pytestmark = pytest.mark.e2e

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
WRITTEN = "envoy_access_logs_grpc_access_log_logs_written"
DROPPED = "envoy_access_logs_grpc_access_log_logs_dropped"


@pytest.fixture(scope="module")
def command() -> str:
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    return found


class Prometheus:
    """Prometheus with Compose's configuration: other targets, and a hurry. No alert waits for its ``for``."""

    def __init__(self, command: str, directory: Path, targets: Mapping[str, int]) -> None:
        directory.mkdir()
        self._command = command
        self._directory = directory
        self._port = lease_port()
        self._process: asyncio.subprocess.Process | None = None
        rules = yaml.safe_load((DEPLOY / "components" / "monitoring" / "rules.yaml").read_text())
        self.alerts = {
            rule["alert"]: rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule
        }
        for rule in self.alerts.values():
            rule.pop("for", None)
        (directory / "rules.yaml").write_text(yaml.safe_dump(rules))
        config = yaml.safe_load((DEPLOY / "compose" / "prometheus.yml").read_text())
        config["global"] = {
            "scrape_interval": "300ms",
            "scrape_timeout": "300ms",
            "evaluation_interval": "300ms",
        }
        config["rule_files"] = ["rules.yaml"]
        jobs = [job for job in config["scrape_configs"] if job["job_name"] in targets]
        for job in jobs:
            job["static_configs"] = [{"targets": [f"127.0.0.1:{targets[job['job_name']]}"]}]
        config["scrape_configs"] = jobs
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))

    async def __aenter__(self) -> Self:
        with (self._directory / "log").open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                self._command,
                f"--config.file={self._directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
                stdout=log,
                stderr=log,
            )
        await eventually(self._ready, "Prometheus is ready", why=self.said)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.returncode is None, self.said()
        try:
            async with aiohttp.ClientSession() as session, session.get(self._url("/-/ready")) as answer:
                return answer.status == 200
        except aiohttp.ClientConnectionError:
            return False

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def said(self) -> str:
        """The end of its log."""
        return (self._directory / "log").read_text(errors="replace")[-3000:]

    async def _get(self, path: str, **query: str) -> Any:
        url = self._url(f"/api/v1/{path}")
        async with aiohttp.ClientSession() as session, session.get(url, params=query) as answer:
            body = json.loads(await answer.text())
        assert body["status"] == "success", body
        return body["data"]

    async def value(self, query: str) -> float | None:
        """What a query without labels comes to; None: nothing."""
        result = (await self._get("query", query=query))["result"]
        return float(result[0]["value"][1]) if result else None

    async def rules(self) -> list[dict[str, Any]]:
        """Every rule with its health."""
        groups = (await self._get("rules"))["groups"]
        return [rule for group in groups for rule in group["rules"]]

    async def firing(self) -> dict[str, dict[str, str]]:
        """Alerts that fire now → the annotations of one of each."""
        alerts = (await self._get("alerts"))["alerts"]
        return {one["labels"]["alertname"]: one["annotations"] for one in alerts if one["state"] == "firing"}

    async def until(self, *names: str) -> dict[str, dict[str, str]]:
        """Waits until exactly these alerts fire. Returns them: a scrape that fails ends them all."""
        seen: dict[str, dict[str, str]] = {}

        async def same() -> bool:
            nonlocal seen
            seen = await self.firing()
            return seen.keys() == set(names)

        await eventually(same, f"exactly {sorted(names)} fire", why=lambda: sorted(seen), poll_s=0.2)
        return seen


@asynccontextmanager
async def scraped(command: str, directory: Path) -> AsyncIterator[tuple[BillingStandIn, Sink, Prometheus]]:
    """A sink for finished short streams alone, its endpoint, and a Prometheus that knows it is well."""
    async with BillingStandIn() as billing:
        settings = {"envoy": {"flush_interval": "60s", "long_streams": "elsewhere"}}
        async with (
            Sink(directory / "sink", url=billing.url, settings=settings) as sink,
            Prometheus(command, directory / "prometheus", {"proxy-usage": sink.http_port}) as prometheus,
        ):
            await send(sink, http_row(tags={"project_name": "alpha"}, start_ns=now_ns()))
            await eventually(lambda: billing.stored, "its usage is billed", why=sink.said)
            await prometheus.until("ProxyUsageSingleSink")  # which is true, and no trouble
            yield billing, sink, prometheus


def now_ns() -> int:
    return time.time_ns() - 1_000_000_000


async def send(sink: Sink, *rows: Any) -> None:
    async with AlsClient(sink.grpc_port) as client:
        await client.send(message(*rows, node_id="edge-1"))


async def test_alerts_about_rows_fire_with_the_first_row(command: str, tmp_path: Path) -> None:
    async with scraped(command, tmp_path) as (_, sink, prometheus):

        async def all_work() -> bool:  # groups are evaluated one after the other
            return {rule["health"] for rule in await prometheus.rules()} == {"ok"}

        await eventually(all_work, "every rule can be evaluated", why=prometheus.said, poll_s=0.2)
        alerts = {rule["name"] for rule in await prometheus.rules() if rule["type"] == "alerting"}
        assert alerts == prometheus.alerts.keys()
        alpha = {"project_name": "alpha"}
        await send(
            sink,
            http_row(start_ns=now_ns(), route="httproute/ns-a/web/rule/0"),
            http_row(tags=alpha, start_ns=now_ns(), type=DOWNSTREAM_PERIODIC, duration_ns=None),
            http_row(tags=alpha, start_ns=now_ns(), wire=(1 << 60, 0)),
            http_row(tags=alpha, start_ns=now_ns() + 3_600_000_000_000),
        )
        fired = await prometheus.until(
            "ProxyUsageSingleSink",
            "ProxyUsageUnattributed",
            "ProxyUsageMisroutedRows",
            "ProxyUsageInvalidRows",
            "ProxyUsageClockSkew",
        )
        told = fired["ProxyUsageUnattributed"]
        assert told["summary"] == f"127.0.0.1:{sink.http_port} holds usage that nobody pays (no_tenant)."
        assert told["runbook_url"] == "docs/runbook.md#proxyusageunattributed"


async def test_alerts_about_delivery_fire_and_end(command: str, tmp_path: Path) -> None:
    async with scraped(command, tmp_path) as (billing, sink, prometheus):
        billing.faults = Faults(drop_tenants=["bravo"])
        await send(sink, http_row(tags={"project_name": "bravo"}, start_ns=now_ns()))
        await prometheus.until("ProxyUsageSingleSink", "ProxyUsageDeadLetters")

        billing.token = "changed"
        await send(sink, http_row(tags={"project_name": "alpha"}, start_ns=now_ns()))
        await prometheus.until("ProxyUsageSingleSink", "ProxyUsageDeadLetters", "ProxyUsageOutputPaused")

        # What the runbook says to do, and how it says that they end.
        billing.token, billing.faults = None, Faults()
        await prometheus.until("ProxyUsageSingleSink", "ProxyUsageDeadLetters")
        replayed = await sink.cli("deadletters", "replay", "--reason", "not_accepted")
        assert replayed.status == 0, replayed.said
        await prometheus.until("ProxyUsageSingleSink")

        await sink.kill()
        await prometheus.until("ProxyUsageDown")


async def test_what_a_real_envoy_says_it_wrote_is_what_is_read(command: str, tmp_path: Path) -> None:
    """The names that the rules read, and that both sides of their comparison mean the same rows."""
    async with World(tmp_path, tenants=2) as world:
        ports = {"proxy-usage": world.sink.http_port, "envoy": world.envoy.admin_port}
        async with Prometheus(command, tmp_path / "prometheus", ports) as prometheus:
            await world.send(300)
            await world.equal()
            # TCP rows, such as the listener's, are in no counter of Envoy's.
            tcp = 'sum(proxy_usage_entries_skipped_total{reason="listener"})'
            read = f"sum(proxy_usage_entries_read_total) - {tcp}"

            async def same() -> bool:
                written = await prometheus.value(f"sum({WRITTEN})")
                return written is not None and written >= 300 and written == await prometheus.value(read)

            await eventually(same, "written is read", why=prometheus.said, poll_s=0.3)
            # What is recorded of both sides, TCP rows included, is what the program says it received.
            received = world.sink.read()

            async def agree() -> bool:
                sides = ("envoy_entries_flushed", "entries_received")
                values = [await prometheus.value(f"proxy_usage:{side}:sum") for side in sides]
                return values == [received, received] and received == world.sink.read()

            await eventually(agree, "both sides are recorded", why=prometheus.said, poll_s=0.3)

            async def none_dropped() -> bool:  # for a moment after a scrape that failed there is no value
                return await prometheus.value(f"sum({DROPPED})") == 0

            await eventually(none_dropped, "Envoy dropped nothing", why=prometheus.said, poll_s=0.3)
            assert not {"ProxyUsageEntriesMissing", "ProxyUsageEnvoyDropsRows"} & set(
                await prometheus.firing()
            )
