"""What was sent against what was delivered, to the unit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from proxy_usage.demo.arrived import Arrived
from proxy_usage.demo.checks import METERS
from proxy_usage.demo.truth import Count, Exchange, Truth

REQUESTS, INGRESS, EGRESS, SECONDS = METERS


@dataclass(slots=True)
class Spent:
    """Open time of a tenant's requests as Envoy's own log file has it, in floored milliseconds."""

    rows: int = 0
    ms: int = 0
    routes: set[str] = field(default_factory=set)

    def allows(self, seconds: int) -> bool:
        """Whether ``seconds`` may be the sum of exact times, billed in whole seconds per route.

        Each row lasted less than 1 ms longer than logged; each route keeps back less than a second.
        """
        if not self.rows:
            return seconds == 0
        return self.ms - 1000 * len(self.routes) < 1000 * seconds < self.ms + self.rows


class AccessLog:
    """Follows the file that ``EnvoyOptions.access_log`` names.

    Requests of ``guest`` are somebody else's, so that Envoy's file is their only count: it goes to ``truth``.
    """

    def __init__(self, path: Path, truth: Truth, guest: str = "") -> None:
        self._path = path
        self._truth = truth
        self._guest = guest
        self._offset = 0
        self.spent: dict[str, Spent] = {}

    def follow(self) -> None:
        """Takes the lines that were written since the last call; a line without its end waits."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as log:
            log.seek(self._offset)
            while (line := log.readline()).endswith(b"\n"):
                self._offset += len(line)
                row = json.loads(line)
                if row["route"]:
                    self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        spent = self.spent.setdefault(row["project"], Spent())
        spent.rows += 1
        spent.ms += row["duration_ms"]
        spent.routes.add(row["route"])
        if row["project"] == self._guest:
            sizes = (row["wire_in"], row["wire_out"], row["body_in"], row["body_out"])
            self._truth.add(self._guest, row["route"], Exchange(row["status"], *sizes))


@dataclass(frozen=True, slots=True)
class Line:
    """One tenant: what its clients counted, and what the billing endpoint was told."""

    tenant: str
    sent: Count
    spent: Spent
    requests: int
    ingress: int
    egress: int
    seconds: int

    @property
    def equal(self) -> bool:
        """Whether requests and bytes agree to the unit and the seconds are possible."""
        sent = (self.sent.requests, self.sent.wire_in, self.sent.wire_out)
        return sent == (self.requests, self.ingress, self.egress) and self.spent.allows(self.seconds)

    def verdict(self, *, final: bool = False) -> str:
        """One word or three; ``final``: nothing is on its way any more."""
        if self.equal:
            return "equal"
        if not final:
            return "on its way"
        more = (
            self.requests > self.sent.requests
            or self.ingress > self.sent.wire_in
            or self.egress > self.sent.wire_out
            or (not self.spent.allows(self.seconds) and 1000 * self.seconds > self.spent.ms)
        )
        return "differs" if more else "short"


def lines(truth: Truth, sums: Mapping[tuple[str, str], int], spent: Mapping[str, Spent]) -> list[Line]:
    """One line per tenant that sent anything or was billed for anything."""
    counts = truth.tenants()
    named = sorted({*counts, *(tenant for tenant, _ in sums)})
    return [
        Line(
            tenant,
            counts.get(tenant, Count()),
            spent.get(tenant, Spent()),
            *(sums.get((tenant, meter), 0) for meter in METERS),
        )
        for tenant in named
    ]


def differences(truth: Truth, arrived: Arrived, spent: Mapping[str, Spent]) -> list[str]:
    """Everything that is not as it should be, one sentence each; empty when the bill is right.

    Requests and bytes are compared per tenant and route, so that two errors cannot cancel out.
    """
    wrong = []
    delivered = arrived.by_route()
    expected = {
        (*key, meter): amount
        for key, count in truth.by_route().items()
        for meter, amount in ((REQUESTS, count.requests), (INGRESS, count.wire_in), (EGRESS, count.wire_out))
    }
    for key in sorted({*expected, *(key for key in delivered if key[2] != SECONDS)}):
        if (sent := expected.get(key, 0)) != (got := delivered.get(key, 0)):
            tenant, route, meter = key
            wrong.append(f"{tenant}, route {route}, {meter.rpartition('/')[2]}: sent {sent}, delivered {got}")
    wrong += [
        f"{line.tenant}: Envoy logged {line.spent.ms} ms, delivered {line.seconds} s"
        for line in lines(truth, arrived.sums(), spent)
        if not line.spent.allows(line.seconds)
    ]
    wrong += [f"event {id_}: {what}: {detail}" for id_, what, detail in arrived.violations]
    return wrong


def table(shown: Iterable[Line], title: str, *, final: bool = False) -> Table:
    """Sent / delivered per tenant; ``final``: nothing is on its way any more."""
    caption = (
        "seconds sent are Envoy's log file's, which drops what is below a millisecond of each request;\n"
        "they are billed whole: what is left over is carried to the route's next event"
    )
    drawn = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    drawn.add_column("tenant")
    for name in ("requests", "bytes in", "bytes out", "seconds"):
        drawn.add_column(name, justify="right")
    drawn.add_column("")
    for line in shown:
        drawn.add_row(
            line.tenant,
            f"{line.sent.requests:,} / {line.requests:,}",
            f"{line.sent.wire_in:,} / {line.ingress:,}",
            f"{line.sent.wire_out:,} / {line.egress:,}",
            f"{line.spent.ms // 1000:,} / {line.seconds:,}",
            f"[{'green' if line.equal else 'yellow'}]{line.verdict(final=final)}[/]",
        )
    return drawn


def plain(line: Line) -> str:
    """The same as one line of text."""
    return (
        f"{line.tenant}: sent/delivered requests {line.sent.requests}/{line.requests}, "
        f"bytes in {line.sent.wire_in}/{line.ingress}, bytes out {line.sent.wire_out}/{line.egress}, "
        f"seconds {line.spent.ms // 1000}/{line.seconds}: {line.verdict()}"
    )
