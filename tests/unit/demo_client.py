"""A faultless event and a client for the billing stand-in, for the tests of both."""

from __future__ import annotations

import json
from typing import Any

import aiohttp

from proxy_usage.demo.billing import BATCH, BillingStandIn
from proxy_usage.demo.checks import DIMENSIONS, METERS

ULIDS = [f"01K38Z6N5T{number:016d}" for number in range(200)]


def event(number: int = 0, **changes: Any) -> dict[str, Any]:
    """A faultless event; ``changes`` replace attributes, and the value ``...`` removes one."""
    made = {
        "specversion": "1.0",
        "id": ULIDS[number],
        "type": METERS[0],
        "source": "//networking.datumapis.com/gateway",
        "subject": "projects/alpha",
        "time": "2026-08-22T10:14:59.999Z",
        "datacontenttype": "application/json",
        "data": {"value": "42", "dimensions": dict.fromkeys(DIMENSIONS, "")},
    } | changes
    return {name: value for name, value in made.items() if value is not ...}


def data(value: Any, **more: Any) -> dict[str, Any]:
    return {"value": value, "dimensions": dict.fromkeys(DIMENSIONS, ""), **more}


class Client:
    def __init__(self, session: aiohttp.ClientSession, billing: BillingStandIn) -> None:
        self.session, self.billing = session, billing

    async def send(self, body: Any, path: str = BATCH, **options: Any) -> tuple[int, Any]:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        url = self.billing.base + path
        async with self.session.post(url, data=raw, allow_redirects=False, **options) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if "json" in answer.content_type else text
