"""All of it on one machine: traffic, Envoy, the sink, a billing endpoint, and whether the bill is right.

Parts start against the flow (endpoint first) and stop with it: traffic ends, Envoy is drained, what is on
its way arrives, the sink stops, and then the sums are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from proxy_usage.demo.account import Account
from proxy_usage.demo.acts import Act, Acts
from proxy_usage.demo.billing import BillingStandIn
from proxy_usage.demo.bootstrap import EnvoyOptions, bootstrap
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.compare import AccessLog, differences, lines, plain, table
from proxy_usage.demo.envoy import EnvoyProcess, envoy_command
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.listener import lease_port
from proxy_usage.demo.sink import SinkProcess
from proxy_usage.demo.traffic import mixed
from proxy_usage.demo.truth import NO_ROUTE, Count, Tenant, Truth, tenants
from proxy_usage.demo.upstream import Upstream
from proxy_usage.errors import ProxyUsageError, UsageError
from proxy_usage.store.reader import Reader

QUIET_S = 20
"""How long nothing may arrive, after the last row was flushed, until the wait for it ends."""
PAUSE_S = 1
"""Between waves."""
ACTS_MS = 60_000


@dataclass(frozen=True, slots=True)
class StoryOptions:
    """``duration_ms`` None: until Ctrl-C; with ``acts`` for ``ACTS_MS``. ``once``: one wave, then compare."""

    tenants: int = 3
    requests: int = 300
    """Requests per wave."""
    duration_ms: int | None = None
    once: bool = False
    fail: bool = False
    acts: bool = False
    """The endpoint fails and heals, the sink is killed and comes back; at the end all counts side by side."""
    directory: Path | None = None
    """Where configurations, logs and the store stay; None: a temporary directory."""
    seed: int = 1


GUEST = Tenant("guest", "guest.example.com")
"""Whose host people use for requests of their own; Envoy's log file is then what is compared with."""

_TROUBLE: dict[str, Callable[..., Faults]] = {
    "answers 503 to everything": partial(Faults, always=Fault.UNAVAILABLE),
    "answers late, not at all, with 429 or 503, or stores half a batch": partial(
        Faults,
        times=8,
        delay_ms=300,
        per_mille=dict.fromkeys((Fault.BUSY, Fault.UNAVAILABLE, Fault.LOST, Fault.MIDWAY, Fault.LATE), 200),
    ),
    "is well again": Faults,
}


