"""The audit among Envoys and sinks that are played: whom it asks, whom it believes, what it keeps."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from proxy_usage.audit import Asker, Auditor, Envoy, Received, report
from proxy_usage.audit.exposition import read_stats
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.errors import StoreError
from proxy_usage.figures import Figures, Sent
from proxy_usage.intake import HTTP, OTHERS, TCP, Source, label
from proxy_usage.metrics import MAX_NODES_NAMED, Metrics
from proxy_usage.store import Database
from proxy_usage.store.audits import Audits
from proxy_usage.store.history import HOUR_MS
from proxy_usage.store.thread import StoreThread

STATS = """\
# TYPE envoy_access_logs_grpc_access_log_logs_written counter
envoy_access_logs_grpc_access_log_logs_written{{}} {rows}
envoy_access_logs_grpc_access_log_logs_dropped{{}} 3
envoy_access_logs_grpc_access_log_grpc_entries_flushed{{}} {flushed}
envoy_access_logs_grpc_access_log_grpc_entries_flush_failed{{}} 0
envoy_http_downstream_rq_total{{envoy_http_conn_manager_prefix="admin"}} 400
envoy_http_downstream_rq_total{{envoy_http_conn_manager_prefix="ingress"}} {rows}
envoy_http_downstream_rq_total{{envoy_http_conn_manager_prefix="stats"}} 70
envoy_http_downstream_rq_active{{envoy_http_conn_manager_prefix="ingress"}} 2
envoy_http_downstream_rq_active{{envoy_http_conn_manager_prefix="stats"}} 1
envoy_http_downstream_cx_active{{envoy_http_conn_manager_prefix="admin"}} 1
envoy_http_downstream_cx_active{{envoy_http_conn_manager_prefix="stats"}} 1
envoy_http_downstream_cx_rx_bytes_total{{envoy_http_conn_manager_prefix="ingress"}} 1000
envoy_http_downstream_cx_tx_bytes_total{{envoy_http_conn_manager_prefix="ingress"}} 9000
envoy_listener_downstream_cx_active{{envoy_listener_address="0.0.0.0_19001"}} 1
envoy_listener_downstream_cx_active{{envoy_listener_address="0.0.0.0_80"}} 4
envoy_listener_admin_downstream_cx_active{{}} 1
envoy_listener_manager_total_listeners_active{{}} 2
envoy_listener_manager_listener_stopped{{}} {stopped}
envoy_listener_manager_listener_removed{{}} 0
envoy_server_state{{}} 0
envoy_server_live{{}} {live}
envoy_server_uptime{{}} {uptime}
envoy_server_initialization_time_ms_sum{{}} 124.7999999
"""


def stats(rows: int = 100, flushed: int | None = None, **how: int) -> str:
    values = {"stopped": 0, "live": 1, "uptime": 60} | how
    return STATS.format(rows=rows, flushed=rows if flushed is None else flushed, **values)


def test_counters_are_read_off_what_envoy_answers() -> None:
    assert read_stats(stats(100, 120), "logs", ["ingress"]) == Sent(
        sent=120,
        written=100,
        dropped=3,
        requests=100,
        bytes_in=1000,
        bytes_out=9000,
        uptime_s=60,
        connections=4,  # not the one that asks
    )


def test_requests_that_ended_are_counted_where_log_counters_are_shared() -> None:
    found = read_stats(stats(100), "requests", ["ingress"])
    assert found is not None
    assert (found.sent, found.written, found.dropped, found.requests) == (98, 98, 0, 100)
    everyone = read_stats(stats(100), "requests")
    assert everyone is not None
    assert everyone.sent == 98 + 69  # of every manager but Envoy's own


@pytest.mark.parametrize(
    ("how", "draining"), [({}, False), ({"stopped": 1}, False), ({"stopped": 2}, True), ({"live": 0}, True)]
)
def test_an_envoy_on_its_way_out_is_known(how: Mapping[str, int], draining: bool) -> None:
    found = read_stats(stats(**how), "logs")
    assert found is not None
    assert found.draining is draining


@pytest.mark.parametrize("text", ["", "<html>404</html>", 'up{job="x"} 1\n', "envoy_server_uptime x\n"])
def test_what_is_no_envoy_is_none(text: str) -> None:
    assert read_stats(text, "logs") is None


class Site:
    """An auditor, the sinks and Envoys that it asks, and a clock."""

    def __init__(self, path: Path) -> None:
        self.now_ms = 1_800_000_000_000
        self.store = Database(path / "usage.db")
        self.audits = Audits(self.store, keep_ms=10 * HOUR_MS)
        self.thread = StoreThread()
        self.metrics = Metrics()
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, str]] = []
        self.names = {"envoys.test": ["127.0.0.1"], "sinks.test": ["127.0.0.1"]}
        self.own = received("own", edge=100)
        self.siblings: dict[str, Received | None] = {}
        self.port = 0

    async def ask_siblings(self) -> dict[str, Received | None]:
        return self.siblings

    async def serve(self, request: web.Request) -> web.Response:
        host = request.host.partition(":")[0]
        self.asked.append((host + request.path, request.headers.get("Authorization", "")))
        local = request.transport.get_extra_info("sockname")[0] if request.transport else ""
        answer = self.answers.get(f"{local}{request.path}", self.answers.get(request.path))
        if answer is None:
            raise web.HTTPNotFound
        return web.json_response(answer) if isinstance(answer, dict | list) else web.Response(text=answer)

    async def resolve(self, host: str) -> Sequence[str]:
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    def url(self, name: str) -> str:
        return f"http://{name}:{self.port}"

    def auditor(
        self,
        *envoys: Envoy,
        members: Sequence[str] = (),
        token: TokenFile | None = None,
    ) -> tuple[Auditor, Asker]:
        asker = Asker(token, self.resolve)
        made = Auditor(
            envoys or [Envoy(self.url("envoys.test"))],
            [self.url(name) for name in members],
            own=lambda: self.own,
            siblings=self.ask_siblings,
            asker=asker,
            store=self.audits,
            thread=self.thread,
            metrics=self.metrics,
            settle_ms=1,
            interval_ms=60_000,
            clock_ms=self.tick,
        )
        return made, asker

    def tick(self) -> int:
        self.now_ms += 1_000
        return self.now_ms

    async def rounds(self, auditor: tuple[Auditor, Asker], *, count: int = 2) -> dict[str, Any]:
        made, asker = auditor
        async with asker:
            for _ in range(count):
                await made.round()
        latest: dict[str, Any] = made.latest()
        return latest


def received(sink: str, live: Sequence[str] = ("127.0.0.1",), /, **rows: int) -> Received:
    return report(
        sink,
        1,
        {Source(node, "http", HTTP): count for node, count in rows.items()},
        ended={},
        losses={name: {} for name in ("crash_lost", "crash_lost_http", "crash_unknown")},
        live={node: tuple(live) for node in rows},
        seen={},
    )


def as_json(found: Received) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(found)
    return plain


@contextlib.asynccontextmanager
async def site(path: Path) -> AsyncIterator[Site]:
    made = Site(path)
    app = web.Application()
    app.router.add_get("/{path:.*}", made.serve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listening = web.TCPSite(runner, "0.0.0.0", 0)
    await listening.start()
    made.port = runner.addresses[0][1]
    made.answers["/stats/prometheus"] = stats(100)
    try:
        yield made
    finally:
        await runner.cleanup()
        made.thread.close()
        made.store.close()


def only(latest: Mapping[str, Any]) -> dict[str, Any]:
    (node,) = latest["nodes"]
    found: dict[str, Any] = node
    return found


async def test_all_sinks_are_added_and_this_one_is_counted_once(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.answers["127.0.0.1/api/intake"] = as_json(here.own)
        here.answers["127.0.0.2/api/intake"] = as_json(received("other", edge=40))
        here.names["sinks.test"] = ["127.0.0.1", "127.0.0.2"]
        here.answers["/stats/prometheus"] = stats(140)
        auditor = here.auditor(members=["sinks.test"])
        await here.rounds(auditor)
        here.answers["/stats/prometheus"] = stats(200, uptime=70)
        here.own = received("own", edge=120)
        here.answers["127.0.0.2/api/intake"] = as_json(received("other", edge=55))
        latest = await here.rounds(auditor, count=1)
        node = only(latest)
        assert (node["node"], node["state"], node["flushed"], node["received"]) == ("edge", "missing", 60, 35)
        assert node["missing"] == node["at_least"] == node["at_most"] == 25
        assert latest["sinks"] == ["other", "own"]
        assert latest["summary"] == {"complete": 0, "missing": 1, "unknown": 0, "missing_entries": 25}


async def test_each_worker_is_a_sink_of_its_own_and_is_counted_once(tmp_path: Path) -> None:
    """This sink's, who are asked beside, and those of a member that answers for all of them."""
    async with site(tmp_path) as here:
        here.siblings = {"worker 1": received("own-1", edge=30)}
        here.answers["/api/intake"] = [as_json(received(name, edge=10)) for name in ("far-0", "far-1")]
        here.answers["127.0.0.1/api/intake"] = [as_json(here.own), as_json(received("own-1", edge=30))]
        here.names["sinks.test"] = ["127.0.0.1", "127.0.0.2"]
        here.answers["/stats/prometheus"] = stats(150)
        auditor = here.auditor(members=["sinks.test"])
        latest = await here.rounds(auditor)
        assert latest["sinks"] == ["far-0", "far-1", "own", "own-1"]
        assert only(latest)["state"] == "complete"
        here.siblings = {"worker 1": None}
        here.names["sinks.test"] = ["127.0.0.2"]
        latest = await here.rounds(auditor, count=1)
        assert latest["away"] == ["worker 1"]
        assert (only(latest)["state"], only(latest)["reason"]) == ("unknown", "a sink is away")


