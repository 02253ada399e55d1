"""What several stores hold together, as one of them would say it.

Sums of sums are exact. Whether everything adds up is asked of each store by itself: what one lacks does not
make up for what another has too much.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain

from proxy_usage.store.usage import HeldHour, UsageNotes
from proxy_usage.store.views import Conservation, MeterTerms, OutputStatus, Status, Tally


def total_status(found: Sequence[Status]) -> Status:
    """Several stores at about one moment. The path is the first one's."""
    first = found[0]
    if len(found) == 1:
        return first
    return replace(
        first,
        sizes=_added(one.sizes for one in found),
        outputs=_outputs(chain.from_iterable(one.outputs for one in found)),
        meters=_meters(chain.from_iterable(one.meters for one in found)),
        rows=_rows(found),
        intake=_added(one.intake for one in found),
        crash_lost=_added(one.crash_lost for one in found),
        crash_unknown=_added(one.crash_unknown for one in found),
        open_windows=sum(one.open_windows for one in found),
        keys=sum(one.keys for one in found),
        unattributed=sum(one.unattributed for one in found),
        asides=tuple(chain.from_iterable(one.asides for one in found)),
        restored=next((one.restored for one in found if one.restored is not None), None),
    )


def total_conservation(found: Sequence[Conservation]) -> Conservation:
    """The terms of each store side by side."""
    return Conservation(
        meters=tuple(chain.from_iterable(one.meters for one in found)),
        outputs=tuple(chain.from_iterable(one.outputs for one in found)),
        deep=all(one.deep for one in found),
        differences=tuple(chain.from_iterable(one.differences for one in found)),
    )


def total_notes(found: Sequence[UsageNotes]) -> UsageNotes:
    """What is to be said beside the usage of all of them: of since when all know something, the latest."""
    held: dict[tuple[int, str], HeldHour] = {}
    for one in chain.from_iterable(notes.held for notes in found):
        place = (one.hour_ms, one.reason)
        have = held.get(place, HeldHour(*place, 0, {}))
        held[place] = replace(one, rows=have.rows + one.rows, amounts=_added((have.amounts, one.amounts)))
    singles = [notes.single_since_ms for notes in found if notes.single_since_ms is not None]
    known = [notes.known_since_ms for notes in found if notes.known_since_ms is not None]
    return UsageNotes(
        open_windows=sum(notes.open_windows for notes in found),
        held=tuple(held[place] for place in sorted(held)),
        summed=any(notes.summed for notes in found),
        single_since_ms=max(singles, default=None),
        known_since_ms=max(known, default=None),
    )


def _added(amounts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in amounts:
        total.update(one)
    return dict(total)


def _rows(found: Iterable[Status]) -> dict[str, dict[str, int]]:
    rows: dict[str, Counter[str]] = {}
    for one in found:
        for fate, reasons in one.rows.items():
            rows.setdefault(fate, Counter()).update(reasons)
    return {fate: dict(reasons) for fate, reasons in rows.items()}


def _outputs(found: Iterable[OutputStatus]) -> tuple[OutputStatus, ...]:
    total: dict[str, OutputStatus] = {}
    for one in found:
        have = total.get(one.name)
        total[one.name] = one if have is None else _output(have, one)
    return tuple(total.values())


def _output(one: OutputStatus, other: OutputStatus) -> OutputStatus:
    """Numbers are added; it is as old as the older, paused if either is, and tries as long as either does."""
    apart = {"name", "added_ms", "oldest_ms", "paused", "paused_ms", "detail", "retrying_ms", "answer"}
    numbers = {
        field.name: getattr(one, field.name) + getattr(other, field.name)
        for field in fields(OutputStatus)
        if field.name not in apart
    }
    oldest = [ms for ms in (one.oldest_ms, other.oldest_ms) if ms is not None]
    paused = one if one.paused is not None else other
    retrying = [(have.retrying_ms, have.answer) for have in (one, other) if have.retrying_ms is not None]
    retrying_ms, answer = min(retrying, default=(None, ""))
    return replace(
        paused,
        **numbers,
        added_ms=min(one.added_ms, other.added_ms),
        oldest_ms=min(oldest, default=None),
        retrying_ms=retrying_ms,
        answer=answer,
    )


def _meters(found: Iterable[MeterTerms]) -> tuple[MeterTerms, ...]:
    total: dict[str, MeterTerms] = {}
    for one in found:
        have = total.get(one.meter)
        total[one.meter] = one if have is None else _meter(have, one)
    return tuple(total.values())


def _meter(one: MeterTerms, other: MeterTerms) -> MeterTerms:
    names = ("counted", "open", "held", "remainders", "written_off", "expired")
    return replace(
        one,
        **{name: getattr(one, name) + getattr(other, name) for name in names},
        divisor=one.divisor if one.divisor is not None else other.divisor,
        minted=Tally(*map(sum, zip(one.minted, other.minted, strict=True))),
        redated=Tally(*map(sum, zip(one.redated, other.redated, strict=True))),
    )
