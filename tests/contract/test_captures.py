"""What a real Envoy sent, through the whole pipeline into a real store, is what its clients counted.

Numbers that differ from the client's are Envoy's own (measured) and stand here one by one; nothing is
compared with a tolerance but two clocks.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from envoy.service.accesslog.v3 import als_pb2
from metering import Metering, Sums
from wire import CAPTURES, captured, truth

PERIODIC = {"envoy": {"flush_interval": "1s"}}
"""As Envoy was configured for the captures."""
BY_CONNECTION = {"meters": {"connection_seconds": {"count": "connections"}}}
BY_UPGRADE = {"meters": {"connection_seconds": {"count": "upgraded_and_tcp"}}}
BODIES = {"meters": {"ingress_bytes": {"bytes": "body"}, "egress_bytes": {"bytes": "body"}}}
NO_ROUTE_HELD = {"tenant": {"no_route": "hold"}}

# Nanoseconds that the rows say their streams were open: clients measured none of requests, and milliseconds
# of the rest.
OPEN_NS = {
    "h1_basic": {"alpha": 4_361_337, "beta": 3_691_635},
    "h1_keepalive_conn_seconds": {"alpha": 3_281_726, "beta": 6_464_253},
    "internal_redirect": {"alpha": 2_308_473, "beta": 1_108_845},
    "websocket_periodic": {"alpha": 3_507_172_665, "beta": 902_573_405},
    "websocket_final_only": {"alpha": 3_507_025_493},
    "sse_and_delay": {"alpha": 2_512_131_383, "beta": 2_203_404_110},
    "client_aborts": {"alpha": 188_490_693, "beta": 197_740_621},
    "h1_pipelined": {"alpha": 5_411_591},
    "local_replies_errors": {"alpha": 112_476, "beta": 356_058},
}
ENVOYS_OWN = {
    # Envoy counts the second of two pipelined requests with the first, too: 136 bytes were sent.
    "h1_pipelined": {"alpha": (2, 204, 504)},
    # What the client did not read any more when it hung up: it had read 200,704 bytes.
    "client_aborts": {"alpha": (1, 73, 1_048_591)},
}

Laid = Mapping[str, Any]


@pytest.fixture(params=["once", "restarts"])
def restarts(request: pytest.FixtureRequest) -> bool:
    """Whether the process is killed and started anew after each message."""
    return bool(request.param == "restarts")


def driven(name: str) -> dict[str | None, Sums]:
    """Requests, bytes in and bytes out by project, as the clients counted them."""
    sums: dict[str | None, list[int]] = {}
    for run in truth(name)["driven"]:
        if "tx_wire" not in run:
            continue  # a connection without a byte
        have = sums.setdefault(run["project"], [0, 0, 0])
        requests = 0 if run["kind"] == "tcp" else run.get("requests", 1)
        for column, amount in enumerate((requests, run["tx_wire"], run["rx_wire"])):
            have[column] += amount
    return {project: tuple(have) for project, have in sums.items()}


def metered(
    path: Path, name: str, *changes: Laid, **how: Any
) -> tuple[dict[str, Sums], dict[str, Sums], dict[str, int]]:
    """A capture to the end of all its windows: what is billed, what is held, what became of its rows."""
    laid = {key: value for change in changes for key, value in change.items()}
    with Metering(path, laid) as metering:
        metering.capture(name, **how)
        metering.settle()
        metering.check()
        rows = metering.rows()
        if "entries" in truth(name):
            assert sum(rows.values()) == truth(name)["entries"]
        return metering.billed(), metering.held(), rows


# ── the clients' numbers ──


@pytest.mark.parametrize("flush", [PERIODIC, {}], ids=["periodic", "ends alone"])
@pytest.mark.parametrize("name", OPEN_NS)
def test_tenants_are_billed_what_their_clients_counted(
    name: str, flush: Laid, restarts: bool, tmp_path: Path
) -> None:
    expected = driven(name) | ENVOYS_OWN.get(name, {})
    # Gamma's host is unknown, and codec errors have neither host nor route: nobody's, and skipped.
    billable = {tenant: sums for tenant, sums in expected.items() if tenant in ("alpha", "beta")}
    billed, held, rows = metered(tmp_path, name, flush, restarts=restarts)
    assert billed == {tenant: (*sums, OPEN_NS[name][tenant]) for tenant, sums in billable.items()}
    assert held == {}
    assert rows.get("skipped/no_route", 0) == (6 if name == "local_replies_errors" else 0)
    assert not [label for label in rows if label.startswith("invalid")]


@pytest.mark.parametrize("name", ["websocket_periodic", "sse_and_delay"])
def test_after_each_message_the_highest_totals_seen_are_booked(
    name: str, restarts: bool, tmp_path: Path
) -> None:
    highest: dict[tuple[int, str], tuple[int, int]] = {}
    with Metering(tmp_path, PERIODIC) as metering:
        for place, (_, raw) in enumerate(captured(name)):
            for row in als_pb2.StreamAccessLogsMessage.FromString(raw).http_logs.log_entry:
                common = row.common_properties
                totals = common.downstream_wire_bytes_received, common.downstream_wire_bytes_sent
                stream = common.start_time.ToNanoseconds(), common.stream_id
                assert totals >= highest.get(stream, (0, 0))
                highest[stream] = totals
            metering.capture(name, first=place, last=place, restarts=restarts)
            assert metering.counted()[1:3] == tuple(map(sum, zip((0, 0), *highest.values(), strict=True)))


def test_no_route_may_be_held_to_the_last_byte(tmp_path: Path) -> None:
    counted = driven("local_replies_errors")
    nobodys = [a + b for a, b in zip(counted["gamma"], counted[None], strict=True)]
    _, held, rows = metered(tmp_path, "local_replies_errors", NO_ROUTE_HELD)
    (sums,) = held.values()
    assert [*sums[:3]] == nobodys
    assert list(held) == ["no_route"]
    assert rows["counted"] == 8


@pytest.mark.parametrize("flush", [PERIODIC, {}], ids=["periodic", "ends alone"])
def test_a_tcp_connection_is_bytes_and_time_and_no_request(
    flush: Laid, restarts: bool, tmp_path: Path
) -> None:
    by_listener = {"tenant": {"rules": [{"custom_tag": "listener_project"}]}}
    billed, held, _ = metered(tmp_path, "tcp_proxy_final_only", flush, by_listener, restarts=restarts)
    assert billed == {"alpha": (*driven("tcp_proxy_final_only")["alpha"], 2_403_731_064)}
    assert billed["alpha"][0] == 0
    assert held == {}


def test_a_connection_that_names_no_tenant_is_held(tmp_path: Path) -> None:
    billed, held, _ = metered(tmp_path, "tcp_proxy_final_only", PERIODIC)
    assert (billed, held) == ({}, {"no_tenant": (0, 4_200, 4_200, 2_403_731_064)})


@pytest.mark.parametrize("flush", [PERIODIC, {}], ids=["periodic", "ends alone"])
def test_a_header_that_is_no_text_costs_nobody_a_row(flush: Laid, restarts: bool, tmp_path: Path) -> None:
    """Four requests, whole: three of a route without a project, one that the codec refused."""
    billed, held, rows = metered(tmp_path, "invalid_utf8", flush, restarts=restarts)
    assert billed == {}
    assert held == {"no_tenant": (3, 77 + 34 + 58_036, 3 * 118, 150_102 + 73_439 + 473_331)}
    assert rows == {"counted": 3, "skipped/no_route": 1}


def test_every_row_that_arrived_is_counted_when_the_sink_was_away(tmp_path: Path) -> None:
    """756 of 1,200 arrived. Their host had no project: by default they are nobody's."""
    whole = {"tenant": {"rules": [{"literal": "alpha"}]}}
    billed, _, rows = metered(tmp_path, "sink_outage_2s", PERIODIC)
    assert (billed, rows) == ({}, {"skipped/no_route": 756, "skipped/listener": 4})
    (tmp_path / "whole").mkdir()
    billed, _, rows = metered(tmp_path / "whole", "sink_outage_2s", PERIODIC, whole)
    assert billed["alpha"][:3] == (756, 756 * 108, 756 * 97)
    assert rows == {"counted": 756, "skipped/listener": 4}