@dataclass(slots=True)
class Story:
    """One performance. ``await Story(options, console).run()`` gives the exit status."""

    options: StoryOptions
    console: Console
    truth: Truth = field(default_factory=Truth)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by Ctrl-C or SIGTERM: no further request is begun."""

    async def run(self) -> int:
        """0 when what was delivered equals what was sent, 1 otherwise. Raises ProxyUsageError of a part."""
        envoy_command()  # said before anything else is started
        directory = _prepare(self.options.directory)
        keep = self.options.directory is not None
        try:
            with _stopped_by_signals(self.stop):
                status = await self._play(directory)
            keep = keep or status != 0
        except ProxyUsageError:
            keep = True  # the error names a log in it
            raise
        finally:
            if not keep:
                shutil.rmtree(directory)
        return status

    async def _play(self, directory: Path) -> int:
        named = tenants(self.options.tenants)
        token_file = directory / "token"
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(16))
        # The ports that the documentation names, where they are free; `once` stays out of people's way.
        ports = (0, 0, 0) if self.options.once else (9001, 9090, 10080)
        log = AccessLog(directory / "access.jsonl", self.truth, GUEST.name)
        async with contextlib.AsyncExitStack() as parts:
            billing = await parts.enter_async_context(BillingStandIn(token=token_file.read_text()))
            upstream = await parts.enter_async_context(Upstream())
            admin_port = lease_port()  # known before Envoy starts, for the sink's audit
            sink = await parts.enter_async_context(
                SinkProcess(
                    directory,
                    url=billing.url,
                    token_file=token_file,
                    grpc_port=ports[0],
                    http_port=ports[1],
                    envoys=[f"http://127.0.0.1:{admin_port}"],
                )
            )
            options = EnvoyOptions(
                tenants=(*named, GUEST),
                upstream=("127.0.0.1", upstream.port),
                als=[("127.0.0.1", sink.grpc_port)],
                listen=("127.0.0.1", lease_port(ports[2]) if ports[2] else 0),
                admin=("127.0.0.1", admin_port),
                access_log=directory / "access.jsonl",
            )
            envoy = await parts.enter_async_context(
                EnvoyProcess(bootstrap(options), directory, buffer_flush_ms=options.buffer_flush_ms)
            )
            self._introduce(directory, billing, sink, envoy)
            with self._showing(billing, log):
                if self.options.acts:
                    await self._audited(sink, options.node_id, bool)
                await self._waves(billing, sink, envoy, log, named)
                with Reader(directory / "usage.db") as store:
                    audited = await self._asked(billing, sink, log, options.node_id, store)
                self._say("traffic ended; draining Envoy, then the sink")
                await envoy.drain()
                await envoy.stop()
                if billing.faults.always is not None:
                    billing.faults = Faults()
                await self._settle(billing, sink, log)
                status = await sink.stop()
            return self._judge(billing, log, status, directory, audited)

    async def _waves(
        self,
        billing: BillingStandIn,
        sink: SinkProcess,
        envoy: EnvoyProcess,
        log: AccessLog,
        named: tuple[Tenant, ...],
    ) -> None:
        loop = asyncio.get_running_loop()
        begun, duration_ms = loop.time(), self.options.duration_ms
        if duration_ms is None and self.options.acts:
            duration_ms = ACTS_MS
        acts = Acts(duration_ms or 0, self._acts(billing, sink) if self.options.acts else ())
        wave = 0
        while not self.stop.is_set():
            elapsed_ms = int((loop.time() - begun) * 1_000)
            # Where waves take long, what was announced is still played to its end.
            if duration_ms is not None and elapsed_ms >= duration_ms and acts.over:
                return
            self._trouble(billing, wave)
            act = acts.due(elapsed_ms)
            if act is not None:
                self._say(act.says)
                await act.does()
            async with asyncio.TaskGroup() as group:
                if act is not None and act.then is not None:
                    group.create_task(act.then())
                group.create_task(self._wave(envoy, named, wave))
            wave += 1
            sink.check()
            self._progress(wave, billing, log)
            if self.options.once:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stop.wait(), PAUSE_S)

    async def _wave(self, envoy: EnvoyProcess, named: tuple[Tenant, ...], wave: int) -> None:
        await mixed(
            "127.0.0.1",
            envoy.port,
            named,
            requests=self.options.requests,
            seed=self.options.seed + wave,
            strays=self.options.requests // 100,
            truth=self.truth,
            stop=self.stop.is_set,
        )

    def _acts(self, billing: BillingStandIn, sink: SinkProcess) -> tuple[Act, ...]:
        async def fail() -> None:
            billing.faults = Faults(always=Fault.UNAVAILABLE)

        async def heal() -> None:
            billing.faults = Faults()

        async def come_back() -> None:
            await sink.start()
            self._say("the sink is back, where it was last durable")

        return (
            Act(200, "the billing endpoint fails: 503 to everything. Events wait in the store", fail),
            Act(400, "the billing endpoint is well again: what waited goes out, each once", heal),
            Act(
                600,
                "the sink is killed (SIGKILL); traffic goes on, Envoy keeps what it has not handed over",
                sink.kill,
                come_back,
            ),
        )

    async def _asked(
        self, billing: BillingStandIn, sink: SinkProcess, log: AccessLog, node: str, store: Reader
    ) -> Mapping[str, Any]:
        """With acts: what the audit says in the end, once it has nothing open."""
        if not self.options.acts:
            return {}
        billing.faults = Faults()
        log.follow()

        def whole(audited: Mapping[str, Any]) -> bool:
            return self._account(billing, audited, store.status().rows).whole

        return await self._audited(sink, node, whole)

    async def _audited(
        self, sink: SinkProcess, node: str, enough: Callable[[Mapping[str, Any]], bool]
    ) -> Mapping[str, Any]:
        """What the audit says, as soon as it is enough, or after a while."""
        loop = asyncio.get_running_loop()
        until = loop.time() + QUIET_S
        while not enough(audited := await sink.audited(node)) and loop.time() < until:
            sink.check()
            await asyncio.sleep(0.2)
        return audited

    def _account(
        self, billing: BillingStandIn, audited: Mapping[str, Any], fates: Mapping[str, Mapping[str, int]]
    ) -> Account:
        delivered = sum(value for (_, meter), value in billing.sums().items() if meter == METERS[0])
        strays = self.truth.counts.get(NO_ROUTE, Count()).requests
        return Account(self.truth.requests, strays, audited, fates, delivered)

    def _trouble(self, billing: BillingStandIn, wave: int) -> None:
        """With ``fail``: a few waves of outage, a few of bad answers, then none. ``once``: bad answers."""
        outage, bad, well = _TROUBLE
        phases = {0: bad} if self.options.once else {1: outage, 5: bad, 9: well}
        if self.options.fail and wave in phases:
            billing.faults = _TROUBLE[phases[wave]](seed=self.options.seed)
            self._say(f"the billing endpoint now {phases[wave]}")

    async def _settle(self, billing: BillingStandIn, sink: SinkProcess, log: AccessLog) -> None:
        """Waits until everything arrived, or until nothing has arrived for a while."""
        loop = asyncio.get_running_loop()
        seen, since = -1, loop.time()
        while loop.time() - since < QUIET_S:
            log.follow()
            if not differences(self.truth, billing.arrived, log.spent):
                return
            # What never arrived, or was lost with a killed sink, is waited for in vain: the audit counts it.
            if len(billing.arrived.stored) != seen:
                seen, since = len(billing.arrived.stored), loop.time()
            sink.check()
            await asyncio.sleep(0.1)

    def _judge(
        self,
        billing: BillingStandIn,
        log: AccessLog,
        status: int | None,
        directory: Path,
        audited: Mapping[str, Any],
    ) -> int:
        log.follow()
        drawn = table(lines(self.truth, billing.sums(), log.spent), "sent / delivered", final=True)
        self.console.print(drawn)
        wrong = []
        with Reader(directory / "usage.db") as reader:
            account = self._account(billing, audited, reader.status().rows)
        if self.options.acts:
            self.console.print(account.table())
            wrong += account.differences()
        if account.lost:
            self._say(f"{account.lost} rows were lost, and the audit knows: no bill can have them")
        else:
            wrong += differences(self.truth, billing.arrived, log.spent)
        if status != 0:
            wrong.append(f"the sink ended with status {status}")
        for sentence in wrong[:20]:
            self._say(f"differs: {sentence}")
        if wrong:
            self._say(f"{len(wrong)} differences; the files are kept in {directory}")
        if not self.truth.requests:
            self._say("nothing was sent")
        elif not wrong:
            events, again = len(billing.arrived.stored), billing.arrived.duplicates
            self._say(
                f"{account.conclusion(events)}; {again} sent again and recognised; "
                f"answers: {_listed(billing)}"
            )
        return 1 if wrong else 0

    # ── what is shown ──

    def _introduce(
        self, directory: Path, billing: BillingStandIn, sink: SinkProcess, envoy: EnvoyProcess
    ) -> None:
        self._say(f"Envoy            http://127.0.0.1:{envoy.port} (admin {envoy.admin_port})")
        self._say(f"  try            curl -H 'Host: {GUEST.host}' http://127.0.0.1:{envoy.port}/size/1000")
        self._say(f"sink, rows       127.0.0.1:{sink.grpc_port}")
        self._say(f"operator's page  {sink.base}/")
        self._say(f"sink, metrics    {sink.base}/metrics, health {sink.base}/healthz and {sink.base}/readyz")
        self._say(f"billing stand-in {billing.base}/sums, faults: PUT {billing.base}/faults")
        self._say(f"files            {directory}")
        self._say(
            f"your own Envoy   deploy/envoy/envoy.yaml, cluster proxy_usage at 127.0.0.1:{sink.grpc_port}"
        )
        if not self.options.once:
            self._say("Ctrl-C ends it cleanly")

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    def _progress(self, wave: int, billing: BillingStandIn, log: AccessLog) -> None:
        if self.console.is_terminal:
            return
        log.follow()
        self._say(f"wave {wave}: {self.truth.requests} requests sent so far; answers: {_listed(billing)}")
        for line in lines(self.truth, billing.sums(), log.spent):
            self._say(f"  {plain(line)}")

    @contextlib.contextmanager
    def _showing(self, billing: BillingStandIn, log: AccessLog) -> Iterator[None]:
        """On a terminal, a table that follows what happens."""
        if not self.console.is_terminal:
            yield
            return

        async def refresh(live: Live) -> None:
            while True:
                log.follow()
                title = f"sent / delivered; answers: {_listed(billing)}"
                live.update(table(lines(self.truth, billing.sums(), log.spent), title))
                await asyncio.sleep(0.5)

        with Live(console=self.console, refresh_per_second=4, transient=True) as live:
            task = asyncio.create_task(refresh(live))
            try:
                yield
            finally:
                task.cancel()


def _listed(billing: BillingStandIn) -> str:
    return ", ".join(f"{name} × {count}" for name, count in sorted(billing.answers.items())) or "none yet"


def _prepare(chosen: Path | None) -> Path:
    """The directory of this run: ``chosen``, which must be empty, or a new temporary one."""
    if chosen is None:
        return Path(tempfile.mkdtemp(prefix="proxy-usage-demo-"))
    chosen.mkdir(parents=True, exist_ok=True)
    if any(chosen.iterdir()):
        # Usage that an earlier demo left in its store would be delivered into this one's sums.
        raise UsageError(f"{chosen} is not empty", hint="name an empty or a new directory with --dir")
    return chosen.resolve()


@contextlib.contextmanager
def _stopped_by_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets ``stop``; a second one cancels the caller's task."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def handle() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, handle)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
