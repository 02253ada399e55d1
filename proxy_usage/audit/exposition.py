"""Envoy's counters, out of the text that /stats/prometheus answers with.

The names are those of Envoy 1.36 to 1.40; ``tests/e2e/test_audit.py`` finds them at a real one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

from proxy_usage.audit.intake import Count
from proxy_usage.figures import Sent

WANTED = (
    r"^(access_logs\.grpc_access_log\.|http\..*\.downstream_(rq|cx)_|listener\..*\.downstream_cx_active$"
    r"|listener_manager\.|server\.(live|state|uptime)$)"
)
"""A regular expression for Envoy's ``filter=``: everything else need not be sent."""
_OURS = frozenset({"admin", "async-client"})
"""Managers whose requests are never logged: of the admin port, and of Envoy's own clients."""
_LINE = re.compile(r"^envoy_(\w+?)(?:\{(.*)\})? (\d+)(?:\.0+)?$")
_MANAGER = re.compile(r'envoy_http_conn_manager_prefix="((?:[^"\\]|\\.)*)"')
_LOGGER = "access_logs_grpc_access_log_"
_HTTP = "http_downstream_"


def read_stats(text: str, count: Count, managers: Collection[str] = ()) -> Sent | None:
    """What an Envoy counted; None where the text is not an Envoy's.

    Args:
        count: what is to be compared. ``requests``: those that ended, which are ``rq_total - rq_active``.
            (``rq_completed`` leaves out those that ended without an answer, and these have a row too.)
        managers: ``stat_prefix`` of the connection managers that log to the sinks; empty: all but Envoy's
            own.
    """
    sums: Counter[str] = Counter()
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, labels, value = match.group(1), match.group(2) or "", int(match.group(3))
        if name.startswith(_HTTP):
            found = _MANAGER.search(labels)
            manager = found.group(1) if found else ""
            if manager in _OURS:
                continue
            if managers and manager not in managers:
                name = f"other_{name}"
        sums[name] += value
    if "server_uptime" not in sums:
        return None
    ended = sums[f"{_HTTP}rq_total"] - sums[f"{_HTTP}rq_active"]
    logs = count == "logs"
    # The last term: where Envoy serves its stats on a listener, the one who asks is a client too.
    connections = sums["listener_downstream_cx_active"] - sums[f"other_{_HTTP}cx_active"]
    stopped = sums["listener_manager_listener_stopped"] - sums["listener_manager_listener_removed"]
    return Sent(
        sent=sums[f"{_LOGGER}grpc_entries_flushed"] if logs else ended,
        written=sums[f"{_LOGGER}logs_written"] if logs else ended,
        dropped=sums[f"{_LOGGER}logs_dropped"] if logs else 0,
        failed=sums[f"{_LOGGER}grpc_entries_flush_failed"] if logs else 0,
        requests=sums[f"{_HTTP}rq_total"],
        bytes_in=sums[f"{_HTTP}cx_rx_bytes_total"],
        bytes_out=sums[f"{_HTTP}cx_tx_bytes_total"],
        uptime_s=sums["server_uptime"],
        connections=max(0, connections),
        draining=sums["server_state"] == 1
        or sums["server_live"] == 0
        or 0 < sums["listener_manager_total_listeners_active"] <= stopped,
    )
