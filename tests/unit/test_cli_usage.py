"""``usage`` and ``explain ID``: what people, spreadsheets and programs are told of a bill."""

import csv
import io
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from cli_call import Caller
from made_store import MINUTE, START, MadeStore

from proxy_usage.events import rfc3339
from proxy_usage.model import Key
from proxy_usage.origins import RowOrigin
from proxy_usage.store import Fate, Retention, Turn
from proxy_usage.windows import WindowTurn

module = import_module("proxy_usage.cli.usage")  # the verb has the name of its module
HOUR = 3_600_000
SECOND = 10**9
RULE = "0 custom_tag: project_name"
TIME = ("--from", rfc3339(START), "--to", rfc3339(START + HOUR))
DEAD = Fate("dead", 200, "not_accepted", "=no such account")


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.delenv("PROXY_USAGE_CONFIG", raising=False)
    return Caller(tmp_path, capsys)


def fill(path: Path) -> tuple[str, ...]:
    """3 requests and 7 s, delivered to billing but for the seconds; nothing was sent to shadow yet."""
    with MadeStore(path, ("billing", "shadow")) as store:
        store.use("alpha", 3, 7 * SECOND)
        store.use("bravo", 2, 0)
        store.hold("unmapped", b"x", 5, 0)
        ids = store.close_windows()
        store.answer(store.send(), Fate("delivered", 200), DEAD, Fate("delivered", 200))
        told(store, RowOrigin(START, Key("alpha", ("eu",)), RULE, "node-a", 3))
    return ids


def told(store: MadeStore, *origins: RowOrigin) -> None:
    empty = WindowTurn()
    store.checkpoints.commit(Turn(empty, (0, 0), origins=origins), store.mint, START)


# --- people -----------------------------------------------------------------------------------------


def test_people_see_events_sums_and_where_rows_came_from(call: Caller) -> None:
    requests, seconds, _ = fill(call.store)
    answer = call("usage", "--tenant", "alpha", *TIME, "--output", "billing")
    assert answer.code == 0, answer
    said = answer.out.splitlines()
    assert said[0] == f"alpha, {rfc3339(START)} to {rfc3339(START + HOUR)}"
    at = rfc3339(START + 4 * MINUTE)
    heading = "window meter value fate output at status event nodes dimensions notes"
    window, why = rfc3339(START), "not_accepted; =no such account"
    assert [" ".join(line.split()) for line in said[1:4]] == [
        heading,
        f"{window} connection_seconds 7 dead billing {at} - {seconds} node-a region=eu {why}",
        f"{window} requests 3 delivered billing {at} 200 {requests} node-a region=eu",
    ]
    sums = said[said.index("all together:") + 1 :]
    assert [" ".join(line.split()) for line in sums[:3]] == [
        "meter output events used delivered waiting dead unconfirmed other",
        "connection_seconds billing 1 7 0 0 7 0 0",
        "requests billing 1 3 3 0 0 0 0",
    ]
    assert f"node-a  {RULE}     3" in answer.out
    assert "1 rows of these hours are held for nobody (unmapped)" in answer.out
    assert "proxy-usage unattributed ls" in answer.out
    assert requests not in call("usage", "--tenant", "bravo", *TIME).out


def test_a_tenant_without_usage_is_told_so(call: Caller) -> None:
    fill(call.store)
    answer = call("usage", "--tenant", "nobody", *TIME)
    assert answer.code == 0
    assert "no usage of this tenant is known in that time" in answer.out


