"""Verbs that read and change a store: what they say, in tables and in JSON, and what they refuse."""

import json
from pathlib import Path

import pytest
from cli_call import Caller
from made_store import MINUTE, START, MadeStore

from proxy_usage.events import rfc3339
from proxy_usage.store import Fate

READING = [
    ("status",),
    ("queue", "ls"),
    ("queue", "show", "X"),
    ("deadletters", "ls"),
    ("unattributed", "ls"),
]
DEAD = Fate("dead", 200, "rejected", "unknown meter")


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(tmp_path, capsys)


@pytest.fixture
def ids(call: Caller) -> tuple[str, ...]:
    """Five events: delivered, two dead letters, attempted, pending; something held, something open."""
    with MadeStore(call.store) as store:
        store.use("alpha", 2, 1_500_000_000)
        store.use("beta", 3, 2_000_000_000)
        store.use("gamma", 1, 0)
        store.hold("unmapped", b"gam\xffma\x1b[31m", 1, 7)
        made = store.close_windows()
        store.answer(store.send(3), Fate("delivered", 200), DEAD, Fate("dead", 400, "malformed", "no"))
        store.queue.postpone(store.send(1).id, START + 10 * MINUTE, "503 busy")
        store.use("alpha", 5, 0, now_ms=START + 2 * MINUTE)
        store.turn(START + 2 * MINUTE)
    return made


@pytest.mark.parametrize("verb", [*READING, ("deadletters", "replay")], ids=" ".join)
def test_a_store_that_is_not_there_is_not_made(verb: tuple[str, ...], call: Caller) -> None:
    answer = call(*verb)
    assert answer.code == 1
    assert f"error: there is no store at {call.store}" in answer.err
    assert not call.store.exists()


@pytest.mark.parametrize("verb", [*READING, ("deadletters", "replay")], ids=" ".join)
def test_a_file_that_is_no_store_is_refused(verb: tuple[str, ...], call: Caller) -> None:
    call.store.write_bytes(b"something else entirely" * 100)
    answer = call(*verb)
    assert answer.code == 1
    assert "not a database" in answer.err
    assert "hint:" in answer.err


TIME = ("--from", "2027-01-15", "--to", "2027-01-16")
LOOKING = [
    *(verb for verb in READING if "show" not in verb),
    ("usage", "--tenant", "alpha", *TIME),
    ("store", "check"),
]


@pytest.mark.parametrize("verb", LOOKING, ids=" ".join)
def test_a_store_is_read_though_a_file_that_the_service_needs_is_missing(
    verb: tuple[str, ...], call: Caller, ids: tuple[str, ...]
) -> None:
    outputs = [
        {"name": "billing", "url": "http://127.0.0.1:1/", "token_file": "missing"},
        {"name": "archive", "format": "file", "file": {"path": "no/such/directory/usage.ndjson"}},
    ]
    call.configure(outputs=outputs)
    assert call(*verb).code == 0
    assert call("validate").code == 78
    assert call("deadletters", "replay").code == 78
    call.configure(store={"path": str(call.store.parent / "no" / "such" / "usage.db")})
    nothing = call(*verb)
    assert (nothing.code, "there is no store at" in nothing.err) == (1, True)
    call.configure(outputs=[{"name": "billing"}])
    broken = call(*verb)
    assert broken.code == 78
    assert broken.err.endswith("; a service that runs goes on with the configuration it has\n")


def test_status_in_json_has_integers_under_stable_keys(call: Caller, ids: tuple[str, ...]) -> None:
    shown = call("status", "--json").json
    (billing,) = shown["outputs"]
    assert (billing["name"], billing["pending"], billing["attempted"]) == ("billing", 2, 1)
    assert (billing["delivered"], billing["dead"], billing["paused"]) == (1, 2, None)
    assert billing["oldest_ms"] == START + 2 * MINUTE
    assert shown["balanced"] is True
    assert shown["service"] is None
    requests = shown["meters"][0]
    assert requests["counted"] == 12
    assert (requests["open"], requests["held"], requests["difference"]) == (5, 1, 0)
    assert requests["minted"] == {"events": 3, "value": 6}
    assert shown["rows"]["skipped"] == {"upstream": 2}
    assert shown["intake"] == {"node-a": 4}


def test_status_in_words(call: Caller, ids: tuple[str, ...]) -> None:
    lines = call("status").out.splitlines()
    assert "service       not running" in lines
    assert "balanced      yes" in lines
    assert "rows          counted 6, skipped (upstream) 2" in lines
    assert any(line.startswith("billing ") for line in lines)
    assert any(line.startswith("node-a ") for line in lines)


