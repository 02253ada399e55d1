"""``proxy-usage audit``: by the store alone, and refused where it makes no sense."""

from __future__ import annotations

import asyncio
import csv
import io
from pathlib import Path

import pytest
from cli_call import Caller
from made_store import MadeStore

from proxy_usage.completeness import Track
from proxy_usage.control import ControlServer, socket_path
from proxy_usage.figures import Figures
from proxy_usage.store.audits import Audits
from proxy_usage.store.history import HOUR_MS

DAY = 1_800_000_000_000 - 1_800_000_000_000 % (24 * HOUR_MS)


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    caller = Caller(tmp_path, capsys)
    with MadeStore(caller.store) as store:
        audits = Audits(store.database, keep_ms=400 * 24 * HOUR_MS)
        for hour in range(3):
            at_ms = DAY + hour * HOUR_MS
            whole = Figures(from_ms=at_ms, to_ms=at_ms + 1, written=100, flushed=110, received=110)
            lost = Figures(
                from_ms=at_ms, to_ms=at_ms + 1, written=100, flushed=110, received=103, missing=7,
                missing_http=6, missing_tcp=1, requests=6, bytes_in=600, bytes_out=6_000,
            )  # fmt: skip
            audits.save({}, [("edge-1", whole), ("edge-2", lost if hour == 1 else whole)], at_ms)
    return caller


def test_a_month_is_summed_by_node_and_told_by_hour(call: Caller) -> None:
    said = call("audit", "--from", "2027-01-15T00:00:00Z", "--to", "2027-01-15T03:00:00Z", "--json")
    assert said.code == 1  # not every node is complete
    nodes = {node["node"]: node for node in said.json["nodes"]}
    assert (nodes["edge-1"]["state"], nodes["edge-1"]["written"]) == ("complete", 300)
    found = nodes["edge-2"]
    assert (found["state"], found["missing"], found["at_least"], found["at_most"]) == ("missing", 7, 7, 7)
    assert (found["requests"], found["bytes_out"]) == (6, 6_000)
    assert [hour["missing"] for hour in said.json["hours"] if hour["node"] == "edge-2"] == [0, 7, 0]


def test_a_time_is_from_one_hour_up_to_another(call: Caller) -> None:
    said = call("audit", "--from", "2027-01-15T02:00:00Z", "--json")
    assert said.code == 0
    assert [node["state"] for node in said.json["nodes"]] == ["complete", "complete"]


def test_dates_are_midnights(call: Caller) -> None:
    said = call("audit", "--from", "2027-01-15", "--to", "2027-01-16", "--json")
    assert (said.json["from_ms"], said.json["to_ms"]) == (DAY, DAY + 24 * HOUR_MS)
    assert len(said.json["hours"]) == 6


def test_the_report_is_a_line_a_node(call: Caller) -> None:
    said = call("audit", "--to", "2028-01-01T00:00:00Z", "--csv")
    lines = list(csv.DictReader(io.StringIO(said.out)))
    assert [(line["node"], line["missing"], line["requests"], line["unknown"]) for line in lines] == [
        ("edge-1", "0", "0", "0"),
        ("edge-2", "7", "6", "0"),
    ]


def test_people_see_the_estimate_beside_the_gap(call: Caller) -> None:
    said = call("audit", "--to", "2028-01-01T00:00:00Z")
    assert "edge-2  missing" in said.out
    assert "estimate of what was not billed" in said.out
    assert "6000" in said.out.splitlines()[-1]


def test_nothing_audited_is_no_success(call: Caller) -> None:
    for form in ((), ("--json",), ("--csv",)):
        said = call("audit", "--from", "2028-01-01T00:00:00Z", *form)
        assert said.code == 1
        assert "no Envoy is configured to be audited: audit.envoys names" in said.out + said.err
    assert len(call("audit", "--from", "2028-01-01T00:00:00Z", "--csv").out.splitlines()) == 1


