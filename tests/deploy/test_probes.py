"""The program on the configurations that are deployed, asked by the probes that are deployed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from listening import Client
from manifests import DECIDED, DEPLOY, Document, assembled, container, here, read, settings, sink
from pki import Authority
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.listener import lease_port
from proxy_usage.receiver import SERVICE


class Kubelet:
    """Asks what a probe says: in plaintext, without a token, as the kubelet does."""

    def __init__(self, program: Document, running: Sink, streams: int) -> None:
        self._program = program
        self._ports = {"grpc": running.grpc_port, "streams": streams, "http": running.http_port}
        self._numbers = {port["containerPort"]: port["name"] for port in program["ports"]}
        self._running = running

    async def finds(self, probe: str) -> bool:
        asked: Mapping[str, Any] = self._program[probe]
        if "httpGet" in asked:
            assert asked["httpGet"]["port"] == "http"
            status, _ = await self._running.get(asked["httpGet"]["path"])
            return 200 <= status < 400
        if "tcpSocket" in asked:
            try:
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", self._ports[asked["tcpSocket"]["port"]]
                )
            except OSError:
                return False
            writer.close()
            return True
        return await serves(self._ports[self._numbers[asked["grpc"]["port"]]], asked["grpc"]["service"])


async def serves(port: int, service: str) -> bool:
    """What the kubelet's gRPC probe makes of it."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=3)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def started(text: str, directory: Path, url: str, streams: int) -> Sink:
    """The program on a deployed configuration; only addresses, directories and windows are the test's."""
    running = Sink(directory, url=url)
    windows = running.document["windows"]
    running.document = yaml.safe_load(here(text, directory))
    listen = running.document["listen"]
    listen["grpc"], listen["http"] = f"127.0.0.1:{running.grpc_port}", f"127.0.0.1:{running.http_port}"
    if streams:
        listen["streams"] = f"127.0.0.1:{streams}"
    running.document["windows"] = windows
    return running


@pytest.mark.parametrize("components", [(), ("components/daemonset",)], ids=["base", "daemonset"])
async def test_while_the_endpoint_refuses_the_sink_stays_in_envoys_sight(
    components: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = assembled("base", *components)
    text, env = settings(found)
    streams = lease_port() if components else 0
    async with BillingStandIn(token="another") as billing:
        for name, value in {**DECIDED, **env, "BILLING_URL": billing.url}.items():
            monkeypatch.setenv(name, value)
        async with started(text, tmp_path, billing.url, streams) as running:
            kubelet = Kubelet(container(sink(found)), running, streams)
            assert await kubelet.finds("startupProbe")
            async with Client(running.grpc_port) as envoy:
                await envoy.send(message(http_row(tags={"project_name": "alpha"}), node_id="edge-1"))

            async def is_paused() -> bool:
                return "output billing paused" in await running.reasons()

            await eventually(is_paused, "/readyz is red", why=running.said)
            assert await kubelet.finds("readinessProbe")
            assert await kubelet.finds("livenessProbe")
            if streams:
                assert await serves(streams, SERVICE)
            assert await running.stop() == 0
            assert not await kubelet.finds("readinessProbe")


async def test_with_tls_an_open_port_says_what_the_grpc_probe_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (patch,) = read(DEPLOY / "components/tls/certificate.yaml")
    program = container(sink(assembled("base"))) | container(patch)
    program["ports"] = container(sink(assembled("base")))["ports"]
    text = (DEPLOY / "components/tls/proxy-usage.yaml").read_text()
    env = settings(assembled("base"))[1]
    monkeypatch.delenv("PLAINTEXT", raising=False)
    for name, value in {
        **env,
        "BILLING_URL": "http://127.0.0.1:9",
        "ALLOW_SAN": "dns:envoy.example.org",
    }.items():
        monkeypatch.setenv(name, value)
    authority = Authority(tmp_path, "ours")
    server = authority.issue("sink", dns=["sink.example.org"])
    envoy = authority.issue("envoy", dns=["envoy.example.org"])
    running = started(text, tmp_path, "http://127.0.0.1:9", 0)
    secret = tmp_path / "etc/proxy-usage-tls"
    for name, file in (("tls.crt", server.cert), ("tls.key", server.key), ("ca.crt", authority.file)):
        (secret / name).write_bytes(file.read_bytes())
    async with running:
        kubelet = Kubelet(program, running, 0)
        assert await kubelet.finds("startupProbe")
        assert await kubelet.finds("readinessProbe")
        assert not await serves(running.grpc_port, SERVICE)
        async with Client(running.grpc_port, ca=authority.file, pair=envoy) as client:
            stream = client.stream()
            await stream.write(message(http_row(), node_id="edge-1"))

            async def is_read() -> bool:
                return (await running.metrics())["entries_read_total"] == 1

            await eventually(is_read, "the row is read", why=running.said)
            running.send_signal(signal.SIGTERM)

            async def is_gone() -> bool:
                return not await kubelet.finds("readinessProbe")

            await eventually(is_gone, "the port is closed", why=running.said)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await stream.done_writing()
        assert await running.wait() == 0