def test_status_says_since_when_an_output_is_tried_in_vain(call: Caller, ids: tuple[str, ...]) -> None:
    (billing,) = call("status", "--json").json["outputs"]
    assert (billing["retrying_ms"], billing["answer"]) == (START + 3 * MINUTE, "503 busy")
    assert f"  retrying since {rfc3339(START + 3 * MINUTE)}: 503 busy\n" in call("status").out
    with MadeStore(call.store) as store, store.database.transaction() as db:
        db.execute("UPDATE batches SET answer=''")  # under way, or its answer is not known
    (line,) = [line for line in call("status").out.splitlines() if line.startswith("billing ")]
    assert line.endswith(" ok")


def test_status_says_what_the_store_takes_of_what_it_may(call: Caller, ids: tuple[str, ...]) -> None:
    (line,) = [line for line in call("status").out.splitlines() if line.startswith("space")]
    assert " of 8192 MiB (database " in line
    assert "reserve 0 B" in line
    call.store.with_name(call.store.name + ".reserve").write_bytes(bytes(1 << 20))
    assert "reserve 1024 KiB" in call("status").out
    assert call("status", "--json").json["sizes"]["reserve"] == 1 << 20


def test_status_says_what_does_not_add_up(call: Caller, ids: tuple[str, ...]) -> None:
    with MadeStore(call.store) as store, store.database.transaction() as db:
        db.execute("DELETE FROM held")
        db.execute("DELETE FROM tallies WHERE fate='delivered'")
    said = call("status").out
    assert "NO: requests: 1 nowhere; connection_seconds: 7 nowhere" in said
    assert "billing, requests: 1 events without a fate" in said
    assert call("status", "--json").json["balanced"] is False


def test_queue_ls_in_json(call: Caller, ids: tuple[str, ...]) -> None:
    shown = call("queue", "ls", "--json").json
    assert [(one["id"], one["state"]) for one in shown["events"]] == [
        (ids[3], "attempted"),
        (ids[4], "pending"),
    ]
    assert shown["events"][0]["value"] == 2
    (batch,) = shown["batches"]
    assert (batch["attempts"], batch["answer"], batch["confirm"]) == (1, "503 busy", False)


def test_queue_ls_in_words(call: Caller, ids: tuple[str, ...]) -> None:
    said = call("queue", "ls", "--output", "billing", "-n", "1").out
    head, first, *_ = said.splitlines()
    assert head.split() == ["output", "id", "tenant", "meter", "value", "window", "state", "attempts"]
    assert first.split()[:3] == ["billing", ids[3], "beta"]
    assert ids[4] not in said
    assert "503 busy" in said


def test_an_output_that_does_not_exist_is_a_usage_error(call: Caller, ids: tuple[str, ...]) -> None:
    for verb in (("queue", "ls"), ("deadletters", "ls"), ("deadletters", "replay")):
        answer = call(*verb, "--output", "nope")
        assert answer.code == 2
        assert "there is no output 'nope'" in answer.err


def test_queue_show_reads_the_stored_event(call: Caller, ids: tuple[str, ...]) -> None:
    shown = call("queue", "show", ids[4], "--json").json
    assert shown["event"]["id"] == ids[4]
    assert shown["event"]["data"] == {"value": "1", "dimensions": {"region": "eu"}}
    assert json.loads(shown["body"])["type"] == shown["event"]["type"]
    assert [place["state"] for place in shown["places"]] == ["pending"]
    said = call("queue", "show", ids[4]).out
    assert "tenant    gamma" in said
    assert '"subject": "projects/gamma"' in said


def test_queue_show_of_a_settled_event_has_its_fate_alone(call: Caller, ids: tuple[str, ...]) -> None:
    shown = call("queue", "show", ids[0], "--json").json
    assert (shown["event"], shown["body"], shown["places"][0]["state"]) == (None, None, "delivered")
    said = call("queue", "show", ids[0]).out
    assert "its bytes are gone" in said
    at = rfc3339(START + 4 * MINUTE)
    (line,) = [line for line in said.splitlines() if line.startswith("billing ")]
    assert line.split() == ["billing", "delivered", at, "-", "-", "-", "200"]  # not that it was never tried
    (line,) = [line for line in call("queue", "show", ids[3]).out.splitlines() if line.startswith("billing ")]
    assert line.split()[:5] == ["billing", "attempted", "-", rfc3339(START + 3 * MINUTE), "1"]


