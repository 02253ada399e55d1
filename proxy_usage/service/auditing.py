"""What the service does for audits: its own, and those of other sinks that ask what it received."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import msgspec

from proxy_usage.audit import Asker, Auditor, Envoy, Received, report
from proxy_usage.audit.asking import TIMEOUT_S
from proxy_usage.config import Config
from proxy_usage.config.workers import worker_path
from proxy_usage.control import ask, socket_path
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.errors import ProxyUsageError
from proxy_usage.intake import OTHERS, by_node
from proxy_usage.metrics import MAX_NODES_NAMED, Metrics
from proxy_usage.nodes import Nodes
from proxy_usage.page.snapshot import NodeAudit
from proxy_usage.pipeline import Pipeline
from proxy_usage.service.build import Storage, clock_ms
from proxy_usage.store.audits import Audits
from proxy_usage.store.thread import StoreThread


class Auditing:
    """Both sides of audits at one sink.

    Raises:
        StoreError: the store's name cannot be read.
    """

    def __init__(
        self,
        config: Config,
        storage: Storage,
        pipeline: Pipeline,
        nodes: Nodes,
        thread: StoreThread,
        metrics: Metrics,
    ) -> None:
        audits = Audits(storage.database, keep_ms=config.store.keep_sums)
        self._sink = audits.sink(clock_ms())
        self._losses = audits.losses()  # they change at a start alone
        self._adopted = audits.adopted()  # likewise
        self._storage = storage
        self._pipeline = pipeline
        self._nodes = nodes
        self._metrics = metrics
        self._asker = Asker(_token(config))
        self.auditor: Auditor | None = None
        """None where no Envoy is configured to be audited."""
        audit = config.audit
        if audit.envoys:
            self.auditor = Auditor(
                [Envoy(str(one.url), one.node, one.count, one.managers) for one in audit.envoys],
                audit.members,
                own=self.received,
                siblings=partial(_siblings, config),
                asker=self._asker,
                store=audits,
                thread=thread,
                metrics=metrics,
                settle_ms=audit.settle,
                interval_ms=audit.interval,
                clock_ms=clock_ms,
            )

    def trust(self, config: Config) -> None:
        """Asks other sinks with another token from now on."""
        self._asker.token = _token(config)

    def received(self) -> Received:
        """What this sink received: ``/api/intake``."""
        return report(
            self._sink.id,
            self._sink.born_ms,
            self._storage.intake.counts(),
            ended=self._pipeline.ended,
            losses=self._losses,
            live=self._nodes.live(),
            seen=self._nodes.seen(),
            adopted=self._adopted,
        )

    def latest(self) -> dict[str, object]:
        """What the audit came to: ``/api/audit``."""
        return {"nodes": []} if self.auditor is None else self.auditor.latest()

    def api(self) -> Mapping[str, Callable[[], object]]:
        """What the HTTP port answers with."""
        return {"/api/intake": self.received, "/api/audit": self.latest}

    def nodes(self) -> list[NodeAudit] | None:
        """For the operator's page; None where nothing is audited."""
        if self.auditor is None:
            return None
        return [
            NodeAudit(
                node=one.node,
                state=one.state,
                since_ms=one.since_ms,
                written=one.figures.written,
                dropped=one.figures.dropped,
                flushed=one.figures.flushed,
                received=one.figures.received,
                missing=one.figures.missing,
                lost=one.figures.crash_lost,
            )
            for one in self.auditor.nodes()
        ]

    def summary(self) -> object:
        """For ``status``: nodes by state; None where nothing is audited."""
        return None if self.auditor is None else self.auditor.latest()["summary"]

    def gauges(self) -> None:
        """Brings metrics up to date that are read off when somebody asks."""
        counts = by_node(self._storage.intake.counts())
        others = 0
        for number, (node, rows) in enumerate(counts.items()):
            if number < MAX_NODES_NAMED and node != OTHERS:
                self._metrics.node_received.labels(node=node).set(rows)
            else:
                others += rows
        if others:
            self._metrics.node_received.labels(node=OTHERS).set(others)
        if self.auditor is not None:
            self._metrics.audit_age.set(self.auditor.age_ms / 1_000)


async def _siblings(config: Config) -> dict[str, Received | None]:
    """What the other workers received, asked over their control sockets. Of worker 0's configuration."""
    workers = range(1, config.workers)
    answers = await asyncio.gather(*(_sibling(worker_path(config.store.path, one)) for one in workers))
    return {f"worker {one}": answer for one, answer in zip(workers, answers, strict=True)}


async def _sibling(store: Path) -> Received | None:
    try:
        return msgspec.convert(await ask(socket_path(store), "intake", TIMEOUT_S), type=Received)
    except (ProxyUsageError, msgspec.ValidationError):
        return None


def _token(config: Config) -> TokenFile | None:
    path = config.audit.token_file or config.listen.http_token_file
    return None if path is None else TokenFile(path)
