"""Another system's usage beside ours, per tenant and meter, and what explains how they differ.

    their events or sums ─▶ Theirs ─┐
                                    ├─▶ compare ─▶ Line per tenant and meter, Hint per known difference
    our ledger (store) ───▶ Ours ───┘

A hint is said only where the numbers bear it, with its share of the difference. Values are in a meter's
billed unit; differences are ours less theirs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from proxy_usage.attribution import UUID_SHAPED
from proxy_usage.config.units import parse_instant
from proxy_usage.model import Meter, Quantity

REMEMBERED_IDS = 500_000
"""An id that comes again within so many events is the same event, resent: it counts once."""

_PER_REQUEST_ID = re.compile(r"0[0-9A-F]{25}")
"""The log-tailing collector's ids: hexadecimal digits of an MD5, one event a request and meter."""
_VALUE = re.compile(r"-?[0-9]{1,19}")
_MAX_VALUE = (1 << 63) - 1
_ENDED = "(ours counts a request when it ends; those below a second do not show) ended"
_BYTES = {Quantity.WIRE_IN, Quantity.WIRE_OUT, Quantity.BODY_IN, Quantity.BODY_OUT}
_WIRE = {Quantity.WIRE_IN, Quantity.WIRE_OUT}

Sums = Mapping[tuple[str, str], int]
"""Values by tenant and meter's name."""


@dataclass(frozen=True, slots=True)
class Ours:
    """What the ledger of one output has of a time."""

    output: str
    sums: Sums
    no_route: Sums = field(default_factory=dict)
    """Of ``sums``: usage of rows that named no HTTPRoute."""
    keys: Mapping[str, int] = field(default_factory=dict)
    """By tenant: how many keys there are, each of which carries less than a second to its next window."""
    held: Mapping[str, int] = field(default_factory=dict)
    """By meter, in base units: what nobody pays yet, of the whole hours that the time touches."""
    whole_hours: bool = True
    """Whether those hours are exactly the time."""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    """By meter: made anew for another output, or settled by a store before this one; not in ``sums``."""
    open_windows: int = 0
    """Windows of single keys that are not events yet."""
    late_start: str = ""
    """When the output was added, if that is after the time begins."""
    forgotten: bool = False
    """Whether sums of that time may have been removed (``store.keep_sums``)."""
    set_aside: int = 0
    """Stores before this one that were set aside after the time began."""


def combined(parts: Sequence[Ours]) -> Ours:
    """What the ledgers of several stores have together, of the same output and time."""
    first = parts[0]

    def added(name: str) -> Counter[Any]:
        total: Counter[Any] = Counter()
        for part in parts:
            total.update(getattr(part, name))
        return total

    return Ours(
        first.output,
        **{name: added(name) for name in ("sums", "no_route", "keys", "held", "elsewhere")},
        whole_hours=first.whole_hours,
        open_windows=sum(part.open_windows for part in parts),
        # A store that is younger than the output is one of a worker that was not there before.
        late_start="" if any(not part.late_start for part in parts) else min(p.late_start for p in parts),
        forgotten=any(part.forgotten for part in parts),
        set_aside=sum(part.set_aside for part in parts),
    )


class Line(NamedTuple):
    """One tenant and meter."""

    tenant: str | None
    """None: usage that has no tenant here."""
    meter: str
    theirs: int
    ours: int

    @property
    def difference(self) -> int:
        """What ours has more."""
        return self.ours - self.theirs


