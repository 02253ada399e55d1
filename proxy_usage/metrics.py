"""Every metric of the program, declared once. No label ever carries a tenant or anything a client chose."""

from __future__ import annotations

import prometheus_client as prometheus

# A second series per counter, with the time it was made, is of no use to anybody here.
prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]

MAX_NODES_NAMED = 100
"""Nodes with a label of their own in metrics by node."""
DEAD_LETTER_REASONS = frozenset(
    {
        "INVALID_ULID",
        "MISSING_REQUIRED_FIELD",
        "INVALID_DATACONTENTTYPE",
        "INVALID_VALUE_TYPE",
        "malformed",
        "not_accepted",
        "refused",
        "restored",
        "salvaged",
        "too_large",
        "too_late",
        "unreadable",
    }
)


def log_lines_lost(registry: prometheus.CollectorRegistry) -> prometheus.Counter:
    """Of any process: each writes its own lines."""
    return prometheus.Counter(
        "proxy_usage_log_lines_lost", "Log lines that standard output did not take.", registry=registry
    )


class SupervisorMetrics:
    """What the supervisor of several workers says itself; a single process says whether it is ready."""

    def __init__(self, registry: prometheus.CollectorRegistry) -> None:
        self.ready = prometheus.Gauge("proxy_usage_ready", "1 while /readyz says yes.", registry=registry)
        self.workers = prometheus.Gauge(
            "proxy_usage_workers", "Workers by state: up, down.", ["state"], registry=registry
        )
        self.restarts = prometheus.Counter(
            "proxy_usage_worker_restarts",
            "Starts in place of a worker that ended.",
            ["worker"],
            registry=registry,
        )


