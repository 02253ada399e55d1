"""The service's life, top to bottom: start, supervise, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from proxy_usage import __version__
from proxy_usage.certificates import expires_s
from proxy_usage.config import Config
from proxy_usage.control import ControlServer
from proxy_usage.decode import CHOICE, Split
from proxy_usage.delivery import Courier
from proxy_usage.errors import ProxyUsageError, StageDied, StoreError, StoreForeign
from proxy_usage.intake import HTTP, OTHERS, TCP, by_node
from proxy_usage.metrics import MAX_NODES_NAMED, Metrics
from proxy_usage.model import Origin
from proxy_usage.nodes import Nodes
from proxy_usage.pipeline import Port
from proxy_usage.recording import Recorder
from proxy_usage.service.auditing import Auditing
from proxy_usage.service.build import (
    Storage,
    build_attributor,
    build_housekeeping,
    build_mint,
    build_pipeline,
    build_receivers,
    build_repairs,
    clock_ms,
)
from proxy_usage.service.checking import check_beside
from proxy_usage.service.collector import collect_seldom, settle
from proxy_usage.service.couriers import build_couriers
from proxy_usage.service.health import health_of
from proxy_usage.service.logs import configure_log, lost_lines
from proxy_usage.service.looking import Lookout, Parts, build_web
from proxy_usage.service.reaching import Reach
from proxy_usage.service.reloading import prepare
from proxy_usage.service.salvaging import salvage_all
from proxy_usage.service.turns import Turns
from proxy_usage.service.unsaved import tell_unsaved
from proxy_usage.service.verbs import Verbs
from proxy_usage.service.watching import QueueWatch
from proxy_usage.store.thread import StoreThread
from proxy_usage.web import Health

log = structlog.get_logger()

DRAIN_STREAMS_S = 5.0
DRAIN_TURNS_S = 5.0
"""So long a full store is given to make room for what is only in memory."""
DRAIN_DELIVERY_S = 10.0


class Service:
    """One sink. ``start``, then ``supervise`` until it returns, then ``drain``.

    Args:
        worker: it is one of several, which have one HTTP port together that is not its own.
    """

    def __init__(
        self,
        config: Config,
        storage: Storage,
        *,
        reload: Callable[[], Config],
        config_file: Path | None = None,
        worker: bool = False,
    ) -> None:
        self.config = config
        self._reload = reload
        self._storage = storage
        self._metrics = Metrics()
        self._thread = StoreThread()
        self._pipeline = build_pipeline(config, storage)
        self._recorder = Recorder(config.fold_plan().node_paths, clock_ms)
        nodes = Nodes(self._metrics)
        self._receivers = build_receivers(config, self._take, self._recorder.message, self._metrics, nodes)
        self._couriers = build_couriers(config, storage, self._thread, self._metrics)
        self._housekeeping = build_housekeeping(config, storage, self._thread, self._metrics)
        self._turns = Turns(
            self._pipeline,
            storage.database,
            storage.checkpoints,
            build_mint(config),
            self._housekeeping,
            self._thread,
            self._metrics,
            interval_ms=config.windows.checkpoint,
            clock_ms=clock_ms,
            on_events=self._wake,
            on_reopened=self._reopened,
            saved=storage.intake.counts(),
        )
        self._auditing = Auditing(config, storage, self._pipeline, nodes, self._thread, self._metrics)
        moving = (self._pipeline, self._turns, self._couriers, self._housekeeping)
        seen = Parts(
            lambda: self.config,
            storage,
            self._metrics,
            *moving,
            self.health,
            lambda: self._config_error,
            self._auditing.nodes,
        )
        self._lookout = Lookout(seen, config_file, clock_ms)
        self._turns.on_closed = self._lookout.closed
        self._web = (
            None
            if worker
            else build_web(
                config, self._metrics, self.health, self._refresh, self._lookout, self._auditing.api()
            )
        )
        store = config.store.path
        self._control = ControlServer(
            store.with_name(store.name + ".sock"),
            Verbs(
                build_repairs(config, storage, lambda: build_attributor(self.config)),
                self._thread,
                self._recorder,
                self._metrics,
                status=self.status,
                audit=self._auditing.latest,
                intake=self._auditing.received,
                health=self.health,
                scrape=self._exposition,
                page=lambda: self._lookout.document(tenants=self.config.listen.http_tenants),
                snapshot=self._lookout.snapshot,
                wake=self._wake,
            ).handlers(),
        )
        self._reach = Reach(self._control, storage.database.is_there)
        self._stages: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()
        self._started = False
        self._queues = QueueWatch(
            [courier.settings for courier in self._couriers],
            storage.queue,
            config.store.path,
            self._thread,
            self._metrics,
        )
        self._config_error = ""

    # --- start ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens the ports, the receiver's last: rows are only taken when everything behind it stands.

        Raises:
            ListenError: a port cannot be had.
        """
        self._metrics.info.labels(version=__version__, fold=CHOICE.reason).set(1)
        for number, (node, rows) in enumerate(by_node(self._storage.loss.rows).items()):
            self._metrics.crash_lost.labels(node=node if number < MAX_NODES_NAMED else OTHERS).inc(rows)
        self._metrics.crash_unknown.set(len(self._storage.loss.unknown))
        http = None if self._web is None else await self._web.start()
        await self._control.start()
        self._stages["control"] = asyncio.create_task(self._reach.keep(), name="control")
        self._stages["turns"] = asyncio.create_task(self._turns.run(), name="turns")
        self._stages["watch"] = asyncio.create_task(self._queues.run(), name="watch")
        self._stages["page"] = asyncio.create_task(self._lookout.run(), name="page")
        for courier in self._couriers:
            name = f"output {courier.settings.name}"
            self._stages[name] = asyncio.create_task(courier.run(), name=name)
        if self._storage.database.unchecked:
            checking = check_beside(self._storage.database)
            self._stages["check"] = asyncio.create_task(checking, name="check")
        if (auditor := self._auditing.auditor) is not None:
            self._stages["audit"] = asyncio.create_task(auditor.run(), name="audit")
        if salvages := self._storage.past.salvages:
            salvaging = salvage_all(salvages, self._thread, self._metrics, clock_ms)
            self._stages["salvage"] = asyncio.create_task(salvaging, name="salvage")
        grpc = [await receiver.start() for receiver in self._receivers]
        for watch in self._guards():
            self._stages[watch.get_name()] = watch
        self._started = True
        settle()
        self._stages["memory"] = asyncio.create_task(collect_seldom(), name="memory")
        log.info(
            "serving",
            version=__version__,
            grpc=grpc,
            http=http,
            store=str(self.config.store.path),
            outputs=[output.name for output in self.config.outputs],
            open_windows=len(self._pipeline.windows),
        )

    # --- run --------------------------------------------------------------------------------------------

    async def supervise(self) -> None:
        """Waits for ``request_stop``.

        Raises:
            StageDied: a stage ended; what it raised is the cause.
        """
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        done, _ = await asyncio.wait([stop, *self._stages.values()], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in done - {stop}:
            cause = None if task.cancelled() else task.exception()
            if isinstance(cause, StoreForeign):
                raise StageDied(
                    f"the stage {task.get_name()!r} ended: {cause.message}", hint=cause.hint
                ) from cause
            raise StageDied(
                f"the stage {task.get_name()!r} ended by itself: {cause!r}",
                hint="the process stops so that it can be started anew; nothing durable is lost",
            ) from cause

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested."""
        return self._stopping.is_set()

    @property
    def store_failure(self) -> StoreError | None:
        """Why the store does not take what was counted; None while it does."""
        return self._turns.failure

    def request_stop(self) -> None:
        """Lets ``supervise`` return."""
        self._stopping.set()

    async def end(self) -> None:
        """Ends what still runs, also after a start that failed half way, so that the store can be closed."""
        for task in self._stages.values():
            task.cancel()
        await asyncio.gather(*self._stages.values(), return_exceptions=True)
        await asyncio.to_thread(self._thread.close)

    def reload(self) -> None:
        """Takes over what may change while running; a configuration with mistakes changes nothing."""
        try:
            change = prepare(self.config, self._reload())
        except ProxyUsageError as error:
            self._config_error = error.message
            self._metrics.reload_refused.set(1)
            log.error("reload refused, the former configuration goes on", error=str(error))  # noqa: TRY400
            return
        self._config_error = ""
        self._metrics.reload_refused.set(0)
        config = self.config = change.config
        configure_log(config.log.level, config.log.format)
        self._pipeline.replace(change.folds, change.attributor, clock_ms())
        windows, held = self._pipeline.windows, config.tenant.unattributed.max_identities
        windows.max_tenants = config.tenant.max_tenants
        windows.defaults = tuple(dimension.default for dimension in config.dimensions.values())
        self._pipeline.holding.limit = self._storage.checkpoints.max_held = held
        for receiver in self._receivers:
            receiver.admit(change.admission, change.tls)
        for courier in self._couriers:
            courier.trust(*change.trust[courier.settings.name])
        if self._web is not None:
            self._web.token = change.http_token
        self._auditing.trust(config)
        log.info("reloaded", changed=change.keys)

    # --- drain ------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Reads what was sent, makes it durable, delivers for a while. What is left is in the store."""
        for watch in self._guards():
            self._stages.pop(watch.get_name(), None)  # each ends with its port
        await asyncio.gather(*(receiver.drain(DRAIN_STREAMS_S) for receiver in self._receivers))
        self._turns.stop()
        turns = self._stages.pop("turns", None)
        if turns is not None:
            await asyncio.wait([turns])
        try:
            await self._turns.finish(DRAIN_TURNS_S)
            if self.store_failure is not None:
                self.tell_unsaved("stopping with usage that the store does not take")
            await self._deliver_rest()
        except StoreForeign as error:
            log.error("stopping with a damaged store", error=error.message, hint=error.hint)  # noqa: TRY400
            self.tell_unsaved("stopping with usage that is in no store")
        await asyncio.gather(*(courier.stop(1.0) for courier in self._couriers))
        for task in self._stages.values():
            task.cancel()
        await asyncio.gather(*self._stages.values(), return_exceptions=True)
        await self._recorder.close()
        await self._control.close()
        if self._web is not None:
            await self._web.stop()
        self._thread.close()

    def tell_unsaved(self, why: str) -> None:
        """Says in the log what was read and is in no store."""
        tell_unsaved(why, self._turns.saved, self._storage.intake, self.store_failure)

    async def _deliver_rest(self) -> None:
        """Gives healthy outputs a bounded time to empty their queues."""
        self._wake()
        deadline_ms = clock_ms() + int(DRAIN_DELIVERY_S * 1_000)
        while clock_ms() < deadline_ms:
            try:
                waiting = [await self._waits(courier) for courier in self._couriers]
            except StoreError as error:
                if not error.retriable:
                    raise
                return  # what is not known to wait cannot be delivered either
            if not any(waiting):
                return
            await asyncio.sleep(0.05)

    async def _waits(self, courier: Courier) -> bool:
        """Whether a healthy output has something to deliver."""
        if courier.policy.failures:
            return False
        return await self._thread.run(self._storage.queue.oldest_ms, courier.settings.output) is not None

    # --- between the parts ------------------------------------------------------------------------------

    def _take(self, port: Port, origin: Origin, part: Split, now_ms: int) -> None:
        tcp = len(part.entries) - part.http
        for kind, rows in ((HTTP, part.http), (TCP, tcp)):
            if rows:
                self._storage.intake.add(origin.node_id, rows, origin.log_name, kind)
        self._pipeline.take(port, origin, part, now_ms)

    def _guards(self) -> Iterator[asyncio.Task[None]]:
        """What keeps ports within their bounds: without it the process must not live on."""
        guards = [port.guard for port in (*self._receivers, self._web) if port is not None]
        yield from (guard for guard in guards if guard is not None)

    async def _reopened(self) -> None:
        """The store was opened anew: what lies beside it is to be where it is now."""
        self._storage.intake.renew()
        await self._reach.renew()

    def _wake(self) -> None:
        for courier in self._couriers:
            courier.notify()

    def health(self) -> Health:
        """What /healthz and /readyz say."""
        parts = health_of(self._turns, self._couriers, self._housekeeping, self._queues, clock_ms())
        reasons: dict[str, str] = {}
        if not self._started:
            reasons["starting"] = "not all ports are open yet"
        if self._stopping.is_set():
            reasons["draining"] = "the service is stopping"
        alive = parts.alive and all(not task.done() for task in self._stages.values())
        return Health(alive, reasons | dict(parts.reasons))

    def status(self) -> dict[str, object]:
        """What only the running process knows, for ``proxy-usage status``."""
        health = self.health()
        return {
            "version": __version__,
            "alive": health.alive,
            "reasons": dict(health.reasons),
            "remarks": self._turns.observer.remarks(),
            "open_windows": len(self._pipeline.windows),
            "checkpoint_age_ms": clock_ms() - self._turns.durable_ms,
            "config_error": self._config_error,
            "space": self._housekeeping.status(),
            "audit": self._auditing.summary(),
        }

    def _exposition(self) -> bytes:
        self._refresh()
        return self._metrics.exposition()

    def _refresh(self) -> None:
        """Gauges that are read off the parts when somebody asks."""
        now_ms = clock_ms()
        metrics = self._metrics
        metrics.ready.set(not self.health().reasons)
        metrics.log_lost.inc(lost_lines())
        metrics.windows_open.set(len(self._pipeline.windows))
        metrics.tenants.set(self._pipeline.windows.tenants)
        metrics.checkpoint_age.set((now_ms - self._turns.durable_ms) / 1_000)
        metrics.stage_beat.labels(stage="turns").set((now_ms - self._turns.beat_ms) / 1_000)
        metrics.store_failed.set(self._turns.failure is not None)
        self._housekeeping.gauges()
        self._auditing.gauges()
        shown = {f"output {output.name}": output.cert_file for output in self.config.outputs}
        shown["listen"] = self.config.listen.tls.cert_file if self.config.listen.tls else None
        for use, path in shown.items():
            if path is not None and (expires := expires_s(path)) is not None:
                metrics.certificate_expiry.labels(use=use).set(expires)
        for courier in self._couriers:
            name = courier.settings.name
            oldest_ms = self._queues.oldest_ms.get(courier.settings.output)
            metrics.oldest.labels(output=name).set(max(0, now_ms - oldest_ms) / 1_000 if oldest_ms else 0)
            metrics.paused.labels(output=name).set(courier.policy.paused is not None)
            metrics.stage_beat.labels(stage=f"output {name}").set((now_ms - courier.beat_ms) / 1_000)
