"""The four counts of a performance side by side: clients', Envoy's, the sink's and the endpoint's.

    clients ── Envoy written ── flushed ── received ── counted ── delivered
                      └ dropped     └ missing   └ crash_lost, skipped

What is missing is the audit's own figure, what is skipped the store's: whether the chain closes is for
arithmetic to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Account:
    """Requests, as each party has counted them."""

    clients: int
    """Sent and answered, those without a route too."""
    strays: int
    """Of these, for a host that nobody owns: skipped, and billed to nobody."""
    envoy: Mapping[str, Any]
    """What the audit says of the Envoy (``/api/audit``); empty where it says nothing."""
    fates: Mapping[str, Mapping[str, int]]
    """What became of all rows that the sink read, by fate and reason, those of connections too."""
    delivered: int
    """Billed, at the endpoint."""

    def _of(self, *names: str) -> int:
        return sum(int(self.envoy.get(name) or 0) for name in names)

    @property
    def written(self) -> int:
        """Rows that Envoy had to log: those it had no room for are Envoy's own count, too."""
        return self._of("written", "dropped")

    @property
    def received(self) -> int:
        """Rows of requests that the sink read."""
        return self._of("written") - self._of("missing_http")

    @property
    def counted(self) -> int:
        """Rows that are to be billed: all that arrived, less what a crash lost and what is skipped."""
        other = sum(sum(reasons.values()) for fate, reasons in self.fates.items() if fate != "counted")
        return self._of("received") - self._of("crash_lost") - other

    @property
    def skipped(self) -> int:
        return sum(rows for reason, rows in self.fates.get("skipped", {}).items() if reason != "listener")

    @property
    def lost(self) -> int:
        """What the audit says that nobody can be billed for, rows of connections too."""
        return self._of("dropped", "missing", "crash_lost")

    @property
    def lost_requests(self) -> int:
        """The same of requests alone."""
        return self._of("dropped", "missing_http", "crash_lost")

    def conclusion(self, events: int) -> str:
        """What it came to, where nothing differs: ``events`` are those at the endpoint."""
        if self.lost:
            return (
                f"accounted for: {self.delivered:,} of {self.clients:,} requests billed, "
                f"{self.skipped:,} skipped, {self.lost_requests:,} lost on the way"
            )
        nobodys = f"; {self.strays:,} more were for a host that nobody owns, so nobody is billed"
        billed = self.clients - self.strays
        return f"equal: {billed:,} requests are {events:,} events" + (nobodys if self.strays else "")

    @property
    def decided(self) -> bool:
        """Whether the audit has seen it all and leaves nothing open."""
        open_ends = self._of("unknown", "under_way")
        return self.written == self.clients and open_ends == 0 and bool(self.envoy)

    @property
    def whole(self) -> bool:
        """Whether it is decided, and none of the rows waits in Envoy or came after the audit's last look.

        Envoy has written what it still keeps, for a sink that is away: nothing moves then either.
        """
        rows = sum(sum(reasons.values()) for reasons in self.fates.values())
        of_requests = rows - self.fates.get("skipped", {}).get("listener", 0)
        seen = rows == self._of("received") - self._of("crash_lost")
        return self.decided and seen and of_requests + self.lost_requests >= self.clients

    def differences(self) -> list[str]:
        """Where the chain does not close, a sentence each."""
        wrong = []
        if not self.decided:
            wrong.append(
                f"clients counted {self.clients} requests, Envoy {self.written}; "
                f"the audit says {self.envoy.get('state', 'nothing')}"
            )
        if self.delivered != self.counted:
            wrong.append(f"{self.counted} requests were to be billed, {self.delivered} were")
        return wrong

    def table(self) -> Table:
        """One line a party."""
        drawn = Table(title="the same requests, counted by each", title_justify="left")
        drawn.add_column("who")
        drawn.add_column("requests", justify="right")
        drawn.add_column("")
        crashed = self._of("crash_lost")
        for who, count, note in (
            ("clients", self.clients, f"of these {self.strays} for a host that nobody owns"),
            ("Envoy", self.written, f"of these {self._of('dropped')} dropped in its buffer"),
            ("sink", self.received, f"{self._of('missing')} missing on the way"),
            (
                "delivered",
                self.delivered,
                f"{crashed} lost in a crash, {self.skipped} skipped",
            ),
            ("audit", self.counted, str(self.envoy.get("state", "nothing"))),
        ):
            drawn.add_row(who, f"{count:,}", note)
        return drawn
