"""SIGHUP: every key that is said to take effect does, in a running process; anything else changes nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import yaml
from aiohttp import web
from listening import Client
from pki import Authority
from program import Sink, eventually, merged
from samples_peer import Post, SamplesPeer
from wire import http_row, message

from proxy_usage.config import RELOADABLE
from proxy_usage.demo.billing import BillingStandIn

pytestmark = pytest.mark.e2e

Test = Callable[[Path], Awaitable[None]]

COVERED: set[str] = set()
"""Patterns of ``RELOADABLE`` with a test here; the last test compares."""


def covers(*patterns: str) -> Callable[[Test], Test]:
    """Says of a test which patterns it is about."""
    COVERED.update(patterns)
    return lambda test: test


def rows(tenant: str, **more: Any) -> bytes:
    return message(http_row(tags={"project_name": tenant}, **more), node_id="edge-1")


class Running:
    """A sink with its stand-in, and changes to its configuration."""

    def __init__(self, sink: Sink, billing: BillingStandIn) -> None:
        self.sink = sink
        self.billing = billing

    async def send(self, *messages: bytes, **client: Any) -> None:
        async with Client(self.sink.grpc_port, **client) as one:
            await one.send(*messages)

    def write(self, settings: Mapping[str, Any], output: Mapping[str, Any] | None = None) -> None:
        document = merged(self.sink.document, settings)
        document["outputs"] = [merged(document["outputs"][0], output or {})]
        self.sink.document = document
        self.sink.config.write_text(yaml.safe_dump(document), encoding="utf-8")

    async def change(self, settings: Mapping[str, Any], output: Mapping[str, Any] | None = None) -> None:
        """Writes the configuration anew and waits until it was taken over."""
        before = len(self.sink.events("reloaded"))
        self.write(settings, output)
        self.sink.send_signal(signal.SIGHUP)
        await eventually(
            lambda: len(self.sink.events("reloaded")) > before, "it is taken over", why=self.sink.said
        )

    def rows(self, fate: str, reason: str = "") -> int:
        """Rows of a fate, as of the last checkpoint."""
        with self.sink.reader() as reader:
            return reader.status().rows.get(fate, {}).get(reason, 0)

    async def held(self) -> list[dict[str, Any]]:
        said = (await self.sink.cli("unattributed", "ls", "--json")).said
        found: list[dict[str, Any]] = json.loads(said)["unattributed"]
        return found

    def billed(self) -> set[str]:
        """Tenants that were billed."""
        return {tenant for tenant, _ in self.billing.arrived.sums()}


@contextlib.asynccontextmanager
async def running(
    directory: Path,
    settings: Mapping[str, Any] | None = None,
    output: Mapping[str, Any] | None = None,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[Running]:
    async with BillingStandIn(token=token, tls=tls) as billing:
        sink = Sink(
            directory / "sink", url=billing.url.replace("127.0.0.1", host), settings=settings, output=output
        )
        async with sink:
            yield Running(sink, billing)


@covers("tenant.rules", "tenant.allow_uuid", "tenant.no_route")
async def test_rules_and_what_is_held(tmp_path: Path) -> None:
    uuid = "0f8fad5b-d9cb-469f-a165-70867728950e"
    other = message(http_row(tags={"other": "bravo"}, route="r"), node_id="edge-1")
    stray = message(http_row(), node_id="edge-1")
    async with running(tmp_path) as one:
        await one.send(rows("alpha"), other, rows(uuid), stray)
        await eventually(lambda: one.billed() == {"alpha"}, "alpha is billed", why=one.billed)
        await eventually(lambda: one.rows("skipped", "no_route") == 1, "the stray is skipped")
        rules = [{"custom_tag": "other"}, {"custom_tag": "project_name"}]
        await one.change({"tenant": {"rules": rules, "allow_uuid": True, "no_route": "hold"}})
        await one.send(rows("alpha"), other, rows(uuid), stray)
        await eventually(lambda: one.billed() == {"alpha", "bravo", uuid}, "all are billed", why=one.billed)
        await eventually(lambda: one.rows("counted") == 7, "all have their fate")
        reasons = [row["reason"] for row in await one.held()]
        assert sorted(reasons) == ["no_route", "no_tenant", "uuid_tenant"]


@covers("tenant.max_tenants", "tenant.unattributed.max_identities")
async def test_bounds(tmp_path: Path) -> None:
    bound = {"max_tenants": 1, "unattributed": {"max_identities": 1}}
    async with running(tmp_path, {"tenant": bound}) as one:
        await one.send(rows("alpha"), rows("bravo"), rows("UPPER"), rows("LOWER"))
        await eventually(lambda: one.billed() == {"alpha"}, "alpha is billed", why=one.billed)
        await eventually(lambda: one.rows("counted") == 4, "all have their fate")
        before = len(await one.held())
        await one.change({"tenant": {"max_tenants": 9, "unattributed": {"max_identities": 99}}})
        await one.send(rows("bravo"), *(rows(f"BAD-{number}") for number in range(5)))
        await eventually(lambda: one.billed() == {"alpha", "bravo"}, "bravo is billed", why=one.billed)
        await eventually(lambda: one.rows("counted") == 10, "all have their fate")
        assert len(await one.held()) == before + 5


@covers("dimensions.*", "skip")
async def test_dimensions_and_skip(tmp_path: Path) -> None:
    async with running(tmp_path, {"dimensions": {"region": {"custom_tag": "r", "default": "old"}}}) as one:
        await one.send(rows("alpha"))
        await eventually(lambda: regions(one) == {"old"}, "the old default is said")
        await one.change(
            {
                "dimensions": {"region": {"custom_tag": "r", "default": "new"}},
                "skip": [{"if": {"status": 404}, "reason": "mine"}],
            }
        )
        await one.send(rows("alpha"), rows("alpha", status=404))
        await eventually(lambda: regions(one) == {"old", "new"}, "the new default is said")
        await eventually(lambda: one.rows("skipped", "mine") == 1, "the new test skips")


def regions(one: Running) -> set[str]:
    events = [json.loads(stored.raw) for stored in one.billing.arrived.stored.values()]
    return {event["data"]["dimensions"]["region"] for event in events}


@covers(
    *(
        f"listen.tls.{key}"
        for key in ("cert_file", "key_file", "client_ca_file", "allow_san", "node_from_san")
    )
)
async def test_certificates_and_who_may_send(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    sinks = [each.issue(f"sink-{number}", dns=["sink.example.org"]) for number, each in enumerate((old, new))]
    uri = "spiffe://example.org/envoy/edge-1"
    edges = [each.issue(f"edge-{number}", uri=[uri]) for number, each in enumerate((old, new))]
    tls = {"cert_file": str(sinks[0].cert), "key_file": str(sinks[0].key), "client_ca_file": str(old.file)}
    async with running(tmp_path, {"listen": {"tls": {**tls, "allow_san": ["uri:*"]}}}) as one:
        port = one.sink.grpc_port
        await one.send(rows("alpha"), ca=old.file, pair=edges[0])
        tls = {
            "cert_file": str(sinks[1].cert),
            "key_file": str(sinks[1].key),
            "client_ca_file": str(new.file),
        }
        await one.change({"listen": {"tls": tls}})
        await one.send(rows("alpha"), ca=new.file, pair=edges[1])
        async with Client(port, ca=new.file, pair=edges[0]) as stranger:
            assert await stranger.refused(rows("alpha")) is grpc.StatusCode.UNAVAILABLE
        async with Client(port, ca=new.file, pair=edges[1]) as client:
            open_stream = client.stream()
            await open_stream.write(rows("alpha"))
            await eventually(lambda: one.sink.read() == 3, "it is read")
            await one.change({"listen": {"tls": {"node_from_san": ".*/([^/]*)"}}})
            assert (
                await client.refused(message(http_row(), node_id="edge-2"))
                is grpc.StatusCode.PERMISSION_DENIED
            )
            await client.send(rows("alpha"))
            assert not open_stream.done()
            await one.change({"listen": {"tls": {"allow_san": ["dns:*"]}}})
            assert await client.refused(rows("alpha")) is grpc.StatusCode.PERMISSION_DENIED
            async with asyncio.timeout(30):
                assert await open_stream.code() is grpc.StatusCode.PERMISSION_DENIED


@covers("listen.token_file", "listen.http_token_file")
async def test_tokens_of_clients(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    async with running(tmp_path) as one:
        await one.send(rows("alpha"))
        for name in ("one", "two"):
            token = str(tmp_path / name)
            await one.change({"listen": {"token_file": token, "http_token_file": token}})
            await one.send(rows("alpha"), token=name)
            async with Client(one.sink.grpc_port, token="old") as client:
                assert await client.refused(rows("alpha")) is grpc.StatusCode.PERMISSION_DENIED
            url = f"http://127.0.0.1:{one.sink.http_port}/metrics"
            async with aiohttp.ClientSession() as session:
                for given, status in ((name, 200), ("old", 401)):
                    async with session.get(url, headers={"Authorization": f"Bearer {given}"}) as answer:
                        assert answer.status == status
        await one.change({"listen": {"token_file": None, "http_token_file": None}})
        await one.send(rows("alpha"))
        await one.sink.metrics()


@covers("outputs.*.token_file")
async def test_the_token_for_an_output(tmp_path: Path) -> None:
    for name in ("wrong", "right"):
        (tmp_path / name).write_text(name)
    async with running(tmp_path, output={"token_file": str(tmp_path / "wrong")}, token="right") as one:
        await one.send(rows("alpha"))
        await eventually(one.sink.reasons, "it is paused", why=one.sink.said)
        await one.change({}, {"token_file": str(tmp_path / "right")})
        await eventually(lambda: one.billed() == {"alpha"}, "it is delivered", why=one.sink.said)


def basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


@covers("outputs.*.password_file")
async def test_the_password_for_an_output(tmp_path: Path) -> None:
    for name in ("wrong", "right"):
        (tmp_path / name).write_text(name)
    wanted = basic("meter:right")

    def answer(post: Post) -> web.Response:
        return web.Response(status=204 if post.headers.get("authorization") == wanted else 401)

    async with SamplesPeer(answer=answer) as peer:
        output = {"format": "ceilometer", "url": peer.url, "user": "meter"}
        async with running(tmp_path, output={**output, "password_file": str(tmp_path / "wrong")}) as one:
            await one.send(rows("alpha"))
            await eventually(one.sink.reasons, "it is paused", why=one.sink.said)
            await one.change({}, {"password_file": str(tmp_path / "right")})
            await eventually(lambda: peer.volumes, "it is delivered", why=one.sink.said)
            (tmp_path / "right").write_text("renewed\n")
            wanted = basic("meter:renewed")
            before = len(peer.volumes)
            await one.send(rows("bravo"))
            await eventually(lambda: len(peer.volumes) > before, "the renewed is sent", why=one.sink.said)
    assert peer.wrong == []


@covers("outputs.*.ca_file")
async def test_the_authorities_of_an_output(tmp_path: Path) -> None:
    wrong, right = Authority(tmp_path, "wrong"), Authority(tmp_path, "right")
    pair = right.issue("endpoint", dns=["localhost"])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(pair.cert, pair.key)
    async with running(tmp_path, output={"ca_file": str(wrong.file)}, tls=tls, host="localhost") as one:
        await one.send(rows("alpha"))
        await eventually(one.sink.reasons, "it is paused", why=one.sink.said)
        await one.change({}, {"ca_file": str(right.file)})
        await eventually(lambda: one.billed() == {"alpha"}, "it is delivered", why=one.sink.said)


@covers("outputs.*.cert_file", "outputs.*.key_file")
async def test_the_certificate_that_an_output_shows(tmp_path: Path) -> None:
    site, strange = Authority(tmp_path, "site"), Authority(tmp_path, "strange")
    pair = site.issue("endpoint", dns=["localhost"])
    ours, wrong = site.issue("sink"), strange.issue("stranger")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=site.file)
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_cert_chain(pair.cert, pair.key)
    shown = {"ca_file": str(site.file), "cert_file": str(wrong.cert), "key_file": str(wrong.key)}
    async with running(tmp_path, output=shown, tls=tls, host="localhost") as one:
        await one.send(rows("alpha"))
        await eventually(lambda: one.sink.events("batch"), "it is refused", why=one.sink.said)
        assert one.billed() == set()
        await one.change({}, {"cert_file": str(ours.cert), "key_file": str(ours.key)})
        await eventually(lambda: one.billed() == {"alpha"}, "it is delivered", why=one.sink.said)


@covers("log")
async def test_the_log(tmp_path: Path) -> None:
    async with running(tmp_path) as one:
        one.write({"log": {"format": "console"}})
        one.sink.send_signal(signal.SIGHUP)
        await eventually(lambda: "reloaded    " in one.sink.said(), "people can read it", why=one.sink.said)
        await one.change({"log": {"format": "json"}})
        # No line says any more that it was taken over: a key that takes effect with it does.
        token = tmp_path / "token"
        token.write_text("s3cret")
        one.write({"log": {"level": "error"}, "listen": {"http_token_file": str(token)}})
        one.sink.send_signal(signal.SIGHUP)

        async def taken_over() -> bool:
            return (await one.sink.get("/metrics"))[0] == 401

        await eventually(taken_over, "it is taken over", why=one.sink.said)
        await one.send(rows("alpha"))
        await eventually(lambda: one.billed() == {"alpha"}, "it is delivered", why=one.sink.said)
        assert one.sink.events("windows closed") == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tenant": {"rules": []}}, "1 mistake in the configuration"),
        ({"windows": {"length": "2s"}, "tenant": {"max_tenants": 5}}, "windows.length"),
        ({"listen": {"tls": {"cert_file": "{0}", "key_file": "{0}"}}}, "listen.tls"),
        ({"dimensions": {"more": {"literal": "x"}}}, "dimensions"),
    ],
)
async def test_what_cannot_be_taken_over_changes_nothing_and_is_said(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    pem = tmp_path / "not.pem"
    pem.write_text("no certificate")
    text = json.dumps(settings).replace("{0}", str(pem))
    async with running(tmp_path) as one:
        before = one.sink.document
        one.write(json.loads(text))
        one.sink.send_signal(signal.SIGHUP)
        refused = "reload refused, the former configuration goes on"
        await eventually(lambda: one.sink.events(refused), "it is logged", why=one.sink.said)
        assert said in one.sink.events(refused)[0]["error"]
        assert (await one.sink.metrics())["config_reload_refused"] == 1
        one.sink.document = before
        one.sink.config.write_text(yaml.safe_dump(before))
        status = await one.sink.cli("status")
        assert "reload refused" in status.said
        await one.send(rows("alpha"))
        await eventually(lambda: one.billed() == {"alpha"}, "the former rules bill", why=one.sink.said)
        await one.change({})
        assert (await one.sink.metrics())["config_reload_refused"] == 0
        assert "reload refused" not in (await one.sink.cli("status")).said


def test_every_key_that_can_be_reloaded_has_a_test() -> None:
    assert COVERED == RELOADABLE
