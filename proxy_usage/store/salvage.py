"""What can be read of a store that was set aside becomes dead letters of the store in its place.

    file set aside                          this store
    ─────────────────────────────────────   ──────────────────────────────────────────────────────────────
    event waiting, sent, a dead letter  ─▶  dead letter ``salvaged``; ``answer`` says what it was there
    event settled at an output          ─▶  ``elsewhere`` at that output: the other store settled it
    open window                         ─▶  events made now, dead letters ``salvaged``
    remainders, held usage, streams     ─▶  not brought over; the report says how much it was
    sums that say more than was found   ─▶  ``missing`` in the report

Nothing of it is ever sent by itself: it may have been delivered, and the file not know it any more.

Conservation: a salvaged event enters as minted, and its amount as ``counted``, as if its rows had been
counted here, so that the sums of this store stay exact; the counter ``salvaged`` says how much of ``counted``
that is.

Each step is one transaction of events, sums and the place reached. So a salvage that is cut short goes on
where it was, and nothing is brought over twice.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from proxy_usage.events import Mint
from proxy_usage.model import Cell, Key
from proxy_usage.store.checkpoint import key_number
from proxy_usage.store.database import Database, Sums, add_counters, add_tallies, tally
from proxy_usage.store.report import Aside, Report, save
from proxy_usage.store.wreck import Found, Wreck
from proxy_usage.turn import Layout, OutputSlot

SALVAGED = "salvaged"
ELSEWHERE = "elsewhere"
ANSWER_CHARS = 500
STEP = 200
"""Events or windows brought over in one transaction."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the file's content, and the report once it is brought over."""

    report: Report
    events: tuple[Found, ...] = ()
    cells: tuple[Cell, ...] = ()


class _Place(NamedTuple):
    """What becomes of an event at one output of this store."""

    fate: str
    words: str = ""
    first_attempt_ms: int | None = None


