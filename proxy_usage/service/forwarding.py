"""A forwarder's life: from a JetStream stream to one endpoint, without a store."""

from __future__ import annotations

import asyncio

import structlog

from proxy_usage import __version__
from proxy_usage.certificates import expires_s
from proxy_usage.config import Config
from proxy_usage.config.fields import split_address
from proxy_usage.config.nats import ForwardConfig
from proxy_usage.delivery import Courier, CourierSettings
from proxy_usage.delivery.consumer import StreamSettings
from proxy_usage.delivery.jetstream import Link, Peer
from proxy_usage.delivery.stream import StreamBacklog
from proxy_usage.delivery.taking import Taking
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.errors import ConfigError, StageDied
from proxy_usage.metrics import Metrics
from proxy_usage.service.build import clock_ms
from proxy_usage.service.couriers import build_policy, build_sender
from proxy_usage.service.logs import lost_lines
from proxy_usage.service.serving import live
from proxy_usage.web import Health, Web

log = structlog.get_logger()

DRAIN_S = 10.0
STALE_BEAT_MS = 30_000
"""As of a sink: unready after so long without life, unhealthy after ten times that."""
STALLED_MS = 600_000


async def serve_forwarder(config: Config, forward: ForwardConfig) -> int:
    """Runs a forwarder until it is told to stop. Returns the exit code: 0 drained; 1 forced by a second
    signal."""
    forwarder = Forwarder(config, forward)
    try:
        if await live(forwarder):
            log.info("drained")
            return 0
        log.warning("stopped before the drain was done; what was held goes to another forwarder")
        return 1
    finally:
        await forwarder.end()


