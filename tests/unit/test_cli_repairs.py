"""Verbs that decide about stuck usage, with the lock of the store and through a running service."""

import json
from pathlib import Path

import pytest
from cli_call import Caller
from made_store import MINUTE, START, MadeStore

from proxy_usage.store import Fate

REJECTED = Fate("dead", 200, "rejected", "unknown meter")


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(tmp_path, capsys)


@pytest.fixture
def ids(call: Caller) -> tuple[str, ...]:
    """Three events of two tenants: rejected, in doubt and too late, and one that waits; something held."""
    with MadeStore(call.store, ("billing", "shadow")) as store:
        store.use("alpha", 2, 0)
        store.use("beta", 3, 0)
        store.use("gamma", 4, 0)
        store.hold("unmapped", b"a name", 1, 7)
        made = store.close_windows()
        store.answer(store.send(1), REJECTED)
        store.queue.postpone(store.send(1).id, START, "", unanswered=True)
        store.queue.lease(
            store.slots[0].output,
            START + 5 * MINUTE,
            events=1,
            max_bytes=1 << 20,
            linger_ms=0,
            fresh=False,
            late_ms=START + MINUTE,
        )
    return made


def balanced(call: Caller) -> bool:
    return bool(call("status", "--json").json["balanced"])


def test_redate_leaves_what_may_be_stored_until_it_is_told_to_accept_it(
    call: Caller, ids: tuple[str, ...]
) -> None:
    refused = call("deadletters", "replay", "--redate", ids[1])
    assert refused.code == 2
    assert f"may have been stored before they became dead letters: {ids[1]}" in refused.err
    said = call("deadletters", "replay", "--redate").out
    assert said.splitlines() == [
        "1 new events take the place of dead letters; they are sent when the service runs",
        "1 may have been stored and stay: --accept-duplicates takes them, too",
    ]
    forced = call("deadletters", "replay", "--redate", "--accept-duplicates", ids[1], "--json").json
    assert forced == {"redated": 1, "doubtful": 0, "service": False}
    assert call("deadletters", "ls", "--json").json == {"deadletters": []}
    waiting = call("queue", "ls", "--output", "billing", "--json").json["events"]
    assert [one["tenant"] for one in waiting] == ["gamma", "alpha", "beta"]
    assert not {one["id"] for one in waiting[1:]} & set(ids)
    assert balanced(call)
    assert [place["state"] for place in call("queue", "show", ids[0], "--json").json["places"]] == [
        "pending",
        "redated",
    ]
    assert call("deadletters", "replay", "--redate").out == "no dead letter was meant\n"


def test_accepting_duplicates_without_redating_is_a_mistake(call: Caller, ids: tuple[str, ...]) -> None:
    answer = call("deadletters", "replay", "--accept-duplicates")
    assert (answer.code, "goes with --redate" in answer.err) == (2, True)


def test_export_of_nothing_leaves_no_file_in_the_way(
    call: Caller, ids: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "letters.jsonl"
    answer = call("deadletters", "export", str(file), "--reason", "nope")
    assert (answer.code, file.exists()) == (0, False)
    assert "no dead letters with this reason" in answer.out


def test_export_writes_a_line_each_and_takes_nothing_away(
    call: Caller, ids: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "letters.jsonl"
    file.write_text("old")
    refused = call("deadletters", "export", str(file))
    assert (refused.code, refused.out, file.read_text()) == (2, "", "old")
    assert f"cannot write {file}: it exists\n  hint: name a file that does not exist yet" in refused.err
    assert call("deadletters", "export", str(file), "--force").out == f"2 dead letters are in {file}\n"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["id"] for line in lines] == [line["event"]["id"] for line in lines] == list(ids[:2])
    first, second = lines
    assert (first["reason"], first["answer"], first["at_ms"]) == (
        "rejected",
        "unknown meter",
        START + 4 * MINUTE,
    )
    assert (second["reason"], second["first_attempt_ms"]) == ("too_late", START + 3 * MINUTE)
    assert first["event"]["data"]["value"] == "2"
    assert file.stat().st_mode & 0o077 == 0
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith(".partial")] == []
    printed = call("deadletters", "export", "-", "--reason", "rejected").out
    assert [json.loads(line)["id"] for line in printed.splitlines()] == [ids[0]]
    assert len(call("deadletters", "ls", "--json").json["deadletters"]) == 2
    failed = call("deadletters", "export", str(tmp_path / "nowhere" / "file"))
    assert (failed.code, "cannot write" in failed.err) == (1, True)


