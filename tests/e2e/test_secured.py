"""A real Envoy that proves who it is, peers that pose as it, and clients that pose as other tenants."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from listening import Client
from pki import Authority, Pair
from program import Sink, eventually
from wire import DOWNSTREAM_END, DOWNSTREAM_PERIODIC, http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.compare import AccessLog, differences
from proxy_usage.demo.envoy import EnvoyProcess
from proxy_usage.demo.http1 import Http1Client
from proxy_usage.demo.traffic import mixed
from proxy_usage.demo.truth import Truth, tenants
from proxy_usage.demo.upstream import Upstream
from proxy_usage.service.logs import A_MINUTE

pytestmark = pytest.mark.e2e

LOCAL = "127.0.0.1"
GUIDE = Path(__file__).parents[2] / "deploy" / "envoy" / "README.md"
TLS_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
FLUSH_MS = 1_000
"""As Envoy has it where nobody sets it. What it sends while the end of a stream is on its way is lost."""
SPIFFE = "spiffe://example.org/envoy/"


def transport_socket(ca: Path, pair: Pair) -> dict[str, Any]:
    """How an Envoy proves to the sink who it is."""
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": TLS_TYPE,
            "sni": "sink.example.org",
            "common_tls_context": {
                "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificates": [
                    {
                        "certificate_chain": {"filename": str(pair.cert)},
                        "private_key": {"filename": str(pair.key)},
                    }
                ],
                "validation_context": {
                    "trusted_ca": {"filename": str(ca)},
                    "match_typed_subject_alt_names": [
                        {"san_type": "DNS", "matcher": {"exact": "sink.example.org"}}
                    ],
                },
            },
        },
    }


def loggers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gRPC loggers of an Envoy."""
    (listener,) = document["static_resources"]["listeners"]
    manager = connection_manager(document)
    return [
        one["typed_config"]
        for one in (*listener["access_log"], *manager["access_log"])
        if "grpc" in one["name"]
    ]


def connection_manager(document: Mapping[str, Any]) -> dict[str, Any]:
    (listener,) = document["static_resources"]["listeners"]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


async def test_an_envoy_with_certificate_and_token_is_billed_exactly_while_its_connections_are_renewed(
    tmp_path: Path,
) -> None:
    """A connection lives a second: some ten renewals under load, and not a row is missing."""
    authority = Authority(tmp_path, "ours")
    server = authority.issue("sink", dns=["sink.example.org"])
    pair = authority.issue("envoy", uri=[f"{SPIFFE}demo-envoy"])
    (tmp_path / "token").write_text("s3cret")
    listen = {
        "tls": {
            "cert_file": str(server.cert),
            "key_file": str(server.key),
            "client_ca_file": str(authority.file),
            "allow_san": [f"uri:{SPIFFE}*"],
            "node_from_san": f"{SPIFFE}(.*)",
        },
        "token_file": str(tmp_path / "token"),
        "limits": {"connection_age": "1s"},
    }
    truth = Truth()
    log = AccessLog(tmp_path / "access.jsonl", truth)
    async with BillingStandIn() as billing, Upstream() as upstream:
        sink = Sink(tmp_path / "sink", url=billing.url, settings={"listen": listen})
        async with sink:
            options = EnvoyOptions(
                tenants=tenants(3),
                upstream=(LOCAL, upstream.port),
                als=[(LOCAL, sink.grpc_port)],
                access_log=tmp_path / "access.jsonl",
                buffer_flush_ms=FLUSH_MS,
                health_check=False,  # a check without a certificate would be refused, as it should be
            )
            document = bootstrap(options)
            cluster = next(one for one in document["static_resources"]["clusters"] if one["name"] == "usage")
            cluster["transport_socket"] = transport_socket(authority.file, pair)
            for logger in loggers(document):
                logger["common_config"]["grpc_service"]["initial_metadata"] = [
                    {"key": "authorization", "value": "Bearer s3cret"}
                ]
            async with EnvoyProcess(document, tmp_path, concurrency=2, buffer_flush_ms=FLUSH_MS) as envoy:
                began, connections, seed = time.monotonic(), 0, 0
                while time.monotonic() < began + 12 or connections < 10:
                    assert time.monotonic() < began + 60, f"{connections} connections: they are not renewed"
                    await mixed(LOCAL, envoy.port, tenants(3), requests=300, seed=seed, truth=truth)
                    name = "cluster.usage.upstream_cx_total"
                    connections, seed = (await envoy.stats(name))[name], seed + 1
                await envoy.drain()

            def wrong() -> list[str]:
                log.follow()
                return differences(truth, billing.arrived, log.spent)

            await eventually(lambda: not wrong(), "the bill is right", why=wrong)
            metrics = await sink.metrics()
            assert not [name for name in metrics if name.startswith("receiver_refused_streams_total")]


