"""The store against a model that is a dictionary, killed after any statement of any transaction.

A crash is what a kill leaves behind: the files as they are before the next statement. They are copied there
and then, the copy is opened as the next process opens it, and the machine goes on with it. What was going on
has then happened as a whole or not at all, and:

- what was counted is in events and remainders, and each event has one fate (`Conservation`, table by table);
- an id never stands for two contents, and what was settled stays settled;
- what was not marked as attempted was never handed out to be sent.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from money import HOUR_MS, MINUTE_MS, NAMES, T0, Store, cell, key, turn

from proxy_usage.model import NS_PER_SECOND, Cell
from proxy_usage.store import Batch, Fate, Merger, OutputSlot, Retention
from proxy_usage.store.letters import Letters, Wanted
from proxy_usage.store.reader import Reader

OUTPUTS = (OutputSlot(0, "billing"), OutputSlot(0, "archive"))
TENANTS = ["alpha", "beta", "gamma"]
PARTS = ("", "-wal")
MAX_STATEMENTS = 60
"""A crash later than that in one step is no crash: the step is over by then."""

crashes = st.one_of(st.none(), st.integers(0, MAX_STATEMENTS))


class StoreModel(RuleBasedStateMachine):
    """Usage goes in by turns, events go out to two outputs, housekeeping goes on; kills at any statement."""

    @initialize()
    def open(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="store-model-"))
        self.lives = 0
        self.now_ms = T0
        self.bodies: dict[str, bytes] = {}  # every id there ever was
        self.settled: dict[tuple[int, int], str] = {}  # (output, seq) → fate
        self.store = Store(self._home(), outputs=OUTPUTS)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.database.close()
            shutil.rmtree(self.place)

    def _home(self) -> Path:
        home = self.place / str(self.lives)
        home.mkdir()
        return home

    # --- a kill -----------------------------------------------------------------------------------------

    def _step(self, step: Callable[[], None], crash: int | None) -> bool:
        """Takes a step, and kills the process before its statement number ``crash``. Whether it survived."""
        if crash is None:
            step()
            return True
        path, seen = self.store.path, 0
        self.lives += 1
        home = self._home()
        copied = False

        def watch(_statement: str) -> None:
            nonlocal seen, copied
            if seen == crash:
                for part in PARTS:
                    source = path.with_name(path.name + part)
                    if source.exists():
                        shutil.copyfile(source, home / source.name)
                copied = True
            seen += 1

        self.store.db.set_trace_callback(watch)
        step()
        if not copied:
            self.store.db.set_trace_callback(None)
            return True
        self.store.database.close()
        self.store = Store(home, outputs=OUTPUTS, now_ms=self.now_ms)
        return False

    # --- usage ------------------------------------------------------------------------------------------

    @rule(
        tenants=st.lists(st.sampled_from(TENANTS), min_size=1, max_size=3, unique=True),
        minutes=st.integers(0, 3),
        amount=st.integers(1, 5),
        crash=crashes,
    )
    def close_windows(self, tenants: list[str], minutes: int, amount: int, crash: int | None) -> None:
        amounts = (amount, 10 * amount, 0, amount * NS_PER_SECOND // 2)
        cells = [self._cell(tenant, minutes, number, amounts) for number, tenant in enumerate(tenants, 1)]
        brought = tuple(len(cells) * one for one in amounts)
        before = self._total()
        given = turn(*cells, counted=brought)
        self._step(lambda: void(self.store.checkpoints.commit(given, self.store.mint, self.now_ms)), crash)
        after = self._total()
        # All of it or nothing of it.
        assert after in (before, [a + b for a, b in zip(before, brought, strict=True)])

    def _cell(self, tenant: str, minutes: int, number: int, amounts: tuple[int, ...]) -> Cell:
        window_ms = self.now_ms - self.now_ms % MINUTE_MS - minutes * MINUTE_MS
        return cell(amounts, key=key(tenant), id=number, window_ms=window_ms)

    def _total(self) -> list[int]:
        counted = self.store.counters("counted")
        return [counted[name] for name in NAMES]

    @rule(by_ms=st.sampled_from([1_000, MINUTE_MS, HOUR_MS]))
    def wait(self, by_ms: int) -> None:
        self.now_ms += by_ms

    # --- delivery ---------------------------------------------------------------------------------------

    @rule(
        which=st.sampled_from([0, 1]),
        fate=st.sampled_from(["delivered", "dead", "lost", "split"]),
        events=st.integers(1, 4),
        crash=crashes,
        late=crashes,
    )
    def deliver(self, which: int, fate: str, events: int, crash: int | None, late: int | None) -> None:
        output = self.store.slots[which].output
        leased: list[Batch] = []

        def lease() -> None:
            found = self.store.lease(self.now_ms, output=output, events=events)
            if isinstance(found, Batch):
                leased.append(found)

        if not self._step(lease, crash) or not leased:
            return  # killed before its first byte left
        (batch,) = leased
        for event in batch.events:
            marked = self.store.rows(
                "SELECT first_attempt_ms FROM deliveries WHERE output=? AND seq=?", output, event.seq
            )
            assert marked[0][0] is not None, "sent without a mark"
        fates, rest = self._answer(batch, fate)

        def settle() -> None:
            if fate == "lost":
                self.store.queue.postpone(batch.id, self.now_ms + 1, "timeout", unanswered=True, clean=False)
            else:
                self.store.queue.settle(batch, fates, self.now_ms, rest=rest)

        survived = self._step(settle, late)
        now = {seq: self._fate_of(output, seq) for seq in fates}
        if survived:
            assert now == {seq: one.name for seq, one in fates.items()}
        # The batch was settled as a whole or is still what it was.
        assert len({name == fates[seq].name for seq, name in now.items()}) <= 1
        self.settled.update(
            ((output, seq), name) for seq, name in now.items() if name and name.startswith("delivered")
        )

    @staticmethod
    def _answer(batch: Batch, fate: str) -> tuple[dict[int, Fate], list[list[int]]]:
        seqs = [event.seq for event in batch.events]
        if fate == "delivered":
            return {seq: Fate("delivered", 200) for seq in seqs}, []
        if fate == "dead":
            return {seq: Fate("dead", 400, "refused", "no") for seq in seqs}, []
        half = len(seqs) // 2
        return {}, [part for part in (seqs[:half], seqs[half:]) if part] if fate == "split" else []

    def _fate_of(self, output: int, seq: int) -> str | None:
        """What the tables say of an event: dead, or the ledger's word; None while it waits."""
        if self.store.rows("SELECT 1 FROM dead WHERE output=? AND seq=?", output, seq):
            return "dead"
        if self.store.rows("SELECT 1 FROM deliveries WHERE output=? AND seq=?", output, seq):
            return None
        return "delivered"

    @rule(crash=crashes)
    def replay(self, crash: int | None) -> None:
        letters = Letters(self.store.database)
        self._step(lambda: void(letters.replay(Wanted())), crash)

    # --- upkeep -----------------------------------------------------------------------------------------

    @rule(crash=crashes)
    def merge(self, crash: int | None) -> None:
        merger = Merger(self.store.database, self.store.mint)

        def merge_all() -> None:
            while not merger.step(self.now_ms).done:
                continue

        self._step(merge_all, crash)

    @rule(crash=crashes)
    def roll_up(self, crash: int | None) -> None:
        retention = Retention(
            self.store.database, ledger_max_bytes=1, keep_delivered_ms=1, keep_sums_ms=1 << 40, keep_held_ms=1
        )
        self._step(lambda: void(retention.roll(self.now_ms, short=True)), crash)

    @rule(crash=crashes)
    def fold(self, crash: int | None) -> None:
        self._step(self.store.checkpoints.fold, crash)

    # --- what always holds ------------------------------------------------------------------------------

    @invariant()
    def it_adds_up(self) -> None:
        if not hasattr(self, "store"):
            return
        with Reader(self.store.path) as reader:
            sums = reader.conservation(deep=True)
        assert sums.balanced, sums

    @invariant()
    def an_id_has_one_content(self) -> None:
        if not hasattr(self, "store"):
            return
        for event_id, body in self.store.rows("SELECT id, body FROM events"):
            assert self.bodies.setdefault(event_id, body) == body

    @invariant()
    def what_was_delivered_is_not_sent_again(self) -> None:
        if not hasattr(self, "store"):
            return
        waiting = set(self.store.rows("SELECT output, seq FROM deliveries"))
        assert not waiting & self.settled.keys()


def void(_: object) -> None:
    """A step whose answer nobody needs."""


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