def test_many_lines_are_cut_for_people_and_summed_whole(
    call: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHOWN", 1)
    fill(call.store)
    answer = call("usage", "--tenant", "alpha", *TIME)
    assert "and 3 more lines: --json and --csv have all" in answer.out
    assert answer.out.count("\nrequests ") == 2


def test_dates_are_midnights(call: Caller) -> None:
    fill(call.store)
    day = rfc3339(START)[:10]
    answer = call("usage", "--tenant", "alpha", "--from", day, "--to", "2100-01-01", "--json")
    assert answer.json["from_ms"] == START - START % (24 * HOUR)
    assert len(answer.json["lines"]) == 4


def test_old_hours_and_open_windows_are_said(call: Caller) -> None:
    fill(call.store)
    with MadeStore(call.store, ("billing", "shadow")) as store:
        Retention(
            store.database,
            ledger_max_bytes=1 << 30,
            keep_delivered_ms=HOUR,
            keep_sums_ms=400 * 24 * HOUR,
            keep_held_ms=HOUR,
        ).roll(START + 3 * HOUR)
        store.use("alpha", 1, 0)
        store.turn()
    answer = call("usage", "--tenant", "alpha", *TIME, "--output", "billing")
    assert "1 events of this hour" in answer.out
    assert "of what was settled, hours are known and no single events" in answer.out
    assert "1 windows are open: what is in them is no event yet" in answer.out
    inside = call("usage", "--tenant", "alpha", "--from", rfc3339(START + MINUTE), "--to", "2100-01-01")
    assert inside.code == 2
    assert inside.out == ""
    assert "lies within an hour of which the store keeps only the sum" in inside.err


# --- programs and spreadsheets ------------------------------------------------------------------------


def test_json_has_every_line_and_what_they_come_to(call: Caller) -> None:
    requests, seconds, _ = fill(call.store)
    data = call("usage", "--tenant", "alpha", *TIME, "--json").json
    assert [(one["id"], one["output"], one["fate"], one["value"]) for one in data["lines"]] == [
        (seconds, "billing", "dead", 7),
        (seconds, "shadow", "pending", 7),
        (requests, "billing", "delivered", 3),
        (requests, "shadow", "pending", 3),
    ]
    first = data["lines"][0]
    assert first["window_ms"] == START
    assert first["minted_ms"] == START + 2 * MINUTE
    assert first["at_ms"] == START + 4 * MINUTE
    assert (first["reason"], first["answer"]) == ("not_accepted", "=no such account")
    assert first["sources"] == [{"node": "node-a", "rule": RULE, "rows": 3}]
    assert {(one["meter"], one["output"], one["used"], one["delivered"]) for one in data["sums"]} == {
        ("connection_seconds", "billing", 7, 0),
        ("connection_seconds", "shadow", 7, 0),
        ("requests", "billing", 3, 3),
        ("requests", "shadow", 3, 0),
    }
    assert data["sources"] == [{"node": "node-a", "rule": RULE, "rows": 3}]
    (held,) = data["notes"]["held"]
    assert (held["reason"], held["rows"], held["amounts"]["requests"]) == ("unmapped", 1, 5)


def test_csv_has_stable_columns_and_no_formulas(call: Caller) -> None:
    fill(call.store)
    with MadeStore(call.store, ("billing", "shadow")) as store:
        told(store, RowOrigin(START, Key("alpha", ("eu",)), RULE, "=cmd", 1))
    answer = call("usage", "--tenant", "alpha", *TIME, "--csv")
    lines = list(csv.reader(io.StringIO(answer.out)))
    assert tuple(lines[0]) == module.COLUMNS
    assert len(lines) == 5
    row = dict(zip(lines[0], lines[1], strict=True))
    assert (row["meter"], row["value"], row["fate"], row["output"]) == (
        "connection_seconds",
        "7",
        "dead",
        "billing",
    )
    assert row["answer"] == "'=no such account"
    assert row["nodes"] == '["=cmd", "node-a"]'
    assert row["dimensions"] == '{"region": "eu"}'
    assert row["window"] == rfc3339(START)
    assert not any(cell.startswith(("=", "+", "@")) for line in lines for cell in line)


@pytest.mark.parametrize(
    ("by", "group"), [("hour", {"hour_ms": START}), ("meter", {}), ("route", {"route": "eu"})]
)
def test_usage_is_added_up_by(by: str, group: dict[str, object], call: Caller) -> None:
    call.configure(dimensions={"route": {"route_name": True}})
    fill(call.store)
    with MadeStore(call.store, ("billing", "shadow")) as store:
        store.database.db.execute("""UPDATE keys SET dimensions='{"route":"eu"}'""")
    data = call("usage", "--tenant", "alpha", *TIME, "--by", by, "--json").json
    assert "lines" not in data
    assert [one["group"] for one in data["groups"]] == [group] * 4
    assert [(one["meter"], one["output"], one["used"]) for one in data["groups"]] == [
        ("connection_seconds", "billing", 7),
        ("connection_seconds", "shadow", 7),
        ("requests", "billing", 3),
        ("requests", "shadow", 3),
    ]
    people = call("usage", "--tenant", "alpha", *TIME, "--by", by).out
    assert ("all together:" in people) == bool(group)
    lines = list(csv.reader(io.StringIO(call("usage", "--tenant", "alpha", *TIME, "--by", by, "--csv").out)))
    assert tuple(lines[0]) == module.GROUP_COLUMNS
    assert ["billing", "alpha", "requests", lines[3][3], "delivered", "3", "1"] in lines


def test_what_cannot_be_answered_is_said_before_anything_is_written(call: Caller) -> None:
    fill(call.store)
    for arguments, words in (
        ((*TIME, "--json", "--csv"), "--json and --csv exclude each other"),
        ((*TIME, "--by", "route"), "no dimension reads a route's name"),
        ((*TIME, "--output", "elsewhere", "--json"), "there is no output 'elsewhere'"),
        (("--from", "2026-11-02", "--to", "2026-11-01"), "--to is not after --from"),
        (("--from", "yesterday", "--to", "2026-11-01"), "write a date, e.g. 2026-09-01, or an RFC 3339 time"),
    ):
        answer = call("usage", "--tenant", "alpha", *arguments)
        assert (answer.code, answer.out) == (2, ""), answer
        assert words in answer.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("form", ["--csv", "--json"])
def test_an_answer_that_cannot_be_written_is_an_error_in_words(call: Caller, form: str) -> None:
    fill(call.store)
    words = ("usage", "--config", str(call.config), "--tenant", "alpha", *TIME, form)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "proxy_usage", *words], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (
        1,
        b"error: cannot write the answer: No space left on device\n",
    )