class Metrics:
    """The process's metrics in a registry of their own, so that two can live in one test.

    Counters of rows follow the fates: ``read = counted + skipped + invalid``. Counters of events likewise:
    ``minted = delivered + unconfirmed + pending + dead letters`` per output.
    """

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> prometheus.Counter:
            return prometheus.Counter(f"proxy_usage_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> prometheus.Gauge:
            return prometheus.Gauge(f"proxy_usage_{name}", text, labels, registry=self.registry)

        # receiver
        self.streams = gauge("receiver_streams", "Access-log streams open now.")
        self.messages = counter("receiver_messages", "Messages read from access-log streams.")
        self.received_bytes = counter("receiver_bytes", "Bytes of messages read from access-log streams.")
        self.bad_messages = counter("receiver_bad_messages", "Messages that broke off or were no messages.")
        self.refused_streams = counter("receiver_refused_streams", "Streams ended by the sink.", "reason")
        self.broken_streams = counter(
            "receiver_broken_streams", "Streams that a client broke off, or that sent too large a message."
        )
        self.connections = gauge("receiver_connections", "Connections with an access-log stream.")
        self.shared_nodes = gauge("receiver_shared_node_ids", "Node ids that several addresses claim now.")

        # rows
        self.read = counter("entries_read", "Access-log entries read.")
        self.counted = counter("entries_counted", "Entries whose usage was counted, attributed or not.")
        self.skipped = counter("entries_skipped", "Entries that are not usage, by reason.", "reason")
        self.invalid = counter(
            "entries_invalid", "Entries that could not be understood, by reason.", "reason"
        )
        self.unattributed = counter(
            "entries_unattributed", "Counted entries whose usage is held, by reason.", "reason"
        )
        self.noted = counter("entries_noted", "Counted entries with something odd about them.", "kind")
        self.late = counter("entries_late", "Counted entries that came after their window had closed.")
        self.crash_lost = counter(
            "crash_lost_entries", "Entries that were read and lost by the last crash, by node.", "node"
        )
        self.crash_unknown = gauge(
            "crash_loss_unknown_nodes", "Nodes of which nobody can say what the last crash lost."
        )

        self.node_received = gauge(
            "node_entries_received", "Entries received over the life of the store, by node.", "node"
        )

        # audit
        self.audit_nodes = gauge("audit_nodes", "Envoys, by what the audit says of the last day.", "state")
        self.audit_missing = gauge(
            "audit_missing_entries",
            "Entries that an Envoy flushed in the last day and no sink received, at least.",
            "node",
        )
        self.audit_dropped = gauge(
            "audit_dropped_entries", "Entries for which an Envoy had no room in the last day.", "node"
        )
        self.audit_age = gauge("audit_age_seconds", "Time since the last round of the audit.")

        # long streams
        self.long_streams = gauge("streams_remembered", "Long streams whose totals are known.")
        self.streams_estimated = counter(
            "streams_estimated", "Streams that fell silent: their request was counted without an end row."
        )
        self.streams_at_limit = counter(
            "streams_at_limit", "Rows of streams past streams.max, which are metered at their end alone."
        )

        self.certificate_expiry = gauge(
            "certificate_expiry_timestamp_seconds",
            "When a certificate that is shown to others expires, in seconds since the epoch.",
            "use",
        )

        # windows and store
        self.windows_open = gauge("windows_open", "Keys with an open window.")
        self.tenants = gauge("tenants", "Tenants seen within a day.")
        self.overflow = counter("entries_dimension_overflow", "Entries counted without their dimensions.")
        self.checkpoints = counter("checkpoints", "Turns made durable.")
        self.checkpoint_failures = counter(
            "checkpoint_failures", "Turns the disk refused; none is lost by it."
        )
        self.checkpoint_age = gauge("checkpoint_age_seconds", "Time since everything read was last durable.")
        self.store_failed = gauge("store_failed", "1 while the store cannot be written.")
        self.store_bytes = gauge("store_bytes", "Bytes of the store: used, free, log, reserve.", "part")
        self.store_limit = gauge("store_limit_bytes", "What the store may take, all parts together.")
        self.store_room = gauge(
            "store_room_bytes", "What new usage may make of the used bytes, by limit and disk."
        )
        self.store_reserve = gauge("store_reserve", "1 while the reserve is there, 0 once it was given up.")
        self.store_pressure = gauge(
            "store_pressure", "0 room enough, 1 the ledger gives way, 2 events are merged, 3 nothing is left."
        )
        self.refused_turns = counter(
            "store_refused_turns", "Turns refused by a full store; their usage waits in memory."
        )
        self.merged = counter("events_merged", "Events that became part of another, since room was short.")
        self.rolled = counter("ledger_rolled_rows", "Ledger rows that became hourly sums.")
        self.expired = counter("unattributed_expired_rows", "Rows of held usage that nobody claimed in time.")
        self.set_aside = gauge("stores_set_aside", "Damaged stores that lie beside the one in use.")

        # delivery
        self.minted = counter("events_minted", "Events made of closed windows.")
        self.events = counter("events_settled", "Events that an output settled, by fate.", "output", "fate")
        self.dead_letters = counter("events_dead_lettered", "Dead letters, by reason.", "output", "reason")
        self.batches = counter("batches", "Batches sent, by outcome.", "output", "outcome")
        self.unanswered = counter(
            "attempts_unanswered", "Attempts whose end does not say what the endpoint stored.", "output"
        )
        self.pending = gauge("queue_events", "Events an output has not settled.", "output")
        self.dead = gauge("dead_letters", "Dead letters kept for replay.", "output")
        self.oldest = gauge("queue_oldest_seconds", "Age of the oldest event not settled.", "output")
        self.paused = gauge("output_paused", "1 while an output is paused.", "output")

        # a forwarder: read = settled + returned + held
        self.forward_read = counter("forward_read", "Events that a forwarder took from its stream.")
        self.forward_returned = counter(
            "forward_returned", "Events that a forwarder gave back: another one settles them."
        )
        self.forward_held = gauge("forward_held", "Events that a forwarder has taken and not settled.")

        self.reload_refused = gauge(
            "config_reload_refused", "1 while the configuration file holds what was not taken over."
        )
        self.log_lost = log_lines_lost(self.registry)
        self.ready = SupervisorMetrics(self.registry).ready
        self.stage_beat = gauge("stage_beat_seconds", "Time since a stage last showed life.", "stage")
        self.info = gauge("build_info", "Version and the fold that runs.", "version", "fold")

    def delivered(self, output: str, fate: str, reason: str) -> None:
        """One event of an output was settled."""
        self.events.labels(output=output, fate=fate).inc()
        if fate == "dead":
            # The reason comes from the endpoint: unknown ones share a label.
            known = reason if reason in DEAD_LETTER_REASONS else "other"
            self.dead_letters.labels(output=output, reason=known).inc()

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return prometheus.generate_latest(self.registry)


def total(metric: prometheus.Counter | prometheus.Gauge) -> int:
    """The present value, over all labels."""
    return sum(int(sample.value) for family in metric.collect() for sample in family.samples)


def by_label(counter: prometheus.Counter, label: str) -> dict[str, int]:
    """The present values of a counter, added up by one of its labels."""
    found: dict[str, int] = {}
    for family in counter.collect():
        for sample in family.samples:
            value = sample.labels[label]
            found[value] = found.get(value, 0) + int(sample.value)
    return found
