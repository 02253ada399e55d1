"""A receiver of Ceilometer's samples, strict about their form, and every request as it arrived.

    async with SamplesPeer() as peer:
        peer.url                     # where samples are posted
        peer.posts                   # what came, in order: headers, and the body as JSON
        peer.volumes                 # by sample id, each once
        peer.wrong                   # what a strict reader would not take

``answer`` makes the status (and headers) of an answer; by default all are 200.
"""

from __future__ import annotations

import json
import re
import ssl
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple, Self

from aiohttp import web

from proxy_usage.demo.listener import Listener

TEXT, MAYBE = (str,), (str, type(None))
KEYS: Mapping[str, tuple[type, ...]] = {
    "name": TEXT,
    "type": TEXT,
    "unit": TEXT,
    "volume": (int, float),
    "user_id": MAYBE,
    "user_name": MAYBE,
    "project_id": MAYBE,
    "project_name": MAYBE,
    "resource_id": TEXT,
    "timestamp": TEXT,
    "resource_metadata": (dict,),
    "source": TEXT,
    "id": TEXT,
    "monotonic_time": (int, float, type(None)),
}
"""The keys of a sample, in their order, and the types of their values."""
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00")


class Post(NamedTuple):
    """A request."""

    headers: Mapping[str, str]
    """Names in lower case."""
    raw: bytes
    body: Any
    peer: Any
    """The certificate that the client showed, as ``getpeercert`` has it."""


def faults(sample: Any) -> list[str]:
    """Why a sample is none; empty when it is one."""
    if not isinstance(sample, dict) or list(sample) != list(KEYS):
        return [f"keys: {list(sample) if isinstance(sample, dict) else sample!r}"]
    found = [
        f"{key}: {sample[key]!r}"
        for key, types in KEYS.items()
        if not isinstance(sample[key], types) or isinstance(sample[key], bool)
    ]
    if sample["type"] not in ("gauge", "delta", "cumulative"):
        found.append(f"type: {sample['type']!r}")
    try:
        assert str(uuid.UUID(sample["id"])) == sample["id"]
        assert TIME.fullmatch(sample["timestamp"])
        datetime.fromisoformat(sample["timestamp"])
    except (ValueError, AssertionError):
        found.append(f"id or timestamp: {sample['id']!r}, {sample['timestamp']!r}")
    return found


class SamplesPeer:
    """The receiver. ``port`` 0 takes a free one; ``start`` and ``stop`` keep it."""

    def __init__(
        self,
        *,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        answer: Callable[[Post], web.Response] | None = None,
    ) -> None:
        self.posts: list[Post] = []
        self.volumes: dict[str, int] = {}
        self.wrong: list[str] = []
        self.answer = answer or (lambda post: web.Response(text="thanks"))
        self._tls = tls
        self._listener: Listener | None = None
        self._port = port

    @property
    def url(self) -> str:
        scheme, host = ("https", "localhost") if self._tls else ("http", "127.0.0.1")
        return f"{scheme}://{host}:{self._port}/samples"

    async def start(self) -> None:
        app = web.Application(client_max_size=16 << 20)
        app.router.add_post("/samples", self._post)
        self._listener = Listener(app, "127.0.0.1", self._port, self._tls)
        await self._listener.start()
        self._port = self._listener.port

    async def stop(self) -> None:
        if self._listener is not None:
            await self._listener.stop()
            self._listener = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _post(self, request: web.Request) -> web.Response:
        raw = await request.read()
        assert request.transport is not None
        post = Post(
            {name.lower(): value for name, value in request.headers.items()},
            raw,
            json.loads(raw),
            request.transport.get_extra_info("peercert"),
        )
        self.posts.append(post)
        answer = self.answer(post)
        if 200 <= answer.status < 300:
            for sample in post.body if isinstance(post.body, list) else [post.body]:
                self.wrong += faults(sample)
                self._keep(sample)
        return answer

    def _keep(self, sample: dict[str, Any]) -> None:
        first = self.volumes.setdefault(sample["id"], sample["volume"])
        if first != sample["volume"]:
            self.wrong.append(f"{sample['id']} came with {first} and with {sample['volume']}")