def test_a_reason_that_nothing_has_is_told_from_none_at_all(
    call: Caller, ids: tuple[str, ...], tmp_path: Path
) -> None:
    others = "no dead letters with this reason; there are: rejected 1, too_late 1\n"
    for verb in (("ls",), ("replay",), ("replay", "--redate"), ("export", str(tmp_path / "none"))):
        assert call("deadletters", *verb, "--reason", "bogus").out == others
    elsewhere = call("deadletters", "ls", "--output", "shadow", "--reason", "bogus").out
    assert elsewhere == "there are no dead letters\n"
    said = call("unattributed", "replay", "--reason", "nope").out
    assert said == "nothing is held for this reason; there are: unmapped 1\n"
    assert call("unattributed", "replay", "--reason", "unmapped").out != said


def test_bytes_that_are_no_json_are_exported_all_the_same(call: Caller, ids: tuple[str, ...]) -> None:
    with MadeStore(call.store, ("billing", "shadow")) as store:
        store.database.db.execute("UPDATE events SET body=x'ff00' WHERE id=?", (ids[0],))
    first = json.loads(call("deadletters", "export", "-").out.splitlines()[0])
    assert (first["body"], "event" in first) == ("/wA=", False)


def test_a_dead_letter_that_is_too_old_stays_and_says_how_it_goes_on(call: Caller) -> None:
    with MadeStore(call.store) as store:
        store.use("alpha", 2, 0)
        (old,) = store.close_windows()
        store.answer(store.send(), REJECTED)
        store.database.db.execute("UPDATE events SET window_ms=0")
    assert call("deadletters", "replay").out.splitlines() == [
        "no dead letter was meant",
        "1 are too old to be sent as they are and stay: --redate makes them anew",
    ]
    named = call("deadletters", "replay", old)
    assert (named.code, "--redate" in named.err) == (2, True)


def test_an_output_is_retired_once_it_is_out_of_the_configuration(call: Caller, ids: tuple[str, ...]) -> None:
    configured = call("outputs", "retire", "billing")
    assert (configured.code, "is configured" in configured.err) == (2, True)
    call.configure(outputs=[{"name": "shadow", "format": "none"}])
    assert call("outputs", "retire", "nonesuch").code == 2
    assert call("outputs", "retire", "billing", "--json").json == {"retired": 3, "service": False}
    assert call("outputs", "retire", "billing").out == "billing had nothing left to give up\n"
    (billing, shadow) = call("status", "--json").json["outputs"]
    assert (billing["given_up"], billing["pending"], billing["dead"], shadow["pending"]) == (3, 0, 0, 3)
    assert balanced(call)


def rules(call: Caller, **tenant: object) -> None:
    call.configure(tenant={"rules": [{"literal": "rest"}]} | tenant)


def test_held_usage_is_run_through_the_rules_of_today(call: Caller, ids: tuple[str, ...]) -> None:
    shown = call("unattributed", "ls", "--json").json["unattributed"]
    assert call("unattributed", "replay", "--id", "00").code == 2
    assert call("unattributed", "replay").out.splitlines() == [
        "nothing of what is held has a tenant",
        "1 stay held: the present rules name nobody",
    ]
    rules(call)
    assert (
        call("unattributed", "replay", "--reason", "no_tenant").out
        == "nothing is held for this reason; there are: unmapped 1\n"
    )
    done = call("unattributed", "replay", "--id", shown[0]["id"], "--json").json
    assert done == {
        "released": 1,
        "minted": 1,
        "unattributed": 0,
        "too_late": 0,
        "lost": 0,
        "service": False,
    }
    assert call("unattributed", "ls").out == "nothing is held\n"
    assert balanced(call)
    assert call("queue", "ls", "--output", "billing", "--json").json["events"][-1]["tenant"] == "rest"


def test_what_was_delivered_perhaps_twice_is_listed(call: Caller, ids: tuple[str, ...]) -> None:
    assert "nothing was delivered that" in call("queue", "ls", "--ambiguous").out
    with MadeStore(call.store, ("billing", "shadow")) as store:
        batch = store.send(1)
        store.answer(batch, Fate("delivered_ambiguous", 200))
    (found,) = call("queue", "ls", "--ambiguous", "--json").json["ambiguous"]
    assert (found["id"], found["output"], found["tenant"]) == (ids[2], "billing", "gamma")
    assert ids[2] in call("queue", "ls", "--ambiguous").out
    assert call("status", "--json").json["outputs"][0]["ambiguous"] == 1
    assert balanced(call)
