"""Recorded rows through the service's own fold and rules, one at a time, so that each can be explained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from proxy_usage.attribution import Attributor, Explanation, Unattributed
from proxy_usage.cli.capture import Message, type_name
from proxy_usage.cli.show import lossy
from proxy_usage.config import Config
from proxy_usage.decode import Drained, RowFate, Split, parts, read_identifier
from proxy_usage.errors import DecodeError
from proxy_usage.model import Amounts, Identity, Meter, Origin, Quantity
from proxy_usage.pipeline import Port
from proxy_usage.service.build import build_attributor, build_folds

HELD = "held"
CONNECTION = "connection"
_UNKNOWN = Origin("", "", "")


class Booked(NamedTuple):
    """What a row adds, as far as the row alone says it."""

    fate: str
    reason: str
    identity: Identity | None = None
    window_ms: int | None = None
    amounts: Amounts = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One row and what becomes of it."""

    entry: int
    """Its number in the file, from 1."""
    stream: int
    origin: Origin
    http: bool
    raw: bytes
    booked: Booked
    """Its fate is ``counted``, ``skipped`` or ``invalid``; ``held``: counted, and of nobody; ``stream``: the
    amounts are running totals, of which the service books what is new; ``connection``: a listener row that
    belongs to those whose requests the connection carried."""
    notes: tuple[str, ...]
    complaint: str | None
    explanation: Explanation | None

    @property
    def type(self) -> str:
        """The row's access log type, in Envoy's words."""
        return type_name(self.raw)

    def plain(self, meters: Iterable[Meter]) -> dict[str, Any]:
        """The row for JSON."""
        found = self.explanation
        tenant = None if found is None or isinstance(found.result, Unattributed) else found.result.tenant
        shown: dict[str, Any] = {
            "entry": self.entry,
            "stream": self.stream,
            "node": self.origin.node_id,
            "log_name": self.origin.log_name,
            "kind": "http" if self.http else "tcp",
            "type": self.type,
            "fate": self.booked.fate,
            "reason": self.booked.reason,
            "tenant": tenant,
            "rule": None,
            "value": None if self.booked.identity is None else lossy(self.booked.identity.value),
            "dimensions": {},
            "window_ms": self.booked.window_ms,
            "amounts": dict(zip((meter.name for meter in meters), self.booked.amounts, strict=False)),
            "notes": list(self.notes),
            "complaint": self.complaint,
            "steps": [],
        }
        if found is not None:
            if found.rule >= 0:
                shown["rule"] = {"index": found.rule, "field": found.tenant.field}
            named = [part.name for part in found.dimensions]
            shown["dimensions"] = dict(zip(named, found.values, strict=True))
            shown["steps"] = [
                {"name": part.name, "field": part.field, "raw": part.raw, "steps": list(part.steps)}
                for part in (found.tenant, *found.dimensions)
            ]
        return shown


class Explainer:
    """Explains rows under one configuration, as if they were read at ``now_ms``.

    Where there are two ports, rows are taken as the owner of long streams takes them.
    """

    def __init__(self, config: Config, now_ms: int) -> None:
        self._attributor: Attributor = build_attributor(config)
        folds = build_folds(config, self._attributor)
        self._fold = folds[Port.STREAMS if Port.STREAMS in folds else Port.ALL]
        self._paths = config.fold_plan().node_paths
        self._quantities = config.fold_plan().quantities
        self._now_ms = now_ms
        self.damage: list[str] = []
        """What is wrong with messages rather than rows, so far."""

    def rows(self, messages: Iterable[Message]) -> Iterator[Row]:
        """Each row of the messages, in their order."""
        origins: dict[int, Origin] = {}
        entry = 0
        for number, message in enumerate(messages, start=1):
            try:
                found = read_identifier(message.raw, "", self._paths)
            except DecodeError as error:
                self.damage.append(f"message {number}: {error.message}")
                found = _UNKNOWN
            origin = origins[message.stream] = found or origins.get(message.stream, _UNKNOWN)
            for part in parts(message.raw):
                for position, raw in enumerate(part.entries):
                    entry += 1
                    yield self._row(entry, message.stream, origin, raw, http=position < part.http)
                if part.damaged:
                    self.damage.append(f"message {number}: rows behind the damage are lost: {part.damaged}")

    def _row(self, entry: int, stream: int, origin: Origin, raw: bytes, *, http: bool) -> Row:
        self._fold.entries(origin, Split([raw], int(http)), self._now_ms)
        drained = self._fold.drain()
        booked = self._booked(drained)
        explanation = None
        if booked.identity is not None:
            explanation = self._attributor.explain(booked.identity)
            booked = _attributed(booked, explanation)
        complaint = drained.complaints[0] if drained.complaints else None
        notes = tuple(drained.notes)
        return Row(entry, stream, origin, http, raw, booked, notes, complaint, explanation)

    def _booked(self, drained: Drained) -> Booked:
        """The one row's fate and amounts, of the three places where a fold may put them."""
        ((fate, reason),) = drained.fates
        for (identity, window_ms), (_, *amounts) in drained.totals.items():
            return Booked(fate, reason, identity, window_ms, tuple(amounts))
        for row in drained.long_rows:
            return Booked(fate, reason, row.identity, row.window_ms, row.amounts)
        for connection in drained.connection_rows:
            amounts = [connection.open_ns if q is Quantity.CONNECTION_NS else 0 for q in self._quantities]
            return Booked(CONNECTION, "", connection.identity, connection.window_ms, tuple(amounts))
        return Booked(str(fate), reason)


def _attributed(booked: Booked, explanation: Explanation) -> Booked:
    """The fate once attribution has spoken."""
    result = explanation.result
    if not isinstance(result, Unattributed):
        return booked._replace(fate=str(RowFate.COUNTED)) if booked.fate == CONNECTION else booked
    if booked.fate == CONNECTION:
        return booked._replace(reason="waits_for_users")
    if result.skip:
        return Booked(str(RowFate.SKIPPED), str(result.reason), booked.identity)
    return booked._replace(fate=HELD, reason=str(result.reason))