class Hint(NamedTuple):
    """A known difference that is there: of which kind, for which meter, and how much it is."""

    kind: str
    meter: str | None
    amount: int
    text: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides."""

    lines: tuple[Line, ...]
    hints: tuple[Hint, ...]
    equal: bool
    """Every line is, and everything of theirs could be read."""


class Theirs:
    """Another system's usage in ``[from_ms, to_ms)``, added up as it is read; only sums are kept."""

    def __init__(self, meters: Sequence[Meter], from_ms: int, to_ms: int) -> None:
        self.sums: Counter[tuple[str, str]] = Counter()
        self.unreadable: Counter[str] = Counter()
        """Events left out, by reason."""
        self.other_types: Counter[str] = Counter()
        """Events of meters that are not compared."""
        self.outside = self.repeated = self.began_before = self.ended_after = 0
        self._from_ms, self._to_ms = from_ms, to_ms
        self._names = {name: meter.name for meter in meters for name in (meter.type, meter.name)}
        self._types = {meter.type: meter for meter in meters}
        self._ids: dict[tuple[str, str], None] = {}

    def name(self, meter: str) -> str | None:
        """The meter's name, given that or its type; None for one that is not compared."""
        return self._names.get(meter)

    def add_sum(self, tenant: str, meter: str, value: int) -> None:
        """Adds to a sum; ``meter`` is a name."""
        self.sums[tenant.removeprefix("projects/"), meter] += value

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Adds a CloudEvent, or notes why it does not count."""
        meter = self._types.get(str(event.get("type")))
        if meter is None:
            self.other_types[str(event.get("type"))] += 1
            return
        try:
            time_ms = parse_instant(str(event.get("time")))
        except (ValueError, OverflowError):
            self.unreadable["time"] += 1
            return
        subject, data = event.get("subject"), event.get("data")
        text = data.get("value") if isinstance(data, Mapping) else None
        if not isinstance(subject, str) or not subject.removeprefix("projects/"):
            self.unreadable["subject"] += 1
        elif not isinstance(text, str) or not _VALUE.fullmatch(text) or abs(int(text)) > _MAX_VALUE:
            self.unreadable["data.value"] += 1
        elif self._is_new(event):
            self._book(meter, time_ms, subject, int(text), str(event.get("id")))

    def _book(self, meter: Meter, time_ms: int, subject: str, value: int, event_id: str) -> None:
        # Dated by the request's start, with whole seconds of its duration: when it ended, at the earliest.
        timed = meter.quantity is Quantity.OPEN_NS and _PER_REQUEST_ID.fullmatch(event_id) is not None
        end_ms = time_ms + value * 1000 if timed else time_ms
        if self._from_ms <= time_ms < self._to_ms:
            self.add_sum(subject, meter.name, value)
            self.ended_after += end_ms >= self._to_ms
        else:
            self.outside += 1
            self.began_before += time_ms < self._from_ms <= end_ms

    def _is_new(self, event: Mapping[str, Any]) -> bool:
        key = (str(event.get("source")), str(event.get("id")))
        if key in self._ids:
            self.repeated += 1
            return False
        self._ids[key] = None
        if len(self._ids) > REMEMBERED_IDS:
            del self._ids[next(iter(self._ids))]
        return True


def compare(meters: Sequence[Meter], theirs: Theirs, ours: Ours) -> Comparison:
    """Sets both beside each other. Lines are by tenant, then in the order of the meters."""
    tenants = sorted({tenant for tenant, _ in (*theirs.sums, *ours.sums)})
    lines = [
        Line(tenant, meter.name, theirs.sums[tenant, meter.name], ours.sums.get((tenant, meter.name), 0))
        for tenant in tenants
        for meter in meters
        if (tenant, meter.name) in theirs.sums or (tenant, meter.name) in ours.sums
    ]
    held = [Line(None, meter.name, 0, ours.held.get(meter.name, 0) // meter.divisor) for meter in meters]
    held = [line for line in held if line.ours]
    hints: list[Hint] = []
    for meter in meters:
        of_meter = [line for line in lines if line.meter == meter.name and line.difference]
        hints += _of_meter(meter, of_meter, theirs, ours)
    hints += _of_tenants(meters, theirs)
    hints += _of_held(held, ours)
    hints += _of_their_file(theirs)
    hints += _of_our_ledger(ours)
    lines += held
    equal = not theirs.unreadable and all(not line.difference for line in lines)
    return Comparison(tuple(lines), tuple(hints), equal)


def _of_meter(meter: Meter, lines: Sequence[Line], theirs: Theirs, ours: Ours) -> Iterator[Hint]:
    """What explains the tenants' differences in one meter."""
    more = sum(line.difference for line in lines if line.difference > 0)
    less = -sum(line.difference for line in lines if line.difference < 0)
    no_route = sum(
        min(line.difference, ours.no_route.get((line.tenant or "", meter.name), 0))
        for line in lines
        if line.difference > 0
    )
    if no_route:
        yield Hint(
            "no_route",
            meter.name,
            no_route,
            f"{meter.name}: {no_route} of ours is of rows that name no HTTPRoute; the log-tailing collector "
            "drops those",
        )
    if meter.quantity in _BYTES:
        yield from _of_bytes(meter, more - no_route, less)
    elif meter.quantity is Quantity.REQUESTS:
        yield from _of_requests(meter, more - no_route, theirs)
    else:
        yield from _of_seconds(meter, lines, theirs, ours)


def _of_bytes(meter: Meter, more: int, less: int) -> Iterator[Hint]:
    if meter.quantity in _WIRE and more > 0:
        yield Hint(
            "wire_bytes",
            meter.name,
            more,
            f"{meter.name}: ours has {more} more and counts all bytes of the HTTP stream, with headers and "
            f"framing (meters.{meter.name}.bytes: wire); a system that counts bodies has less",
        )
    if meter.quantity not in _WIRE and less:
        yield Hint(
            "body_bytes",
            meter.name,
            less,
            f"{meter.name}: theirs has {less} more; ours counts bodies alone (meters.{meter.name}.bytes: "
            "body)",
        )


