"""The main job: what four tenants sent through a real Envoy is what the billing endpoint was told, exactly.

One run with each of the two folds, looked at from all sides: by the client's socket, by Envoy's log file, by
a second consumer of the same rows, by the endpoint, by the sink's own store.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from envoy.data.accesslog.v3 import accesslog_pb2
from harness import Row, World, used
from program import intake_rows

from proxy_usage.config.models import METER_TYPES
from proxy_usage.decode.choice import SWITCH, choose
from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.compare import Spent
from proxy_usage.demo.truth import NO_ROUTE, Truth
from proxy_usage.model import NS_PER_SECOND
from proxy_usage.store.reader import Reader
from proxy_usage.store.usage import EventTrace
from proxy_usage.store.usage_sums import UsageSums
from proxy_usage.store.views import Conservation, Status

pytestmark = pytest.mark.e2e

REQUESTS, INGRESS, EGRESS, SECONDS = METERS
SENT = 2_400
STRAYS = 24
NODE = "demo-envoy"
HTTP = accesslog_pb2.HTTPAccessLogEntry


@dataclass(frozen=True, slots=True)
class Run:
    """What is left when everything was sent, delivered and stopped."""

    truth: Truth
    tenants: frozenset[str]
    arrived: Arrived
    spent: Mapping[str, Spent]
    answers: Counter[str]
    recorded: tuple[Row, ...]
    exit_status: int
    intake: Mapping[str, int]
    status: Status
    conservation: Conservation
    usage: Mapping[str, UsageSums]
    explained: Mapping[str, EventTrace]
    """One event of each tenant."""

    @property
    def ended(self) -> list[Any]:
        """Recorded rows of requests that some tenant's route took."""
        return [
            row.entry
            for row in self.recorded
            if row.log_name == "http" and row.entry.common_properties.route_name
        ]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["as it comes", "protobuf"])
async def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> AsyncIterator[Run]:
    directory = tmp_path_factory.mktemp("main")
    with pytest.MonkeyPatch.context() as environ:
        if request.param == "protobuf":
            environ.setenv(SWITCH, "protobuf")
        expected = choose(os.environ).reason
        async for made in run_once(directory, expected):
            yield made


async def run_once(directory: Path, expected_fold: str) -> AsyncIterator[Run]:
    """The run, by the fold that the environment chooses; `expected_fold` is what /metrics must say."""
    async with World(directory, tenants=4, record=True, concurrency=2) as world:
        _, exposition = await world.sink.get("/metrics")
        assert f'proxy_usage_build_info{{fold="{expected_fold}"' in exposition
        await world.send(SENT, strays=STRAYS)
        await world.stop_envoy()
        await world.equal()
        exit_status = await world.sink.stop()
        assert world.recorder is not None
        with Reader(world.sink.store) as reader:
            yield Run(
                truth=world.truth,
                tenants=frozenset(tenant.name for tenant in world.tenants),
                arrived=world.billing.arrived,
                spent=world.log.spent,
                answers=world.billing.answers,
                recorded=tuple(world.recorder.rows()),
                exit_status=exit_status,
                intake=intake_rows(world.sink.store),
                status=reader.status(),
                conservation=reader.conservation(deep=True),
                usage={tenant.name: used(reader, tenant.name) for tenant in world.tenants},
                explained={
                    stored.tenant: trace
                    for event_id, stored in world.billing.arrived.stored.items()
                    if (trace := reader.explain(event_id)) is not None
                },
            )


def test_the_load_is_what_it_should_be(run: Run) -> None:
    assert run.truth.requests == SENT + STRAYS
    assert run.truth.counts[NO_ROUTE].requests == STRAYS
    assert set(run.truth.tenants()) == run.tenants
    statuses = sum((count.statuses for count in run.truth.counts.values()), Counter[int]())
    assert {200, 204, 304, 404, 503} <= set(statuses)
    assert {route for _, route in run.truth.by_route()} == {"web", "api", "broken", "static"}
    protocols = Counter(entry.protocol_version for entry in run.ended)
    assert min(protocols[HTTP.HTTP11], protocols[HTTP.HTTP2]) > SENT // 4
    assert all(count.body_in and count.body_out for count in run.truth.tenants().values())


def test_requests_and_bytes_per_tenant_meter_and_route_are_the_clients(run: Run) -> None:
    delivered = {key: sum_ for key, sum_ in run.arrived.by_route().items() if key[2] != SECONDS}
    assert delivered == {
        (tenant, route, meter): amount
        for (tenant, route), count in run.truth.by_route().items()
        for meter, amount in (
            (REQUESTS, count.requests),
            (INGRESS, count.wire_in),
            (EGRESS, count.wire_out),
        )
    }


