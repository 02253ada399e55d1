"""Several workers: what each is told, what their metrics come to, and who may have their port."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from proxy_usage.config import Config
from proxy_usage.config.workers import all_stores, worker_config, worker_path, worker_stores
from proxy_usage.demo.listener import lease_port
from proxy_usage.errors import ListenError, UsageError
from proxy_usage.metrics import Metrics
from proxy_usage.receiver.port import ReceiverLimits, check_free, options, reserve
from proxy_usage.service.merging import GAUGES, OWN, Merged
from proxy_usage.service.worker import Part

# --- what each is told --------------------------------------------------------------------------------------


def configured(path: Path, workers: int) -> Config:
    return Config.model_validate(
        {
            "store": {"path": str(path / "usage.db"), "max_bytes": "9GiB", "ledger_max_bytes": "3GiB"},
            "listen": {"streams": "127.0.0.1:9002", "limits": {"memory": "3GiB", "new_streams": 7}},
            "envoy": {"flush_interval": "60s"},
            "workers": workers,
        }
    )


def test_what_a_machine_has_is_divided_and_the_rest_is_each_ones_own(tmp_path: Path) -> None:
    whole = configured(tmp_path, 3)
    parts = [worker_config(whole, worker, 3, grpc="127.0.0.1:4711") for worker in range(3)]
    assert [part.store.path.name for part in parts] == ["usage.db", "usage.worker-1.db", "usage.worker-2.db"]
    for part in parts:
        assert part.store.max_bytes == 3 << 30
        assert part.store.ledger_max_bytes == 1 << 30
        assert (part.listen.limits.memory, part.listen.limits.new_streams) == (1 << 30, 2)
        assert part.windows == whole.windows
        assert part.tenant == whole.tenant
        assert part.listen.grpc == "127.0.0.1:4711"
    assert parts[0] != parts[1]


def test_worker_0_alone_audits(tmp_path: Path) -> None:
    audit = {"envoys": ["http://127.0.0.1:9901"], "members": ["http://127.0.0.1:9090"]}
    whole = Config.model_validate({"store": {"path": str(tmp_path / "usage.db")}, "audit": audit})
    parts = [worker_config(whole, worker, 3).audit for worker in range(3)]
    assert [len(part.envoys) for part in parts] == [1, 0, 0]
    assert parts[0] == whole.audit


def test_each_worker_writes_an_archive_of_its_own(tmp_path: Path) -> None:
    """Two writers of one file would shut each other out."""
    archive = {"path": str(tmp_path / "a.ndjson"), "max_bytes": "3MiB", "rotate_bytes": "2MiB"}
    outputs = [{"name": "archive", "format": "file", "file": archive}]
    whole = Config.model_validate({"store": {"path": str(tmp_path / "usage.db")}, "outputs": outputs})
    files = [worker_config(whole, worker, 3).outputs[0].file for worker in range(3)]
    assert [file and file.path.name for file in files] == [
        *("a.ndjson", "a.worker-1.ndjson", "a.worker-2.ndjson")
    ]
    assert {file and (file.max_bytes, file.rotate_bytes) for file in files} == {(1 << 20, 1 << 20)}


def test_worker_0_alone_serves_long_streams_and_the_others_know(tmp_path: Path) -> None:
    first, second = (worker_config(configured(tmp_path, 2), worker, 2) for worker in range(2))
    assert (first.listen.streams, first.envoy.long_streams) == ("127.0.0.1:9002", "here")
    assert (second.listen.streams, second.envoy.long_streams) == (None, "elsewhere")


def test_the_worst_case_of_memory_is_of_all_workers_together(tmp_path: Path) -> None:
    one, three = (configured(tmp_path, workers) for workers in (1, 3))
    message = one.listen.limits.message
    assert three.worst_case_memory() == one.worst_case_memory() + 2 * message


def test_stores_of_workers_are_told_from_all_else(tmp_path: Path) -> None:
    store = tmp_path / "usage.db"
    names = ["usage.worker-12.db", "usage.worker-2.db"]
    others = [
        "usage.db",
        "usage-1.db",
        "usage.worker-0.db",
        "usage.worker-02.db",
        "usage.worker-2.db-wal",
        "usage.worker-2.db.intake",
        "usage.worker-2.db.aside-20261122T052452Z",
        "xusage.worker-2.db",
        "other.worker-2.db",
    ]
    for name in (*names, *others):
        (tmp_path / name).touch()
    assert worker_stores(store) == {2: tmp_path / names[1], 12: tmp_path / names[0]}
    assert worker_stores(tmp_path / "none" / "usage.db") == {}
    found = all_stores(configured(tmp_path, 2))
    assert found == {worker: worker_path(store, worker) for worker in (0, 1, 2, 12)}


def test_a_part_survives_the_command_line_and_nonsense_is_refused() -> None:
    part = Part(2, 3, "[::1]:9001")
    assert Part.decode(part.encode()) == part
    with pytest.raises(UsageError, match="--worker"):
        Part.decode("2")


# --- their metrics ------------------------------------------------------------------------------------------


COUNTED = {"proxy_usage_worker_restarts"}
"""Of what the supervisor says itself, no gauge."""


def test_every_metric_has_a_rule() -> None:
    """A new gauge: say in ``service/merging.py`` what its values come to."""
    kinds = {family.name: family.type for family in Metrics().registry.collect()}
    assert set(kinds.values()) == {"counter", "gauge"}
    assert {name for name, kind in kinds.items() if kind == "gauge"} == (GAUGES.keys() | OWN) - COUNTED
    assert kinds.keys() >= OWN
    assert not GAUGES.keys() & OWN


def values(merged: Merged) -> dict[str, float]:
    return {
        sample.name.removeprefix("proxy_usage_") + "".join(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(merged.exposition().decode())
        for sample in family.samples
    }


def worker_metrics(number: int) -> Metrics:
    metrics = Metrics()
    metrics.read.inc(10 + number)
    metrics.skipped.labels(reason="upstream" if number else "start").inc(number + 1)
    metrics.pending.labels(output="billing").set(100 * number)
    metrics.checkpoint_age.set(number)
    metrics.store_reserve.set(number != 1)
    metrics.ready.set(1)
    metrics.info.labels(version="1", fold="protobuf").set(1)
    return metrics


def test_samples_of_all_workers_become_one() -> None:
    merged = Merged(lambda: ())
    for number in range(3):
        merged.took(number, worker_metrics(number).exposition().decode())
    found = values(merged)
    assert found["entries_read_total"] == 33
    assert found["entries_skipped_totalstart"] == 1
    assert found["entries_skipped_totalupstream"] == 5
    assert found["queue_eventsbilling"] == 300
    assert found["checkpoint_age_seconds"] == 2
    assert found["store_reserve"] == 0
    assert found["build_infoprotobuf1"] == 1
    assert "ready" not in found  # the supervisor says it


def test_it_is_what_a_single_process_says() -> None:
    """Same names, types, help and order, so that nobody's queries need to know how many workers there are."""
    metrics = worker_metrics(1)
    merged = Merged(lambda: ())
    merged.took(0, metrics.exposition().decode())

    def comments(text: str) -> list[str]:
        lines = (line for line in text.splitlines() if line.startswith("#"))
        return [line for line in lines if line.split()[2].removesuffix("_total") not in OWN]

    assert comments(merged.exposition().decode()) == comments(metrics.exposition().decode())


