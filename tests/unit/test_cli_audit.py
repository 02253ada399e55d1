"""``proxy-usage audit``: by the store alone, and refused where it makes no sense."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from cli_call import Caller
from made_store import MadeStore

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
