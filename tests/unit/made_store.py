"""A store as a service leaves it, made through the service's own parts."""

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from proxy_usage.events import Mint
from proxy_usage.intake import HTTP, TCP, Source
from proxy_usage.model import Identity, Key, Meter, Origin, Quantity
from proxy_usage.store import Batch, Checkpoints, Database, Fate, Held, Idle, Layout, OutputSlot, Queue, Turn
from proxy_usage.windows import Windows

MINUTE = 60_000
START = 1_800_000_000_000 - 1_800_000_000_000 % 3_600_000
METERS = (
    Meter("requests", "networking.datumapis.com/gateway/requests", "{request}", Quantity.REQUESTS),
    Meter(
        "connection_seconds",
        "networking.datumapis.com/gateway/connection-seconds",
        "s",
        Quantity.OPEN_NS,
        10**9,
    ),
)
DIMENSIONS = ("region",)
SOURCE = "//networking.datumapis.com/gateway"


class MadeStore:
    """Usage in, events out, answers in: each step as the service takes it."""

    def __init__(self, path: Path, outputs: Sequence[str] = ("billing",), *, max_held: int = 100) -> None:
        self.database = Database(path)
        self.queue = Queue(self.database)
        self.checkpoints = Checkpoints(self.database, max_held=max_held)
        self.windows = Windows(
            length_ms=MINUTE,
            grace_ms=0,
            reopen_ms=MINUTE,
            spread_ms=1,
            salt=b"",
            defaults=("",),
            max_keys=10_000,
            max_tenants=10_000,
        )
        self.mint = Mint(METERS, DIMENSIONS, SOURCE, MINUTE)
        self._counted = [0] * len(METERS)
        self._held: list[Held] = []
        self.windows.restore(self.checkpoints.recover().cells)
        self.slots = self.queue.register([OutputSlot(0, name) for name in outputs], START)
        self.checkpoints.begin(Layout.of(METERS, DIMENSIONS), self.slots, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.database.close()

    def use(self, tenant: str, *amounts: int, now_ms: int = START) -> None:
        """A row of a tenant: requests and nanoseconds."""
        self.windows.add(Key(tenant, ("eu",)), START, 1, amounts, now_ms)
        self.count(amounts)

    def hold(self, reason: str, value: bytes, *amounts: int, hour_ms: int = START) -> None:
        """A row of nobody."""
        identity = Identity(Origin("", "node-a", "http"), -1, value, (b"gw",), routed=True)
        self._held.append(Held(hour_ms, reason, identity, 1, amounts))
        self.count(amounts)

    @staticmethod
    def key(number: int) -> Key:
        """A key of its own for each number."""
        return Key(f"tenant-{number}", ("eu",))

    def count(self, amounts: Sequence[int]) -> None:
        """Notes usage as counted."""
        self._counted = [have + more for have, more in zip(self._counted, amounts, strict=True)]

    def turn(self, now_ms: int = START) -> tuple[str, ...]:
        """Makes durable what was used and closes the windows that are due. Gives the ids of new events."""
        windows = self.windows.begin(now_ms)
        turn = Turn(
            windows=windows,
            counted=tuple(self._counted),
            fates={("counted", ""): 3, ("skipped", "upstream"): 1},
            held=tuple(self._held),
            intake={Source("node-a", "http", HTTP): 3, Source("node-a", "conn", TCP): 1},
        )
        events = self.checkpoints.commit(turn, self.mint, now_ms)
        self.windows.commit(windows)
        self._counted, self._held = [0] * len(METERS), []
        return tuple(event.id for event in events)

    def close_windows(self) -> tuple[str, ...]:
        """Turns what is open into events."""
        return self.turn(START + 2 * MINUTE)

    def send(self, events: int = 100, output: int = 0) -> Batch:
        """Marks a batch as attempted."""
        batch = self.queue.lease(
            self.slots[output].output, START + 3 * MINUTE, events=events, max_bytes=1 << 20, linger_ms=0
        )
        assert not isinstance(batch, Idle)
        return batch

    def answer(self, batch: Batch, *fates: Fate) -> None:
        """Settles the first events of a batch; the others stay in it."""
        self.queue.settle(
            batch,
            {event.seq: fate for event, fate in zip(batch.events, fates, strict=False)},
            START + 4 * MINUTE,
        )