def _of_requests(meter: Meter, more: int, theirs: Theirs) -> Iterator[Hint]:
    # What is billed to a namespace's UID there is not missing there.
    more -= sum(theirs.sums[tenant, meter.name] for tenant in _uuids(theirs))
    if more <= 0:
        return
    nothing = not any(name == meter.name for _, name in theirs.sums)
    why = "which drops every line where the log format has none: theirs has no request at all"
    yield Hint(
        "no_request_id",
        meter.name,
        more,
        f"{meter.name}: {more} of ours name a route and are not in theirs; rows without a request id are "
        + (f"dropped by the log-tailing collector, {why}" if nothing else "dropped by that collector"),
    )


def _of_seconds(meter: Meter, lines: Sequence[Line], theirs: Theirs, ours: Ours) -> Iterator[Hint]:
    carried = sum(
        -line.difference for line in lines if 0 < -line.difference <= ours.keys.get(line.tenant or "", 0)
    )
    if carried:
        yield Hint(
            "carried_seconds",
            meter.name,
            carried,
            f"{meter.name}: {carried} less than theirs where each key carries what is below a second to its "
            "next window",
        )
    more = sum(line.difference for line in lines if line.difference > 0)
    if not more:
        return
    if meter.quantity is not Quantity.OPEN_NS:
        count = "connections" if meter.quantity is Quantity.CONNECTION_NS else "upgraded_and_tcp"
        yield Hint(
            "other_seconds",
            meter.name,
            more,
            f"{meter.name}: ours counts {count} (meters.{meter.name}.count), not the time of each request",
        )
        return
    floored = rows = 0
    for line in lines:
        tenant = line.tenant or ""
        # A request in theirs loses less than a second; where they give no requests, ours are the bound.
        requests = theirs.sums[tenant, "requests"] or ours.sums.get((tenant, "requests"), 0)
        rows += requests if line.difference > 0 else 0
        floored += min(requests, max(0, line.difference))
    if floored:
        rest = f"; {more - floored} is more than that explains" if floored < more else ""
        yield Hint(
            "floored_seconds",
            meter.name,
            floored,
            f"{meter.name}: ours has {more} more; whole seconds of each request lose less than one in each "
            f"of {rows} requests, ours carries what is left{rest}",
        )


def _uuids(theirs: Theirs) -> list[str]:
    return sorted({tenant for tenant, _ in theirs.sums if UUID_SHAPED.fullmatch(tenant)})


def _of_tenants(meters: Sequence[Meter], theirs: Theirs) -> Iterator[Hint]:
    tenants = _uuids(theirs)
    for meter in meters:
        amount = sum(theirs.sums[tenant, meter.name] for tenant in tenants)
        if amount:
            yield Hint(
                "uuid_tenant",
                meter.name,
                amount,
                f"{meter.name}: {amount} of theirs is of {len(tenants)} tenants that are the UID of a "
                "namespace, which is no project: nobody is billed for it",
            )


def _of_held(held: Sequence[Line], ours: Ours) -> Iterator[Hint]:
    hours = "" if ours.whole_hours else ", in the whole hours that the time touches"
    for line in held:
        yield Hint(
            "unattributed",
            line.meter,
            line.ours,
            f"{line.meter}: {line.ours} is held here without a tenant{hours}: proxy-usage unattributed ls",
        )


def _of_their_file(theirs: Theirs) -> Iterator[Hint]:
    for what, count in sorted(theirs.unreadable.items()):
        yield Hint("unreadable", None, count, f"{count} of their events are left out: no valid {what}")
    if count := sum(theirs.other_types.values()):
        named = ", ".join(sorted(theirs.other_types)[:3])
        yield Hint("other_type", None, count, f"{count} of their events are of other types: {named}")
    for kind, count, text in (
        ("repeated", theirs.repeated, "of their events came again: counted once"),
        ("outside", theirs.outside, "of their events are of another time"),
        ("began_before", theirs.began_before, f"of their requests began before the time and {_ENDED} in it"),
        ("ended_after", theirs.ended_after, f"of their requests began in the time and {_ENDED} after it"),
    ):
        if count:
            yield Hint(kind, None, count, f"{count} {text}")


def _of_our_ledger(ours: Ours) -> Iterator[Hint]:
    if ours.open_windows:
        count = ours.open_windows
        yield Hint(
            "open_windows", None, count, f"{count} windows of that time are open here: ask again later"
        )
    for meter, amount in ours.elsewhere.items():
        yield Hint("elsewhere", meter, amount, f"{meter}: {amount} more is elsewhere, not in {ours.output}")
    if ours.late_start:
        yield Hint("late_start", None, 0, f"{ours.output} was added at {ours.late_start}: nothing before it")
    if ours.forgotten:
        yield Hint("forgotten", None, 0, "sums of that time may have been removed here (store.keep_sums)")
    if ours.set_aside:
        count = ours.set_aside
        yield Hint(
            "set_aside",
            None,
            count,
            f"{count} stores before this one were set aside since: their usage lacks",
        )
