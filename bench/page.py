"""What a refresh of the operator's page costs with many tenants and a week behind it.

    python bench/page.py [TENANTS]

Makes a store of 10,000 tenants with a ledger line, a waiting event and 168 hourly sums each, then looks as
the service does: into the store, and from there to the JSON document with the tenants that use most. Prints
the median of 30 in milliseconds, of the clock and of the processor, and the most. The bound is 100 ms.
"""

import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from proxy_usage.model import Cell, Key
from proxy_usage.page.document import document
from proxy_usage.page.ring import LEVELS, POINTS, RATES, STEP_MS, Ring
from proxy_usage.page.snapshot import (
    NodeFigures,
    Snapshot,
    StoreFigures,
    TenantFigures,
    TopFigures,
    WeekFigures,
)
from proxy_usage.page.tops import Tops
from proxy_usage.store import Database
from proxy_usage.store.glance import glance
from proxy_usage.store.week import HOUR_MS, HOURS, add_hours

METERS = ("requests", "ingress_bytes", "egress_bytes", "connection_seconds")
NOW = 1_800_000_000_000
ROUNDS = 30


def fill(db: sqlite3.Connection, tenants: int) -> None:
    """A week of usage, as the tables hold it."""
    keys = range(1, tenants + 1)
    db.execute("BEGIN")
    db.execute("INSERT INTO outputs(name, added_ms) VALUES('billing', 0)")
    db.executemany(
        "INSERT INTO keys VALUES(?,?,?,'{}','{}',0)", [(k, k.to_bytes(8, "big"), f"t-{k}") for k in keys]
    )
    db.executemany(
        "INSERT INTO ledger(output,fate,key,meter,window_ms,value,at_ms,answer,id)"
        " VALUES(1,'delivered',?,'requests',?,1,?,200,?)",
        [(k, NOW, NOW, f"id-{k}") for k in keys],
    )
    db.executemany(
        "INSERT INTO events(id,key,meter,window_ms,value,minted_ms,outputs,body)"
        " VALUES(?,?,'requests',?,1,?,1,zeroblob(700))",
        [(f"e-{k}", k, NOW, NOW) for k in keys],
    )
    db.executemany("INSERT INTO deliveries VALUES(1,?,NULL,NULL)", [(k,) for k in keys])
    for hour in range(HOURS):
        at = NOW - NOW % HOUR_MS - hour * HOUR_MS
        db.executemany(
            "INSERT INTO sums VALUES(?,1,'delivered',?,'requests',60,'60')", [(at, k) for k in keys]
        )
        add_hours(db, {(at, meter): (60 * tenants, 600 * tenants) for meter in METERS}, NOW)
    db.execute("COMMIT")


def show(path: Path, tops: Tops, ring: Ring) -> int:
    """One refresh. Returns the bytes of the document."""
    found = glance(path, NOW)
    first = []
    for index, meter in enumerate(METERS):
        top = tops.top(index, NOW)
        first.append(TopFigures(meter, "By", top.first, top.rest, top.tenants))
    week = WeekFigures(found.week.end_ms, found.week.events, found.week.values, {})
    snapshot = Snapshot(
        now_ms=NOW,
        started_ms=NOW,
        version="bench",
        host="bench",
        config_file="bench.yaml",
        settings=(),
        reasons={},
        store=StoreFigures(str(path)),
        figures_ms=NOW,
        nodes=tuple(NodeFigures(f"envoy-{number}", number, number) for number in range(1_000)),
        dead=found.dead,
        held=found.held,
        tenants=TenantFigures(NOW, tuple(first)),
        history=ring.history(),
        week=week,
    )
    return len(msgspec.json.encode(document(snapshot, tenants=True)))


def main() -> None:
    tenants = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    tops, ring = Tops(len(METERS)), Ring()
    for hour in (NOW - HOUR_MS, NOW):
        tops.add((Cell(1, hour, Key(f"t-{k}", ()), 1, (k, k, k, k)) for k in range(tenants)), hour)
    for point in range(POINTS):
        ring.add(NOW + point * STEP_MS, dict.fromkeys(RATES, point * 1_000), dict.fromkeys(LEVELS, point))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "usage.db"
        database = Database(path)
        fill(database.db, tenants)
        times, spent = [], []
        for _ in range(ROUNDS):
            started, worked = time.perf_counter_ns(), time.process_time_ns()
            size = show(path, tops, ring)
            times.append((time.perf_counter_ns() - started) / 1e6)
            spent.append((time.process_time_ns() - worked) / 1e6)
        stored = path.stat().st_size
        database.close()
    heads = f"{'tenants':>8} {'store MiB':>10} {'document KiB':>13}"
    print(f"{heads} {'median ms':>10} {'cpu ms':>7} {'most ms':>8}")
    columns = f"{statistics.median(times):>10.1f} {statistics.median(spent):>7.1f} {max(times):>8.1f}"
    print(f"{tenants:>8} {stored >> 20:>10} {size >> 10:>13} {columns}")


if __name__ == "__main__":
    main()
