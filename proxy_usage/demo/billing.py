"""A strict stand-in for the billing endpoint, the usage ingestion gateway, over a real socket.

    POST /v1/usage/events              one CloudEvent
    POST /v1/usage/events:batchIngest  a JSON array of at most 100
    GET  /healthz, /sums, /violations; GET, PUT, DELETE /faults

It answers as the endpoint does, remembers what it stored, and shows faults on demand. Alone:
``python -m proxy_usage.demo.billing --listen 127.0.0.1:8080``.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import ssl
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.checks import Refusal, read
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.listener import Listener, serve_alone
from proxy_usage.errors import UsageError

SINGLE = "/v1/usage/events"
BATCH = "/v1/usage/events:batchIngest"
MAX_SINGLE_BYTES = 1 << 20
MAX_BATCH_BYTES = 100 << 20
MAX_BATCH_EVENTS = 100

_CODES = {
    Fault.REFUSE: (400, "INVALID_REQUEST"),
    Fault.UNAUTHENTICATED: (401, "UNAUTHENTICATED"),
    Fault.FORBIDDEN: (403, "PERMISSION_DENIED"),
    Fault.NOT_FOUND: (404, "NOT_FOUND"),
    Fault.TIMEOUT: (408, "DEADLINE_EXCEEDED"),
    Fault.TOO_LARGE: (413, "TOO_LARGE"),
    Fault.BUSY: (429, "RESOURCE_EXHAUSTED"),
    Fault.ERROR: (500, "INTERNAL"),
    Fault.UNAVAILABLE: (503, "UNAVAILABLE"),
}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Outcome(NamedTuple):
    """What became of the events of one request."""

    accepted: int
    rejected: list[Refusal]


class BillingStandIn:
    """The endpoint. ``async with BillingStandIn() as billing: … billing.url``.

    ``token``: bearer token that must be sent; may be changed while it runs, to rotate it.
    ``tls``: a server-side context; the URLs are then ``https``. ``port`` 0 takes a free one.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        faults: Faults | None = None,
        arrived: Arrived | None = None,
        clock_ms: Callable[[], int] = now_ms,
        max_batch_bytes: int = MAX_BATCH_BYTES,
    ) -> None:
        self.token = token
        self.faults = faults or Faults()
        self.arrived = arrived or Arrived()
        self.answers: Counter[str] = Counter()
        """Requests by what was answered: a status, or the name of a fault without one."""
        self.not_accepted = 0
        """Events left out of ``accepted`` without a word."""
        self._clock_ms = clock_ms
        self._max_batch_bytes = max_batch_bytes
        self._stopping = asyncio.Event()
        app = web.Application()
        app.router.add_post(SINGLE, self._single)
        app.router.add_post(BATCH, self._batch)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/sums", self._show_sums)
        app.router.add_get("/violations", self._show_violations)
        app.router.add_get("/faults", self._show_faults)
        app.router.add_put("/faults", self._put_faults)
        app.router.add_delete("/faults", self._delete_faults)
        self._listener = Listener(app, host, port, tls)

    async def __aenter__(self) -> BillingStandIn:
        self._stopping.clear()
        await self._listener.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopping.set()
        await self._listener.stop()

    @property
    def base(self) -> str:
        """``http://host:port``."""
        return self._listener.base

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def url(self) -> str:
        """Where batches are posted."""
        return self.base + BATCH

    @property
    def single_url(self) -> str:
        return self.base + SINGLE

    def sums(self) -> dict[tuple[str, str], int]:
        """(tenant, event type) → sum of values, each id once."""
        return self.arrived.sums()

    def by_route(self) -> dict[tuple[str, str, str], int]:
        """(tenant, route name, event type) → sum of values, each id once."""
        return self.arrived.by_route()

    @property
    def stored(self) -> dict[str, dict[str, Any]]:
        """Every stored event by its id, decoded."""
        return {id_: entry.event for id_, entry in self.arrived.stored.items()}

    # ── the endpoint ──

    async def _single(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, MAX_SINGLE_BYTES, single=True)

    async def _batch(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, self._max_batch_bytes, single=False)

    async def _serve(self, request: web.Request, limit: int, *, single: bool) -> web.StreamResponse:
        body = await _read_up_to(request, limit)
        if self.token is not None and not self._authenticated(request):
            return self._refuse(401, "UNAUTHENTICATED", "a valid bearer token is needed")
        fault = self.faults.decide()
        if fault in _CODES or fault in _WITHOUT_STORING:
            return await self._unstored(request, fault)
        if single:
            raws = [body]
        else:
            try:
                raws = [bytes(raw) for raw in msgspec.json.decode(body, type=list[msgspec.Raw])]
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                return self._refuse(400, "INVALID_REQUEST", f"not a JSON array: {error}")
            if len(raws) > MAX_BATCH_EVENTS:
                return self._refuse(400, "INVALID_REQUEST", f"{len(raws)} events, at most {MAX_BATCH_EVENTS}")
        if fault is Fault.MIDWAY:
            self._store(raws[: self.faults.cut(len(raws))], None)
            return self._refuse(429, "RESOURCE_EXHAUSTED", "the log is full", self.faults.retry_after)
        outcome = self._store(raws, fault)
        if fault is Fault.LOST:
            return self._abort(request, fault)
        if fault is Fault.LATE:
            await self._wait(self.faults.delay_ms)
        return self._answer(outcome, single=single)

    def _store(self, raws: list[bytes], fault: Fault | None) -> Outcome:
        """Checks and stores events in order, as the endpoint publishes them one by one."""
        picked = self.faults.pick(len(raws)) if fault in (Fault.REJECT, Fault.SHORT) else frozenset[int]()
        accepted, rejected = 0, []
        for index, raw in enumerate(raws):
            event = read(raw)
            if isinstance(event, Refusal):
                rejected.append(event)
                continue
            tenant = event["subject"].removeprefix("projects/")
            chosen = tenant in self.faults.reject_tenants or event["type"] in self.faults.reject_types
            if chosen or (index in picked and fault is Fault.REJECT):
                rejected.append(Refusal(event["id"], "INVALID_VALUE_TYPE", "refused on demand"))
            elif tenant in self.faults.drop_tenants or index in picked:
                self.not_accepted += 1
            else:
                self.arrived.add(raw, event, self._clock_ms())
                accepted += 1
        return Outcome(accepted, rejected)

    def _answer(self, outcome: Outcome, *, single: bool) -> web.Response:
        if single and outcome.rejected:
            return self._refuse(400, outcome.rejected[0].reason, outcome.rejected[0].detail)
        if not outcome.rejected:
            return self._json(200, {"accepted": outcome.accepted})
        rejected = [refusal._asdict() for refusal in outcome.rejected]
        return self._json(207, {"accepted": outcome.accepted, "rejected": rejected})

    async def _unstored(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        if fault in _CODES:
            status, code = _CODES[fault]
            return self._refuse(status, code, "on demand", self.faults.retry_after if status == 429 else None)
        if fault is Fault.REDIRECT:
            self.answers["302"] += 1
            return web.Response(status=302, headers={"Location": f"{self.base}/login"})
        if fault in (Fault.HTML, Fault.EMPTY):
            self.answers[fault] += 1
            page = "<!doctype html><title>Sign in</title>" if fault is Fault.HTML else None
            return web.Response(status=200, text=page, content_type="text/html")
        if fault is Fault.HANG:
            await self._stopping.wait()
        return self._abort(request, fault)

    def _authenticated(self, request: web.Request) -> bool:
        sent = request.headers.get("Authorization", "")
        return hmac.compare_digest(sent.encode(), f"Bearer {self.token}".encode())

    async def _wait(self, milliseconds: int) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), milliseconds / 1000)
        except TimeoutError:
            return

    def _refuse(self, status: int, code: str, message: str, retry_after: str | None = None) -> web.Response:
        headers = {"Retry-After": retry_after} if retry_after is not None else {}
        return self._json(status, {"code": code, "message": message}, headers)

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> web.Response:
        self.answers[str(status)] += 1
        return web.json_response(body, status=status, headers=headers)

    def _abort(self, request: web.Request, fault: Fault) -> web.Response:
        self.answers[fault] += 1
        if request.transport is not None:
            request.transport.abort()
        return web.Response()  # goes nowhere: the connection is gone

    # ── for people and other processes ──

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _show_sums(self, _: web.Request) -> web.Response:
        sums: dict[str, dict[str, int]] = {}
        for (tenant, type_), value in sorted(self.sums().items()):
            sums.setdefault(tenant, {})[type_] = value
        events, duplicates = len(self.arrived.stored) + self.arrived.forgotten, self.arrived.duplicates
        return web.json_response(
            {"events": events, "duplicates": duplicates, "answers": dict(self.answers), "sums": sums}
        )

    async def _show_violations(self, _: web.Request) -> web.Response:
        listed = [violation._asdict() for violation in self.arrived.violations]
        return web.json_response({"total": self.arrived.violations_total, "violations": listed})

    async def _show_faults(self, _: web.Request) -> web.Response:
        return web.json_response(self.faults.as_json())

    async def _put_faults(self, request: web.Request) -> web.Response:
        try:
            self.faults = Faults.from_json(msgspec.json.decode(await request.read()))
        except (UsageError, msgspec.DecodeError) as error:
            return web.json_response({"code": "INVALID_REQUEST", "message": str(error)}, status=400)
        return web.json_response(self.faults.as_json())

    async def _delete_faults(self, _: web.Request) -> web.Response:
        self.faults = Faults()
        return web.json_response(self.faults.as_json())


_WITHOUT_STORING = frozenset({Fault.REDIRECT, Fault.HTML, Fault.EMPTY, Fault.HANG, Fault.RESET})


async def _read_up_to(request: web.Request, limit: int) -> bytes:
    """The body, silently cut at ``limit`` bytes as the endpoint does: a cut body then fails to parse."""
    body = bytearray()
    async for chunk in request.content.iter_any():
        if len(body) < limit:
            body += chunk[: limit - len(body)]
    return bytes(body)


def main() -> None:
    """Runs the stand-in alone, until a signal."""
    parser = argparse.ArgumentParser(prog="proxy_usage.demo.billing", description=BillingStandIn.__doc__)
    parser.add_argument("--listen", default="127.0.0.1:8080", metavar="HOST:PORT")
    parser.add_argument("--token", help="bearer token that must be sent")
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")

    async def run() -> None:
        async with BillingStandIn(host=host, port=int(port), token=options.token) as billing:
            await serve_alone(f"billing stand-in at {billing.base}")

    asyncio.run(run())


if __name__ == "__main__":
    main()
