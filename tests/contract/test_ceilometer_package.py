"""Our samples beside those of Ceilometer's own publisher: what both post to one receiver is the same.

The package has an environment of its own: ``make ceilometer``.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from money import METERS, T0, cell, key, mint
from pki import Authority, Pair
from samples_peer import KEYS, Post, SamplesPeer

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery import HttpSender, Transport
from proxy_usage.delivery.transport import credentials
from proxy_usage.delivery.trust import Trust
from proxy_usage.model import NS_PER_SECOND
from proxy_usage.outputs.base import Settled
from proxy_usage.outputs.ceilometer import Ceilometer
from proxy_usage.store import Queued

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / "build" / "ceilometer-venv" / "bin" / "python"
PUBLISHER = Path(__file__).with_name("ceilometer_publisher.py")
WINDOW_MS = 60_000

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no Ceilometer here: make ceilometer")


def events() -> list[Queued]:
    """An event of each meter, with values that a float would not hold and names beyond ASCII."""
    amounts = (1, (1 << 53) + 1, (1 << 63) - 1, 7 * NS_PER_SECOND)
    made = mint().mint(cell(amounts, key=key("p-abc", 'ü "east"', "web")), (0, 0, 0, 0), T0 + 65_000)
    return [
        Queued(seq, one.id, "p-abc", METERS[one.meter].name, one.value, one.body, one.window_ms)
        for seq, one in enumerate(made.events, start=1)
    ]


def output(url: str, *, batch: bool = True, **settings: Any) -> OutputConfig:
    samples = {"batch": batch, "resource_id": "httproute/ns/{httproute_name}"}
    return OutputConfig.model_validate(
        {
            "name": "telemetry",
            "format": "ceilometer",
            "url": url,
            "batch": {"events": 100 if batch else 1},
            "ceilometer": samples,
            **settings,
        }
    )


async def send(one: OutputConfig, batches: Sequence[Sequence[Queued]]) -> None:
    assert one.url is not None
    transport = Transport(
        one.url, timeout_ms=30_000, concurrency=1, token=credentials(one), trust=Trust.of(one)
    )
    async with HttpSender(Ceilometer(one, WINDOW_MS), transport) as sender:
        for batch in batches:
            assert isinstance(await sender.send(batch), Settled)


async def publish(url: str, samples: Sequence[dict[str, Any]], **settings: str) -> None:
    """What Ceilometer makes of the same values. ``settings`` are its publisher's, in the URL."""
    given = [{name: sample[name] for name in sorted(sample)} for sample in samples]
    process = await asyncio.create_subprocess_exec(
        *(str(PYTHON), str(PUBLISHER), f"{url}?{urlencode({'timeout': '30', **settings})}"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate(json.dumps(given).encode())
    assert process.returncode == 0, said.decode()


def compare(ours: Sequence[Post], theirs: Sequence[Post]) -> None:
    """Key by key, in order, and type by type."""
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine.body) is type(other.body)
        pairs = zip(samples_of(mine), samples_of(other), strict=True)
        for left, right in pairs:
            assert list(left) == list(right) == list(KEYS)
            for name in KEYS:
                assert type(left[name]) is type(right[name]), name
            assert left == right
            assert list(left["resource_metadata"]) == list(right["resource_metadata"])
        for name in ("content-type", "authorization"):
            assert mine.headers.get(name) == other.headers.get(name)
        assert "content-encoding" not in mine.headers
    assert ours[0].headers["content-type"] == "application/json"


def samples_of(post: Post) -> list[dict[str, Any]]:
    return post.body if isinstance(post.body, list) else [post.body]


@pytest.mark.parametrize("batch", [True, False])
async def test_both_publishers_post_the_same(batch: bool) -> None:
    made = events()
    async with SamplesPeer() as peer:
        await send(output(peer.url, batch=batch), [made] if batch else [[event] for event in made])
        ours, peer.posts = peer.posts, []
        samples = [sample for post in ours for sample in samples_of(post)]
        await publish(peer.url, samples, batch=str(batch))
        compare(ours, peer.posts)
        assert [isinstance(post.body, list) for post in ours] == ([True] if batch else [False] * 4)
        assert peer.wrong == []
        assert list(peer.volumes.values()) == [event.value for event in made]


async def test_basic_authentication_is_sent_as_ceilometer_sends_it(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("s3cret\n")
    async with SamplesPeer() as peer:
        await send(output(peer.url, user="meter", password_file=password), [events()])
        ours, peer.posts = peer.posts, []
        await publish(peer.url.replace("://", "://meter:s3cret@"), samples_of(ours[0]))
        compare(ours, peer.posts)
        assert ours[0].headers["authorization"].startswith("Basic ")


async def test_a_client_certificate_is_shown_as_ceilometer_shows_it(tmp_path: Path) -> None:
    site = Authority(tmp_path, "site")
    shown: Pair = site.issue("sink", dns=["sink.example.org"])
    pair = site.issue("receiver", dns=["localhost"])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=site.file)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_cert_chain(pair.cert, pair.key)
    async with SamplesPeer(tls=tls) as peer:
        files: dict[str, Any] = {"ca_file": site.file, "cert_file": shown.cert, "key_file": shown.key}
        await send(output(peer.url, **files), [events()])
        ours, peer.posts = peer.posts, []
        await publish(
            peer.url,
            samples_of(ours[0]),
            verify_ssl=str(site.file),
            clientcert=str(shown.cert),
            clientkey=str(shown.key),
        )
        compare(ours, peer.posts)
        assert ours[0].peer == peer.posts[0].peer
        assert ours[0].peer["subject"] == ((("commonName", "sink"),),)