async def test_a_peer_cannot_touch_the_streams_of_another(tmp_path: Path) -> None:
    """Node id, connection id, start and stream id are the same: all that a sender can choose."""
    authority = Authority(tmp_path, "ours")
    server = authority.issue("sink", dns=["sink.example.org"])
    honest = authority.issue("honest", uri=[f"{SPIFFE}edge-1"])
    evil = authority.issue("evil", uri=[f"{SPIFFE}evil"])
    tls = {"cert_file": str(server.cert), "key_file": str(server.key), "client_ca_file": str(authority.file)}
    settings = {"listen": {"tls": {**tls, "allow_san": ["uri:*"]}}, "envoy": {"flush_interval": "60s"}}
    start_ns = time.time_ns() - 300 * 1_000_000_000

    def row(tenant: str, kind: int, total: int, seconds: int) -> bytes:
        tags = {"project_name": tenant, "conn_id": "7", "dur_ms": str(seconds * 1_000)}
        ended = kind == DOWNSTREAM_END
        one = http_row(
            type=kind,
            start_ns=start_ns,
            duration_ns=seconds * 1_000_000_000 if ended else None,
            wire=(total, total),
            tags=tags,
            stream_id="same",
        )
        return message(one, node_id="edge-1")

    async with BillingStandIn() as billing:
        sink = Sink(tmp_path / "sink", url=billing.url, settings=settings)
        async with (
            sink,
            Client(sink.grpc_port, ca=authority.file, pair=honest) as good,
            Client(sink.grpc_port, ca=authority.file, pair=evil) as bad,
        ):
            await good.send(row("alpha", DOWNSTREAM_PERIODIC, 1_000, 60))
            # A total of its own, and an end: taken for the other, nothing that follows would count.
            await bad.send(
                row("bravo", DOWNSTREAM_PERIODIC, 10**12, 120), row("bravo", DOWNSTREAM_END, 10**12, 180)
            )
            await good.send(
                row("alpha", DOWNSTREAM_PERIODIC, 3_000, 120), row("alpha", DOWNSTREAM_END, 7_000, 200)
            )
            expected = {METERS[0]: 1, METERS[1]: 7_000, METERS[2]: 7_000, METERS[3]: 200}

            def billed() -> dict[str, int]:
                return {
                    meter: value for (tenant, meter), value in billing.sums().items() if tenant == "alpha"
                }

            await eventually(lambda: billed() == expected, "alpha pays for its own, to the byte", why=billed)
            await eventually(lambda: billing.sums().get(("bravo", METERS[1])) == 10**12, "bravo for its own")


def guide() -> list[Any]:
    """The snippets about a tenant in a header, as the guide has them."""
    text = GUIDE.read_text()
    section = text[text.index("## A tenant from a request header") : text.index("## What to know")]
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)]


@pytest.mark.parametrize("stripped", [True, False])
async def test_a_client_cannot_choose_its_tenant_where_envoy_does_what_the_guide_says(
    tmp_path: Path, stripped: bool
) -> None:
    """With only half of it, as the guide warns, a client can: by a request without a route."""
    early, adding = guide()
    header = "x-datum-project"
    settings = {
        "tenant": {"rules": [{"request_header": header, "trusted": True}], "no_route": "hold"},
    }
    async with BillingStandIn() as billing, Upstream() as upstream:
        sink = Sink(tmp_path / "sink", url=billing.url, settings=settings)
        async with sink:
            (alpha,) = tenants(1)
            options = EnvoyOptions(
                tenants=[alpha], upstream=(LOCAL, upstream.port), als=[(LOCAL, sink.grpc_port)]
            )
            document = bootstrap(options)
            manager = connection_manager(document)
            if stripped:
                manager.update(early)
            (host,) = manager["route_config"]["virtual_hosts"]
            host.update(adding)
            for logger in loggers(document):
                if "Http" in logger["@type"]:
                    logger["additional_request_headers_to_log"] = [header]
            async with (
                EnvoyProcess(document, tmp_path) as envoy,
                Http1Client(LOCAL, envoy.port) as client,
            ):
                claims = ((header, "victim"),)
                for authority in (alpha.host, "nobody.example.net"):
                    await client.request("GET", authority, "/size/10", headers=claims)
                await client.request("GET", alpha.host, "/size/10")
                await envoy.drain()

            def requests() -> dict[str, int]:
                return {
                    tenant: value for (tenant, meter), value in billing.sums().items() if meter == METERS[0]
                }

            def counted() -> int:
                with sink.reader() as reader:
                    return reader.status().rows.get("counted", {}).get("", 0)

            await eventually(lambda: counted() == 3, "every row has its fate", why=sink.said)
            await eventually(sink.idle, "all that is billed is delivered", why=sink.said)
            assert requests() == {"alpha": 2} | ({} if stripped else {"victim": 1})


@pytest.mark.parametrize(("verbosity", "written"), [(None, False), ("INFO", True)])
async def test_strangers_cannot_fill_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verbosity: str | None, *, written: bool
) -> None:
    """Whoever looks for the reason of a failed handshake may ask for gRPC's own lines."""
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    if verbosity is not None:
        monkeypatch.setenv("GRPC_VERBOSITY", verbosity)
    authority = Authority(tmp_path, "ours")
    server = authority.issue("sink", dns=["sink.example.org"])
    listen = {
        "tls": {
            "cert_file": str(server.cert),
            "key_file": str(server.key),
            "client_ca_file": str(authority.file),
        }
    }
    async with BillingStandIn() as billing:
        async with Sink(tmp_path / "sink", url=billing.url, settings={"listen": listen}) as sink:
            for number in range(100):
                port = (sink.grpc_port, sink.http_port)[number % 2]
                reader, writer = await asyncio.open_connection(LOCAL, port)
                writer.write(b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n")
                with contextlib.suppress(ConnectionError):
                    await reader.read()  # until it hangs up
                writer.close()
            assert await sink.stop() == 0
        lines = sink.log.read_text().splitlines()
        assert any("Handshake failed" in line for line in lines) is written
        assert written or all(line.startswith("{") for line in lines), lines
        # Over the end of a minute twice as many.
        said = len(sink.events("a library says"))
        assert 0 < said <= 2 * A_MINUTE
        assert said + sum(line["lines"] for line in sink.events("more lines of libraries")) == 50