def test_a_configured_envoy_without_an_hour_is_unknown(call: Caller) -> None:
    call.configure(audit={"envoys": [{"url": "http://127.0.0.1:1", "node": "edge-3"}]})
    said = call("audit", "--from", "2027-01-15T02:00:00Z", "--json")
    assert said.code == 1
    nodes = {node["node"]: node for node in said.json["nodes"]}
    assert {node: one["state"] for node, one in nodes.items()} == {
        "edge-1": "complete",
        "edge-2": "complete",
        "edge-3": "unknown",
    }
    assert (nodes["edge-3"]["flushed"], nodes["edge-3"]["at_most"]) == (0, None)
    people = call("audit", "--from", "2028-01-01T00:00:00Z")
    assert people.code == 1
    assert "edge-3: it is configured, but no hour of it is recorded in that time" in people.out
    lines = list(csv.DictReader(io.StringIO(call("audit", "--from", "2028-01-01T00:00:00Z", "--csv").out)))
    assert [(line["node"], line["state"], line["at_most"]) for line in lines] == [("edge-3", "unknown", "")]


@pytest.mark.parametrize(
    ("envoys", "known_as", "unknown"),
    [
        (["http://a:1"], {}, []),  # it may be either of the two that are recorded
        (["http://a:1", "http://b:1"], {"http://a:1 at 10.0.0.1": "edge-1"}, []),  # b may be edge-2
        (["http://a:1", "http://b:1"], {"http://a:1": "edge-1", "http://gone:1": "edge-2"}, ["http://b:1"]),
        ([{"url": "http://a:1", "node": "edge-1"}, {"url": "http://b:1", "node": "edge-2"}], {}, []),
        (
            [{"url": f"http://{name}:1", "node": f"edge-{name}"} for name in (1, 2)] + ["http://b:1"],
            {"http://b:1": "edge-3"},
            ["http://b:1"],
        ),
    ],
)
def test_an_envoy_that_names_no_node_is_unknown_where_no_recorded_node_can_be_it(
    call: Caller, envoys: list[object], known_as: dict[str, str], unknown: list[str]
) -> None:
    call.configure(audit={"envoys": envoys})
    with MadeStore(call.store) as store:
        tracks = {key: Track(node) for key, node in known_as.items()}
        Audits(store.database, keep_ms=400 * 24 * HOUR_MS).save(tracks, [], DAY)
    nodes = call("audit", "--from", "2027-01-15T02:00:00Z", "--json").json["nodes"]
    assert [node["node"] for node in nodes if node["state"] == "unknown"] == unknown


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--watch", "--csv"), "--watch shows the present"),
        (("--from", "yesterday"), "RFC 3339"),
        (("--from", "2027-01-15T00:00:00Z", "--to", "2027-01-15T00:00:00Z"), "--to is not after --from"),
    ],
)
def test_what_makes_no_sense_is_refused(call: Caller, arguments: tuple[str, ...], what: str) -> None:
    said = call("audit", *arguments)
    assert said.code == 2
    assert what in said.err


def test_the_present_is_known_to_the_service_alone(call: Caller) -> None:
    said = call("audit")
    assert said.code == 1
    assert "no service listens" in said.err


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"nodes": []}, "no Envoy is configured to be audited"),
        ({"nodes": [], "at_ms": 0}, "the first round of the audit is under way"),
    ],
)
async def test_a_service_that_has_audited_nothing_says_why(
    call: Caller, answer: dict[str, object], said: str
) -> None:
    async def audit(_: dict[str, object]) -> object:
        return answer

    server = ControlServer(socket_path(call.store), {"audit": audit})
    await server.start()
    try:
        for form in ((), ("--csv",)):
            asked = await asyncio.to_thread(call, "audit", *form)
            assert asked.code == 1
            assert said in asked.out + asked.err
    finally:
        await server.close()
