"""``compare``: files of other systems in, differences and an exit code out."""

import io
import json
import sys
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from cli_call import Caller
from made_store import METERS, MINUTE, START, MadeStore

from proxy_usage.cli import foreign
from proxy_usage.events import rfc3339
from proxy_usage.model import Key
from proxy_usage.store import Fate, Retention

HOUR = 3_600_000
SECOND = 10**9
REQUESTS, SECONDS = (meter.type for meter in METERS)
TIME = ("--from", rfc3339(START), "--to", rfc3339(START + 2 * MINUTE))


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.delenv("PROXY_USAGE_CONFIG", raising=False)
    return Caller(tmp_path, capsys)


def fill(path: Path, outputs: tuple[str, ...] = ("billing",)) -> None:
    """Two tenants in one window: 3 requests and 7 s, and 2 requests."""
    with MadeStore(path, outputs) as store:
        store.use("alpha", 3, 7 * SECOND)
        store.use("bravo", 2, 0)
        store.close_windows()


def event(number: int, tenant: str, type_: str, value: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": f"E{number}",
        "source": "//x",
        "type": type_,
        "subject": f"projects/{tenant}",
        "time": rfc3339(START),
        "data": {"value": str(value)},
    } | changes


EQUAL = [event(1, "alpha", REQUESTS, 3), event(2, "alpha", SECONDS, 7), event(3, "bravo", REQUESTS, 2)]


def written(path: Path, events: Iterable[object], *, array: bool = False) -> str:
    lines = [json.dumps(one) for one in events]
    path.write_text(f"[{', '.join(lines)}]" if array else "\n".join(lines))
    return str(path)


# --- both sides -------------------------------------------------------------------------------------


