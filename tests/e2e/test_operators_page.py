"""The operator's page in a real browser, on a real sink: every state is brought about, not pretended.

Pictures of each go to where SCREENSHOTS says (`make screenshots`); else they are thrown away.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from browser import TIMEOUT_MS, Browser, View
from envoy.data.accesslog.v3.accesslog_pb2 import HTTPAccessLogEntry
from harness import AlsClient
from playwright.async_api import expect
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.metrics import Metrics
from proxy_usage.page.document import document
from proxy_usage.page.ring import History
from proxy_usage.page.snapshot import NodeAudit, NodeFigures, Snapshot, StoreFigures
from proxy_usage.web import Health, Web

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

NAMED = {"listen": {"http_tenants": True}}
PICTURES = os.environ.get("SCREENSHOTS")
TRAFFIC_S = 120 if PICTURES else 0
"""For pictures there is a while of traffic, so that there is something to be seen."""
OUTPUT_PROBLEM = re.compile("Output billing (delivers nothing|is paused)")
LISTEN = """() => {
  globalThis.heard = 0;
  const listener = new MutationObserver((changes) => { heard += changes.length; });
  for (const region of document.querySelectorAll("[role=status], [aria-live]"))
    listener.observe(region, {childList: true, characterData: true, subtree: true});
}"""
HOSTILE = "<img src=x onerror=alert(1)>\u202egnp.exe\u0000\u200b"
LONG = "x" * 4_096


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Browser]:
    pictures = Path(PICTURES) if PICTURES else tmp_path_factory.mktemp("pictures")
    async with Browser(pictures) as opened:
        yield opened


def rows(count: int, tenant: str = "", size: int = 100) -> bytes:
    """A message of finished requests; without ``tenant`` of several."""
    started = time.time_ns() - 900_000_000
    return message(
        *(
            http_row(
                start_ns=started,
                duration_ns=800_000_000,
                tags={
                    "project_name": tenant
                    or f"{('web', 'shop', 'api', 'media', 'docs')[number % 5]}-{number % 7}"
                },
                wire=(size + number, 12 * size * (1 + number % 5)),
                route="httproute/ns-a/web/rule/0/match/0/a",
            )
            for number in range(count)
        ),
        node_id=f"envoy-{'ab'[count % 2]}",
    )


async def send(client: AlsClient, *messages: bytes) -> None:
    """Each on a stream of its own: a stream is one node's."""
    for one in messages:
        await client.send(one)


