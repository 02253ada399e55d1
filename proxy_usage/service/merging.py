"""One /metrics of several workers: each metric's samples become one, label by label.

Counters are added, and never fall: what a worker had counted when it was last asked stays in the sum after
its death, and the one started in its place counts on from nothing. For each gauge ``GAUGES`` says what its
values come to; there is no label for the worker, so that N workers make no more series than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

Rule = Callable[[Iterable[float]], float]
_Labels = tuple[tuple[str, str], ...]


class _Series(NamedTuple):
    """One sample's place."""

    metric: str
    name: str
    labels: _Labels


GAUGES: Mapping[str, Rule] = {
    "proxy_usage_audit_age_seconds": max,  # worker 0 alone audits
    "proxy_usage_audit_dropped_entries": max,
    "proxy_usage_audit_missing_entries": max,
    "proxy_usage_audit_nodes": max,
    "proxy_usage_build_info": max,
    "proxy_usage_certificate_expiry_timestamp_seconds": min,
    "proxy_usage_checkpoint_age_seconds": max,
    "proxy_usage_config_reload_refused": max,
    "proxy_usage_crash_loss_unknown_nodes": max,  # a node sends to several: at least so many
    "proxy_usage_dead_letters": sum,
    "proxy_usage_forward_held": sum,
    "proxy_usage_node_entries_received": sum,
    "proxy_usage_output_paused": max,
    "proxy_usage_queue_events": sum,
    "proxy_usage_queue_oldest_seconds": max,
    "proxy_usage_receiver_connections": sum,
    "proxy_usage_receiver_shared_node_ids": max,  # likewise
    "proxy_usage_receiver_streams": sum,
    "proxy_usage_stage_beat_seconds": max,
    "proxy_usage_store_bytes": sum,
    "proxy_usage_store_failed": max,
    "proxy_usage_store_limit_bytes": sum,
    "proxy_usage_store_pressure": max,
    "proxy_usage_store_reserve": min,
    "proxy_usage_store_room_bytes": sum,
    "proxy_usage_stores_set_aside": sum,
    "proxy_usage_streams_remembered": sum,
    "proxy_usage_tenants": max,  # a tenant's rows come to several, and each has the limit for itself
    "proxy_usage_windows_open": sum,
}
"""What a gauge's values come to, of all workers."""
OWN = frozenset({"proxy_usage_ready", "proxy_usage_workers", "proxy_usage_worker_restarts"})
"""What the supervisor says in place of its workers: one of them may not be there to say that it is not."""


class Merged:
    """The samples of several workers as one exposition.

    Args:
        own: metrics of the process that merges, given as they are.
    """

    def __init__(self, own: Callable[[], Iterable[Metric]]) -> None:
        self._own = own
        self._kinds: dict[str, tuple[str, str]] = {}  # metric → (type, help), in the order they came
        self._now: dict[int, dict[_Series, float]] = {}  # by worker, as it was last asked
        self._before: dict[_Series, float] = {}  # counters of those that died

    def took(self, worker: int, text: str) -> None:
        """A worker was asked, and this is its /metrics."""
        samples: dict[_Series, float] = {}
        for family in text_string_to_metric_families(text):
            if family.name in OWN:
                continue
            self._kinds.setdefault(family.name, (family.type, family.documentation))
            for sample in family.samples:
                labels = tuple(sorted(sample.labels.items()))
                samples[_Series(family.name, sample.name, labels)] = sample.value
        self._now[worker] = samples

    def died(self, worker: int) -> None:
        """A worker is gone. Its gauges stay as they were until another in its place is asked."""
        samples = self._now.get(worker, {})
        for series in [one for one in samples if self._kinds[one.metric][0] == "counter"]:
            self._before[series] = self._before.get(series, 0) + samples.pop(series)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        values: dict[_Series, list[float]] = {series: [value] for series, value in self._before.items()}
        for samples in self._now.values():
            for series, value in samples.items():
                values.setdefault(series, []).append(value)
        metrics = {name: Metric(name, text, kind) for name, (kind, text) in self._kinds.items()}
        for series, found in values.items():
            kind = self._kinds[series.metric][0]
            rule = sum if kind == "counter" else GAUGES.get(series.metric, max)
            metrics[series.metric].add_sample(series.name, dict(series.labels), rule(found))
        yield from metrics.values()
        yield from self._own()
