"""What the service keeps for its page: since when a problem is there, and figures that grow old."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy_usage.config import Config, load_text
from proxy_usage.model import Cell, Key
from proxy_usage.service.build import clock_ms, open_storage
from proxy_usage.service.looking import Lookout, settings
from proxy_usage.service.service import Service

SECRET = "p4ssword"
SETTINGS = f"""
listen: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0", http_tenants: true}}
outputs:
- {{name: billing, url: "http://127.0.0.1:9/v1/usage/events:batchIngest?key={SECRET}"}}
- {{name: shadow, format: none}}
"""


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    config = load_text(
        f"{SETTINGS}store: {{path: {tmp_path}/usage.db}}", origin="test", base=tmp_path, env={}
    )

    def reload() -> Config:
        return config

    storage = open_storage(config)
    made = Service(config, storage, reload=reload, config_file=Path("made.yaml"))
    await made.start()
    page = made._stages["page"]  # it would look by itself, at moments of its own
    page.cancel()
    await asyncio.wait([page])
    yield made
    await made.drain()
    await made.end()
    storage.close()


def told(lookout: Lookout) -> dict[str, Any]:
    """The document, made anew."""
    document: dict[str, Any] = json.loads(json.dumps(lookout.document(tenants=True)))
    return document


async def test_figures_of_a_store_that_cannot_be_read_stay_and_say_how_old_they_are(service: Service) -> None:
    lookout, store = service._lookout, service.config.store.path
    await lookout._look(clock_ms())
    before = told(lookout)
    assert before["state"]["word"] == "waiting"
    away = store.rename(store.with_suffix(".away"))
    try:
        await lookout._look(clock_ms())
        after = told(lookout)
        (problem,) = after["problems"]
        assert (problem["key"], problem["level"]) == ("store unread", "warning")
        assert after["figures_ms"] == before["figures_ms"]
        assert [one["name"] for one in after["outputs"]] == ["billing", "shadow"]
        first_seen = problem["since_ms"]
        assert told(lookout)["problems"][0]["since_ms"] == first_seen, "it does not grow younger"
    finally:
        away.rename(store)
    await lookout._look(clock_ms())
    assert told(lookout)["problems"] == []


async def test_no_secret_of_the_configuration_is_shown(service: Service) -> None:
    await service._lookout._look(clock_ms())
    text = json.dumps(told(service._lookout))
    assert SECRET not in text
    assert "127.0.0.1:9" in text
    assert dict(settings(service.config))["outputs"] == "billing (billing), shadow (none)"


async def test_tenants_are_those_whose_windows_closed(service: Service) -> None:
    cell = Cell(1, 0, Key("acme", ()), 3, (3, 10, 20, 5 * 10**9))
    service._lookout.closed([cell], clock_ms())
    meters = told(service._lookout)["tenants"]["meters"]
    assert [(one["meter"], one["first"]) for one in meters] == [
        ("requests", [["acme", 3]]),
        ("ingress_bytes", [["acme", 10]]),
        ("egress_bytes", [["acme", 20]]),
        ("connection_seconds", [["acme", 5]]),
    ]


async def test_the_document_is_made_once_however_many_ask(service: Service) -> None:
    lookout = service._lookout
    now_ms = clock_ms()
    lookout._clock_ms = lambda: now_ms
    first = lookout.state(tenants=False)
    assert lookout.state(tenants=False) is first
    assert lookout.state(tenants=True) is not first
    now_ms += 1_000
    assert lookout.state(tenants=False) is not first