def test_counters_never_fall_when_a_worker_dies() -> None:
    merged = Merged(lambda: ())
    for number in range(2):
        merged.took(number, worker_metrics(number).exposition().decode())
    before = values(merged)
    merged.died(1)
    assert values(merged) == before
    merged.died(1)  # its successor died before it was asked
    assert values(merged) == before
    merged.took(1, Metrics().exposition().decode())
    assert values(merged)["entries_read_total"] == before["entries_read_total"] == 21
    assert values(merged)["queue_eventsbilling"] == 0
    merged.took(1, worker_metrics(1).exposition().decode())
    assert values(merged)["entries_read_total"] == 32


# --- their port ---------------------------------------------------------------------------------------------


def test_a_shared_port_is_opened_as_one() -> None:
    assert dict(options(ReceiverLimits(shared=True)))["grpc.so_reuseport"] == 1


LISTEN = """
import socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if sys.argv[2] == "shared":
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
listener.bind(("127.0.0.1", int(sys.argv[1])))
listener.listen()
"""


def takes(port: int, how: str) -> bool:
    """Whether another process gets the port."""
    return subprocess.run([sys.executable, "-c", LISTEN, str(port), how], check=False).returncode == 0


def test_a_reserved_port_is_for_those_who_share_it_alone() -> None:
    port = lease_port()  # not of those that the kernel gives to whoever connects meanwhile
    with closing(reserve("127.0.0.1", port)):
        assert not takes(port, "alone")
        assert takes(port, "shared")
        check_free("127.0.0.1", port, shared=True)
        with pytest.raises(ListenError, match="cannot listen on"):
            check_free("127.0.0.1", port)
        with pytest.raises(ListenError, match="cannot listen on"):
            reserve("127.0.0.1", port)
    assert takes(port, "alone")


def test_a_port_that_others_share_is_not_reserved() -> None:
    with closing(socket.socket()) as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        with pytest.raises(ListenError, match="cannot listen on"):
            reserve("127.0.0.1", stranger.getsockname()[1])