# ── an Envoy that dies ──


def test_of_a_stream_without_an_end_the_last_totals_are_billed(restarts: bool, tmp_path: Path) -> None:
    """Killed with a WebSocket open, started again with the same node id and connection id 1."""
    name = "envoy_sigkill_mid_websocket_then_restart"
    first, second = truth(name)["driven"]
    billed, held, rows = metered(tmp_path, name, PERIODIC, restarts=restarts)
    # The first stream's last row was written 0.4 s before the end: 5,215 and 5,201 of its bytes are known.
    assert (first["tx_wire"], first["rx_wire"]) == (6_223, 6_205)
    assert billed == {
        "alpha": (2, 5_215 + second["tx_wire"], 5_201 + second["rx_wire"], 1_999_000_000 + 1_203_671_800)
    }
    assert held == {}
    assert rows == {"counted": 4, "skipped/listener": 1}


def test_without_periodic_rows_a_stream_without_an_end_was_never_heard_of(tmp_path: Path) -> None:
    name = "envoy_sigkill_mid_websocket_then_restart"
    second = truth(name)["driven"][1]
    billed, _, rows = metered(tmp_path, name)
    assert billed == {"alpha": (1, second["tx_wire"], second["rx_wire"], 1_203_671_800)}
    assert rows == {"counted": 1, "skipped/periodic": 3, "skipped/listener": 1}


