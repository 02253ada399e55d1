"""The service's own parts from a message to the store, on a real file, without sockets.

    with Metering(tmp_path, {"envoy": {"flush_interval": "1s"}}) as metering:
        metering.capture("websocket_periodic")
        metering.settle()
        assert metering.billed() == {"alpha": (1, 7231, 7209, 3_507_172_665), …}

The configuration is the shipped one; what a test changes is laid over it. ``billed`` and ``held`` are read
off the store: events, what is carried to the next, and what is nobody's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import wire
import yaml

from proxy_usage.config import Config
from proxy_usage.config.load import load_text
from proxy_usage.decode import parts, read_identifier
from proxy_usage.model import NS_PER_SECOND, Origin
from proxy_usage.pipeline import Port
from proxy_usage.service.build import build_mint, build_pipeline, open_storage

SHIPPED = Path(__file__).parent.parent / "config" / "proxy-usage.yaml"
CAPTURED_MS = 1_795_303_900_000
"""When the captures were complete; they are minutes old then."""
SETTLED_MS = 40_000
"""What waits for somebody to own it has waited long enough by then, and windows are closed."""

LEFT_OUT = object()
"""In place of a value: the key is not in the configuration."""

Sums = tuple[int, ...]
"""Base units per meter, in the meters' order: requests, bytes in, bytes out, nanoseconds."""


class Metering:
    """One sink, at a moment of the tests' choosing."""

    def __init__(self, path: Path, changes: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.now_ms = CAPTURED_MS
        self.config = configured(path, changes or {})
        self._open()

    def _open(self) -> None:
        self.storage = open_storage(self.config)
        self.pipeline = build_pipeline(self.config, self.storage)
        self.mint = build_mint(self.config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.storage.close()

    def restart(self, changes: Mapping[str, Any] | None = None) -> None:
        """The process is killed and started again, with other changes; what no turn saved is gone."""
        self.storage.close()
        if changes is not None:
            self.config = configured(self.path, changes)
        self._open()

    def take(self, origin: Origin, raw: bytes, port: Port = Port.ALL) -> None:
        """A message, counted and folded as the receiver and the service do it."""
        for part in parts(raw):
            self.storage.intake.add(origin.node_id, len(part.entries), origin.log_name)
            self.pipeline.take(port, origin, part, self.now_ms)

    def turn(self, *, everything: bool = False) -> bool:
        """A turn that is committed. Returns whether there was anything to save."""
        turn = self.pipeline.begin(self.now_ms, everything=everything)
        self.storage.checkpoints.commit(turn, self.mint, self.now_ms)
        self.pipeline.commit(turn)
        return not turn.is_empty

    def messages(
        self,
        messages: Iterable[tuple[int, bytes]],
        *,
        restarts: bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> None:
        """Messages by number of their stream, a turn after each, and a restart if so wished.

        Args:
            first, last: places of the first and the last message that are taken; None: of all.
        """
        origins: dict[int, Origin] = {}
        for place, (stream, raw) in enumerate(messages):
            named = read_identifier(raw, "", self.config.fold_plan().node_paths)
            if named is not None:  # a sink that starts anew numbers its streams from 1 again
                origins[stream] = named
            if place < first or (last is not None and place > last):
                continue
            self.take(origins[stream], raw)
            self.turn()
            if restarts:
                self.restart()

    def capture(self, name: str, **how: Any) -> None:
        """What a real Envoy sent, see ``messages``."""
        self.messages(wire.captured(name), **how)

    def settle(self) -> None:
        """Time passes: whatever waits is settled, every window closed."""
        for _ in range(2):
            self.now_ms += SETTLED_MS
            while self.turn(everything=True):
                pass

    def billed(self) -> dict[str, Sums]:
        """By tenant: the events there are, and what is carried to the next."""
        names = [meter.name for meter in self.config.meter_list()]
        return {tenant: tuple(of[name] for name in names) for tenant, of in self.by_meter().items()}

    def by_meter(self) -> dict[str, Counter[str]]:
        """The same by tenant and meter, with the meters that were configured once."""
        sums: dict[str, Counter[str]] = {}
        db = self.storage.database.db
        for tenant, meter, value in db.execute(
            "SELECT k.tenant, e.meter, e.value FROM events e JOIN keys k ON k.key=e.key"
        ):
            in_ns = meter == "connection_seconds"
            sums.setdefault(tenant, Counter())[meter] += value * NS_PER_SECOND if in_ns else value
        for tenant, remainders in db.execute("SELECT tenant, remainders FROM keys"):
            sums.setdefault(tenant, Counter()).update(json.loads(remainders))
        return dict(sorted(sums.items()))

    def held(self) -> dict[str, Sums]:
        """By reason: what is nobody's."""
        sums: dict[str, Counter[str]] = {}
        for reason, amounts in self.storage.database.db.execute("SELECT reason, amounts FROM held"):
            sums.setdefault(reason, Counter()).update(json.loads(amounts))
        names = [meter.name for meter in self.config.meter_list()]
        return {reason: tuple(of[name] for name in names) for reason, of in sorted(sums.items())}

    def counted(self) -> Sums:
        """All that was ever counted, billed or held or still open."""
        counted = dict(
            self.storage.database.db.execute("SELECT label, value FROM counters WHERE name='counted'")
        )
        return tuple(int(counted.get(meter.name, 0)) for meter in self.config.meter_list())

    def rows(self) -> dict[str, int]:
        """Rows by fate, with its reason behind a stroke if it has one."""
        return {
            label.removesuffix("/"): int(value)
            for label, value in self.storage.database.db.execute(
                "SELECT label, value FROM counters WHERE name='rows' AND value != '0' ORDER BY label"
            )
        }

    def check(self) -> None:
        """All that was counted is somewhere, once; nothing is open any more."""
        assert not len(self.pipeline.windows)
        nothing = (0,) * len(self.config.meters)
        columns = zip(nothing, *self.billed().values(), *self.held().values(), strict=True)
        assert self.counted() == tuple(map(sum, columns))


def configured(path: Path, changes: Mapping[str, Any]) -> Config:
    """The shipped configuration with changes laid over it and the store at ``path``."""
    settings = yaml.safe_load(SHIPPED.read_text())
    laid = _over(settings, {**changes, "store": {"path": str(path / "usage.db")}})
    return load_text(yaml.safe_dump(laid, sort_keys=False), origin="test", base=path, env={})


def _over(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, Mapping):
        laid = below | {key: _over(below.get(key), value) for key, value in above.items()}
        return {key: value for key, value in laid.items() if value is not LEFT_OUT}
    return above
