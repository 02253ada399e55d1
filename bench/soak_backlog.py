"""How a start fares with a large backlog: time until it is ready, and its resident memory.

    python bench/soak_backlog.py [EVENTS]      # 5,000,000 unless said otherwise; about 4 GiB of disk

Builds a store of pending events as turns leave them, then starts the program on it, with an endpoint that
does not answer, and asks /readyz until it says yes. The bounds: 5 s, 200 MiB. Then memory once more, after
20 s of failing deliveries and housekeeping.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from proxy_usage.config import load_text
from proxy_usage.model import Cell, Key
from proxy_usage.service.build import build_mint, open_storage
from proxy_usage.turn import Turn
from proxy_usage.windows import WindowTurn

EVENTS = 5_000_000
KEYS = 10_000
AT_ONCE = 100_000
SETTLE_S = 20

CONFIG = """
listen: {{grpc: 127.0.0.1:{grpc}, http: 127.0.0.1:{http}}}
store: {{path: {store}, max_bytes: 16GiB}}
outputs: [{{name: billing, url: "http://127.0.0.1:{nobody}/v1/usage/events:batchIngest"}}]
"""


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else EVENTS
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        grpc, http, nobody = ports(3)
        text = CONFIG.format(store=place / "usage.db", grpc=grpc, http=http, nobody=nobody)
        (place / "proxy-usage.yaml").write_text(text)
        started = time.monotonic()
        build(text, place, count)
        size = sum(path.stat().st_size for path in place.glob("usage.db*"))
        print(f"{count} events, {size >> 20} MiB, built in {time.monotonic() - started:.0f} s")
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "proxy_usage", "run", "--config", str(place / "proxy-usage.yaml")],
            stdout=(place / "log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        try:
            while not ready(http):
                if process.poll() is not None or time.monotonic() - started > 120:
                    sys.exit(f"not ready: {(place / 'log').read_text()[-2_000:]}")
                time.sleep(0.02)
            print(f"ready after {time.monotonic() - started:.2f} s, {resident(process.pid)} MiB")
            time.sleep(SETTLE_S)
            print(f"after {SETTLE_S} s: {resident(process.pid)} MiB")
        finally:
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            process.wait(60)
            print(f"stopped in {time.monotonic() - started:.1f} s, exit code {process.returncode}")


def build(text: str, place: Path, count: int) -> None:
    """A store with so many pending events. The first is made as always, the rest after its image."""
    config = load_text(text, origin="bench", base=place, env={})
    storage = open_storage(config)
    mint = build_mint(config)
    now_ms = time.time_ns() // 1_000_000
    window_ms = now_ms - now_ms % 60_000
    dimensions = ("",) * len(config.dimensions)
    cells = tuple(
        Cell(number, window_ms, Key(f"tenant-{number}", dimensions), 1, (1, 0, 0, 0))
        for number in range(1, KEYS + 1)
    )
    storage.checkpoints.commit(Turn(WindowTurn(cells), (KEYS, 0, 0, 0), 1), mint, now_ms)
    db = storage.database.db
    body = db.execute("SELECT body FROM events LIMIT 1").fetchone()[0]
    (output,) = db.execute("SELECT output FROM deliveries LIMIT 1").fetchone()
    db.execute("PRAGMA synchronous=OFF")
    for first in range(KEYS + 1, count + 1, AT_ONCE):
        last = min(count, first + AT_ONCE - 1)
        db.execute("BEGIN")
        db.executemany(
            "INSERT INTO events(seq,id,key,meter,window_ms,value,minted_ms,outputs,given,body)"
            " VALUES(?,?,?,'requests',?,1,?,1,1,?)",
            rows(body, first, last, window_ms, now_ms),
        )
        db.executemany(
            "INSERT INTO deliveries(output, seq) VALUES(?,?)",
            ((output, seq) for seq in range(first, last + 1)),
        )
        db.execute("COMMIT")
    db.execute("UPDATE tallies SET events=?1, value=?2 WHERE meter='requests'", (count, str(count)))
    db.execute("UPDATE counters SET value=? WHERE name='counted' AND label='requests'", (str(count),))
    storage.close()


def rows(body: bytes, first: int, last: int, window_ms: int, now_ms: int) -> Iterator[tuple[object, ...]]:
    event = json.loads(body)
    for seq in range(first, last + 1):
        key = seq % KEYS + 1
        event |= {"id": f"01JCZZ{seq:020d}", "subject": f"projects/tenant-{key}"}
        yield seq, event["id"], key, window_ms + seq // KEYS % 60 * 60_000, now_ms, json.dumps(event).encode()


def ports(count: int) -> list[int]:
    """Ports that nobody uses."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return found


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def resident(pid: int) -> int:
    """Resident memory in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


if __name__ == "__main__":
    main()