async def traffic(client: AlsClient, seconds: int) -> None:
    """A load that comes and goes."""
    for second in range(seconds):
        wave = abs((second * 7) % 120 - 60)
        await send(client, rows(40 + wave), rows(21 + wave // 2 * 2))
        await asyncio.sleep(1)


def url(sink: Sink) -> str:
    return f"http://127.0.0.1:{sink.http_port}/"


async def test_from_the_first_entry_to_the_last(tmp_path: Path, browser: Browser) -> None:
    """Nothing yet, all well, endpoint down, paused, dead letters and unattributed usage, stopping, gone."""
    async with (
        BillingStandIn() as billing,
        Sink(tmp_path, url=billing.url, settings=NAMED) as sink,
        AlsClient(sink.grpc_port) as client,
    ):
        view = await browser.open(url(sink))
        await view.says("Nothing has arrived yet")
        await view.shows("Nothing yet: what comes next", f"127.0.0.1:{sink.grpc_port}")
        await view.shows("Dead letters", "None.")
        await view.inspect("nothing-yet")

        await send(client, rows(35), rows(14))
        await traffic(client, TRAFFIC_S)
        await _all_is_well(view, sink)

        billing.faults = Faults(always=Fault.UNAVAILABLE)
        await client.send(rows(35))
        await traffic(client, TRAFFIC_S // 4)
        await view.says("Output billing delivers nothing: the endpoint reports an error of its own")
        problem = view.page.get_by_role("listitem").filter(has_text=OUTPUT_PROBLEM)
        await expect(problem).to_contain_text("since ")
        await expect(problem).to_contain_text("events wait, and go with the bytes they have")
        await expect(problem).to_contain_text("See whether the endpoint runs")
        await view.inspect("endpoint-down")

        billing.faults = Faults(always=Fault.UNAUTHENTICATED)
        await view.says("Output billing is paused: unauthorized")
        await view.shows("What is wrong, and what to do", "Renew the token file; it is read again by itself.")
        await view.inspect("paused")

        billing.faults = Faults(reject_tenants=["refused-one"])
        await client.send(rows(3, "refused-one"), rows(2, HOSTILE), rows(2, LONG), rows(3))
        await view.shows(
            "Dead letters", "deadletters replay --output billing --reason", "Once the cause is mended"
        )
        await view.shows("Unattributed usage", "unattributed replay --reason invalid_tenant", "Entries")
        await expect(problem).to_have_count(0)  # the output works again by itself
        await _hostile_names_are_harmless(view)
        await view.inspect("to-be-decided")
        await view.part("Unattributed usage", "unattributed")
        await _a_command_stays_selected(view, client)

        billing.faults = Faults(always=Fault.HANG, times=99)
        await client.send(rows(4))
        await eventually(lambda: billing.faults.times != 99, "a request is under way", why=sink.said)
        sink.send_signal(signal.SIGTERM)
        await view.says("The sink is stopping")
        await view.shows("What is wrong, and what to do", "leave it be")
        await view.inspect("stopping", leaving=True)
        await sink.kill()
        await view.page.get_by_text("No answer for").wait_for(timeout=TIMEOUT_MS)
        await expect(view.page.get_by_role("status").first).to_contain_text("Figures are of")
        await view.picture("gone")
        assert all("net::ERR_" in text for text in view.complaints), view.complaints


async def _all_is_well(view: View, sink: Sink) -> None:
    await view.says("All is well")
    await expect(view.section("What is wrong, and what to do")).to_have_count(0)
    await view.shows("What goes out", "billing", "works", "delivered")
    table = view.section("What comes in, by node").get_by_role("table")
    await expect(table.get_by_role("rowheader")).to_have_text(["envoy-a", "envoy-b"])
    await view.shows("Who uses most", "Requests", "web-0", "Bytes out")
    await view.shows("The last hour", "Entries in", "per second", "highest")
    await view.shows("The last seven days", "Events made", "highest")
    await view.shows("Completeness", "No audit is set up", "docs/audit.md")
    await view.shows("Configuration", "listen.http", f"127.0.0.1:{sink.http_port}", "version")
    await view.shows("Store", "room used", str(sink.store))
    await view.inspect("all-well")
    await view.part("Who uses most", "tenants")
    await view.page.evaluate(LISTEN)
    for _ in range(2):
        async with view.page.expect_response("**/api/state"):
            pass
    assert await view.page.evaluate("heard") == 0, "screen readers are not told what did not change"
    paused = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    asked: list[str] = []
    view.page.on("request", lambda request: asked.append(request.url))
    await view.page.evaluate(paused % "true" + tell)
    await view.page.wait_for_timeout(1_000)  # what it had asked by then is told of later
    asked.clear()
    await view.page.wait_for_timeout(4_000)  # longer than the page waits between two questions
    assert asked == [], "a page that nobody sees asks nothing"
    await view.page.evaluate(paused % "false" + tell)
    await eventually(lambda: asked, "a page that is seen again asks at once")


async def _hostile_names_are_harmless(view: View) -> None:
    held = view.section("Unattributed usage")
    shown = held.get_by_role("rowheader").filter(has_text="<img src=x onerror=alert(1)>")
    await expect(shown.first).to_contain_text("\\u202egnp.exe\\x00\\u200b")
    assert await view.page.locator("img").count() == 0
    await expect(held.get_by_role("rowheader").filter(has_text="(4096 characters)").first).to_be_visible()
    isolated = await shown.first.locator("bdi").evaluate("one => getComputedStyle(one).unicodeBidi")
    assert "isolate" in isolated
    command = held.locator("pre").first
    await command.focus()
    selected = await view.page.evaluate("getSelection().toString()")
    assert selected.startswith("proxy-usage unattributed replay --reason "), "ready to be copied"


async def _a_command_stays_selected(view: View, client: AlsClient) -> None:
    """However the figures beside it change, what is about to be copied does not go away."""
    held = view.section("Unattributed usage")
    before = await held.inner_text()
    await held.locator("pre").first.focus()
    await client.send(rows(5, HOSTILE))
    problem = view.page.get_by_role("listitem").filter(has_text="no tenant")
    await expect(problem).to_contain_text("9 entries")
    assert await held.inner_text() == before
    assert await view.page.evaluate("getSelection().toString()") != ""
    await view.page.evaluate("document.activeElement.blur()")
    await expect(held).not_to_have_text(before)


async def test_a_store_that_fills_up(tmp_path: Path, browser: Browser) -> None:
    settings = {"store": {"max_bytes": "1MiB", "ledger_max_bytes": "100KiB"}}
    async with (
        BillingStandIn() as billing,
        Sink(tmp_path, url=billing.url, settings=settings) as sink,
        AlsClient(sink.grpc_port) as client,
    ):
        billing.faults = Faults(always=Fault.UNAVAILABLE)
        view = await browser.open(url(sink))
        sent = 0

        async def more(count: int) -> None:
            nonlocal sent
            tenants = range(sent, sent + count)
            await client.send(message(*(_row(f"acme-{number}") for number in tenants), node_id="envoy-a"))
            sent += count

        async def nearly_full() -> bool:
            await more(5)
            metrics = await sink.metrics()
            return metrics['store_bytes{part="used"}'] * 100 >= metrics["store_room_bytes"] * 81

        async def full() -> bool:
            await more(50)
            return "store" in await sink.reasons()

        await eventually(nearly_full, "most of the room is used", why=sink.said, poll_s=0.2)
        await view.says("The store is nearly full")
        await view.shows("What is wrong, and what to do", "raise store.max_bytes", "ProxyUsageQueueFilling")
        await view.inspect("nearly-full")
        await eventually(full, "readiness names the store", why=sink.said, poll_s=0.3)
        await view.says("The store takes nothing more")
        await view.shows("What is wrong, and what to do", "Do not restart it", "counting goes on in memory")
        await view.inspect("full")
        shown = await view.page.content()
        assert "acme-" not in shown, "tenants are not named unless it is allowed"
        assert "Tenants are not named here" in shown


def _row(tenant: str) -> HTTPAccessLogEntry:
    return http_row(start_ns=time.time_ns() - 2_000_000, tags={"project_name": tenant}, wire=(10, 100))


async def test_entries_that_a_kill_cost(tmp_path: Path, browser: Browser) -> None:
    settings = NAMED | {"windows": {"length": "1h", "checkpoint": "1h"}}
    async with BillingStandIn() as billing, Sink(tmp_path, url=billing.url, settings=settings) as sink:
        async with AlsClient(sink.grpc_port) as client:
            await send(client, rows(7), rows(6))
        await sink.kill()
        sink.document["windows"]["checkpoint"] = "250ms"
        await sink.start()
        view = await browser.open(url(sink))
        await view.says("Entries are missing: the process before this one was killed and lost 13 entries")
        await view.shows("What is wrong, and what to do", "cannot be brought back", "kill -9")
        await view.shows("Completeness", "Lost by crashes of this sink", "envoy-a", "envoy-b")
        await view.inspect("entries-missing")


class Fixed:
    """A page of one snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def state(self, *, tenants: bool) -> bytes:
        return json.dumps(document(self.snapshot, tenants=tenants)).encode()


class Token:
    def token(self) -> str:
        return "s3cret"


async def test_what_an_audit_found_and_the_token(browser: Browser) -> None:
    """The page itself and the port are real; the audit's result is given."""
    now_ms = time.time_ns() // 1_000_000
    audit = (
        NodeAudit("envoy-a", "complete", now_ms - 3_600_000, 90_000, 0, 90_000, 90_000, 0, 0),
        NodeAudit("envoy-b", "missing", now_ms - 3_600_000, 50_000, 10, 49_990, 48_426, 1_564, 0),
        NodeAudit("envoy-c", "unknown", now_ms - 3_600_000, None, None, None, 12, None, None),
    )
    snapshot = Snapshot(
        now_ms=now_ms,
        started_ms=now_ms - 7_200_000,
        version="0.0",
        host="sink-0",
        config_file="/etc/proxy-usage.yaml",
        settings=(),
        reasons={},
        store=StoreFigures("usage.db"),
        figures_ms=now_ms,
        nodes=tuple(NodeFigures(one.node, one.received or 0, 60) for one in audit),
        minute_ms=60_000,
        audit=audit,
        history=History(now_ms, {"entries": (5, None, 7)}),
    )
    web = Web(
        "127.0.0.1",
        0,
        metrics=Metrics(),
        health=lambda: Health(True, {}),
        refresh=lambda: None,
        token=Token(),
        page=Fixed(snapshot),
    )
    port = await web.start()
    try:
        view = await browser.open(
            f"http://127.0.0.1:{port}/", http_credentials={"username": "any", "password": "s3cret"}
        )
        await view.says("Entries of envoy-b are missing: 1,564 of 49,990")
        table = view.section("Completeness").get_by_role("table")
        await expect(table.get_by_role("row")).to_have_text(
            [
                "NodeStateMissingOf",
                "envoy-bmissing1,56449,990",
                "envoy-cunknownunknownunknown",
                "envoy-acomplete090,000",
            ]
        )
        await view.inspect("audited")
    finally:
        await web.stop()