@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_equal_events_end_with_0(array: bool, call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    answer = call("compare", "--events", written(tmp_path / "e", EQUAL, array=array), *TIME)
    assert answer.code == 0, answer
    assert answer.out.splitlines()[1:] == [
        "tenant  meter               theirs  ours  difference",
        "alpha   connection_seconds       7     7           0",
        "alpha   requests                 3     3           0",
        "bravo   requests                 2     2           0",
        "equal",
    ]


def test_a_difference_ends_with_1_and_says_why(call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    theirs = [EQUAL[0], event(2, "alpha", SECONDS, 5), EQUAL[2]]
    answer = call("compare", "--events", written(tmp_path / "e", theirs), *TIME)
    assert answer.code == 1
    assert "alpha   connection_seconds       5     7           2\n" in answer.out
    assert "- connection_seconds: ours has 2 more; whole seconds of each request" in answer.out
    assert answer.out.endswith("not equal\n")
    data = call("compare", "--events", str(tmp_path / "e"), *TIME, "--json")
    assert data.code == 1
    assert data.json["equal"] is False
    assert data.json["output"] == "billing"
    assert data.json["lines"][0] == {
        "tenant": "alpha",
        "meter": "connection_seconds",
        "theirs": 5,
        "ours": 7,
        "difference": 2,
    }
    assert [(one["kind"], one["amount"]) for one in data.json["hints"]] == [("floored_seconds", 2)]


def test_one_meter_alone(call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    file = written(tmp_path / "e", [EQUAL[0], EQUAL[2]])
    assert call("compare", "--events", file, *TIME).code == 1
    assert call("compare", "--events", file, *TIME, "--meter", "requests").code == 0
    unknown = call("compare", "--events", file, *TIME, "--meter", "request")
    assert unknown.code == 2
    assert "there is no meter 'request'\n  hint: meters are connection_seconds, requests" in unknown.err


@pytest.mark.parametrize("heading", ["", "Tenant, Meter, Value\n"])
def test_sums_name_meters_by_name_or_type(heading: str, call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    (tmp_path / "sums.csv").write_text(
        f"{heading}alpha,requests,2\nprojects/alpha,{REQUESTS},1\n\nalpha,connection_seconds,7\n"
        '"bravo",requests,2\n'
    )
    answer = call("compare", "--csv", str(tmp_path / "sums.csv"), *TIME)
    assert answer.code == 0, answer


@pytest.mark.parametrize(
    "line", ["alpha,requests", "alpha,requests,1.5", ",requests,1", "alpha,requests,1,2", "alpha,bytes,1"]
)
def test_a_sum_that_is_none_is_named_with_its_line(line: str, call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    (tmp_path / "sums.csv").write_text(f"tenant,meter,value\nalpha,requests,2\n{line}\n")
    answer = call("compare", "--csv", str(tmp_path / "sums.csv"), *TIME)
    assert answer.code == 2
    assert f"{tmp_path / 'sums.csv'}:3: " in answer.err


def test_what_is_held_is_shown_as_nobody_s(call: Caller, tmp_path: Path) -> None:
    with MadeStore(call.store) as store:
        store.hold("unmapped", b"x", 4, 0)
        store.hold("unmapped", b"x", 8, 0, hour_ms=START + HOUR)
        store.close_windows()
    answer = call("compare", "--events", written(tmp_path / "e", []), *TIME)
    assert answer.code == 1
    assert "(unattributed)  requests       0     4           4\n" in answer.out
    assert "held here without a tenant, in the whole hours that the time touches" in answer.out


def test_what_names_no_route_is_told_from_what_lacks_an_id(call: Caller, tmp_path: Path) -> None:
    call.configure(dimensions={"region": {"route_name": "^httproute/(?P<value>.+)", "default": ""}})
    with MadeStore(call.store) as store:
        store.use("alpha", 3, 0)
        store.windows.add(Key("alpha", ("",)), START, 1, (5, 0), START)
        store.count((5, 0))
        store.close_windows()
    file = written(tmp_path / "e", [event(1, "alpha", REQUESTS, 2)])
    hints = call("compare", "--events", file, *TIME, "--json").json["hints"]
    assert {one["kind"]: one["amount"] for one in hints} == {"no_route": 5, "no_request_id": 1}


# --- our side ---------------------------------------------------------------------------------------


def test_every_place_of_an_event_counts_once(call: Caller, tmp_path: Path) -> None:
    with MadeStore(call.store, ("billing", "shadow")) as store:
        for number in range(4):
            store.use(f"t{number}", 1, 0)
        store.use("early", 9, 0)
        store.windows.add(Key("late", ("eu",)), START + 2 * MINUTE, 1, (9, 0), START)
        store.count((9, 0))
        store.turn(START + 4 * MINUTE)
        batch = store.send(2)
        store.answer(batch, Fate("delivered", 200), Fate("dead", 200, "not_accepted"))
        store.send(1)  # sent and not settled; the rest waits
        store.use("open", 1, 0, now_ms=START + 4 * MINUTE)
        store.turn(START + 4 * MINUTE)
    file = written(tmp_path / "e", [event(n, f"t{n}", REQUESTS, 1) for n in range(4)])
    for output in ("billing", "shadow"):
        data = call("compare", "--events", file, *TIME, "--json", "--output", output).json
        assert {(line["tenant"], line["ours"]) for line in data["lines"]} == {
            *((f"t{number}", 1) for number in range(4)),
            ("early", 9),
        }
        assert {one["kind"]: one["amount"] for one in data["hints"]}["open_windows"] == 1


@pytest.mark.parametrize("shift", [0, MINUTE])
def test_hourly_sums_are_compared_by_the_hour(shift: int, call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    with MadeStore(call.store) as store:
        batch = store.send()
        store.answer(batch, *(Fate("delivered", 200) for _ in batch.events))
        retention = Retention(
            store.database,
            ledger_max_bytes=1 << 30,
            keep_delivered_ms=0,
            keep_sums_ms=HOUR,
            keep_held_ms=HOUR,
        )
        assert retention.roll(START + HOUR) == 3
    file = written(tmp_path / "e", EQUAL)
    to = ("--to", rfc3339(START + HOUR))
    answer = call("compare", "--events", file, "--from", rfc3339(START + shift), *to)
    if not shift:
        assert answer.code == 0, answer
        return
    assert answer.code == 2
    assert "lies within an hour of which the store keeps only the sum" in answer.err
    assert f"e.g. {rfc3339(START)} or {rfc3339(START + HOUR)}" in answer.err
    early = ("--from", rfc3339(START - HOUR + MINUTE))  # of that hour nothing was rolled up
    assert call("compare", "--events", file, *early, *to).code == 0


def test_sums_that_were_removed_are_said_to_lack(call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    with MadeStore(call.store) as store:
        batch = store.send()
        store.answer(batch, *(Fate("delivered", 200) for _ in batch.events))
        retention = Retention(
            store.database,
            ledger_max_bytes=1 << 30,
            keep_delivered_ms=0,
            keep_sums_ms=HOUR,
            keep_held_ms=HOUR,
        )
        assert retention.roll(START + HOUR)
        assert retention.forget(START + 3 * HOUR)
    answer = call("compare", "--events", written(tmp_path / "e", EQUAL), *TIME)
    assert answer.code == 1
    assert "sums of that time may have been removed here (store.keep_sums)" in answer.out


def test_the_ledger_is_of_the_output_that_was_added_first(call: Caller, tmp_path: Path) -> None:
    fill(call.store, ("shadow",))
    with MadeStore(call.store, ("shadow", "billing")):
        pass
    file = written(tmp_path / "e", EQUAL)
    answer = call("compare", "--events", file, *TIME, "--json")  # billing comes first in the configuration
    assert (answer.code, answer.json["output"]) == (0, "shadow")
    assert call("compare", "--events", file, *TIME, "--output", "billing").code == 1
    unknown = call("compare", "--events", file, *TIME, "--output", "nobody")
    assert unknown.code == 2
    assert "outputs are shadow, billing" in unknown.err


def test_usage_before_an_output_was_added_is_said_to_lack(call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    before = ("--from", rfc3339(START - HOUR), "--to", TIME[3])
    answer = call("compare", "--events", written(tmp_path / "e", EQUAL), *before)
    assert answer.code == 0
    assert f"billing was added at {rfc3339(START)}: nothing before it" in answer.out


def test_sums_past_64_bits_are_exact(call: Caller, tmp_path: Path) -> None:
    most = (1 << 63) - 1
    with MadeStore(call.store) as store:
        for _ in range(3):
            store.use("alpha", most, 0)
        store.close_windows()
    (tmp_path / "sums.csv").write_text(f"alpha,requests,{3 * most}\n")
    assert call("compare", "--csv", str(tmp_path / "sums.csv"), *TIME).code == 0


# --- how it is called -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--from", rfc3339(START), "--to", rfc3339(START)), "--to is not after --from"),
        (("--from", rfc3339(START + 1), "--to", rfc3339(START + MINUTE)), "--from: no window begins at"),
        (("--from", "now", "--to", rfc3339(START)), "--from: 'now' is not a time"),
        (("--from", rfc3339(START), "--to", "2027-01-15T08:00:00"), "has no zone"),
    ],
)
def test_a_time_that_is_none_is_named(
    arguments: tuple[str, ...], said: str, call: Caller, tmp_path: Path
) -> None:
    fill(call.store)
    answer = call("compare", "--events", written(tmp_path / "e", EQUAL), *arguments)
    assert answer.code == 2
    assert said in answer.err


def test_one_file_is_given(call: Caller, tmp_path: Path) -> None:
    fill(call.store)
    file = written(tmp_path / "e", EQUAL)
    assert "their usage is not given" in call("compare", *TIME).err
    assert "their usage is given twice" in call("compare", *TIME, "--events", file, "--csv", file).err
    missing = call("compare", *TIME, "--events", str(tmp_path / "nothing"))
    assert missing.code == 2
    assert "nothing cannot be read: No such file or directory" in missing.err


def test_standard_input_is_read(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(call.store)
    text = "\n".join(json.dumps(one) for one in EQUAL)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert call("compare", *TIME, "--events", "-").code == 0


# --- reading files ----------------------------------------------------------------------------------


def test_events_are_read_piece_by_piece_whatever_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign, "PIECE", 64)
    # Shorter than a piece each, and so laid out that pieces end everywhere within them.
    many = [{"n": number, "text": "ü]}[{" * (number % 5)} for number in range(200)]
    for array in (False, True):
        for indent in (None, 1):
            encoder = json.JSONEncoder(ensure_ascii=False, indent=indent)
            text = encoder.encode(many) if array else "\n".join(encoder.encode(one) for one in many)
            (tmp_path / "e").write_text(text)
            assert list(foreign.events(tmp_path / "e")) == many


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    line = json.dumps(EQUAL[0] | {"filling": "x" * 1000}) + "\n"
    with (tmp_path / "e").open("w") as file:
        for _ in range(20_000):  # 23 MB
            file.write(line)
    tracemalloc.start()
    count = sum(1 for _ in foreign.events(tmp_path / "e"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 12 << 20


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a": ', "event 2 is no JSON object"),
        ('[{"a": 1}, {"a": ', "event 2 is no JSON object"),
        ('[{"a": 1}, ', "ends within its array"),
        ('[{"a": 1}', "ends within its array"),
        ('[{"a": 1}] {"a": 2}', "event 2 is no JSON object"),
        ('[{"a": 1}] ]', "event 2 is no JSON object"),
        ("[1]", "event 1 is no JSON object"),
        ("{" + '"a":{' * 100_000, "event 1 is no JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "event 1 is no JSON object"),
        ('{"a": "' + "x" * (3 << 20), "event 1 is no JSON object"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_a_file_that_was_cut_or_is_something_else_is_refused(
    text: str | bytes, said: str, call: Caller, tmp_path: Path
) -> None:
    fill(call.store)
    (tmp_path / "e").write_bytes(text if isinstance(text, bytes) else text.encode())
    answer = call("compare", "--events", str(tmp_path / "e"), *TIME)
    assert answer.code == 2
    assert said in answer.err


def test_an_empty_file_has_nothing(tmp_path: Path) -> None:
    for text in ("", " \n", "[]", "\ufeff[ ]\n"):
        (tmp_path / "e").write_text(text)
        assert list(foreign.events(tmp_path / "e")) == []
