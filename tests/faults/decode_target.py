"""What a sender's bytes meet in the process, without sockets and store, and what must always hold.

Both folds are given each message, under plans of every kind: what one drains to the other must, too.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from plans import KINDS, ORIGINS, fold_of
from wire import CAPTURES, captured

from proxy_usage.config import Config
from proxy_usage.decode import parts, read_identifier, slices, split
from proxy_usage.errors import DecodeError
from proxy_usage.model import Origin
from proxy_usage.pipeline import Pipeline, Port
from proxy_usage.recording import varint
from proxy_usage.service.build import (
    build_attributor,
    build_connections,
    build_folds,
    build_streams,
    build_windows,
)

MAX_LEN = 1 << 14
NOW_MS = 1_795_300_000_000
SETTINGS = {
    "envoy": {"flush_interval": 60_000},
    "tenant": {
        "rules": [
            {"custom_tag": "project_name"},
            {"dynamic_metadata": {"filter": "datum", "path": ["project", "name"]}},
            {"request_header": "x-project", "trusted": True},
            {"route_name": "^httproute/(?P<tenant>[^/]+)/"},
            {"authority": True, "pattern": "^([a-z]+)\\."},
            {"sni": True},
            {"node": "metadata.project"},
        ],
        "unattributed": {"max_identities": 50},
        "no_route": "hold",
    },
    "meters": {
        "requests": {},
        "ingress_bytes": {},
        "egress_bytes": {"bytes": "body"},
        "connection_seconds": {"count": "connections"},
    },
    "skip": [{"if": {"flag": "NR", "status": [404]}, "reason": "no_route_found"}],
    "windows": {"max_keys": 50},
    "streams": {"max": 50},
    "outputs": [{"name": "ledger", "format": "none"}],
}
"""Every source, every meter and every bound, small enough to be reached."""


class Target:
    """The pipeline without a store: what a message's bytes meet in the process."""

    def __init__(self) -> None:
        config = Config.model_validate(SETTINGS)
        self.plan = config.fold_plan()
        attributor = build_attributor(config)
        self.rows = self.fated = self.messages = 0
        self.pipeline = Pipeline(
            build_folds(config, attributor),
            attributor,
            build_windows(config),
            quantities=self.plan.quantities,
            counts=dict,
            max_held=50,
            streams=build_streams(config),
            connections=build_connections(config),
        )
        self.amounts = [0] * len(self.plan.quantities)
        self.pairs = [fold_of(kind) for kind in KINDS]

    def message(self, raw: bytes) -> None:
        """What the receiver does with a message, and some more. AssertionError when something is lost."""
        self.messages += 1
        try:
            origin = read_identifier(raw, "peer", self.plan.node_paths)
        except DecodeError:
            origin = None
        origin = origin or Origin("peer", "", "", ("",) * len(self.plan.node_paths))
        for part in parts(raw):
            self.rows += len(part.entries)
            self.pipeline.take(Port.ALL, origin, part, NOW_MS + self.messages)
        whole, pieces = split(raw), list(slices(raw, 16))
        assert sorted(whole.entries) == sorted(entry for piece in pieces for entry in piece.entries)
        assert whole.http == sum(piece.http for piece in pieces)
        pair = self.pairs[self.messages % len(self.pairs)]
        pair.message(ORIGINS[self.messages % len(ORIGINS)], raw, NOW_MS + self.messages)
        if pair.full or self.messages % 16 < len(self.pairs):
            pair.drain()
        self._turn()

    def _turn(self) -> None:
        """A turn that takes effect: each row has a fate, each amount is in a window or held."""
        windows = self.pipeline.windows
        at_ms = NOW_MS + self.messages
        turn = self.pipeline.begin(at_ms, limit=1_000, everything=self.messages % 64 == 0)
        self.pipeline.commit(turn)
        self.fated += sum(turn.fates.values())
        assert self.fated == self.rows, (self.fated, self.rows, turn.fates)
        closed = [
            sum(column) for column in zip(*(cell.amounts for cell in turn.windows.closing), strict=True)
        ]
        held = [sum(column) for column in zip(*(one.amounts for one in turn.held), strict=True)]
        after = windows.open_amounts() or (0,) * len(self.amounts)
        zeros = [0] * len(self.amounts)
        self.amounts = [
            total + counted - put - kept
            for total, counted, put, kept in zip(
                self.amounts, turn.counted, closed or zeros, held or zeros, strict=True
            )
        ]
        assert self.amounts == list(after), (self.amounts, after)
        self.pipeline.observe()


def seeds() -> dict[str, bytes]:
    """Messages of real Envoys, the shorter ones, by a name."""
    return {
        f"{capture.stem}-{number}": raw
        for capture in sorted(CAPTURES.glob("*.binpb"))
        for number, (_, raw) in enumerate(captured(capture.stem))
        if len(raw) <= MAX_LEN
    }


def mutate_row(raw: bytes, mutate: Callable[[bytes], bytes], dice: random.Random) -> bytes:
    """Changes one row of a message and leaves the lengths around it right, so that the change is read."""
    whole = split(raw)
    if not whole.entries:
        return mutate(raw)
    at = dice.randrange(len(whole.entries))
    entries = list(whole.entries)
    entries[at] = mutate(entries[at])
    message = b""
    for field, rows in ((b"\x12", entries[: whole.http]), (b"\x1a", entries[whole.http :])):
        body = b"".join(b"\x0a" + varint(len(row)) + row for row in rows)
        message += field + varint(len(body)) + body if rows else b""
    return message


def scramble(raw: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, taken out, doubled or put in."""
    changed = bytearray(raw or b"\0")
    for _ in range(dice.randrange(1, 8)):
        at, size = dice.randrange(len(changed) + 1), dice.randrange(1, 9)
        match dice.randrange(4):
            case 0:
                changed[at : at + size] = dice.randbytes(size)
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = changed[at : at + size]
            case _:
                changed[at:at] = dice.choice((b"\xff" * size, b"\0" * size, varint(dice.getrandbits(64))))
        changed = changed or bytearray(1)
    return bytes(changed[:MAX_LEN])
