"""Verbs where several workers have stores: all of them are looked into, and the right one is changed."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_call import Caller
from made_store import MINUTE, START, MadeStore

from proxy_usage.cli.repair import repaired
from proxy_usage.config import load
from proxy_usage.config.workers import worker_path
from proxy_usage.events import rfc3339
from proxy_usage.store import Fate, Retention

REJECTED = Fate("dead", 200, "rejected", "unknown meter")
DELIVERED = Fate("delivered", 200)


class Workers(Caller):
    """Stores of three workers, two of which are configured."""

    def __init__(self, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        super().__init__(directory, capture)
        self.configure(workers=2)
        self.ids = [self._made(worker) for worker in range(3)]

    def stores(self) -> list[Path]:
        return [worker_path(self.store, worker) for worker in range(3)]

    def _made(self, worker: int) -> Sequence[str]:
        """Of each worker an event that was delivered, one that waits and a dead letter; something held."""
        with MadeStore(self.stores()[worker], ("billing", "shadow")) as store:
            for tenant in ("alpha", "beta", "gamma"):
                store.use(tenant, worker + 1, 600_000_000)
            store.hold("unmapped", b"a name", 1, 7)
            made = store.close_windows()
            store.answer(store.send(1), DELIVERED)
            store.answer(store.send(1), REJECTED)
            return made


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Workers:
    return Workers(tmp_path, capsys)


def test_status_adds_up_and_shows_each(call: Workers) -> None:
    said = call("status", "--json").json
    requests = next(one for one in said["meters"] if one["meter"] == "requests")
    assert requests["counted"] == 3 * (1 + 2 + 3) + 3
    assert requests["minted"]["value"] == 18
    seconds = next(one for one in said["meters"] if one["meter"] == "connection_seconds")
    assert seconds["remainders"] == 9 * 600_000_000  # a store's each, and no unit of them together
    billing = said["outputs"][0]
    assert (billing["pending"], billing["dead"], billing["delivered"]) == (3, 3, 3)
    assert said["rows"]["counted"][""] == 9
    assert said["intake"] == {"node-a": 12}
    assert said["unattributed"] == 3
    assert said["balanced"] is True
    assert [one["worker"] for one in said["workers"]] == [0, 1, 2]
    assert [one["meters"][0]["counted"] for one in said["workers"]] == [4, 7, 10]
    assert all(one["service"] is None for one in said["workers"])
    text = call("status").out
    assert "worker 1      not running" in text
    assert "worker 2      is configured no more: worker 0 takes its store over" in text


def test_one_store_that_does_not_add_up_is_not_evened_out_by_another(call: Workers) -> None:
    for worker, more in ((0, 5), (1, -5)):
        with (
            MadeStore(call.stores()[worker], ("billing", "shadow")) as store,
            store.database.transaction() as db,
        ):
            db.execute("UPDATE counters SET value=value+? WHERE name='counted' AND label='requests'", (more,))
    said = call("status", "--json").json
    assert said["balanced"] is False
    assert said["meters"][0]["difference"] == 0
    assert "NO: requests: 5 nowhere; requests: 5 not counted" in call("status").out


def test_an_output_is_tried_in_vain_for_as_long_as_in_any_store(call: Workers) -> None:
    for worker, answer in ((1, "503 busy"), (2, "connect")):
        with MadeStore(call.stores()[worker], ("billing", "shadow")) as store:
            store.queue.postpone(store.send(1).id, START + 10 * MINUTE, answer)
            at_ms = START + (9 - worker) * MINUTE
            store.database.db.execute("UPDATE deliveries SET first_attempt_ms=? WHERE batch>0", (at_ms,))
    (billing, shadow) = call("status", "--json").json["outputs"]
    assert (billing["retrying_ms"], billing["answer"]) == (START + 7 * MINUTE, "connect")
    assert (shadow["retrying_ms"], shadow["answer"]) == (None, "")


def test_lists_say_the_worker(call: Workers) -> None:
    waiting = call("queue", "ls", "--output", "billing", "--json").json["events"]
    assert [one["worker"] for one in waiting] == [0, 1, 2]
    assert len(call("queue", "ls", "--limit", "2", "--json").json["events"]) == 2
    letters = call("deadletters", "ls", "--json").json["deadletters"]
    assert [one["worker"] for one in letters] == [0, 1, 2]
    assert "worker" in call("deadletters", "ls").out.splitlines()[0]
    held = call("unattributed", "ls", "--json").json["unattributed"]
    assert [one["worker"] for one in held] == [0, 1, 2]
    assert call("queue", "ls", "--output", "nobody").code == 2


def test_an_event_is_found_wherever_it_is(call: Workers) -> None:
    letter = call("deadletters", "ls", "--json").json["deadletters"][2]
    assert call("queue", "show", letter["id"], "--json").json["tenant"] == letter["tenant"]
    assert call("queue", "show", "01JCZZ00000000000000000000").code == 2


def test_the_usage_of_a_tenant_is_that_of_all_stores(call: Workers) -> None:
    time = ("--from", rfc3339(START), "--to", rfc3339(START + 3_600_000))
    said = call("usage", "--tenant", "alpha", *time, "--output", "billing", "--json").json
    assert sorted(line["id"] for line in said["lines"]) == sorted(ids[0] for ids in call.ids)
    (sum_,) = said["sums"]
    assert (sum_["used"], sum_["delivered"]) == (1 + 2 + 3, 1 + 2 + 3)
    (held,) = said["notes"]["held"]
    assert (held["rows"], held["amounts"]) == (3, {"requests": 3, "connection_seconds": 21})
    (group,) = call("usage", "--tenant", "beta", *time, "--by", "hour", "--json").json["groups"][:1]
    assert (group["output"], group["fates"]["dead"]) == ("billing", {"events": 3, "value": 6})
    lines = call("usage", "--tenant", "alpha", *time, "--csv").out.splitlines()
    assert len(lines) == 1 + 3 * 2


def test_usage_knows_an_output_that_one_store_alone_has_and_no_other(call: Workers) -> None:
    time = ("--from", rfc3339(START), "--to", rfc3339(START + 3_600_000))
    with MadeStore(call.stores()[1], ("billing", "shadow", "gone")) as store:
        store.use("alpha", 5, 0, now_ms=START + 2 * MINUTE)
        store.turn(START + 5 * MINUTE)
    said = call("usage", "--tenant", "alpha", *time, "--output", "gone", "--json").json
    assert [(one["output"], one["used"]) for one in said["sums"]] == [("gone", 5)]
    assert call("usage", "--tenant", "alpha", *time, "--output", "never").code == 2


def test_one_store_that_cannot_answer_for_a_time_keeps_all_from_being_told(call: Workers) -> None:
    with MadeStore(call.stores()[1], ("billing", "shadow")) as store:
        Retention(
            store.database,
            ledger_max_bytes=1 << 30,
            keep_delivered_ms=3_600_000,
            keep_sums_ms=400 * 24 * 3_600_000,
            keep_held_ms=3_600_000,
        ).roll(START + 3 * 3_600_000)
    said = call(
        "usage", "--tenant", "alpha", "--from", rfc3339(START + MINUTE), "--to", "2100-01-01", "--csv"
    )
    assert (said.code, said.out) == (2, "")
    assert "of which the store keeps only the sum" in said.err


def test_an_event_is_explained_by_the_worker_that_made_it(call: Workers) -> None:
    for worker, ids in enumerate(call.ids):
        said = call("explain", ids[1], "--json").json
        assert (said["worker"], said["event"]["tenant"]) == (worker, "beta")
    assert "worker    2" in call("explain", call.ids[2][1]).out
    unknown = call("explain", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert unknown.code == 2
    assert "is unknown to the stores of 3 workers" in unknown.err


def test_a_letter_is_replayed_in_its_store_and_all_in_all(call: Workers) -> None:
    letters = [one["id"] for one in call("deadletters", "ls", "--json").json["deadletters"]]
    assert call("deadletters", "replay", letters[1], "--json").json["replayed"] == 1
    left = call("deadletters", "ls", "--json").json["deadletters"]
    assert [(one["id"], one["worker"]) for one in left] == [(letters[0], 0), (letters[2], 2)]
    assert call("deadletters", "replay", letters[1]).code == 2
    assert call("deadletters", "replay", "--json").json["replayed"] == 2
    assert call("deadletters", "ls", "--json").json["deadletters"] == []


def test_an_export_has_the_letters_of_all(call: Workers, tmp_path: Path) -> None:
    file = tmp_path / "letters"
    assert "3 dead letters" in call("deadletters", "export", str(file)).out
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["worker"] for line in lines] == [0, 1, 2]
    assert all(line["event"]["id"] == line["id"] for line in lines)
    assert call("deadletters", "export", "-", "--output", "nobody").code == 2


def test_held_usage_is_released_in_each_store_that_has_it(call: Workers) -> None:
    held = {one["id"] for one in call("unattributed", "ls", "--json").json["unattributed"]}
    (one,) = held
    counts = call("unattributed", "replay", "--id", one, "--redate", "--json").json
    assert counts["unattributed"] + counts["released"] + counts["lost"] == 3
    assert call("unattributed", "replay", "--id", "ff").code == 2


def test_an_output_is_retired_in_all_stores_also_where_one_never_had_it(call: Workers) -> None:
    with MadeStore(call.stores()[2], ("billing", "shadow", "gone")) as store:
        store.use("alpha", 1, 0)
        store.close_windows()
    assert call("outputs", "retire", "gone", "--json").json["retired"] == 1
    assert call("outputs", "retire", "never").code == 2


def test_store_check_reads_all_and_fails_for_one(call: Workers) -> None:
    said = call("store", "check", "--json")
    assert said.code == 0
    assert [Path(one["path"]).name for one in said.json["stores"]] == [path.name for path in call.stores()]
    os.truncate(call.stores()[1], 8_192)
    assert call("store", "check").code == 1


def test_a_ledger_of_several_stores_is_compared_as_one(call: Workers, tmp_path: Path) -> None:
    theirs = tmp_path / "sums.csv"
    lines = [f"{tenant},requests,6" for tenant in ("alpha", "beta", "gamma")]
    theirs.write_text("tenant,meter,value\n" + "\n".join(lines) + "\n")
    from_, to = (f"2027-01-15T0{START // 3_600_000 % 24 + hour}:00:00Z" for hour in (0, 1))
    said = call("compare", "--from", from_, "--to", to, "--csv", str(theirs), "--meter", "requests", "--json")
    sums = Counter({line["tenant"]: line["ours"] for line in said.json["lines"]})
    assert (sums["alpha"], sums["beta"], sums["gamma"]) == (6, 6, 6), said.out


def test_repairs_of_one_store_are_as_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = Caller(tmp_path, capsys)
    with MadeStore(call.store, ("billing", "shadow")) as store:
        store.use("alpha", 1, 0, now_ms=START)
        store.turn(START + 2 * MINUTE)
    said = call("status", "--json").json
    assert "workers" not in said
    assert "worker" not in call("queue", "ls", "--json").json["events"][0]
    done = repaired(
        load(call.config, {}), "deadletters.replay", {}, lambda repairs, _: repairs.replay(None, [], None)
    )
    assert done.counts["replayed"] == 0
