"""The read-only HTTP port: /healthz, /readyz, /metrics, the operator's page with /api/state, and what
audits ask for, /api/….

Nothing on it names a tenant but /api/state, and that only where it is allowed and the reader is known: by the
token, or because both ends are on this machine.

A connection has ten seconds for each request, from its first byte, or its opening, to the end of its headers,
and thirty for the answer; what is slower, or one connection too many, is closed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import errno
import hmac
import inspect
import ipaddress
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from proxy_usage.errors import ListenError
from proxy_usage.page.assets import assets

MAX_CONNECTIONS = 64
MAX_LINE = 4_096
"""Bytes of a request's first line, and of each header."""
REQUEST_S = 10.0
ANSWER_S = 30.0
OPEN_TO_ALL = frozenset({"/healthz", "/readyz"})
"""Asked by probes, which carry no token."""
WORTH_PACKING = 1_024
"""Bytes from which on an answer is compressed for those who take it so."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Of every answer: no script but the page's own runs, and nothing is asked of anybody else."""

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


class Page(Protocol):
    """What the operator's page shows."""

    def state(self, *, tenants: bool) -> bytes | Awaitable[bytes]:
        """One JSON document. ``tenants``: it may name them."""
        ...


class Web:
    """The HTTP listener.

    Args:
        health: asked at each request.
        refresh: brings the gauges up to date before a scrape.
        token: what clients must send as a bearer token, or browsers as a password; None: nothing.
        page: what is at / and /api/state; None: nothing.
        tenants: the page may name tenants, to those who have the token, or are on this machine.
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
        page: Page | None = None,
        tenants: bool = False,
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
        self._page = page
        self._tenants = tenants
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
        if self._page is not None:
            app.router.add_get("/api/state", self._state)
            for path in assets():
                app.router.add_get(path, self._file)
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
                hint="another process has the port: stop it, or change listen.http"
                if error.errno == errno.EADDRINUSE
                else "listen.http must name an address of this machine"
                if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror)
                else "this user may not listen there: use a port from 1024 on"
                if error.errno in (errno.EACCES, errno.EPERM)
                else "change listen.http",
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
                response: web.StreamResponse = web.Response(
                    status=401,
                    text="a bearer token is required; a browser may give it as a password, with any name\n",
                )
                response.headers.add("WWW-Authenticate", "Bearer")
                response.headers.add("WWW-Authenticate", 'Basic realm="proxy-usage", charset="UTF-8"')
                response.headers.update(HEADERS)
                return response
            response = await handler(request)
            response.headers.update(HEADERS)
            await response.prepare(request)
            await response.write_eof()
        finally:
            self._since[request.protocol] = (False, time.monotonic())
        return response

    def _knows(self, request: web.Request) -> bool:
        wanted = self.token.token() if self.token is not None else ""
        given = _given(request.headers.get("Authorization", ""))
        return bool(wanted) and hmac.compare_digest(given, wanted.encode())

    async def _healthz(self, _request: web.Request) -> web.Response:
        alive = self._health().alive
        return web.json_response({"alive": alive}, status=200 if alive else 503)

    async def _readyz(self, _request: web.Request) -> web.Response:
        reasons = dict(self._health().reasons)
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def _file(self, request: web.Request) -> web.Response:
        asset = assets()[request.path]
        tag = f'"{asset.tag}"'
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        if request.headers.get("If-None-Match") == tag:
            return web.Response(status=304, headers=headers)
        response = web.Response(body=asset.body, content_type=asset.type, charset="utf-8", headers=headers)
        if len(asset.body) > WORTH_PACKING:
            response.enable_compression()
        return response

    async def _state(self, request: web.Request) -> web.Response:
        assert self._page is not None, "the route is there with the page alone"
        named = self._tenants and (self.token is not None or _local(request))
        made = self._page.state(tenants=named)
        response = web.Response(
            body=made if isinstance(made, bytes) else await made,
            content_type="application/json",
            headers={"Cache-Control": "no-store"},
        )
        response.enable_compression()
        return response

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


def _given(header: str) -> bytes:
    """The token in an Authorization header: a bearer's, or a password with whatever name. Empty: none."""
    scheme, _, value = header.partition(" ")
    if scheme == "Bearer":
        return value.encode(errors="replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _local(request: web.Request) -> bool:
    """Whether the reader is on this machine, and meant to ask it.

    A page of somebody else's that has its own name resolve to 127.0.0.1 has a browser ask for that name.
    """
    try:
        host = urlsplit(f"//{request.host}").hostname or ""
        name_is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
        return name_is_local and ipaddress.ip_address(request.remote or "").is_loopback
    except ValueError:
        return False


def _why(error: OSError) -> str:
    """asyncio puts a sentence with the address in it where the system's own words would be."""
    if isinstance(error, socket.gaierror):  # its numbers are not the system's
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno else str(error)
