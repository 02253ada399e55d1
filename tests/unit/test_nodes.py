"""Two Envoys that call themselves the same."""

from typing import Any

import pytest
import structlog

from proxy_usage import nodes
from proxy_usage.metrics import Metrics
from proxy_usage.nodes import Nodes


def shared(metrics: Metrics) -> Any:
    return metrics.registry.get_sample_value("proxy_usage_receiver_shared_node_ids")


def test_a_node_id_from_two_addresses_is_reported_while_both_speak() -> None:
    metrics = Metrics()
    known = Nodes(metrics)
    with structlog.testing.capture_logs() as lines:
        known.joined("edge-1", "ipv4:10.0.0.1")
        known.joined("edge-1", "ipv4:10.0.0.1")  # a stream per worker and log
        known.joined("edge-2", "ipv4:10.0.0.2")
        assert (shared(metrics), lines) == (0, [])
        known.joined("edge-1", "ipv4:10.0.0.3")
        assert shared(metrics) == 1
        known.left("edge-1", "ipv4:10.0.0.3")
        assert shared(metrics) == 0
        known.joined("edge-1", "ipv4:10.0.0.3")
    assert [line["node"] for line in lines] == ["edge-1"]
    assert lines[0]["addresses"] == ["ipv4:10.0.0.1", "ipv4:10.0.0.3"]
    for host in ("ipv4:10.0.0.1", "ipv4:10.0.0.1", "ipv4:10.0.0.3"):
        known.left("edge-1", host)
    known.left("edge-2", "ipv4:10.0.0.2")
    assert shared(metrics) == 0


def test_who_invents_node_ids_does_not_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "MAX_WARNED_NODES", 3)
    known = Nodes(Metrics())
    with structlog.testing.capture_logs() as lines:
        for number in range(10):
            known.joined(f"node-{number}", "ipv4:10.0.0.1")
            known.joined(f"node-{number}", "ipv4:10.0.0.2")
    assert len(lines) == 3