# ── streams of every kind ──

LONG_LIVED = {
    "tenant": {"rules": [{"custom_tag": "project"}, {"literal": "tcp"}]},
    # TCP tunnelled through CONNECT to the same Envoy has rows at both hops; it is counted at the inner one.
    "skip": [{"if": {"log_name": "tcptun"}, "reason": "outer_hop"}],
}


def experiments() -> Iterator[tuple[str, dict[str, Any]]]:
    for experiment in truth("long_lived")["experiments"]:
        yield experiment["exp"], experiment


def test_streams_of_every_kind_are_exact_at_their_end(restarts: bool, tmp_path: Path) -> None:
    exp = dict(experiments())
    billed, held, rows = metered(tmp_path, "long_lived", PERIODIC, LONG_LIVED, restarts=restarts)
    http = ("websocket-periodic", "websocket-final-only", "sse-periodic", "connect-periodic")
    bytes_in = sum(exp[name]["tx"] for name in http)
    bytes_out = sum(exp[name]["rx"] for name in http)
    bytes_in += (
        3_306 + 3_050 + 44 + 51
    )  # gRPC, the CONNECT under TCP, a slow answer, retries: by Envoy's rows
    bytes_out += 3_204 + 3_061 + exp["upstream_log-delay2.3"]["rx"] + exp["upstream_log-retry"]["rx"]
    # Envoy ended twice with WebSockets open: what their last rows said, each a request that expired.
    requests = 8 + 2
    bytes_in += 151 + 1_159
    bytes_out += 181 + 1_185
    ended_ns = (
        *(3_510_964_811, 3_539_415_000, 2_514_503_725, 2_509_559_076, 3_006_191_245, 1_202_853_611),
        *(2_302_107_030, 52_592_928),
    )
    tcp = ("tcp-periodic", "tcp-final-only")
    assert billed == {
        "proj-ws": (requests, bytes_in, bytes_out, sum(ended_ns)),
        # The one that was refused upstream sent 5 bytes that its row does not know of. The one that was open
        # when Envoy ended had passed 100 bytes both ways.
        "tcp": (
            0,
            sum(exp[name]["tx"] for name in tcp) + 100,
            sum(exp[name]["rx"] for name in tcp) + 100,
            3_007_163_697 + 3_013_796_122 + 379_473,
        ),
    }
    assert held == {}
    assert rows == {
        "counted": 33,
        "skipped/start": 11,
        "skipped/connected": 2,
        "skipped/tunnel": 5,
        "skipped/upstream": 10,
        "skipped/outer_hop": 1,
    }


