"""Decode and fold alone, without a network: µs an entry of both folds, bytes a row, and what draining costs.

    python bench/fold.py [TENANTS ...]

Messages of 16 KiB with 26 HTTP entries of Envoy's full schema, as synthetic as they are seeded. Before it is
timed every tenant was seen once; then tenants come at random, which is the worst case for caches. The folds
take turns within a round; figures are medians of five rounds of CPU time, with the lowest and the highest.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

from proxy_usage.config import load_text
from proxy_usage.decode import EnvoySettings, Fold, new_fold, parts
from proxy_usage.decode.choice import Choice, choose
from proxy_usage.decode.compiled import CompiledFold
from proxy_usage.model import FoldPlan, Origin
from proxy_usage.service.collector import settle

ROUNDS = 5
MESSAGES = 400
ENTRIES = 26
NOW_MS = 1_795_300_000_000
ORIGIN = Origin("", "gateway-1", "http", ("region-1",))
CONFIG = """
outputs: [{name: none, format: none}]
tenant: {rules: [{custom_tag: project_name}]}
dimensions:
  region: {node: locality.region}
  gateway: {custom_tag: gateway}
  httproute_name: {route_name: "^httproute/[^/]+/(?P<value>[^/]+)"}
"""
NAME = "project-%07d"


def entry(dice: random.Random) -> accesslog_pb2.HTTPAccessLogEntry:
    """An entry as Envoy writes it, of some 640 bytes."""
    row = accesslog_pb2.HTTPAccessLogEntry()
    common = row.common_properties
    for address in (
        common.downstream_remote_address,
        common.downstream_local_address,
        common.upstream_remote_address,
        common.upstream_local_address,
        common.downstream_direct_remote_address,
    ):
        address.socket_address.address = f"10.{dice.randrange(256)}.{dice.randrange(256)}.7"
        address.socket_address.port_value = dice.randrange(1024, 65536)
    common.start_time.seconds, common.start_time.nanos = NOW_MS // 1000 - 2, dice.randrange(10**9)
    for span in (
        common.time_to_last_rx_byte,
        common.time_to_first_upstream_tx_byte,
        common.time_to_last_upstream_tx_byte,
        common.time_to_first_upstream_rx_byte,
        common.time_to_last_upstream_rx_byte,
        common.time_to_first_downstream_tx_byte,
        common.time_to_last_downstream_tx_byte,
        common.duration,
    ):
        span.nanos = dice.randrange(1, 10**9)
    common.upstream_cluster = "httproute/ns-1/web/rule/0"
    common.route_name = f"httproute/ns-1/web-{dice.randrange(4)}/rule/0/match/0/example"
    common.custom_tags["gateway"] = "gateway-1"
    common.custom_tags["gateway_class"] = "public"
    common.custom_tags["project_name"] = NAME % 0
    common.stream_id = f"{dice.getrandbits(128):032x}"
    common.downstream_wire_bytes_received = dice.randrange(200, 5_000)
    common.downstream_wire_bytes_sent = dice.randrange(200, 500_000)
    common.upstream_wire_bytes_sent, common.upstream_wire_bytes_received = 900, 90_000
    common.access_log_type = 6
    if dice.random() < 1 / 3:
        common.metadata.filter_metadata["envoy.filters.http.jwt_authn"].update({"sub": "someone", "n": 7})
    row.protocol_version = accesslog_pb2.HTTPAccessLogEntry.HTTP11
    row.request.request_method = base_pb2.GET
    row.request.scheme, row.request.authority = "https", "www.example.org"
    row.request.path = f"/v1/things/{dice.randrange(10**6)}?page={dice.randrange(100)}"
    row.request.user_agent = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36"
    row.request.request_id = f"{dice.getrandbits(128):032x}"
    row.request.request_headers_bytes = 321
    row.response.response_code.value = 200
    row.response.response_body_bytes, row.response.response_headers_bytes = 12_345, 234
    row.response.response_code_details = "via_upstream"
    return row


class Load:
    """Messages whose entries get the tenants that are wanted, in place."""

    def __init__(self) -> None:
        dice = random.Random(7)
        self._raw: list[bytearray] = []
        self._at: list[list[int]] = []
        name = (NAME % 0).encode()
        for _ in range(MESSAGES):
            whole = als_pb2.StreamAccessLogsMessage()
            whole.http_logs.log_entry.extend(entry(dice) for _ in range(ENTRIES))
            raw = bytearray(whole.SerializeToString())
            places, at = [], raw.find(name)
            while at >= 0:
                places.append(at)
                at = raw.find(name, at + 1)
            assert len(places) == ENTRIES
            self._raw.append(raw)
            self._at.append(places)
        self.size = statistics.mean(map(len, self._raw))

    def of(self, tenants: Iterator[int]) -> list[bytes]:
        """The messages, with the next tenants in them."""
        for raw, places in zip(self._raw, self._at, strict=True):
            for at in places:
                name = (NAME % next(tenants)).encode()
                raw[at : at + len(name)] = name
        return [bytes(raw) for raw in self._raw]


def fold_messages(fold: Fold, messages: list[bytes]) -> float:
    """CPU seconds an entry."""
    begun = time.process_time_ns()
    for raw in messages:
        for part in parts(raw):
            fold.entries(ORIGIN, part, NOW_MS)
    return (time.process_time_ns() - begun) / 1e9 / (len(messages) * ENTRIES)


def drain(fold: Fold) -> tuple[float, float, int]:
    """CPU seconds a row, the longest wall time of one piece, and rows."""
    rows, longest, begun = 0, 0, time.process_time_ns()
    last = time.perf_counter_ns()
    for piece in fold.drains():
        rows += len(piece.totals)
        now = time.perf_counter_ns()
        longest, last = max(longest, now - last), now
    return (time.process_time_ns() - begun) / 1e9 / rows, longest / 1e9, rows


def measure(load: Load, plan: FoldPlan, tenants: int) -> None:
    """One line of the table."""
    choices = {"compiled": choose({}), "protobuf": Choice(None, "")}
    folds = {
        name: new_fold(
            plan,
            accepts=lambda _rule, _text: True,
            envoy=EnvoySettings(),
            identity_limit=1 << 30,
            plain={0},
            choice=choice,
        )
        for name, choice in choices.items()
    }
    dice = random.Random(tenants)
    seen = 0
    while seen < tenants:
        messages = load.of(iter(range(seen, seen + MESSAGES * ENTRIES)))
        seen += MESSAGES * ENTRIES
        for fold in folds.values():
            fold_messages(fold, messages)
    times: dict[str, list[float]] = {name: [] for name in folds}
    for _ in range(ROUNDS):
        messages = load.of(iter(lambda: dice.randrange(tenants), -1))
        for name, fold in folds.items():
            times[name].append(fold_messages(fold, messages))
    compiled = folds["compiled"]
    assert isinstance(compiled, CompiledFold), choices["compiled"].reason
    bytes_a_row = compiled.allocated_bytes / compiled.rows
    columns = [f"{tenants:>9}"]
    for values in times.values():
        middle, low, high = (f(values) * 1e6 for f in (statistics.median, min, max))
        columns.append(f"{middle:>6.3f} ({low:.3f} to {high:.3f})")
    ratio = statistics.median(times["protobuf"]) / statistics.median(times["compiled"])
    columns.append(f"{ratio:>5.1f}")
    columns.append(f"{bytes_a_row:>6.0f}")
    for fold in folds.values():
        cost, longest, _ = drain(fold)
        columns.append(f"{cost * 1e6:>5.2f} {longest * 1e3:>6.2f}")
    print(" | ".join(columns), flush=True)


def main() -> None:
    settle()  # as the service does: full collections are apart
    load = Load()
    plan = load_text(CONFIG, origin="bench", base=Path(), env={}).fold_plan()
    print(f"{MESSAGES} messages of {load.size:,.0f} bytes, {ENTRIES} entries each; µs of CPU an entry")
    print("  tenants | compiled | protobuf | ratio | bytes a row | drain: µs a row, longest piece ms (each)")
    for tenants in [int(text) for text in sys.argv[1:]] or [10, 1_000, 100_000, 1_000_000]:
        measure(load, plan, tenants)


if __name__ == "__main__":
    main()
