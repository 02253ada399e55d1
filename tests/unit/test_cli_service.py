"""Verbs beside a running service: started, asked, told to replay, and stopped as a person would."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_call import Caller, until_it_serves
from made_store import MadeStore

from proxy_usage.__main__ import plain_run
from proxy_usage.config.workers import worker_path
from proxy_usage.control import socket_path
from proxy_usage.store import Fate


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Caller:
    caller = Caller(tmp_path, capsys)
    with MadeStore(caller.store) as store:
        store.use("alpha", 2, 0)
        store.close_windows()
        store.answer(store.send(), Fate("dead", 200, "rejected", "unknown meter"))
    return caller


@pytest.fixture
def service(call: Caller, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            # What it imports goes into the log, too.
            [
                *(sys.executable, "-X", "importtime"),
                *("-m", "proxy_usage", "run", "--config", str(call.config)),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        until_it_serves(process, call.store, tmp_path / "log")
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_running_service_is_asked_and_replays_itself(
    call: Caller, service: "subprocess.Popen[bytes]"
) -> None:
    asked = call("status", "--json").json
    assert asked["service"]["alive"] is True
    assert asked["outputs"][0]["dead"] == 1
    assert asked["service"]["space"]["pressure"] == "none"
    assert "service       running, " in call("status").out
    assert call("deadletters", "replay", "--json").json == {"replayed": 1, "too_late": 0, "service": True}
    assert call("deadletters", "ls", "--json").json == {"deadletters": []}
    refused = call("deadletters", "replay", "01ARZ3NDEKTSV4RRFFQ69G5FAV")
    assert (refused.code, "not a dead letter" in refused.err) == (2, True)


def test_a_running_service_has_loaded_nothing_of_the_command_line(
    service: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    lines = (tmp_path / "log").read_text().splitlines()
    modules = [line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")]
    loaded = {module.partition(".")[0] for module in modules}
    assert {"grpc", "aiohttp", "structlog"} <= loaded
    assert loaded & {"typer", "pygments", "shellingham", "envoy_data_plane", "betterproto2"} == set()
    # The attempt to load rich is listed, too.
    assert not any(module.startswith(("proxy_usage.cli", "rich.")) for module in modules)


@pytest.fixture
def left(call: Caller) -> Path:
    """A store of a worker that is not configured any more."""
    path = worker_path(call.store, 1)
    with MadeStore(path) as store:
        store.use("beta", 1, 0)
    return path


def test_what_is_taken_over_is_logged_as_everything_is(
    left: Path, service: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    lines = [
        line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("import time:")
    ]
    assert "store adopted" in [json.loads(line)["event"] for line in lines]
    assert not left.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="SCHED_BATCH is Linux's")
def test_the_threads_of_grpc_interrupt_nobody_and_the_event_loop_is_as_prompt_as_ever(
    service: "subprocess.Popen[bytes]",
) -> None:
    policies = {
        int(task.name): (os.sched_getscheduler(int(task.name)), (task / "comm").read_text().strip())
        for task in Path(f"/proc/{service.pid}/task").iterdir()
    }
    assert policies.pop(service.pid)[0] == os.SCHED_OTHER  # the event loop
    grpc = [policy for policy, name in policies.values() if name.startswith(("event_engine", "lifeguard"))]
    assert grpc
    assert set(grpc) == {os.SCHED_BATCH}
    ours = [policy for policy, name in policies.values() if name.startswith("python")]
    # Who hands messages to the loop is gRPC's, too; the store's thread was started when it was done.
    assert set(ours) == {os.SCHED_BATCH, os.SCHED_OTHER}


@pytest.mark.parametrize(
    ("words", "named", "expected"),
    [
        (["run", "--config", "a.yaml"], None, (Path("a.yaml"), False)),
        (["run", "-c", "a.yaml", "--restored"], "b.yaml", (Path("a.yaml"), True)),
        (["run", "--config=a.yaml"], None, (Path("a.yaml"), False)),
        (["run"], "b.yaml", (Path("b.yaml"), False)),
        (["run"], None, None),
        (["run", "--config"], "b.yaml", None),
        (["run", "--help"], "b.yaml", None),
        (["run", "-c", "a.yaml", "more"], None, None),
        (["validate", "-c", "a.yaml"], None, None),
        ([], None, None),
    ],
)
def test_what_a_plain_run_is(words: list[str], named: str | None, expected: tuple[Path, bool] | None) -> None:
    assert plain_run(words, named) == expected


def test_a_second_service_is_told_who_owns_the_store(
    call: Caller, service: "subprocess.Popen[bytes]"
) -> None:
    second = call("run")
    assert second.code == 1
    assert f"is in use by pid {service.pid} on host " in second.err
    assert call("status", "--json").json["service"]["alive"] is True


def test_a_service_that_is_stopped_drains_and_leaves_no_socket(
    call: Caller, service: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    service.send_signal(signal.SIGTERM)
    assert service.wait(timeout=60) == 0
    assert not socket_path(call.store).exists()
    assert json.loads((tmp_path / "log").read_text().splitlines()[-1])["event"] == "drained"
    assert call("status", "--json").json["service"] is None


def test_a_running_service_decides_about_stuck_usage_itself(
    call: Caller, service: "subprocess.Popen[bytes]"
) -> None:
    redated = call("deadletters", "replay", "--redate", "--json").json
    assert redated == {"redated": 1, "doubtful": 0, "service": True}
    (event,) = call("queue", "ls", "--output", "billing", "--json").json["events"]
    assert event["tenant"] == "alpha"
    released = call("unattributed", "replay", "--json").json
    assert released == {
        "released": 0,
        "minted": 0,
        "unattributed": 0,
        "too_late": 0,
        "lost": 0,
        "service": True,
    }
    for verb in (("outputs", "retire", "billing"), ("outputs", "retire", "nonesuch")):
        refused = call(*verb)
        assert (refused.code, "hint:" in refused.err) == (2, True)
    assert call("unattributed", "replay", "--id", "00").code == 2
    assert call("deadletters", "replay", "--redate", event["id"]).code == 2
