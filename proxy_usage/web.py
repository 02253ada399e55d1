"""The read-only HTTP port: /healthz, /readyz, /metrics, /api/…. Nothing on it names a tenant.

A connection has ten seconds for each request, from its first byte, or its opening, to the end of its headers,
and thirty for the answer; what is slower, or one connection too many, is closed.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import msgspec
from aiohttp import web

from proxy_usage.errors import ListenError

MAX_CONNECTIONS = 64
MAX_LINE = 4_096
"""Bytes of a request's first line, and of each header."""
REQUEST_S = 10.0
ANSWER_S = 30.0
OPEN_TO_ALL = frozenset({"/healthz", "/readyz"})
"""Asked by probes, which carry no token."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Health:
    """What the service says of itself."""

    alive: bool
    """False: restart the process."""
    reasons: Mapping[str, str]
    """Why it is not ready, by short name; empty when it is."""


class Token(Protocol):
    """A bearer token that may change."""

    def token(self) -> str:
        """The present token; empty when there is none, and then nobody has it."""
        ...


class Exposition(Protocol):
    """What there is to scrape."""

    def exposition(self) -> bytes:
        """The text."""
        ...


class Web:
    """The HTTP listener.

    Args:
        health: asked at each request.
        refresh: brings the gauges up to date before a scrape.
        token: what clients must send as a bearer token; None: nothing.
        api: what further paths answer with, as JSON; None: nobody can say now.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        metrics: Exposition,
        health: Callable[[], Health],
        refresh: Callable[[], Awaitable[None] | None],
        token: Token | None = None,
        api: Mapping[str, Callable[[], object | Awaitable[object]]] = MappingProxyType({}),
        request_s: float = REQUEST_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.port = port
        self.token = token
        self._host = host
        self._metrics = metrics
        self._health = health
        self._refresh = refresh
        self._api = api
        self._limits = {False: request_s, True: answer_s}
        self._runner: web.AppRunner | None = None
        self._since: dict[object, tuple[bool, float]] = {}  # connection: whether it is answered, since when
        self.guard: asyncio.Task[None] | None = None
        """Closes connections that take too long, while the port is open."""

    async def start(self) -> int:
        """Listens. Returns the port, also where 0 was asked for.

        Raises:
            ListenError: the address cannot be bound.
        """
        app = web.Application(client_max_size=1 << 16, middlewares=[self._guard])
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._scrape)
        for path in self._api:
            app.router.add_get(path, self._tell)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            keepalive_timeout=REQUEST_S,
            lingering_time=0,
            max_line_size=MAX_LINE,
            max_field_size=MAX_LINE,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self.port, reuse_port=False)
        try:
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise ListenError(
                f"cannot listen on {self._host}:{self.port}: {_why(error)}",
                hint="perhaps another process has the port: change listen.http or stop it",
            ) from None
        self.port = self._runner.addresses[0][1]
        self.guard = asyncio.create_task(self._sweep(), name="http port")
        return self.port

    async def stop(self) -> None:
        """Stops listening."""
        if self.guard is not None:
            self.guard.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _sweep(self) -> None:
        """Closes connections that take too long, and the newest of too many."""
        interval_s = min(1.0, *self._limits.values())
        while True:
            await asyncio.sleep(interval_s)
            assert self._runner is not None
            assert self._runner.server is not None
            now = time.monotonic()
            opened = self._runner.server.connections
            self._since = {one: self._since.get(one, (False, now)) for one in opened}
            oldest_first = sorted(opened, key=lambda one: self._since[one][1])
            for number, connection in enumerate(oldest_first):
                answered, since = self._since[connection]
                if number >= MAX_CONNECTIONS or now - since > self._limits[answered]:
                    transport = connection.transport
                    connection.force_close()
                    if transport is not None:
                        transport.abort()  # closing would wait until what was said is read

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        self._since[request.protocol] = (True, time.monotonic())
        try:
            if self.token is not None and request.path not in OPEN_TO_ALL and not self._knows(request):
                return web.Response(
                    status=401, text="a bearer token is required\n", headers={"WWW-Authenticate": "Bearer"}
                )
            response = await handler(request)
            response.headers["X-Content-Type-Options"] = "nosniff"
            await response.prepare(request)
            await response.write_eof()
        finally:
            self._since[request.protocol] = (False, time.monotonic())
        return response

    def _knows(self, request: web.Request) -> bool:
        wanted = self.token.token() if self.token is not None else ""
        given = request.headers.get("Authorization", "")
        return bool(wanted) and hmac.compare_digest(
            given.encode(errors="replace"), f"Bearer {wanted}".encode()
        )

    async def _healthz(self, _request: web.Request) -> web.Response:
        alive = self._health().alive
        return web.json_response({"alive": alive}, status=200 if alive else 503)

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = dict(self._health().reasons)
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def _tell(self, request: web.Request) -> web.Response:
        answer = self._api[request.path]()
        if inspect.isawaitable(answer):
            answer = await answer
        if answer is None:
            return web.json_response({"error": "a worker does not answer"}, status=503)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _scrape(self, _request: web.Request) -> web.Response:
        if (gathering := self._refresh()) is not None:
            await gathering
        return web.Response(
            body=self._metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )


def _why(error: OSError) -> str:
    """asyncio puts a sentence with the address in it where the system's own words would be."""
    return os.strerror(error.errno) if error.errno else str(error)