class Salvage:
    """Brings one file's content over in steps: ``read`` from the file, ``write`` to the store, by turns.

    ``read`` and ``write`` may run on different threads, not at the same time.

    Args:
        outputs: as they are configured and registered.
        layout: as it is configured; it stands in for the file's where that cannot be read.
        mint_of: what makes events of windows under a layout.
    """

    def __init__(
        self,
        database: Database,
        aside: Aside,
        outputs: Sequence[OutputSlot],
        layout: Layout,
        mint_of: Callable[[Layout], Mint],
    ) -> None:
        self.aside = aside
        self.path = database.path.with_name(aside.file)
        self._database = database
        self._slots = {slot.name: slot for slot in outputs}
        self._layout = self._former = layout
        self._mint_of = mint_of
        self._wreck: Wreck | None = None
        self._events: Iterator[Found] | None = None
        self._cells: Iterator[Cell] | None = None

    def close(self) -> None:
        """Closes the file. Closing twice is harmless."""
        if self._wreck is not None:
            self._wreck.close()

    def run(self, now_ms: int) -> Report:
        """Everything at once, on the caller's thread."""
        while not self.aside.report.ended:
            self.write(self.read(), now_ms)
        self.close()
        return self.aside.report

    # --- reading ----------------------------------------------------------------------------------------

    def read(self) -> Piece:
        """The next piece of the file, a few hundred rows. Does not touch the store."""
        report = self.aside.report
        if self._wreck is None:
            if not self.path.exists():
                return Piece(replace(report, state="gone"))
            try:
                self._wreck = Wreck(self.path)
                trouble = self._wreck.trouble()
            except sqlite3.DatabaseError as error:
                trouble = str(error)
            if trouble is not None:
                return Piece(replace(report, state="unreadable", trouble=trouble))
            assert self._wreck is not None
            self._former = self._wreck.layout() or self._layout
        wreck = self._wreck
        piece = (
            self._read_events(wreck, report) if report.state == "events" else self._read_cells(wreck, report)
        )
        found = replace(
            piece.report, gaps=report.gaps + wreck.gaps, senseless=report.senseless + wreck.senseless
        )
        wreck.gaps = wreck.senseless = 0
        return replace(piece, report=found)

    def _read_events(self, wreck: Wreck, report: Report) -> Piece:
        if self._events is None:
            self._events = wreck.events(report.place)
        events = tuple(islice(self._events, STEP))
        if events:
            return Piece(replace(report, place=events[-1].seq), events)
        missing = _missing(wreck, report.brought)
        return Piece(replace(report, state="windows", place=0, missing=missing))

    def _read_cells(self, wreck: Wreck, report: Report) -> Piece:
        if self._cells is None:
            left = wreck.left()
            uncertain: Counter[str] = Counter()
            for cell in filter(self._fits, left.uncertain):
                uncertain.update(self._named(cell.amounts))
            fitting = [cell for cell in left.cells if self._fits(cell)]
            wreck.senseless += len(left.cells) - len(fitting)
            report = replace(report, uncertain=dict(uncertain), nameless=left.nameless)
            self._cells = iter(
                sorted((cell for cell in fitting if cell.id > report.place), key=lambda cell: cell.id)
            )
        cells = tuple(islice(self._cells, STEP))
        if cells:
            return Piece(replace(report, place=cells[-1].id), (), cells)
        return Piece(
            replace(report, state="done", remainders=wreck.amounts("keys"), held=wreck.amounts("held"))
        )

    def _fits(self, cell: Cell) -> bool:
        former = self._former
        return (len(cell.amounts), len(cell.key.dimensions)) == (len(former.meters), len(former.dimensions))

    def _named(self, amounts: Iterable[int]) -> dict[str, int]:
        return dict(zip((meter[0] for meter in self._former.meters), amounts, strict=True))

    # --- writing ----------------------------------------------------------------------------------------

    def write(self, piece: Piece, now_ms: int) -> Counter[str]:
        """Brings a piece over, in one transaction. Returns the new dead letters by output.

        Raises StoreFull or StoreUnavailable, and then nothing has changed: write the same piece again.
        """
        report = piece.report
        with self._database.transaction() as db:
            books = _Books(db, now_ms, {name: slot.output for name, slot in self._slots.items()})
            report = self._write_events(books, piece.events, report)
            report = self._write_cells(books, piece.cells, report, now_ms)
            divisors = {meter[0]: meter[4] for meter in (*self._former.meters, *self._layout.meters)}
            books.end(divisors)
            aside = replace(self.aside, report=report)
            save(db, aside)
        self.aside = aside
        return books.letters

    def _write_events(self, books: _Books, events: Iterable[Found], report: Report) -> Report:
        known = unclear = added = 0
        brought = {place: Counter(events=have[0], value=have[1]) for place, have in report.brought.items()}
        for event in events:
            places = self._places(event)
            if books.knows(event.id):
                known += 1
            else:
                added += 1
                books.enter(event, places)
            states = event.states
            unclear += states is None or any(state.name == "unreadable" for state in states.values())
            for name, place in places.items():
                if place.fate == "dead":
                    sums = brought.setdefault(f"{name}/{event.meter}", Counter())
                    sums.update(events=1, value=event.value)
        return replace(
            report,
            events=report.events + added,
            known=report.known + known,
            unclear=report.unclear + unclear,
            brought={place: (sums["events"], sums["value"]) for place, sums in brought.items()},
        )

    def _write_cells(self, books: _Books, cells: Iterable[Cell], report: Report, now_ms: int) -> Report:
        mint = self._mint_of(self._former)
        rests = Counter(report.rests)
        windows = added = 0
        for cell in cells:
            minted = mint.mint(cell, (0,) * len(mint.meters), now_ms)
            rests.update(self._named(minted.remainders))
            windows += 1
            for event in minted.events:
                found = Found(
                    seq=0,
                    id=event.id,
                    tenant=cell.key.tenant,
                    dimensions=dict(zip(mint.dimensions, cell.key.dimensions, strict=True)),
                    meter=mint.meters[event.meter].name,
                    window_ms=event.window_ms,
                    value=event.value,
                    minted_ms=now_ms,
                    body=event.body,
                    states=None,
                )
                books.enter(found, self._anywhere(found.window_ms, "was an open window"))
                added += 1
        return replace(
            report, windows=report.windows + windows, events=report.events + added, rests=dict(rests)
        )

    def _places(self, event: Found) -> Mapping[str, _Place]:
        """What becomes of an event at each output: of the configuration, and those that want it besides."""
        unclear = "what became of it cannot be read"
        places = dict(self._anywhere(event.window_ms, unclear))
        if event.states is None:
            return places
        for name in places:
            if name not in event.states:  # the output is newer than the event
                places[name] = _Place(ELSEWHERE)
        for name, state in event.states.items():
            if state.name == "settled":
                if name in self._slots:
                    places[name] = _Place(ELSEWHERE)
            elif state.name != "unreadable":
                places[name] = _Place("dead", state.words, state.first_attempt_ms)
            elif name not in self._slots:
                places[name] = _Place("dead", unclear)
        return places

    def _anywhere(self, window_ms: int, words: str) -> Mapping[str, _Place]:
        fates = {name: slot.fate(window_ms) for name, slot in self._slots.items()}
        return {
            name: _Place("dead", words) if fate == "pending" else _Place(fate) for name, fate in fates.items()
        }


