"""``explain``: the fate of every recorded row, by the service's own fold and rules, and the row in full."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_call import Caller

from proxy_usage.cli.capture import TYPES, read_capture, type_name
from proxy_usage.decode import split
from proxy_usage.errors import DecodeError, UsageError

CAPTURES = Path(__file__).resolve().parents[1] / "data" / "captures"
AT = ["--at", "2026-11-22T00:00:00Z"]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of envoy_data_plane's own models


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    caller = Caller(tmp_path, capsys)
    caller.configure(meters={"requests": {}, "ingress_bytes": {}, "egress_bytes": {}})
    return caller


def explained(call: Caller, name: str, *arguments: str) -> Any:
    return call("explain", str(CAPTURES / f"{name}.binpb"), *AT, "--json", *arguments).json


def test_every_row_has_its_fate_tenant_rule_and_amounts(call: Caller) -> None:
    entries = explained(call, "h1_basic")["entries"]
    assert [one["entry"] for one in entries] == list(range(1, len(entries) + 1))
    listener, request = entries[0], entries[16]
    assert (listener["type"], listener["fate"], listener["reason"]) == ("NotSet", "skipped", "listener")
    assert (listener["tenant"], listener["amounts"], listener["window_ms"]) == (None, {}, None)
    assert (request["type"], request["fate"], request["tenant"]) == ("DownstreamEnd", "counted", "alpha")
    assert request["rule"] == {"index": 0, "field": "custom_tag:project_name"}
    assert request["amounts"] == {"requests": 1, "ingress_bytes": 69, "egress_bytes": 1153}
    assert (request["dimensions"], request["node"], request["log_name"]) == (
        {"region": "gw-0"},
        "envoy-1",
        "http",
    )
    assert {one["fate"] for one in entries[16:]} == {"counted"}


def test_the_amounts_are_those_of_the_clients(call: Caller) -> None:
    entries = explained(call, "h1_basic")["entries"]
    counted = [one["amounts"] for one in entries if one["fate"] == "counted"]
    driven = json.loads((CAPTURES / "h1_basic.truth.json").read_text())["driven"]
    assert sum(one["requests"] for one in counted) == len(driven) > 0
    assert sum(one["ingress_bytes"] for one in counted) == sum(one["tx_wire"] for one in driven)
    assert sum(one["egress_bytes"] for one in counted) == sum(one["rx_wire"] for one in driven)


def test_rows_without_a_tenant_say_why(call: Caller) -> None:
    entries = explained(call, "invalid_utf8")["entries"]
    assert {(one["fate"], one["reason"]) for one in entries} == {
        ("held", "no_tenant"),
        ("skipped", "no_route"),
    }
    call.configure(tenant={"no_route": "hold"})
    entries = explained(call, "invalid_utf8")["entries"]
    assert {(one["fate"], one["reason"]) for one in entries} == {("held", "no_tenant"), ("held", "no_route")}


def test_rows_that_no_rule_matches_and_no_route_took_are_skipped(call: Caller) -> None:
    entries = explained(call, "local_replies_errors")["entries"]
    skipped = [one for one in entries if one["reason"] == "no_route"]
    assert skipped
    assert {one["fate"] for one in skipped} == {"skipped"}
    assert all(one["amounts"] == {} for one in skipped)
    assert any(step["name"] == "tenant" and "no_route" in step["steps"][0] for step in skipped[0]["steps"])


def test_rows_of_long_streams_show_running_totals(call: Caller) -> None:
    assert "periodic" in {one["reason"] for one in explained(call, "websocket_periodic")["entries"]}
    call.configure(envoy={"flush_interval": "1s"})
    streams = [one for one in explained(call, "websocket_periodic")["entries"] if one["fate"] == "stream"]
    assert {one["type"]: one["amounts"]["requests"] for one in streams} == {
        "DownstreamPeriodic": 0,
        "DownstreamEnd": 1,
    }
    assert all(one["amounts"]["connection_seconds"] > 0 for one in streams)


def test_listener_rows_wait_for_those_who_used_the_connection(call: Caller) -> None:
    call.configure(meters={"connection_seconds": {"count": "connections"}})
    entries = explained(call, "h1_basic")["entries"]
    assert (entries[0]["fate"], entries[0]["reason"]) == ("connection", "waits_for_users")
    assert entries[0]["amounts"]["connection_seconds"] == 2_244_727


def test_a_row_far_from_the_present_says_so(call: Caller) -> None:
    capture = str(CAPTURES / "h1_basic.binpb")
    rows = call("explain", capture, "--at", "2020-01-01T00:00:00+01:00", "--json").json["entries"]
    assert rows[16]["notes"] == ["future"]
    assert rows[16]["window_ms"] == 1_577_833_200_000


def test_the_table_and_its_sum(call: Caller) -> None:
    said = call("explain", str(CAPTURES / "local_replies_errors.binpb"), *AT).out
    head, *_ = said.splitlines()
    assert head.split()[:7] == ["entry", "log", "type", "fate", "reason", "tenant", "rule"]
    assert said.endswith("\n16 rows: 2 counted, 8 skipped listener, 6 skipped no_route\n")


def test_one_entry_in_full(call: Caller) -> None:
    shown = explained(call, "h1_basic", "--entry", "17")
    assert shown["typed"]["commonProperties"]["routeName"] == "alpha/size"
    assert shown["typed_error"] is None
    said = call("explain", str(CAPTURES / "h1_basic.binpb"), *AT, "--entry", "17").out
    assert "fate           counted\n" in said
    assert "tenant: 'alpha' in custom_tag:project_name" in said
    assert '"routeName": "alpha/size"' in said
    tcp = explained(call, "h1_basic", "--entry", "1")
    assert (tcp["kind"], tcp["typed"]["connectionProperties"]["receivedBytes"]) == ("tcp", "69")


def test_an_entry_that_the_strict_decoder_refuses_is_explained_all_the_same(call: Caller) -> None:
    shown = explained(call, "invalid_utf8", "--entry", "1")
    assert (shown["fate"], shown["typed"]) == ("held", None)
    assert "UnicodeDecodeError" in shown["typed_error"]
    said = call("explain", str(CAPTURES / "invalid_utf8.binpb"), "--entry", "1").out
    assert "not shown as Envoy's types: UnicodeDecodeError" in said


def test_an_entry_that_is_not_there(call: Caller) -> None:
    answer = call("explain", str(CAPTURES / "h1_basic.binpb"), "--entry", "9999")
    assert answer.code == 2
    assert "there is no row 9999" in answer.err


def test_a_single_message(call: Caller, tmp_path: Path) -> None:
    message = read_capture(CAPTURES / "h1_basic.binpb", raw=False)[0].raw
    path = tmp_path / "one"
    path.write_bytes(message)
    assert len(call("explain", str(path), "--raw", "--json").json["entries"]) == 16


def test_damage_is_told_and_costs_what_lies_behind_it(call: Caller, tmp_path: Path) -> None:
    message = read_capture(CAPTURES / "h1_basic.binpb", raw=False)[1].raw
    whole = len(split(message).entries)
    path = tmp_path / "cut"
    path.write_bytes(message[:-10])
    shown = call("explain", str(path), "--raw", "--json").json
    assert len(shown["entries"]) == whole - 1
    assert "rows behind the damage are lost" in shown["damage"][0]
    assert "\ndamage: message 1: " in call("explain", str(path), "--raw").out


def test_a_malformed_row_costs_itself(call: Caller, tmp_path: Path) -> None:
    path = tmp_path / "row"
    path.write_bytes(b"\x12\x05\x0a\x03\x0a\x01\xff")  # http_logs with one row whose properties are broken
    (row,) = call("explain", str(path), "--raw", "--json").json["entries"]
    assert (row["fate"], row["reason"], row["type"]) == ("invalid", "malformed", "?")
    assert "invalid row (malformed)" in row["complaint"]


def test_an_identifier_that_cannot_be_read_is_damage(call: Caller, tmp_path: Path) -> None:
    path = tmp_path / "identifier"
    path.write_bytes(b"\x0a\x03\x0a\x05\x00")
    shown = call("explain", str(path), "--raw", "--json").json
    assert (shown["entries"], len(shown["damage"])) == ([], 1)
    assert "there are no rows in it" in call("explain", str(path), "--raw").out


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\x05abc", "message 1 at byte 0 does not end"), (b"\x00\xff\xff", "message 2 at byte 1 does not end")],
)
def test_a_file_that_is_cut_names_the_byte(content: bytes, said: str, call: Caller, tmp_path: Path) -> None:
    path = tmp_path / "cut.binpb"
    path.write_bytes(content)
    answer = call("explain", str(path))
    assert answer.code == 1
    assert said in answer.err
    assert "--raw" in answer.err


def test_a_file_that_is_not_there(call: Caller, tmp_path: Path) -> None:
    answer = call("explain", str(tmp_path / "nothing"))
    assert answer.code == 2
    assert "cannot be read" in answer.err


@pytest.mark.parametrize("time", ["yesterday", "2026-09-01T00:00:00", "12"])
def test_a_time_without_zone_is_refused(time: str, call: Caller) -> None:
    answer = call("explain", str(CAPTURES / "h1_basic.binpb"), "--at", time)
    assert answer.code == 2
    assert "is not a time with its zone" in answer.err


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ("[1]", "has 1 stream numbers"),
        ("{", "is not JSON"),
        ('{"a": 1}', "is not a list"),
        ('["1"]', "is not a"),
    ],
)
def test_stream_numbers_must_belong_to_the_file(streams: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.binpb"
    path.write_bytes((CAPTURES / "h1_basic.binpb").read_bytes())
    assert {message.stream for message in read_capture(path, raw=False)} == {1}
    (tmp_path / "x.streams.json").write_text(streams)
    with pytest.raises(UsageError, match=said):
        read_capture(path, raw=False)


def test_each_stream_keeps_its_sender(call: Caller) -> None:
    entries = explained(call, "local_replies_errors")["entries"]
    assert {(one["stream"], one["log_name"]) for one in entries} == {(1, "conn"), (2, "http")}


def test_types_are_called_as_envoy_calls_them() -> None:
    from envoy_data_plane.envoy.data.accesslog.v3 import AccessLogCommon, AccessLogType, HttpAccessLogEntry

    assert list(TYPES) == [kind.name for kind in sorted(AccessLogType, key=lambda kind: kind.value)]
    for number, name in enumerate(TYPES):
        common = AccessLogCommon(access_log_type=AccessLogType(number), stream_id="x", sample_rate=0.5)
        assert type_name(bytes(HttpAccessLogEntry(common_properties=common))) == name
    assert type_name(b"\x0a\x03\x88\x02\x63") == "99"
    assert type_name(b"\x0b") == "?"


def test_a_length_that_never_ends_is_no_message(tmp_path: Path) -> None:
    path = tmp_path / "x.binpb"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(DecodeError, match="message 1 at byte 0"):
        read_capture(path, raw=False)
