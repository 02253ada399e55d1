"""``store check`` tells what is in a file, sound or damaged or no store at all, and touches nothing."""

import sqlite3
from pathlib import Path

import pytest
from cli_call import Caller
from damage import leaves, overwrite, page_size
from made_store import START, MadeStore

from proxy_usage.store import Fate
from proxy_usage.store.aside import set_aside
from proxy_usage.store.schema import VERSION


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(tmp_path, capsys)


def lively(path: Path) -> None:
    """100 events, of which 40 wait, 10 are under way, 30 delivered and 20 dead letters; two open windows."""
    with MadeStore(path) as store:
        for number in range(100):
            store.use(f"tenant-{number}", 1 + number, 0)
        store.close_windows()
        store.answer(store.send(60), *[Fate("delivered", 200)] * 30, *[Fate("dead", 200, "refused")] * 20)
        store.use("open", 5, 7)
        store.use("wide", 6, 8)
        store.turn()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}


def test_a_sound_store(call: Caller) -> None:
    lively(call.store)
    said = call("store", "check")
    assert said.code == 0
    assert "sound" in said.out
    assert "could be salvaged" not in said.out
    found = call("store", "check", "--json").json
    assert (found["sound"], found["ours"], found["version"], found["damage"]) == (True, True, VERSION, [])
    assert found["balanced"] is True
    assert found["conservation"]["deep"] is True
    assert (found["tables"]["events"], found["tables"]["dead"], found["tables"]["ledger"]) == (70, 20, 30)
    assert found["salvageable"] == {
        "events": 70,
        "values": {"requests": sum(range(31, 101))},
        "open_windows": 2,
        "uncertain_windows": 0,
        "gaps": 0,
        "senseless": 0,
    }


def test_a_store_that_a_service_uses_is_left_alone(call: Caller) -> None:
    lively(call.store)
    with MadeStore(call.store) as store:
        assert call("store", "check").code == 0
        store.use("more", 1, 0)
        assert store.close_windows()


def test_a_damaged_store_says_what_could_be_kept(call: Caller) -> None:
    lively(call.store)
    overwrite(call.store, leaves(call.store, "events")[2:4])
    before = files(call.store.parent)
    said = call("store", "check")
    assert said.code == 1
    assert "DAMAGED" in said.out
    assert "could be salvaged" in said.out
    found = call("store", "check", "--json").json
    assert found["sound"] is False
    assert found["damage"]
    assert 20 < found["salvageable"]["events"] < 70
    assert found["salvageable"]["gaps"] == 1
    after = files(call.store.parent)
    assert after.items() >= before.items()


def test_a_file_is_named_that_lies_aside(call: Caller, tmp_path: Path) -> None:
    lively(call.store)
    lies = set_aside(call.store, "a test", START)
    said = call.bare("store", "check", str(lies))
    assert said.code == 0
    assert str(lies) in said.out


def test_sums_that_do_not_add_up_are_damage(call: Caller) -> None:
    lively(call.store)
    db = sqlite3.connect(call.store)
    db.execute("DELETE FROM deliveries WHERE seq=(SELECT max(seq) FROM deliveries)")
    db.commit()
    db.close()
    said = call("store", "check")
    assert said.code == 1
    assert "the sums it keeps are not what its tables come to" in said.out
    assert call("store", "check", "--json").json["balanced"] is False


def test_content_that_is_not_what_it_claims_is_damage_though_sqlite_can_read_it(call: Caller) -> None:
    lively(call.store)
    db = sqlite3.connect(call.store)
    db.execute("UPDATE events SET body=x'00' WHERE seq=70")
    db.commit()
    db.close()
    found = call("store", "check", "--json")
    assert found.code == 1
    assert found.json["salvageable"]["senseless"] == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"no database at all " * 500, "not a database"), (b"\0" * 8192, "not a database")],
)
def test_a_file_that_is_no_database(call: Caller, content: bytes, told: str) -> None:
    call.store.write_bytes(content)
    said = call("store", "check")
    assert said.code == 1
    assert told in said.out
    assert call("store", "check", "--json").json["ours"] is False


def test_a_database_of_another_program(call: Caller) -> None:
    db = sqlite3.connect(call.store)
    db.execute("CREATE TABLE precious(x)")
    db.close()
    said = call("store", "check")
    assert said.code == 1
    assert "another program" in said.out


def test_a_store_of_another_version(call: Caller) -> None:
    lively(call.store)
    db = sqlite3.connect(call.store)
    db.execute(f"PRAGMA user_version={VERSION + 1}")
    db.close()
    found = call("store", "check", "--json")
    assert found.code == 1
    assert (found.json["version"], found.json["damage"], found.json["conservation"]) == (
        VERSION + 1,
        [],
        None,
    )


def test_no_file_at_all(call: Caller, tmp_path: Path) -> None:
    said = call.bare("store", "check", str(tmp_path / "nowhere.db"))
    assert said.code == 1
    assert "there is no store at" in said.err
    assert "hint:" in said.err
    assert call.bare("store", "check").code == 2


def test_half_a_store(call: Caller) -> None:
    lively(call.store)
    content = call.store.read_bytes()
    pages = len(content) // page_size(call.store)
    call.store.write_bytes(content[: pages // 2 * page_size(call.store)])
    found = call("store", "check", "--json")
    assert found.code == 1
    assert found.json["damage"]


# --- and what status says of it -------------------------------------------------------------------------


def test_status_tells_of_what_was_set_aside_and_of_a_backup(call: Caller) -> None:
    from proxy_usage.config import load
    from proxy_usage.service.build import open_storage

    config = load(call.config, {})
    storage = open_storage(config)
    storage.intake.add("envoy-1", 3)
    storage.close()
    overwrite(call.store, [1])
    storage = open_storage(config, from_backup=True)
    said = call("status")
    assert "salvage is under way" in said.out
    (salvage,) = storage.past.salvages
    salvage.run(START)
    storage.close()
    said = call("status")
    assert said.code == 0
    assert f"{call.store.name}.aside-" in said.out
    assert "is damaged or not a database" in said.out
    assert "nothing of it can be read" in said.out
    assert "from a backup, 0 dead letters" in said.out
    assert "0, and unknown" in said.out
    found = call("status", "--json").json
    assert found["asides"][0]["report"]["state"] == "unreadable"
    assert found["crash_unknown"] == {"envoy-1": 1}
    assert found["restored"]["events"] == 0
