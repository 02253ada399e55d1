"""Several workers on one port, and the process that looks after them.

    listen.grpc ══ SO_REUSEPORT ══▶ worker 0   usage.db            ┐ asked each second for its health,
                              ╠═══▶ worker 1   usage.worker-1.db   ├ when somebody looks for its metrics and
                              ╚═══▶ worker 2   usage.worker-2.db   ┘ its page, over its control socket
    listen.streams ═══════════════▶ worker 0 alone
    listen.http ──────────────────▶ the supervisor: page and /metrics of all as one, /healthz, /readyz, /api

The supervisor is a parent that holds no store and reads no row. Each worker is ``proxy-usage run`` with its
part of the configuration (``config.workers``): a store, a lock, a control socket and counts of rows of its
own. So all that is said of one sink is said of each, and sums over the stores are exact. A key's remainder
lies in each store that met the key, below one unit in each.

* Worker 0 starts first, and the others when it answers: it takes over the stores of workers that are no
  longer configured (``adopting``), also where one is left, which needs no supervisor.
* The port is free when the supervisor starts, or it does not start; then it reserves it, so that no other
  service shares it unnoticed.
* A worker that ends is started again, later each time. One that cannot start at the first start ends all of
  it, with its exit code, as one that cannot start ends a single sink; one whose configuration has mistakes
  (78) at any start.
* SIGTERM and SIGINT drain all workers at once, a second one ends them; SIGHUP is passed on. When the
  supervisor is gone its workers drain (``worker``).
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import prometheus_client as prometheus
import structlog
from prometheus_client.metrics_core import Metric

from proxy_usage import __version__
from proxy_usage.config import Config, load
from proxy_usage.config.fields import split_address
from proxy_usage.config.workers import worker_path
from proxy_usage.control import ControlServer, supervisor_socket
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.errors import ProxyUsageError
from proxy_usage.metrics import SupervisorMetrics, log_lines_lost
from proxy_usage.page.document import document
from proxy_usage.places import place
from proxy_usage.receiver import reserve
from proxy_usage.service.build import clock_ms
from proxy_usage.service.children import Child, describe
from proxy_usage.service.logs import configure_log, lost_lines
from proxy_usage.service.merging import Merged
from proxy_usage.service.overlooking import Overlook
from proxy_usage.service.reaching import Reach
from proxy_usage.service.worker import Part
from proxy_usage.web import Health, Web

log = structlog.get_logger()

LOOK_S = 1.0
SUPERVISOR = -1
"""Its number among those whose counts are added."""


async def supervise(path: Path, env: Mapping[str, str], config: Config, *, restored: bool = False) -> int:
    """Runs the configured workers until it is told to stop. Returns the exit code: 0 all drained.

    Raises:
        ListenError: a port cannot be had.
    """
    host, port = split_address(config.listen.grpc)
    with contextlib.closing(reserve(host, port)) as reserved:
        port = reserved.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        return await Supervisor(path, env, config, address).run(restored=restored)


class Supervisor:
    """The workers of one configuration.

    Args:
        grpc: the reserved address.
    """

    def __init__(self, path: Path, env: Mapping[str, str], config: Config, grpc: str) -> None:
        self._path, self._env, self._config, self._grpc = path, env, config, grpc
        self._stop = asyncio.Event()
        self._merged = Merged(self._own)
        self._counters = prometheus.CollectorRegistry()  # of what the workers count too
        self._log_lost = log_lines_lost(self._counters)
        self._children = [
            Child(
                Part(number, config.workers, grpc),
                path,
                env,
                worker_path(config.store.path, number),
                self._merged.died,
            )
            for number in range(config.workers)
        ]
        self._overlook = Overlook(config, path, self._children, self._stop.is_set, clock_ms)
        self._web = Web(
            *split_address(config.listen.http),
            metrics=self._merged,
            health=self.health,
            refresh=self._gather,
            token=self._token(config),
            page=self._overlook,
            tenants=config.listen.http_tenants,
            api={"/api/intake": self._intake, "/api/audit": partial(self._children[0].ask, "audit")},
        )
        self._control = ControlServer(supervisor_socket(config.store.path), {"page": self._page})
        self._reach = Reach(self._control, lambda: place(config.store.path) is not None)
        self._signals = 0

    async def run(self, *, restored: bool) -> int:
        """From the start to the end. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._reload)
        http = await self._web.start()
        log.info("supervising", version=__version__, workers=len(self._children), grpc=self._grpc, http=http)
        looking = asyncio.create_task(self._look_on(), name="look")
        reaching = asyncio.create_task(self._reach.keep(), name="control")
        assert self._web.guard is not None
        try:
            return await self._keep_all([looking, reaching, self._web.guard], restored=restored)
        finally:
            for task in (looking, reaching):
                task.cancel()
            for child in self._children:
                child.kill()
            await asyncio.gather(looking, reaching, return_exceptions=True)
            await self._control.close()
            await self._web.stop()

    async def _keep_all(self, own: Sequence[asyncio.Task[None]], *, restored: bool) -> int:
        """Starts, waits and ends; ``own`` are tasks of the supervisor without which it must not live on."""
        first, *others = self._children
        kept = [asyncio.create_task(first.keep(restored=restored), name="worker 0")]
        serving = asyncio.create_task(first.serving.wait())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([serving, stop, *kept], return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        if first.serving.is_set() and not self._stop.is_set():
            await self._listen()
            kept.extend(
                asyncio.create_task(child.keep(restored=restored), name=f"worker {child.part.number}")
                for child in others
            )
        await asyncio.wait([stop, *kept, *own], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        fatal = 0
        if not self._stop.is_set():
            for task in filter(asyncio.Task.done, kept):
                fatal = fatal or task.result() or 1
                log.error("the service ends with its worker", name=task.get_name(), ended=describe(fatal))
            for died in filter(asyncio.Task.done, own):
                fatal = fatal or 1
                log.error("the supervisor ends", stage=died.get_name(), error=repr(died.exception()))
        self._stop.set()
        for child in self._children:
            child.stop()
        codes = await asyncio.gather(*kept)
        if fatal:
            return fatal
        if not any(codes):
            log.info("all workers drained")
        return 1 if any(codes) else 0

    async def _listen(self) -> None:
        """Opens the control socket, once the store's directory is there and the store is our worker's."""
        try:
            await self._control.start()
        except ProxyUsageError as error:  # usage is counted without it
            log.error("status --watch finds nobody to ask", error=error.message)  # noqa: TRY400

    # --- told -------------------------------------------------------------------------------------------

    def _told_to_stop(self) -> None:
        self._signals += 1
        if self._signals == 1:
            log.info("draining")
            self._stop.set()
            return
        log.warning("stopped before the drain was done; what was not durable is reported at the next start")
        for child in self._children:
            child.kill()

    def _reload(self) -> None:
        for child in self._children:
            child.signal(signal.SIGHUP)
        try:
            config = load(self._path, self._env)
        except ProxyUsageError:
            return  # each worker says so
        configure_log(config.log.level, config.log.format)
        self._web.token = self._token(config)

    @staticmethod
    def _token(config: Config) -> TokenFile | None:
        return TokenFile(config.listen.http_token_file) if config.listen.http_token_file else None

    # --- seen -------------------------------------------------------------------------------------------

    async def _look_on(self) -> None:
        while True:
            await asyncio.gather(*(child.look() for child in self._children))
            starting = any(child.running and not child.serving.is_set() for child in self._children)
            await asyncio.sleep(LOOK_S / 10 if starting else LOOK_S)

    def health(self) -> Health:
        """What /healthz and /readyz say: all reasons of all workers, by the worker's number."""
        reasons = {"draining": "the service is stopping"} if self._stop.is_set() else {}
        for child in self._children:
            name = f"worker {child.part.number}"
            reasons.update((f"{name} {short}", text) for short, text in child.reasons.items())
        return Health(True, reasons)

    async def _page(self, _arguments: dict[str, object]) -> object:
        """What /api/state says, for ``status --watch``."""
        return document(await self._overlook.snapshot(), tenants=self._config.listen.http_tenants)

    async def _gather(self) -> None:
        await take_metrics(self._children, self._merged)
        self._log_lost.inc(lost_lines())
        self._merged.took(SUPERVISOR, prometheus.generate_latest(self._counters).decode())

    async def _intake(self) -> object:
        """What each worker received. None when one does not answer: without it, its rows would look lost."""
        answers = await asyncio.gather(*(child.ask("intake") for child in self._children))
        return None if None in answers else answers

    def _own(self) -> Iterable[Metric]:
        """What only the supervisor knows."""
        registry = prometheus.CollectorRegistry()
        metrics = SupervisorMetrics(registry)
        metrics.ready.set(not self.health().reasons)
        down = sum(not child.running or "silent" in child.reasons for child in self._children)
        metrics.workers.labels(state="up").set(len(self._children) - down)
        metrics.workers.labels(state="down").set(down)
        for child in self._children:
            metrics.restarts.labels(worker=child.part.number).inc(child.restarts)
        return registry.collect()


async def take_metrics(children: Iterable[Child], merged: Merged) -> None:
    """Asks all workers for their /metrics, and takes each answer as it comes.

    While others are waited for, a worker may die: an answer taken after that would be counted a second time.
    """

    async def take(child: Child) -> None:
        text = await child.metrics()
        if text is not None:
            merged.took(child.part.number, text)

    await asyncio.gather(*map(take, children))
