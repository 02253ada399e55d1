"""Asks Envoys and sinks by HTTP: a name may stand for many addresses, and each is asked."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import aiohttp
import msgspec

from proxy_usage.audit.exposition import WANTED, read_stats
from proxy_usage.audit.intake import Count, Received
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.figures import Sent

TIMEOUT_S = 5.0
MAX_STATS = 64 << 20
MAX_ADDRESSES = 1_000
"""Addresses of all names together."""
STATS = "/stats/prometheus"
INTAKE = "/api/intake"

Resolve = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Envoy:
    """One configured URL of Envoys' counters."""

    url: str
    node: str | None = None
    count: Count = "logs"
    managers: tuple[str, ...] = ()


class Place(NamedTuple):
    """A URL at one of the addresses that its host name stands for; "": at none, the name is not known."""

    url: str
    address: str

    @property
    def key(self) -> str:
        """Names it where it is stored and shown."""
        host = urlsplit(self.url).hostname
        return self.url if self.address in ("", host) else f"{self.url} at {self.address}"


class Asker:
    """An HTTP client with short patience. Use it as an async context manager.

    Args:
        token: for the other sinks.
        resolve: gives the addresses of a host name. Raises OSError where it has none.
    """

    def __init__(self, token: TokenFile | None = None, resolve: Resolve | None = None) -> None:
        self.token = token
        self._resolve = resolve or addresses
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Asker:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
            headers={"User-Agent": "proxy-usage"},
            cookie_jar=aiohttp.DummyCookieJar(),
            connector=aiohttp.TCPConnector(limit=64, force_close=True),  # a client that stays counts as one
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def places(self, urls: Iterable[str]) -> dict[str, tuple[Place, ...]]:
        """The addresses of each URL's host; none where the name is not known now."""
        found: dict[str, tuple[Place, ...]] = {}
        left = MAX_ADDRESSES
        for url in urls:
            try:
                known = await self._resolve(urlsplit(url).hostname or "")
            except OSError:
                known = []
            found[url] = tuple(Place(url, address) for address in known[:left])
            left -= len(found[url])
        return found

    async def stats(self, place: Place, envoy: Envoy) -> Sent | None:
        """An Envoy's counters; None: it does not answer, or not as an Envoy."""
        url = place.url if urlsplit(place.url).path.strip("/") else place.url.rstrip("/") + STATS
        if not urlsplit(url).query:
            url = f"{url}?filter={quote(WANTED, safe='')}"
        text = await self._get(place._replace(url=url))
        return None if text is None else read_stats(text, envoy.count, envoy.managers)

    async def node(self, place: Place) -> str | None:
        """The node id that Envoy's admin port tells; None where it is another port."""
        parts = urlsplit(place.url)
        text = await self._get(place._replace(url=urlunsplit((*parts[:2], "/server_info", "", ""))))
        try:
            node = json.loads(text or "{}")["node"]["id"]
        except (ValueError, KeyError, TypeError):
            return None
        return node if isinstance(node, str) and node else None

    async def intake(self, place: Place) -> tuple[Received, ...] | None:
        """What another sink received, or each of its workers; None: it does not answer, or not as a sink."""
        parts = urlsplit(place.url)
        token = {} if self.token is None else self.token.header()
        text = await self._get(place._replace(url=urlunsplit((*parts[:2], INTAKE, "", ""))), token)
        try:
            answer = None if text is None else msgspec.json.decode(text, type=Received | tuple[Received, ...])
        except msgspec.MsgspecError:
            return None
        return (answer,) if isinstance(answer, Received) else answer

    async def _get(self, place: Place, headers: dict[str, str] | None = None) -> str | None:
        assert self._session is not None
        parts = urlsplit(place.url)
        host = f"[{place.address}]" if ":" in place.address else place.address
        there = urlunsplit(parts._replace(netloc=f"{host}:{parts.port}" if parts.port else host))
        try:
            async with self._session.get(
                there,
                headers={"Host": parts.netloc, **(headers or {})},
                allow_redirects=False,
                server_hostname=parts.hostname if parts.scheme == "https" else None,
            ) as answer:
                if answer.status != 200:
                    return None
                body = b""
                while part := await answer.content.read(1 << 20):
                    body += part
                    if len(body) > MAX_STATS:
                        return None
                return body.decode("utf-8", "replace")
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError):
            return None


async def addresses(host: str) -> Sequence[str]:
    """What a name stands for, of one address family alone: a machine with two is one Envoy."""
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    families = {family for family, *_ in found}
    wanted = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return sorted({str(address[0]) for family, *_, address in found if family == wanted})