def test_an_owner_of_nobodys_streams_holds_their_ends(tmp_path: Path) -> None:
    """By the shipped rules these rows have no tenant: each end is held in full, periodic rows wait for it."""
    for changes in (PERIODIC, {}):
        path = tmp_path / str(len(changes))
        path.mkdir()
        _, held, rows = metered(path, "long_lived", changes)
        assert held == {"no_tenant": (8, 42_381, 43_345, 25_863_377_607)}
        assert rows["counted"] == 12
        assert rows["skipped/awaits_tenant" if changes else "skipped/periodic"] == 22


def test_upgraded_time_is_that_of_upgrades_and_tcp_alone(restarts: bool, tmp_path: Path) -> None:
    billed, _, _ = metered(tmp_path, "long_lived", PERIODIC, LONG_LIVED, BY_UPGRADE, restarts=restarts)
    # Two WebSockets and two CONNECTs; not SSE, gRPC, the slow answer or the retries.
    assert billed["proj-ws"][3] == 3_510_964_811 + 3_539_415_000 + 2_509_559_076 + 1_202_853_611
    assert billed["tcp"][3] == 3_007_163_697 + 3_013_796_122 + 379_473


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("websocket_periodic", {"alpha": 3_507_172_665, "beta": 902_573_405}),
        # Killed: up to the last row's 1,999 ms.
        ("envoy_sigkill_mid_websocket_then_restart", {"alpha": 1_999_000_000 + 1_203_671_800}),
        ("sse_and_delay", {"alpha": 0, "beta": 0}),
        ("h1_basic", {"alpha": 0, "beta": 0}),
    ],
)
def test_upgraded_time_of_periodic_rows(name: str, expected: dict[str, int], tmp_path: Path) -> None:
    billed, _, _ = metered(tmp_path, name, PERIODIC, BY_UPGRADE)
    assert {tenant: sums[3] for tenant, sums in billed.items()} == expected


# ── connections ──


@pytest.mark.parametrize("flush", [PERIODIC, {}], ids=["periodic", "ends alone"])
def test_connections_belong_to_whom_they_carried(flush: Laid, restarts: bool, tmp_path: Path) -> None:
    name = "h1_keepalive_conn_seconds"
    alpha, beta, silent = truth(name)["driven"]
    billed, held, rows = metered(tmp_path, name, flush, BY_CONNECTION, restarts=restarts)
    counted = driven(name)
    assert billed == {
        "alpha": (*counted["alpha"], 2_105_042_110),
        "beta": (*counted["beta"], 2_111_755_999),
    }
    # A connection that carried nothing is nobody's.
    assert held == {"no_owner": (0, 0, 0, 1_000_337_116)}
    assert rows == {"counted": 9}
    clocks = ((billed["alpha"], alpha), (billed["beta"], beta), (held["no_owner"], silent))
    for sums, client in clocks:
        assert sums[3] // 1_000_000 in (milliseconds(client["open_s"]) - 1, milliseconds(client["open_s"]))


def milliseconds(seconds: float) -> int:
    """The clients wrote seconds with three places."""
    return int(f"{seconds:.3f}".replace(".", ""))


