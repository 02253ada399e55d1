"""What an operator, a disk or a stranger may do to a sink: it names the mistake, or counts it and goes on."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from harness import AlsClient, World
from program import Sink, eventually
from wire import http_row, message, varint

from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.http1 import Http1Client
from proxy_usage.demo.truth import Tenant

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

REQUESTS, INGRESS, EGRESS, SECONDS = METERS
NOWHERE = "http://127.0.0.1:9/v1/usage/events:batchIngest"
SERVICE = "envoy.service.accesslog.v3.AccessLogService"


def row(**fields: Any) -> Any:
    """A finished request of just now, of the tenant ``alpha`` unless said otherwise: 10 bytes in, 100 out."""
    given = {"start_ns": time.time_ns() - 2_000_000, "tags": {"project_name": "alpha"}, "wire": (10, 100)}
    return http_row(**{**given, "route": "httproute/ns-a/web/rule/0/match/0/a", **fields})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def billing() -> AsyncIterator[BillingStandIn]:
    async with BillingStandIn() as billing:
        yield billing
        assert billing.arrived.violations == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sink(tmp_path_factory: pytest.TempPathFactory, billing: BillingStandIn) -> AsyncIterator[Sink]:
    """A sink that strangers may talk to; it must outlive them all."""
    async with Sink(tmp_path_factory.mktemp("sink"), url=billing.url) as sink:
        yield sink
        with sink.reader() as reader:
            assert reader.conservation(deep=True).balanced
        assert await sink.stop() == 0


# --- starts that must fail ------------------------------------------------------------------------------


async def test_a_second_process_on_the_same_store(tmp_path: Path, sink: Sink) -> None:
    second = Sink(tmp_path, url=NOWHERE, settings={"store": {"path": str(sink.store)}})
    ended = await second.run()
    assert ended.status == 1
    assert f"store {sink.store} is in use by pid {sink.pid} on host" in ended.said
    assert "hint: one process owns a store" in ended.said
    assert await sink.reasons() == {}


@pytest.mark.parametrize("port", ["grpc", "http"])
async def test_a_port_in_use(tmp_path: Path, sink: Sink, port: str) -> None:
    second = Sink(tmp_path, url=NOWHERE)
    second.document["listen"][port] = taken = sink.document["listen"][port]
    ended = await second.run()
    assert ended.status == 1
    assert f"cannot listen on {taken}: Address already in use" in ended.said
    assert f"listen.{port}" in ended.said
    assert await sink.reasons() == {}


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an unknown key": ({"windows": {"lenght": "60s"}}, ["windows.lenght", "length"]),
    "a wrong type": ({"windows": {"max_keys": "many"}}, ["windows.max_keys", "many"]),
    "a bad regular expression": (
        {"tenant": {"rules": [{"route_name": "^httproute/(?P<key"}]}},
        ["tenant.rules", "route_name"],
    ),
    "a missing file": ({"listen": {"token_file": "nowhere/token"}}, ["listen.token_file", "nowhere/token"]),
    "a rule behind a literal": (
        {"tenant": {"rules": [{"literal": "alpha"}, {"custom_tag": "project_name"}]}},
        ["tenant.rules", "literal"],
    ),
    "a directory that cannot be": (
        {"store": {"path": "/dev/null/deep/usage.db"}},
        ["store.path", "/dev/null"],
    ),
    "plaintext for other machines": ({"listen": {"grpc": "0.0.0.0:9001"}}, ["listen", "insecure"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_in_the_configuration(tmp_path: Path, mistake: str) -> None:
    settings, named = MISTAKES[mistake]
    sink = Sink(tmp_path, url=NOWHERE, settings=settings)
    ended = await sink.run()
    assert ended.status == 78, ended.said
    assert [part for part in named if part not in ended.said] == [], ended.said
    assert "Traceback" not in ended.said
    assert not (tmp_path / "usage.db").exists()


async def test_two_outputs_of_one_name_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    sink = Sink(tmp_path, url=NOWHERE)
    sink.document["outputs"] *= 2
    ended = await sink.run()
    assert ended.status == 78
    assert "outputs" in ended.said
    assert "'billing'" in ended.said
    validated = await sink.cli("validate")
    assert validated.status == 78
    sink.config.unlink()
    validated = await sink.cli("validate")
    assert validated.status == 78
    assert str(sink.config) in validated.said


# --- strangers ------------------------------------------------------------------------------------------


async def _observed(sink: Sink) -> bool:
    """Whether each row that was read has its fate in /metrics: it is counted there at the next checkpoint."""
    return (await sink.metrics())["entries_read_total"] == sink.read()


def _saved(sink: Sink, rows: int) -> bool:
    """By the store: only what is there can be looked for at the endpoint."""
    with sink.reader() as reader:
        return sum(reader.status().rows.get("counted", {}).values()) == rows


async def is_serving(client: AlsClient, service: str = SERVICE) -> bool:
    stub = health_pb2_grpc.HealthStub(client.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def test_grpc_health(sink: Sink) -> None:
    async with AlsClient(sink.grpc_port) as client:
        assert await is_serving(client)
        assert await is_serving(client, "")
        with pytest.raises(Exception, match="NOT_FOUND"):
            await is_serving(client, "somebody.else")


def hostile() -> list[bytes]:
    """Messages that no Envoy sends, or only a sick one."""
    good = message(row(), row(), node_id="mallory")
    dice = random.Random(3)
    return [
        good[:-7],
        good[:100],
        b"\xff" * 50,
        b"\x12" + varint(1 << 40),
        bytes(range(256)) * 4,
        b"\x0b" * 5_000,  # groups within groups without end
        dice.randbytes(10_000),
        *(good[:at] + dice.randbytes(3) + good[at + 3 :] for at in range(5, len(good), 97)),
    ]


async def test_hostile_messages_beside_good_ones(sink: Sink, billing: BillingStandIn) -> None:
    before = await sink.metrics()
    bad = hostile()
    async with AlsClient(sink.grpc_port) as client, AlsClient(sink.grpc_port) as mallory:
        for number in range(20):
            await client.send(
                message(*(row(tags={"project_name": "honest"}) for _ in range(5)), node_id="envoy-1"),
                # The same stream goes on after a message that is none.
                bad[number % len(bad)],
                message(row(tags={"project_name": "honest"})),
            )
            await mallory.send(*bad)
            assert await is_serving(client)
    await eventually(lambda: _delivered(billing, "honest", REQUESTS) >= 120, "good rows are delivered")
    await eventually(sink.idle, "everything is settled", why=sink.said)
    sums = billing.sums()
    assert [sums["honest", meter] for meter in METERS[:3]] == [120, 1_200, 12_000]
    after = await sink.metrics()
    assert after["entries_read_total"] - before["entries_read_total"] >= 120
    assert after["receiver_bad_messages_total"] > before["receiver_bad_messages_total"]
    assert sink.events("entry not understood")
    assert await sink.reasons() == {}


def _delivered(billing: BillingStandIn, tenant: str, meter: str) -> int:
    return billing.sums().get((tenant, meter), 0)


async def test_rows_that_lack_or_spoil_something(sink: Sink, billing: BillingStandIn) -> None:
    def spoilt(**fields: Any) -> bytes:
        """A row with ÿÿÿÿ as it would stand in a name: four bytes that are not UTF-8."""
        sent: bytes = message(row(**fields))
        return sent.replace(b"HERE", b"\xff\xfe\xc3\x28")

    odd = {"project_name": "odd"}
    await eventually(lambda: _observed(sink), "what was sent before is in the metrics", why=sink.said)
    rows_before = await sink.metrics()
    negative = row(tags=odd)
    negative.common_properties.duration.FromNanoseconds(-5)
    absurd = row(tags=odd, wire=(1 << 62, 1))
    forever = row(tags=odd, duration_ns=500 * 86_400 * 10**9)
    async with AlsClient(sink.grpc_port) as client:
        await client.send(
            message(row(tags=odd, start_ns=None), node_id="envoy-odd"),
            message(row(tags=odd, duration_ns=None)),
            message(row(tags=odd, start_ns=1_924_992_000 * 10**9)),  # 2031
            message(row(tags=odd, start_ns=1)),  # 1970
            spoilt(tags=odd, route="httproute/ns-a/HERE/rule/0/match/0/a"),
            spoilt(tags=odd, path="/HERE", authority="HERE"),
            spoilt(tags={"project_name": "HERE"}),  # held: it names no project
            message(row(tags=odd, route="", status=404)),
            message(negative, absurd, forever),
        )
    await eventually(lambda: _delivered(billing, "odd", REQUESTS) == 7, "seven are counted", why=billing.sums)
    await eventually(sink.idle, "everything is settled", why=sink.said)
    after = await sink.metrics()

    def more(name: str) -> int:
        return after.get(name, 0) - rows_before.get(name, 0)

    assert more("entries_read_total") == 11
    assert more("entries_counted_total") == 8
    assert more('entries_invalid_total{reason="bytes"}') == 1
    assert more('entries_invalid_total{reason="duration"}') == 2
    assert more('entries_unattributed_total{reason="invalid_utf8"}') == 1
    assert more('entries_noted_total{kind="future"}') == 1
    assert more('entries_noted_total{kind="past_horizon"}') == 1
    assert more('entries_noted_total{kind="no_start_time"}') == 1
    assert more('entries_noted_total{kind="no_duration"}') == 1
    assert [billing.sums()["odd", meter] for meter in METERS[1:3]] == [70, 700]


async def test_ten_thousand_tenants_from_a_header(tmp_path: Path, billing: BillingStandIn) -> None:
    settings = {
        "tenant": {
            "rules": [{"request_header": "x-datum-project", "trusted": True}],
            "max_tenants": 100,
            "unattributed": {"max_identities": 500},
        }
    }
    named = [f"flood-{number}" for number in range(10_000)]
    async with (
        Sink(tmp_path, url=billing.url, settings=settings) as sink,
        AlsClient(sink.grpc_port) as client,
    ):
        rows = [row(tags={}, headers={"x-datum-project": name}) for name in named]
        chunks = [message(*rows[at : at + 500]) for at in range(500, len(rows), 500)]
        await client.send(message(*rows[:500], node_id="envoy-1"), *chunks)
        assert await is_serving(client)
        await eventually(lambda: _saved(sink, 10_000), "all rows are counted", why=sink.said)
        await eventually(sink.idle, "everything is settled", why=sink.said)
        metrics = await sink.metrics()
        assert metrics["tenants"] == 100
        assert metrics['entries_unattributed_total{reason="tenant_limit"}'] == 9_900
        with sink.reader() as reader:
            held = reader.unattributed(limit=100_000)
            assert reader.conservation(deep=True).balanced
        # One row of all the rest, per hour and reason: the test may run across an hour.
        assert len(held) <= 502
        assert {one.reason for one in held} == {"tenant_limit"}
        assert sum(one.rows for one in held) == 9_900
        assert sum(one.amounts["egress_bytes"] for one in held) == 990_000
        delivered = {key: value for key, value in billing.sums().items() if key[0].startswith("flood-")}
        assert len({tenant for tenant, _ in delivered}) == 100
        assert sum(value for (_, meter), value in delivered.items() if meter == REQUESTS) == 100
        listed = await sink.cli("unattributed", "ls", "--json")
        assert listed.status == 0
        assert "tenant_limit" in listed.said
        assert await sink.stop() == 0


async def test_random_hosts_under_a_wildcard(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text(yaml.safe_dump({"*.example.com": "wild", "api.example.com": "tame"}))
    settings = {
        "tenant": {
            "rules": [{"authority": True, "map_file": str(hosts)}],
            "unattributed": {"max_identities": 50},
        },
        "dimensions": {},
    }
    everybody = (Tenant("any", "*"),)
    dice = random.Random(11)
    async with World(tmp_path, tenants=everybody, settings=settings, record=True) as world:
        sums = {"wild": [0, 0, 0], "tame": [0, 0, 0], "": [0, 0, 0]}

        async def ask(suffix: str, tenant: str, count: int) -> None:
            async with Http1Client("127.0.0.1", world.envoy.port) as client:
                for _ in range(count):
                    host = f"{dice.randbytes(8).hex()}.{suffix}" if tenant != "tame" else suffix
                    got = await client.request("GET", host, "/static")
                    for place, amount in enumerate((1, got.wire_in, got.wire_out)):
                        sums[tenant][place] += amount

        await asyncio.gather(
            ask("example.com", "wild", 400), ask("api.example.com", "tame", 100), ask("example.net", "", 300)
        )
        billing = world.billing
        await eventually(lambda: _saved(world.sink, 800), "all rows are counted", why=world.sink.said)
        await eventually(world.sink.idle, "everything is settled", why=world.sink.said)
        for tenant in ("wild", "tame"):
            assert [billing.sums()[tenant, meter] for meter in METERS[:3]] == sums[tenant]
        assert {tenant for tenant, _ in billing.sums()} == {"wild", "tame"}
        with world.sink.reader() as reader:
            status, held = reader.status(), reader.unattributed(limit=100_000)
            assert reader.conservation(deep=True).balanced
        assert status.keys == 2
        assert len(held) <= 52
        assert [
            sum(one.rows for one in held),
            sum(one.amounts["ingress_bytes"] for one in held),
            sum(one.amounts["egress_bytes"] for one in held),
        ] == sums[""]
        assert {one.reason for one in held} == {"unmapped"}
        assert await world.sink.stop() == 0
