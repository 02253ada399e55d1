"""A sink without sockets: everything from a message's bytes to the queue, on a real store, time given.

with InnerSink(tmp_path) as sink:
    sink.read(http_row(tags={"project_name": "alpha"}))
    sink.turn(sink.now_ms + 70_000)
    assert sink.fates() == {"pending": 3}
    sink.crash()                    # as kill -9: only files are left
    assert sink.storage.loss.rows == {}
    sink.check_books()
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from money import Store, leave_room
from wire import NOW_MS, message

from proxy_usage.config import Config
from proxy_usage.decode import parts
from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.errors import StoreError
from proxy_usage.intake import HTTP, by_node
from proxy_usage.model import Event, Meter, Origin
from proxy_usage.outputs.base import Answer, Verdict
from proxy_usage.outputs.billing import Billing
from proxy_usage.pipeline import Pipeline, Port, next_step
from proxy_usage.service.build import build_mint, build_pipeline, open_storage
from proxy_usage.store import Batch
from proxy_usage.turn import Turn

Endpoint = Callable[[Batch], Answer | Verdict]


def settings(path: Path, **changes: Any) -> Config:
    """Tenants by tag, then by a header; two dimensions; one output."""
    return Config.model_validate(
        {
            "tenant": {
                "rules": [{"custom_tag": "project_name"}, {"request_header": "x-project", "trusted": True}],
                **changes.pop("tenant", {}),
            },
            "dimensions": {
                "region": {"custom_tag": "region", "default": ""},
                "httproute_name": {"route_name": "^httproute/[^/]+/(?P<value>[^/]+)", "default": "any"},
            },
            "store": {"path": str(path / "usage.db")},
            "outputs": [{"name": "billing", "url": "http://127.0.0.1:9/events"}],
            **changes,
        }
    )


class InnerSink:
    """What ``service`` wires together, driven by hand."""

    def __init__(self, path: Path, *, now_ms: int = NOW_MS, **changes: Any) -> None:
        self.now_ms = now_ms
        self.config = settings(path, **changes)
        self.policy = self._new_policy()
        self.unsaved: Counter[str] = Counter()
        """Rows per node that were read since the last turn that was saved."""
        self.read_rows = 0
        self.lost_rows: Counter[str] = Counter()
        """Rows per node that crashes lost, as each start reported them."""
        self.minted: dict[str, bytes] = {}
        self._open()

    def _open(self) -> None:
        self.storage = open_storage(self.config)
        self.pipeline: Pipeline = build_pipeline(self.config, self.storage)
        self.mint = build_mint(self.config)
        self.lost_rows.update(by_node(self.storage.loss.rows))

    def _new_policy(self) -> Policy:
        return Policy(RetrySettings(500, 60_000, 600_000), below=lambda n: n - 1)

    def __enter__(self) -> InnerSink:
        return self

    def __exit__(self, *_: object) -> None:
        self.storage.close()

    # --- in ---------------------------------------------------------------------------------------

    def read(self, *rows: Any, node: str = "envoy-1", at_ms: int | None = None) -> None:
        """A message of rows arrives."""
        self.read_raw(message(*rows), node=node, at_ms=at_ms)

    def read_raw(self, raw: bytes, *, node: str = "envoy-1", at_ms: int | None = None) -> None:
        """Bytes arrive, whatever they are: as the receiver takes them."""
        self.now_ms = self.now_ms if at_ms is None else at_ms
        for part in parts(raw):
            self.storage.intake.add(node, len(part.entries), "http", HTTP)
            self.pipeline.take(Port.ALL, Origin("", node, "http"), part, self.now_ms)
            self.unsaved[node] += len(part.entries)
            self.read_rows += len(part.entries)

    # --- turns ------------------------------------------------------------------------------------

    def turn(
        self,
        at_ms: int | None = None,
        *,
        everything: bool = False,
        meanwhile: Callable[[], None] | None = None,
        between: Callable[[], None] | None = None,
    ) -> tuple[Event, ...]:
        """A turn; ``between`` runs after each step of its making, ``meanwhile`` while it is under way.

        Rolls back before it raises.
        """
        self.now_ms = self.now_ms if at_ms is None else at_ms
        steps = self.pipeline.beginning(self.now_ms, everything=everything)
        next(steps)
        covered, self.unsaved = self.unsaved, Counter()  # all that came before the first step, and no more
        while True:
            if between is not None:
                between()
            turn = next_step(steps)
            if turn is not None:
                break
        if meanwhile is not None:
            meanwhile()
        try:
            return self._commit(turn)
        except StoreError:
            self.pipeline.rollback(turn)
            self.unsaved.update(covered)
            raise

    def _commit(self, turn: Turn) -> tuple[Event, ...]:
        events = self.storage.checkpoints.commit(turn, self.mint, self.now_ms)
        self.pipeline.commit(turn)
        for _ in turn.windows.release():
            pass
        for event in events:
            assert event.id not in self.minted
            self.minted[event.id] = event.body
        return events

    def close_all(self) -> None:
        """Closes every window, due or not."""
        self.turn()
        while len(self.pipeline.windows):
            self.turn(everything=True)

    def crash(self) -> None:
        """The process is killed and started anew. Nothing in memory is left, and nothing is said goodbye."""
        self.storage.intake.close()  # the kernel keeps the pages of a killed process
        self.storage.database.close()
        self.policy = self._new_policy()
        self.unsaved = Counter()
        self._open()

    # --- out --------------------------------------------------------------------------------------

    def deliver(self, endpoint: Endpoint, *, attempts: int = 1_000_000, until_ms: int | None = None) -> None:
        """The courier's loop without sockets: so many attempts, or until a moment, or until nothing is left.

        The endpoint gets a batch and gives an HTTP answer or a verdict of the transport.
        """
        queue, billing = self.storage.queue, Billing()
        output = self.storage.slots[0].output
        while attempts > 0 and (until_ms is None or self.now_ms < until_ms):
            self.now_ms += self.policy.wait_ms(self.now_ms)
            leased = queue.lease(
                output,
                self.now_ms,
                events=100,
                max_bytes=self.policy.max_bytes,
                linger_ms=0,
                fresh=not self.policy.failures,
                apart=self.policy.apart,
            )
            if not isinstance(leased, Batch):
                if leased.until_ms is None:
                    return
                self.now_ms = max(self.now_ms, leased.until_ms)
                continue
            for event in leased.events:
                assert self.minted[event.id] == event.body
            attempts -= 1
            answer = endpoint(leased)
            verdict = billing.read(answer, leased.events) if isinstance(answer, Answer) else answer
            step = self.policy.decide(leased, verdict, self.now_ms)
            if step.wait_ms is not None:
                queue.postpone(leased.id, self.now_ms + step.wait_ms, step.answer)
            else:
                parts = queue.settle(leased, step.fates, self.now_ms, rest=step.rest, confirm=step.confirm)
                self.policy.inherit(leased, parts)

    # --- the books --------------------------------------------------------------------------------

    @property
    def meters(self) -> tuple[Meter, ...]:
        return self.config.meter_list()

    @property
    def books(self) -> Store:
        """The store's tables, to be looked at."""
        return Store.around(
            self.storage.database, self.storage.queue, self.storage.checkpoints, self.storage.slots
        )

    def fates(self) -> dict[str, int]:
        return self.books.fates()

    def rows(self) -> Counter[str]:
        """Rows by fate, over the life of the store."""
        sums: Counter[str] = Counter()
        for label, rows in self.books.counters("rows").items():
            sums[label.partition("/")[0]] += rows
        return sums

    def check_rows(self) -> None:
        """Rows read = counted + skipped + invalid + lost by crashes + not saved yet."""
        rows = self.rows()
        assert set(rows) <= {"counted", "skipped", "invalid"}, rows
        assert (
            sum(rows.values()) + sum(self.lost_rows.values()) + sum(self.unsaved.values()) == self.read_rows
        )
        assert self.books.counters("crash_lost") == self.lost_rows
        stored = dict(self.books.rows("SELECT node, sum(rows) FROM intake GROUP BY node"))
        counts = by_node(self.storage.intake.counts())
        assert {node: counts[node] - stored.get(node, 0) for node in counts} == {
            node: self.unsaved[node] for node in counts
        }

    def check_usage(self) -> dict[str, Mapping[str, int]]:
        """Per meter, in base units: counted = events × divisor + open + remainders + held + written off.

        Valid when everything read is in a turn. Gives the terms.
        """
        books = self.books
        counted, written_off = books.counters("counted"), books.counters("written_off")
        held, remainders = books.held(), books.remainders()
        opened = self.pipeline.windows.open_amounts() or (0,) * len(self.meters)
        minted = {
            meter: value for (_, fate, meter), (_, value) in books.tallies().items() if fate == "minted"
        }
        terms: dict[str, Mapping[str, int]] = {}
        for index, meter in enumerate(self.meters):
            terms[meter.name] = {
                "minted": minted.get(meter.name, 0) * meter.divisor,
                "open": opened[index],
                "remainders": remainders[meter.name],
                "held": held[meter.name],
                "written_off": written_off[meter.name],
            }
            assert sum(terms[meter.name].values()) == counted[meter.name], (meter.name, terms)
        return terms

    def check_books(self) -> dict[str, Mapping[str, int]]:
        """Rows, usage, and the fates of every event."""
        self.check_rows()
        self.books.check_tallies(tuple(meter.name for meter in self.meters))
        return self.check_usage()


def full(sink: InnerSink, pages: int = 0) -> None:
    """Leaves new usage room for so many pages more. ``roomy`` ends it."""
    leave_room(sink.storage.database, pages)


def roomy(sink: InnerSink) -> None:
    leave_room(sink.storage.database)