@pytest.mark.parametrize("name", sorted(OPEN_NS.keys() - {"websocket_final_only"}))
def test_connection_time_is_that_of_the_listener_rows(name: str, restarts: bool, tmp_path: Path) -> None:
    owned, nobodys = by_listener_rows(captured(name))
    billed, held, _ = metered(tmp_path, name, PERIODIC, BY_CONNECTION, restarts=restarts)
    assert {tenant: sums[3] for tenant, sums in billed.items()} == owned
    assert sum(sums[3] for sums in held.values()) == nobodys


def by_listener_rows(messages: list[tuple[int, bytes]]) -> tuple[dict[str, int], int]:
    """Nanoseconds that connections were open by project, and those of nobody, joined row by row."""
    owners: dict[str, str] = {}
    connections: list[tuple[str, int]] = []
    for _, raw in messages:
        message = als_pb2.StreamAccessLogsMessage.FromString(raw)
        for row in message.http_logs.log_entry:
            tags = row.common_properties.custom_tags
            project = tags.get("project_name") or tags.get("vhost_project")
            if project:
                owners[tags["conn_id"]] = project
        for row in message.tcp_logs.log_entry:
            common = row.common_properties
            connections.append((common.custom_tags["conn_id"], common.duration.ToNanoseconds()))
    owned: dict[str, int] = {}
    nobodys = 0
    for connection, open_ns in connections:
        if connection in owners:
            owned[owners[connection]] = owned.get(owners[connection], 0) + open_ns
        else:
            nobodys += open_ns
    return owned, nobodys


# ── 50,000 requests of 20 tenants on 40 connections ──

WHOLE = Path(__file__).parents[3] / "shared" / "captures"


@pytest.fixture(scope="module")
def load() -> tuple[Path, str]:
    """The whole recording where it lies beside the checkout, else the part of it that is kept here."""
    return (WHOLE, "load_50k") if (WHOLE / "load_50k.binpb.gz").exists() else (CAPTURES, "load_cut")


@pytest.mark.parametrize("flush", [PERIODIC, {}], ids=["periodic", "ends alone"])
def test_load_is_billed_to_the_byte_and_the_nanosecond(
    load: tuple[Path, str], flush: Laid, tmp_path: Path
) -> None:
    folder, name = load
    messages = captured(name, folder)
    clients = truth(name, folder)["tenants"]
    listener_ns, nobodys_ns = by_listener_rows(messages)
    with Metering(tmp_path, {**flush, **BY_CONNECTION}) as metering:
        metering.messages(messages)
        metering.settle()
        metering.check()
        billed = metering.billed()
        assert metering.held() == {}
        assert metering.rows() == {"counted": sum(client["requests"] for client in clients.values()) + 40}
    assert nobodys_ns == 0  # 40 of 40 are owned
    assert billed == {
        tenant: (client["requests"], client["tx_wire"], client["rx_wire"], listener_ns[tenant])
        for tenant, client in clients.items()
    }
    for tenant, client in clients.items():
        client_ns = client["conn_seconds_us"] * 1_000
        assert abs(billed[tenant][3] - client_ns) * 1_000 <= client_ns, tenant  # 0.1 %: two clocks


def test_the_whole_load_has_bodies_too(load: tuple[Path, str], tmp_path: Path) -> None:
    """``bytes: body`` against the clients' bodies; the part kept here against its own rows."""
    folder, name = load
    bodies: dict[str, list[int]] = {}
    messages = captured(name, folder)
    for _, raw in messages:
        for row in als_pb2.StreamAccessLogsMessage.FromString(raw).http_logs.log_entry:
            have = bodies.setdefault(row.common_properties.custom_tags["project_name"], [0, 0])
            have[0] += row.request.request_body_bytes
            have[1] += row.response.response_body_bytes
    clients = truth(name, folder)["tenants"]
    for tenant, client in clients.items():
        if "tx_body" in client:
            assert bodies[tenant] == [client["tx_body"], client["rx_body"]]
    with Metering(tmp_path, BODIES) as metering:
        metering.messages(messages)
        metering.settle()
        assert {tenant: list(sums[1:3]) for tenant, sums in metering.billed().items()} == bodies