def test_queue_show_of_an_unknown_event(call: Caller, ids: tuple[str, ...]) -> None:
    answer = call("queue", "show", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert answer.code == 2
    assert "the store knows no event 01ARZ3NDEKTSV4RRFFQ69G5FAV" in answer.err


def test_queue_show_of_bytes_that_are_no_event(call: Caller, ids: tuple[str, ...]) -> None:
    with MadeStore(call.store) as store, store.database.transaction() as db:
        db.execute("UPDATE events SET body=X'7B7D' WHERE id=?", (ids[4],))
    answer = call("queue", "show", ids[4])
    assert answer.code == 1
    assert "not a CloudEvent" in answer.err


def test_deadletters_ls_and_show(call: Caller, ids: tuple[str, ...]) -> None:
    letters = call("deadletters", "ls", "--json").json["deadletters"]
    assert [(one["id"], one["reason"], one["answer"]) for one in letters] == [
        (ids[1], "rejected", "unknown meter"),
        (ids[2], "malformed", "no"),
    ]
    assert ids[2] not in call("deadletters", "ls", "--reason", "rejected").out
    said = call("deadletters", "show", ids[1]).out
    assert "rejected" in said
    assert '"subject": "projects/alpha"' in said


def test_replay_by_reason_then_by_id_then_of_nothing(call: Caller, ids: tuple[str, ...]) -> None:
    replayed = call("deadletters", "replay", "--reason", "rejected", "--json").json
    assert replayed == {"replayed": 1, "too_late": 0, "service": False}
    assert call("deadletters", "replay", ids[2]).out.startswith("1 dead letters are back in the queue")
    assert call("deadletters", "replay").out == "no dead letter was meant\n"
    queued = call("queue", "ls", "--json").json["events"]
    assert [one["id"] for one in queued] == list(ids[1:])
    assert queued[0]["first_attempt_ms"] == START + 3 * MINUTE
    assert call("status", "--json").json["balanced"] is True


def test_replay_of_more_than_one_transaction_takes(call: Caller) -> None:
    with MadeStore(call.store) as store:
        for number in range(1_200):
            store.windows.add(store.key(number), START, 1, (1, 0), START)
        store.count((1_200, 0))
        while store.close_windows():
            pass
        for _ in range(12):
            store.answer(store.send(100), *[DEAD] * 100)
    everything = [one["id"] for one in call("deadletters", "ls", "-n", "5000", "--json").json["deadletters"]]
    assert len(everything) == 1_200
    assert call("deadletters", "replay", *everything[:600], "--json").json["replayed"] == 600
    assert call("deadletters", "replay", "--json").json["replayed"] == 600
    assert call("deadletters", "ls").out == "there are no dead letters\n"


def test_replay_of_what_is_no_dead_letter(call: Caller, ids: tuple[str, ...]) -> None:
    answer = call("deadletters", "replay", ids[0])
    assert answer.code == 2
    assert f"not a dead letter: {ids[0]}" in answer.err


def test_replay_in_a_store_that_another_process_owns(call: Caller, ids: tuple[str, ...]) -> None:
    with MadeStore(call.store):
        answer = call("deadletters", "replay")
    assert answer.code == 1
    assert f"store {call.store} is in use by pid " in answer.err
    assert len(call("deadletters", "ls", "--json").json["deadletters"]) == 2


def test_unattributed_usage_is_shown_without_what_a_terminal_obeys(
    call: Caller, ids: tuple[str, ...]
) -> None:
    (one,) = call("unattributed", "ls", "--json").json["unattributed"]
    assert (one["reason"], one["node"], one["log_name"]) == ("unmapped", "node-a", "http")
    assert (one["value"], one["rule"], one["overflow"]) == ("gam\\xffma\x1b[31m", None, False)
    assert one["dimensions"] == [{"field": "custom_tag:gateway", "value": "gw"}]
    assert one["amounts"] == {"requests": 1, "connection_seconds": 7}
    said = call("unattributed", "ls").out
    assert "gam\\xffma\\x1b[31m" in said
    assert "\x1b" not in said
    assert "custom_tag:gateway=gw" in said


def test_an_empty_store_says_so(call: Caller) -> None:
    with MadeStore(call.store):
        pass
    assert call("queue", "ls").out == "nothing waits\n"
    assert call("deadletters", "ls").out == "there are no dead letters\n"
    assert call("unattributed", "ls").out == "nothing is held\n"
    assert call("status", "--json").json["balanced"] is True