async def test_a_sink_that_does_not_answer_is_named_and_nothing_is_called_missing(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        latest = await here.rounds(here.auditor(members=["sinks.test", "gone.test"]))
        assert latest["away"] == [f"{here.url('sinks.test')} at 127.0.0.1", here.url("gone.test")]
        assert only(latest)["state"] == "unknown"


async def test_other_sinks_get_the_token_and_envoys_do_not(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    async with site(tmp_path) as here:
        here.answers["/api/intake"] = as_json(received("other"))
        await here.rounds(here.auditor(members=["sinks.test"], token=TokenFile(tmp_path / "token")))
        given = dict(here.asked)
        assert given["sinks.test/api/intake"] == "Bearer s3cret"
        assert given["envoys.test/stats/prometheus"] == given["envoys.test/server_info"] == ""


async def test_each_address_of_a_name_is_an_envoy(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.names["envoys.test"] = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
        here.own = received("own", ["127.0.0.1"], edge=100)
        other = received("own", ["127.0.0.2"], cloud=100)
        here.own.nodes.update(other.nodes)
        nodes = {node["node"]: node for node in (await here.rounds(here.auditor()))["nodes"]}
        assert {name: node["state"] for name, node in nodes.items()} == {
            "edge": "complete",
            "cloud": "complete",
            f"{here.url('envoys.test')} at 127.0.0.3": "unknown",
        }
        assert "no log stream" in nodes[f"{here.url('envoys.test')} at 127.0.0.3"]["reason"]


async def test_two_envoys_at_one_address_are_told_apart_or_not_audited(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as here:
        here.own = received("own", edge=100, cloud=100)
        latest = await here.rounds(here.auditor())
        told = {node["node"]: node["reason"] for node in latest["nodes"]}
        assert told.pop(f"{here.url('envoys.test')} at 127.0.0.1").startswith("2 nodes log from its address")
        assert set(told) == {"cloud", "edge"}  # they log here, and are nobody that is asked
        assert all("no URL of audit.envoys" in reason for reason in told.values())
        here.answers["/server_info"] = {"node": {"id": "cloud"}}
        states = {node["node"]: node["state"] for node in (await here.rounds(here.auditor()))["nodes"]}
        assert states == {"cloud": "complete", "edge": "unknown"}
        named = here.auditor(Envoy(here.url("envoys.test"), "edge"))
        states = {node["node"]: node["state"] for node in (await here.rounds(named))["nodes"]}
        assert states["edge"] == "complete"


async def test_long_names_are_compared_as_the_sinks_know_them(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        name = "n" * 300
        here.answers["/server_info"] = {"node": {"id": name}}
        here.own = received("own", **{label(name): 100})
        assert only(await here.rounds(here.auditor()))["state"] == "complete"


async def test_a_node_that_no_sink_counts_apart_is_unknown(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.answers["/server_info"] = {"node": {"id": "one too many"}}
        here.own.nodes[OTHERS] = here.own.nodes.pop("edge")
        nodes = {node["node"]: node for node in (await here.rounds(here.auditor()))["nodes"]}
        assert nodes["one too many"]["state"] == "unknown"
        assert "does not count apart" in nodes["one too many"]["reason"]


async def test_two_addresses_that_are_one_node_are_not_audited(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.names["envoys.test"] = ["127.0.0.1", "127.0.0.2"]
        here.answers["/server_info"] = {"node": {"id": "edge"}}
        assert "several addresses" in only(await here.rounds(here.auditor()))["reason"]


async def test_what_was_found_is_kept_by_hour_and_a_new_process_goes_on(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        here.answers["/server_info"] = {"node": {"id": "edge"}}
        await here.rounds(here.auditor())
        here.now_ms += HOUR_MS
        here.answers["/stats/prometheus"] = stats(150, uptime=4_000)
        here.own = received("own", edge=143)
        fresh = here.auditor()
        await fresh[0]._begin()
        assert only(await here.rounds(fresh, count=1))["missing"] == 7
        hours = here.audits.hours(0)
        assert [(hour.node, hour.figures.missing) for hour in hours] == [("edge", 0), ("edge", 7)]
        assert hours[0].figures.to_ms <= hours[1].figures.from_ms + 1
        assert hours[1].hour_ms == hours[0].hour_ms + HOUR_MS
        assert here.audits.bound(1) == 1
        assert [hour.hour_ms for hour in here.audits.hours(0)] == [hours[1].hour_ms]
        here.audits.save({}, [], hours[1].hour_ms + 11 * HOUR_MS)
        assert here.audits.hours(0) == ()


async def test_a_round_that_the_store_refuses_was_none(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        auditor = here.auditor()
        await here.rounds(auditor)
        here.answers["/stats/prometheus"] = stats(150, uptime=70)
        here.own = received("own", edge=120)
        here.store.db.execute("PRAGMA query_only=1")
        with pytest.raises(StoreError):
            await here.rounds(auditor, count=1)
        assert only(auditor[0].latest())["missing"] == 0
        here.store.reopen()
        assert only(await here.rounds(auditor))["missing"] == 30
        assert sum(hour.figures.missing for hour in here.audits.hours(0)) == 30


async def test_metrics_name_so_many_nodes_and_no_more(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        auditor, _ = here.auditor()
        found = [(f"node-{n:04}", Figures(from_ms=1, to_ms=here.now_ms, missing=2)) for n in range(150)]
        auditor._ledger.add(found, [], here.now_ms)
        auditor._ledger.gauges(here.metrics, here.now_ms)
        text = here.metrics.exposition().decode()
        assert text.count("proxy_usage_audit_missing_entries{") == MAX_NODES_NAMED + 1
        assert f'proxy_usage_audit_missing_entries{{node="{OTHERS}"}} 100.0' in text
        assert 'proxy_usage_audit_nodes{state="missing"} 150.0' in text


def test_a_sink_says_what_it_received_by_log() -> None:
    found = report(
        "own",
        1,
        {Source("edge", "http", HTTP): 5, Source("edge", "conn", TCP): 2, Source("edge"): 9},
        ended={"edge": 4},
        losses={"crash_lost": {"edge": 3}, "crash_lost_http": {"edge": 1}, "crash_unknown": {}},
        live={"edge": ("10.0.0.1",)},
        seen={"edge": ("10.0.0.1", "10.0.0.2")},
    )
    node = found.nodes["edge"]
    assert (node.http, node.tcp, node.ended) == (5, 2, 4)  # what was counted before logs were is in none
    assert [(log.log, log.kind, log.rows) for log in node.logs] == [
        ("", "", 9),
        ("conn", TCP, 2),
        ("http", HTTP, 5),
    ]
    assert found.got("edge", "logs").rows == 7
    assert (found.got("edge", "requests").rows, found.got("edge", "requests").http) == (4, 4)
