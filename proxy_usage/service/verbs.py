"""Verbs that a running service carries out for the command line, over its control socket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from proxy_usage.errors import UsageError
from proxy_usage.metrics import Metrics
from proxy_usage.page.snapshot import Snapshot
from proxy_usage.recording import Recorder
from proxy_usage.service.repairs import Repairs, Steps, texts
from proxy_usage.store.thread import StoreThread
from proxy_usage.web import Health

Arguments = dict[str, object]
Handler = Callable[[Arguments], Awaitable[object]]


class Verbs:
    """The handlers, each by its name.

    Args:
        status: what only the running process knows.
        audit: what the audit came to.
        intake: what this sink received, for the audit of another.
        health, scrape: what /readyz and /metrics say, for a supervisor.
        page: what the operator's page shows.
        snapshot: what it is made of, for a supervisor.
        wake: tells delivery that there is something to send.
    """

    def __init__(
        self,
        repairs: Repairs,
        thread: StoreThread,
        recorder: Recorder,
        metrics: Metrics,
        *,
        status: Callable[[], Mapping[str, object]],
        audit: Callable[[], object],
        intake: Callable[[], object],
        health: Callable[[], Health],
        scrape: Callable[[], bytes],
        page: Callable[[], Mapping[str, object]],
        snapshot: Callable[[], Snapshot],
        wake: Callable[[], None],
    ) -> None:
        self._repairs = repairs
        self._thread = thread
        self._recorder = recorder
        self._metrics = metrics
        self._status_of = status
        self._audit_of = audit
        self._intake_of = intake
        self._health_of = health
        self._scrape = scrape
        self._page_of = page
        self._snapshot_of = snapshot
        self._wake = wake

    def handlers(self) -> Mapping[str, Handler]:
        """What the control socket serves."""
        return {
            "audit": self._audit,
            "deadletters.redate": self._redate,
            "deadletters.replay": self._replay,
            "health": self._health,
            "intake": self._intake,
            "metrics": self._metrics_text,
            "outputs.retire": self._retire,
            "page": self._page,
            "page.snapshot": self._snapshot,
            "record.start": self._record,
            "record.status": self._record_status,
            "record.stop": self._record_stop,
            "status": self._status,
            "unattributed.replay": self._release,
        }

    async def _replay(self, arguments: Arguments) -> object:
        """{output, ids, reason} → {replayed, too_late}."""
        return await self._carry_out(self._repairs.replay(*_letters(arguments)))

    async def _redate(self, arguments: Arguments) -> object:
        """{output, ids, reason, accept_duplicates} → {redated, doubtful}."""
        accept = arguments.get("accept_duplicates") is True
        return await self._carry_out(self._repairs.redate(*_letters(arguments), accept_duplicates=accept))

    async def _retire(self, arguments: Arguments) -> object:
        """{name} → {retired}."""
        return await self._carry_out(self._repairs.retire(str(arguments.get("name"))))

    async def _release(self, arguments: Arguments) -> object:
        """{ids, reason, redate} → {released, minted, unattributed, too_late, lost}."""
        ids, reason = texts(arguments.get("ids"), "ids"), arguments.get("reason")
        redate = arguments.get("redate") is True
        steps = self._repairs.release(ids, None if reason is None else str(reason), redate=redate)
        return await self._carry_out(steps)

    async def _carry_out(self, steps: Steps) -> dict[str, int]:
        """Takes the steps of a repair one by one, so that whatever else needs the store comes in between."""
        total: Counter[str] = Counter()
        while (step := await self._thread.run(next, steps, None)) is not None:
            total.update(step)
            self._metrics.minted.inc(step.get("minted", 0))
            self._wake()
        return dict(total)

    async def _record(self, arguments: Arguments) -> object:
        """{path, max_bytes, seconds} → how far it is."""
        path, size, seconds = (arguments.get(name) for name in ("path", "max_bytes", "seconds"))
        if not (isinstance(path, str) and isinstance(size, int) and isinstance(seconds, int)):
            raise UsageError("record.start wants a path, max_bytes and seconds", hint="proxy-usage record -h")
        self._recorder.start(Path(path), size, seconds)
        return self._recorder.status()

    async def _record_stop(self, _arguments: Arguments) -> object:
        await self._recorder.close()
        return self._recorder.status()

    async def _record_status(self, _arguments: Arguments) -> object:
        return self._recorder.status()

    async def _audit(self, _arguments: Arguments) -> object:
        return self._audit_of()

    async def _intake(self, _arguments: Arguments) -> object:
        return self._intake_of()

    async def _status(self, _arguments: Arguments) -> object:
        return self._status_of()

    async def _health(self, _arguments: Arguments) -> object:
        health = self._health_of()
        return {"alive": health.alive, "reasons": dict(health.reasons)}

    async def _metrics_text(self, _arguments: Arguments) -> object:
        return self._scrape().decode()

    async def _page(self, _arguments: Arguments) -> object:
        return self._page_of()

    async def _snapshot(self, _arguments: Arguments) -> object:
        return self._snapshot_of()


def _letters(arguments: Arguments) -> tuple[str | None, list[str], str | None]:
    """{output, ids, reason}: which dead letters are meant."""
    output, reason = arguments.get("output"), arguments.get("reason")
    return (
        None if output is None else str(output),
        texts(arguments.get("ids"), "ids"),
        None if reason is None else str(reason),
    )