class Forwarder:
    """One of several that share a durable consumer. ``start``, ``supervise``, ``drain``."""

    def __init__(self, config: Config, forward: ForwardConfig) -> None:
        self._output = output = config.outputs[0]
        self._forward = forward
        self._metrics = Metrics()
        policy = build_policy(output)
        sender = build_sender(output, config.windows.length, policy)
        if sender is None:
            raise ConfigError(f"outputs: {output.name!r} sends nothing", hint="give it a url and a format")
        token = TokenFile(forward.token_file) if forward.token_file else None
        peer = Peer(forward.url, forward.timeout, forward.creds_file, "proxy-usage forward")
        self._taking = Taking(
            Link(peer, token, self._trust()),
            StreamSettings(
                forward.stream,
                forward.durable,
                forward.subject,
                forward.dead_letters,
                forward.ack_wait,
                forward.max_ack_pending,
            ),
            output=output.name,
            room=output.batch.events * output.concurrency,
            metrics=self._metrics,
            wake=self._wake,
            clock_ms=clock_ms,
        )
        self._courier = Courier(
            CourierSettings(
                output.name,
                1,
                output.batch.events,
                output.batch.linger,
                output.concurrency,
                config.windows.late_horizon,
            ),
            StreamBacklog(self._taking, output=output.name, metrics=self._metrics),
            sender,
            policy,
            self._metrics,
            clock_ms,
        )
        host, port = split_address(config.listen.http)
        self._web = Web(
            host,
            port,
            metrics=self._metrics,
            health=self.health,
            refresh=self._refresh,
            token=TokenFile(config.listen.http_token_file) if config.listen.http_token_file else None,
        )
        self._stages: dict[str, asyncio.Task[None]] = {}
        self._stopping = asyncio.Event()

    def _trust(self) -> Trust:
        return Trust(self._forward.ca_file, self._forward.cert_file, self._forward.key_file)

    async def start(self) -> None:
        """Opens the port and begins to take. Raises ListenError."""
        self._metrics.info.labels(version=__version__, fold="none").set(1)
        http = await self._web.start()
        name = f"output {self._output.name}"
        self._stages["stream"] = asyncio.create_task(self._taking.run(), name="stream")
        self._stages[name] = asyncio.create_task(self._courier.run(), name=name)
        if self._web.guard is not None:
            self._stages["http port"] = self._web.guard
        log.info(
            "forwarding",
            version=__version__,
            http=http,
            stream=self._forward.stream,
            durable=self._forward.durable,
            output=self._output.name,
        )

    async def supervise(self) -> None:
        """Waits for ``request_stop``. Raises StageDied: a stage ended by itself."""
        stop = asyncio.create_task(self._stopping.wait(), name="stop")
        done, _ = await asyncio.wait([stop, *self._stages.values()], return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        for task in done - {stop}:
            cause = None if task.cancelled() else task.exception()
            raise StageDied(
                f"the stage {task.get_name()!r} ended by itself: {cause!r}",
                hint="the process stops so that it can be started anew; what it held another one delivers",
            ) from cause

    @property
    def stopping(self) -> bool:
        """Whether a stop was requested."""
        return self._stopping.is_set()

    def request_stop(self) -> None:
        """Lets ``supervise`` return."""
        self._stopping.set()

    def reload(self) -> None:
        """Files are read again as they are needed, at requests and connections; nothing else can change."""
        log.info("nothing to reload: files are read again by themselves, keys need a restart")

    def _wake(self) -> None:
        self._courier.notify()

    async def drain(self) -> None:
        """Lets what is under way end, and gives the rest back to the stream."""
        self._stages.pop("http port", None)
        self._taking.stop()
        await self._courier.stop(DRAIN_S)
        await self.end()
        await self._web.stop()

    async def end(self) -> None:
        """Ends what still runs."""
        for task in self._stages.values():
            task.cancel()
        await asyncio.gather(*self._stages.values(), return_exceptions=True)
        self._stages.clear()
        await self._taking.close()

    def health(self) -> Health:
        """What /healthz and /readyz say."""
        now_ms = clock_ms()
        reasons: dict[str, str] = {}
        name, policy, taking = self._output.name, self._courier.policy, self._taking
        if self._stopping.is_set():
            reasons["draining"] = "the forwarder is stopping"
        if taking.problem is not None:
            reasons["stream"] = taking.problem[0]  # at length it is in the log: it may name a tenant
        oldest_ms = taking.oldest_ms()
        if policy.paused is not None:
            reasons[f"output {name} paused"] = policy.paused
        elif oldest_ms is not None and now_ms - oldest_ms > STALLED_MS:
            reasons[f"output {name} stalled"] = f"oldest event is {(now_ms - oldest_ms) // 1_000} s old"
        beats = {"stream": taking.beat_ms, f"output {name}": self._courier.beat_ms}
        for stage, beat_ms in beats.items():
            if now_ms - beat_ms > STALE_BEAT_MS:
                reasons[stage] = f"no sign of life for {(now_ms - beat_ms) // 1_000} s"
        alive = all(not task.done() for task in self._stages.values())
        return Health(alive and all(now_ms - beat <= 10 * STALE_BEAT_MS for beat in beats.values()), reasons)

    def _refresh(self) -> None:
        """Gauges that are read off the parts when somebody asks."""
        now_ms, metrics, name = clock_ms(), self._metrics, self._output.name
        metrics.ready.set(not self.health().reasons)
        metrics.log_lost.inc(lost_lines())
        metrics.forward_held.set(len(self._taking.held))
        metrics.pending.labels(output=name).set(self._taking.pending)
        oldest_ms = self._taking.oldest_ms()
        metrics.oldest.labels(output=name).set(max(0, now_ms - oldest_ms) / 1_000 if oldest_ms else 0)
        metrics.paused.labels(output=name).set(self._courier.policy.paused is not None)
        metrics.stage_beat.labels(stage="stream").set((now_ms - self._taking.beat_ms) / 1_000)
        metrics.stage_beat.labels(stage=f"output {name}").set((now_ms - self._courier.beat_ms) / 1_000)
        shown = {f"output {name}": self._output.cert_file, "forward": self._forward.cert_file}
        for use, path in shown.items():
            if path is not None and (expires := expires_s(path)) is not None:
                metrics.certificate_expiry.labels(use=use).set(expires)