class _Books:
    """One transaction's entries and their sums."""

    def __init__(self, db: sqlite3.Connection, now_ms: int, outputs: dict[str, int]) -> None:
        self.letters: Counter[str] = Counter()
        self._db = db
        self._now_ms = now_ms
        self._outputs = outputs
        self._sums: Sums = {}
        self._values: Counter[str] = Counter()

    def knows(self, event_id: str) -> bool:
        """Whether an event is here already."""
        return self._db.execute("SELECT 1 FROM events WHERE id=?", (event_id,)).fetchone() is not None

    def enter(self, event: Found, places: Mapping[str, _Place]) -> None:
        """An event with its fate at every output: dead letter, or a row of the ledger."""
        of = Key(event.tenant, tuple(event.dimensions.values()))
        key, _ = key_number(self._db, of, tuple(event.dimensions), self._now_ms)
        # A search for unused keys may have looked through the events already.
        self._db.execute("UPDATE keys SET used_ms=max(used_ms, ?) WHERE key=?", (self._now_ms, key))
        letters = {name: place for name, place in places.items() if place.fate == "dead"}
        tally(self._sums, 0, "minted", event.meter, event.value)
        self._values[event.meter] += event.value
        if letters:
            seq = self._db.execute(
                "INSERT INTO events(id,key,meter,window_ms,value,minted_ms,outputs,body)"
                " VALUES(?,?,?,?,?,?,?,?)",
                (
                    event.id,
                    key,
                    event.meter,
                    event.window_ms,
                    event.value,
                    event.minted_ms,
                    len(letters),
                    event.body,
                ),
            ).lastrowid
        for name, place in places.items():
            output = self._output(name)
            tally(self._sums, output, place.fate, event.meter, event.value)
            if place.fate == "dead":
                self.letters[name] += 1
                self._db.execute(
                    "INSERT INTO dead(output,seq,reason,answer,at_ms,first_attempt_ms) VALUES(?,?,?,?,?,?)",
                    (output, seq, SALVAGED, place.words[:ANSWER_CHARS], self._now_ms, place.first_attempt_ms),
                )
            else:
                self._db.execute(
                    "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
                    " VALUES(?,?,?,?,?,?,?,0,?)",
                    (
                        output,
                        place.fate,
                        key,
                        event.meter,
                        event.window_ms,
                        event.value,
                        self._now_ms,
                        event.id,
                    ),
                )

    def end(self, divisors: Mapping[str, int]) -> None:
        """Adds the sums up. Meters that nobody knows any more have no base units to be counted in."""
        amounts = {
            meter: value * divisors[meter] for meter, value in self._values.items() if meter in divisors
        }
        add_tallies(self._db, self._sums)
        add_counters(self._db, "counted", amounts.items())
        add_counters(self._db, SALVAGED, amounts.items())

    def _output(self, name: str) -> int:
        """The number of an output; one that is not configured is made known, later than all others were."""
        if name not in self._outputs:
            self._db.execute(
                "INSERT INTO outputs(name, added_ms)"
                " SELECT ?, max(?, coalesce(max(added_ms), 0) + 1) FROM outputs"
                " WHERE true ON CONFLICT(name) DO NOTHING",
                (name, self._now_ms),
            )
            row = self._db.execute("SELECT output FROM outputs WHERE name=?", (name,)).fetchone()
            self._outputs[name] = row[0]
        return self._outputs[name]


def _missing(wreck: Wreck, brought: Mapping[str, tuple[int, int]]) -> Mapping[str, tuple[int, int]] | None:
    """What the file's own sums say more than was found."""
    expected, names = wreck.expected(), wreck.outputs()
    if expected is None or names is None:
        return None
    missing = {}
    for (output, meter), (events, value) in expected.items():
        place = f"{names.get(output, output)}/{meter}"
        have = brought.get(place, (0, 0))
        if (events, value) != have:
            missing[place] = (events - have[0], value - have[1])
    return missing