def test_time_is_the_sum_of_the_rows_durations_to_the_nanosecond(run: Run) -> None:
    open_ns: Counter[tuple[str, str]] = Counter()
    for entry in run.ended:
        common = entry.common_properties
        tenant, route = common.custom_tags["project_name"], common.route_name.split("/")[2]
        open_ns[tenant, route] += common.duration.ToNanoseconds()
    assert sum(open_ns.values()) > 10 * NS_PER_SECOND
    # Whole seconds are billed per route, and what is left of them is carried: nothing is ever rounded.
    expected = {key: ns // NS_PER_SECOND for key, ns in open_ns.items() if ns >= NS_PER_SECOND}
    delivered = {key[:2]: sum_ for key, sum_ in run.arrived.by_route().items() if key[2] == SECONDS}
    assert delivered == expected
    (terms,) = (meter for meter in run.status.meters if meter.meter == "connection_seconds")
    assert terms.counted == sum(open_ns.values())
    assert terms.remainders == sum(ns % NS_PER_SECOND for ns in open_ns.values())
    assert terms.minted.value == sum(expected.values())
    assert (terms.open, terms.held, terms.written_off) == (0, 0, 0)


def test_time_is_what_envoys_own_log_file_says(run: Run) -> None:
    delivered = run.arrived.sums()
    assert set(run.spent) == run.tenants
    for tenant, spent in run.spent.items():
        assert spent.rows == run.truth.tenants()[tenant].requests
        assert spent.allows(delivered[tenant, SECONDS]), (tenant, spent, delivered[tenant, SECONDS])


def test_nothing_of_nobody_is_delivered(run: Run) -> None:
    assert {stored.tenant for stored in run.arrived.stored.values()} == run.tenants
    assert run.status.unattributed == 0  # strays name no route: skipped by default, not held


def test_every_event_is_flawless_and_sent_once(run: Run) -> None:
    assert run.arrived.violations == []
    assert run.arrived.duplicates == 0
    assert set(run.answers) == {"200"}
    (output,) = run.status.outputs
    assert (
        output.delivered == len(run.arrived.stored) == sum(terms.minted.events for terms in run.status.meters)
    )


def test_every_row_envoy_sent_was_read_and_has_one_fate(run: Run) -> None:
    logs = Counter(row.log_name for row in run.recorded)
    assert logs["http"] == SENT + STRAYS
    assert logs["conn"] > 0
    assert sum(run.intake.values()) == sum(logs.values())
    assert run.status.intake == run.intake
    assert run.status.rows == {
        "counted": {"": SENT},
        "skipped": {"no_route": STRAYS, "listener": logs["conn"]},
    }
    assert run.status.crash_lost == {}


def test_the_store_adds_up_row_by_row(run: Run) -> None:
    assert run.conservation.deep
    assert run.conservation.balanced, run.conservation
    assert all(terms.difference == 0 for terms in run.conservation.meters)
    assert all(terms.balanced for terms in run.conservation.outputs)


def test_usage_is_what_arrived_and_says_where_it_came_from(run: Run) -> None:
    shown = {
        (tenant, METER_TYPES[one.meter]): (one.used, one.delivered)
        for tenant, sums in run.usage.items()
        for one in sums.sums()
    }
    assert shown == {place: (value, value) for place, value in run.arrived.sums().items()}
    for tenant, sums in run.usage.items():
        (source,) = sums.sources()
        assert (source.node, source.rule) == (NODE, "0 custom_tag: project_name")
        assert source.rows == run.truth.tenants()[tenant].requests


def test_an_event_is_explained_back_to_its_rule(run: Run) -> None:
    assert run.explained.keys() == run.tenants
    for tenant, trace in run.explained.items():
        assert trace.event.tenant == tenant
        (place,) = trace.event.places
        assert (place.output, place.state, place.status) == ("billing", "delivered", 200)
        assert {(one.node, one.rule) for one in trace.sources} == {(NODE, "0 custom_tag: project_name")}
        sent = run.truth.by_route()[tenant, trace.event.dimensions["httproute_name"]].requests
        assert 0 < sum(one.rows for one in trace.sources) <= sent  # the run may have passed a full hour


def test_the_sink_ends_well(run: Run) -> None:
    assert run.exit_status == 0