# --- one event ----------------------------------------------------------------------------------------


def test_explain_walks_an_event_back(call: Caller) -> None:
    requests, seconds, _ = fill(call.store)
    answer = call("explain", seconds)
    assert answer.code == 0, answer
    for text in (
        "connection_seconds  7",
        f"{RULE}  node-a     3",
        "not_accepted  =no such account",
        '"subject": "projects/alpha"',
        f"proxy-usage deadletters show {seconds}",
        f"proxy-usage queue show {seconds}",
        f"proxy-usage usage --tenant alpha --from {rfc3339(START)} --to {rfc3339(START + HOUR)}",
    ):
        assert text in answer.out
    data = call("explain", requests, "--json").json
    assert data["event"]["cloudevent"]["id"] == requests
    assert {place["output"]: place["state"] for place in data["event"]["places"]} == {
        "billing": "delivered",
        "shadow": "pending",
    }
    assert data["sources"] == [{"node": "node-a", "rule": RULE, "rows": 3}]
    assert len(data["more"]) == 2


def test_explain_says_what_was_merged_and_what_is_late(call: Caller) -> None:
    fill(call.store)
    with MadeStore(call.store, ("billing", "shadow")) as store:
        store.use("alpha", 4, 0, now_ms=START + 5 * MINUTE)
        (late,) = store.turn(START + 7 * MINUTE)
        store.database.db.execute("INSERT INTO merges VALUES(?,?,?,2)", (late, START, 3))
    answer = call("explain", late)
    assert "late part" in answer.out
    assert f"3 events of windows from {rfc3339(START)} on" in answer.out


def test_an_unknown_event_says_where_it_was_looked_for_and_since_when(call: Caller) -> None:
    fill(call.store)
    answer = call("explain", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert answer.code == 2
    assert "which was made at 2016-07-30T23:54:10.259Z" in answer.err
    assert f"the ledger, which has what was settled since {rfc3339(START + 4 * MINUTE)}" in answer.err
    misled = call("explain", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "--raw")
    assert misled.code == 2
    assert "an event is explained without options" in misled.err


def test_an_id_that_lacks_a_character_is_told_how_ids_look(call: Caller) -> None:
    fill(call.store)
    answer = call("explain", "01ARZ3NDEKTSV4RRFFQ69G5FA")
    assert (answer.code, "or an event's id, 26 characters" in answer.err) == (2, True)


def test_a_file_that_is_called_like_an_event_is_a_file(
    call: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("01ARZ3NDEKTSV4RRFFQ69G5FAV").write_bytes(b"")
    answer = call("explain", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert "there are no rows in it" in answer.out
