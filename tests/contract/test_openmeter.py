"""One event for two receivers: the billing endpoint's stand-in, and a peer that takes what OpenMeter takes.

OpenMeter compares the media type exactly, asks for id, source, specversion, type and subject, dates with
``time``, tells duplicates by (source, id), and refuses a batch whole for one bad event.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import aiohttp
import pytest
from aiohttp import web
from couriers import PATIENCE_S, running
from money import DIMENSIONS, METERS, SOURCE, Store

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.listener import Listener
from proxy_usage.service.build import clock_ms
from proxy_usage.service.couriers import build_policy, build_sender

BATCH, SINGLE = "application/cloudevents-batch+json", "application/cloudevents+json"


class OpenMeterPeer:
    """``POST /api/v1/events`` as OpenMeter has it. ``success`` is the status of a request it takes."""

    def __init__(self, token: str) -> None:
        self.success = 204
        self.poisoned: set[str] = set()
        """Ids of events it finds bad."""
        self.stored: dict[tuple[str, str], bytes] = {}
        self.requests: list[list[str]] = []
        self._token = token
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/api/v1/events", self._events)
        self._listener = Listener(app, "127.0.0.1", 0)

    @property
    def url(self) -> str:
        return f"{self._listener.base}/api/v1/events"

    async def __aenter__(self) -> Self:
        await self._listener.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._listener.stop()

    async def _events(self, request: web.Request) -> web.Response:
        if not hmac.compare_digest(request.headers.get("Authorization", ""), f"Bearer {self._token}"):
            return problem(401, "unauthorized")
        raw, kind = await request.read(), request.headers["Content-Type"]
        found = json.loads(raw)
        if kind not in (BATCH, SINGLE) or isinstance(found, list) is not (kind == BATCH):
            return problem(400, f"content type {kind!r}")
        events: list[dict[str, Any]] = found if isinstance(found, list) else [found]
        self.requests.append([str(event.get("id")) for event in events])
        for event in events:
            if fault := self._fault(event):
                return problem(400, fault)
        for event in events:
            key = event["source"], event["id"]
            body = json.dumps(event).encode()
            assert self.stored.setdefault(key, body) == body, "one key, two events"
        return web.Response(status=self.success)

    def _fault(self, event: dict[str, Any]) -> str:
        for name in ("id", "source", "specversion", "type", "subject"):
            if not isinstance(event.get(name), str) or not event[name]:
                return f"{name} is missing"
        if event.get("datacontenttype") not in (None, "application/json"):
            return "datacontenttype"
        if not isinstance(event.get("data"), dict) or not re.fullmatch(r"[1-9]\d*", event["data"]["value"]):
            return "data"
        assert datetime.fromisoformat(event["time"]).utcoffset() is not None  # else it would be dated now
        return "bad" if event["id"] in self.poisoned else ""


def problem(status: int, detail: str) -> web.Response:
    return web.json_response(
        {"status": status, "detail": detail}, status=status, content_type="application/problem+json"
    )


def outputs(peer: OpenMeterPeer, billing: BillingStandIn, token: Path, **settings: Any) -> list[OutputConfig]:
    common = {"token_file": token, "retry": {"initial": 1, "max": 8}}
    meter = {"name": "openmeter", "format": "cloudevents", "url": peer.url, **common, **settings}
    bill = {"name": "billing", "format": "billing", "url": billing.url, **common}
    return [OutputConfig.model_validate(meter), OutputConfig.model_validate(bill)]


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("t0ken\n")
    return path


@pytest.mark.parametrize("success", [200, 202, 204])
async def test_the_same_bytes_suit_both(tmp_path: Path, token: Path, success: int) -> None:
    arrived = Arrived(types=[meter.type for meter in METERS], dimensions=DIMENSIONS)
    async with OpenMeterPeer("t0ken") as peer, BillingStandIn(token="t0ken", arrived=arrived) as billing:
        peer.success = success
        async with running(tmp_path, outputs(peer, billing, token)) as one:
            ids = one.store.add("alpha", "bravo", "alpha", now_ms=clock_ms())
            await one.until("openmeter", delivered=3)
            await one.until("billing", delivered=3)
        assert list(peer.stored) == [(SOURCE, id_) for id_ in ids]
        assert billing.arrived.violations == []
        assert list(billing.arrived.stored) == ids
        for (_, id_), body in peer.stored.items():
            assert json.loads(billing.arrived.stored[id_].raw) == json.loads(body)


async def test_the_billing_endpoint_takes_the_content_type_of_a_batch(tmp_path: Path, token: Path) -> None:
    """The other direction: what is sent to OpenMeter, sent to the billing endpoint as it stands."""
    with Store(tmp_path) as store:
        store.add("alpha", "bravo", now_ms=clock_ms())
        events = store.batch(now_ms=clock_ms(), events=10).events
    async with OpenMeterPeer("t0ken") as peer, BillingStandIn(token="t0ken") as billing:
        (openmeter, _) = outputs(peer, billing, token)
        moved = openmeter.model_copy(update={"url": billing.url})
        sender = build_sender(moved, 60_000, build_policy(moved))
        assert sender is not None
        async with sender:
            await sender.send(events)
        assert set(billing.arrived.stored) == {event.id for event in events}


async def test_one_bad_event_is_found_by_splitting_and_the_others_arrive(tmp_path: Path, token: Path) -> None:
    async with OpenMeterPeer("t0ken") as peer, BillingStandIn(token="t0ken") as billing:
        async with running(tmp_path, outputs(peer, billing, token)) as one:
            ids = one.store.add(*(f"t{n}" for n in range(16)), now_ms=clock_ms())
            peer.poisoned = {ids[5]}
            for courier in one.couriers:
                courier.notify()
            await one.until("openmeter", delivered=15, dead=1)
            await one.until("billing", delivered=16)
            (letter,) = await one.thread.run(one.store.rows, "SELECT reason, answer FROM dead")
        assert letter[0] == "refused"
        assert "bad" in letter[1]
        assert set(ids) - {id_ for _, id_ in peer.stored} == {ids[5]}
        assert sum(len(sent) == 16 for sent in peer.requests) == 1


async def test_one_event_a_request_where_the_content_type_says_so(tmp_path: Path, token: Path) -> None:
    async with OpenMeterPeer("t0ken") as peer, BillingStandIn(token="t0ken") as billing:
        configured = outputs(peer, billing, token, content_type=SINGLE, batch={"events": 1})
        async with running(tmp_path, configured) as one:
            one.store.add("alpha", "bravo", now_ms=clock_ms())
            await one.until("openmeter", delivered=2)
        assert [len(sent) for sent in peer.requests] == [1, 1]


async def test_a_retry_sends_the_same_key_and_is_stored_once(tmp_path: Path, token: Path) -> None:
    """Answers are lost after the events were stored: (source, id) and the body are the same again."""
    async with OpenMeterPeer("t0ken") as peer, BillingStandIn(token="t0ken") as billing:
        peer.success = 503
        async with running(tmp_path, outputs(peer, billing, token)) as one:
            ids = one.store.add("alpha", "bravo", now_ms=clock_ms())
            async with asyncio.timeout(PATIENCE_S):
                while len(peer.requests) < 3:
                    await asyncio.sleep(0.005)
            peer.success = 204
            await one.until("openmeter", delivered=2)
        assert {id_ for _, id_ in peer.stored} == set(ids)
        assert {source for source, _ in peer.stored} == {SOURCE}


async def test_the_peer_refuses_parameters_of_the_media_type() -> None:
    """So that a test above could fail."""
    async with OpenMeterPeer("t0ken") as peer, aiohttp.ClientSession() as session:
        headers = {"Authorization": "Bearer t0ken", "Content-Type": f"{BATCH}; charset=utf-8"}
        async with session.post(peer.url, data=b"[]", headers=headers) as answer:
            assert answer.status == 400
