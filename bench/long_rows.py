"""How long rows of open streams hold the event loop, from the wire to the window.

    python bench/long_rows.py [STREAMS]      # 200,000 unless said otherwise

Messages of 600 periodic rows, each of a stream of its own and of 1,000 keys, go through decode, attribution,
streams and windows piece by piece, as the receiver takes them. Prints the processor time of a piece (what the
loop is held for at a time) and of a row. Exits with 1 when one piece in a thousand takes more than 5 ms.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

from proxy_usage.config import load_text
from proxy_usage.decode import parts
from proxy_usage.model import Origin
from proxy_usage.pipeline import Port
from proxy_usage.service.build import build_pipeline, open_storage

ROWS = 600
ROUNDS = 3
LIMIT_NS = 5_000_000
CONFIG = """
envoy: {{flush_interval: 60s}}
store: {{path: {store}}}
outputs: [{{name: none, format: none}}]
"""


def messages(streams: int, minute: int, now_ns: int) -> Iterator[bytes]:
    """A periodic row of each stream."""
    for first in range(0, streams, ROWS):
        whole = als_pb2.StreamAccessLogsMessage()
        for number in range(first, min(streams, first + ROWS)):
            row: accesslog_pb2.HTTPAccessLogEntry = whole.http_logs.log_entry.add()
            common = row.common_properties
            common.access_log_type = 5
            start_ns = now_ns - minute * 60_000_000_000
            common.start_time.seconds, common.start_time.nanos = divmod(start_ns, 1_000_000_000)
            common.downstream_wire_bytes_received = common.downstream_wire_bytes_sent = minute * 1_000
            common.custom_tags["project_name"] = f"project-{number % 1_000}"
            common.custom_tags["conn_id"] = str(number)
            common.custom_tags["dur_ms"] = str(minute * 60_000)
            common.custom_tags["emit_us"] = str(now_ns // 1_000)
            common.stream_id = f"stream-{number}"
            common.route_name = "httproute/ns-a/web/rule/0/match/0/a.example.com"
        yield whole.SerializeToString()


def main() -> None:
    streams = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    with tempfile.TemporaryDirectory() as directory:
        text = CONFIG.format(store=Path(directory) / "usage.db")
        config = load_text(text, origin="bench", base=Path(directory), env={})
        storage = open_storage(config)
        pipeline = build_pipeline(config, storage)
        origin = Origin("", "envoy-1", "http", ("",) * len(config.fold_plan().node_paths))
        pieces: list[int] = []
        now_ns = time.time_ns()
        for minute in range(1, ROUNDS + 1):
            for raw in messages(streams, minute, now_ns):
                for part in parts(raw):
                    started = time.thread_time_ns()
                    pipeline.take(Port.ALL, origin, part, now_ns // 1_000_000)
                    pieces.append(time.thread_time_ns() - started)
        storage.close()
    pieces.sort()
    median, p999, most = (pieces[int((len(pieces) - 1) * part)] for part in (0.5, 0.999, 1))
    print(f"{streams} streams, {ROUNDS} rows each, {len(pieces)} pieces")
    print(f"a piece: median {median / 1e6:.2f} ms, 99.9 % {p999 / 1e6:.2f} ms, most {most / 1e6:.2f} ms")
    print(f"a row: {sum(pieces) / streams / ROUNDS / 1_000:.1f} µs")
    if p999 > LIMIT_NS:
        sys.exit("a piece held the event loop for more than 5 ms")


if __name__ == "__main__":
    main()
