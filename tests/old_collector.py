"""The log-tailing collector that bills today, as a statement of its rules: a line of Envoy's log to events.

Nothing of it is a part of the program: it is what a hand-over is tested against.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from proxy_usage.config.units import parse_instant

FORMAT = {
    "start_time": "%START_TIME%",
    "method": "%REQ(:METHOD)%",
    "path": "%REQ(:PATH)%",
    "protocol": "%PROTOCOL%",
    "response_code": "%RESPONSE_CODE%",
    "bytes_received": "%BYTES_RECEIVED%",
    "bytes_sent": "%BYTES_SENT%",
    "duration": "%DURATION%",
    "route_name": "%ROUTE_NAME%",
    "project_name": "%METADATA(ROUTE:datum-gateway:project_name)%",
    "request_id": "%REQ(X-REQUEST-ID)%",
}
"""The JSON log it reads."""
PREFIX = "networking.datumapis.com/gateway/"
_ROUTE = re.compile(r"^httproute/(?P<namespace>[^/]+)/(?P<name>[^/]+)")

Line = Mapping[str, Any]


def logger(path: Path) -> dict[str, Any]:
    """The access logger that writes the log."""
    return {
        "name": "envoy.access_loggers.file",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
            "path": str(path),
            "log_format": {"json_format": FORMAT},
        },
    }


def lines(path: Path) -> list[Line]:
    """What the log holds; a line whose end is not written yet is none."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def end_ms(line: Line) -> int:
    """When the request ended, as the line tells: milliseconds, both parts of it cut off."""
    return parse_instant(line["start_time"]) + int(line["duration"])


def events(line: Line) -> Iterator[dict[str, Any]]:
    """The events of one request, up to four of them."""
    route = _ROUTE.match(line["route_name"] or "")
    request_id = line.get("request_id")
    if route is None or not request_id:
        return
    project_name = line.get("project_name")
    project_name = "" if project_name in (None, "-") else project_name
    project = project_name or route["namespace"].removeprefix("ns-")
    dimensions = {
        "region": "us-east-1",
        "gateway": "test-gateway",
        "gateway_namespace": "default",
        "gateway_class": "datum-downstream-gateway",
        "httproute_name": route["name"],
        "httproute_namespace": route["namespace"],
        "project_name": project_name,
    }
    for suffix, meter, value in (
        ("-req", "requests", 1),
        ("-egress", "egress-bytes", line["bytes_sent"]),
        ("-ingress", "ingress-bytes", line["bytes_received"]),
        ("-conn", "connection-seconds", line["duration"] // 1000),
    ):
        if value > 0:
            digest = hashlib.md5(f"{request_id}{suffix}".encode()).hexdigest().upper()
            yield {
                "specversion": "1.0",
                "id": f"0{digest[:25]}",
                "source": "//networking.datumapis.com/gateway",
                "type": PREFIX + meter,
                "subject": f"projects/{project}",
                "time": line["start_time"],
                "datacontenttype": "application/json",
                "data": {"value": str(value), "dimensions": dimensions},
            }


def sums(read: Iterable[Line]) -> Counter[tuple[str, str]]:
    """Values by tenant and event type, of all events of these lines."""
    added: Counter[tuple[str, str]] = Counter()
    for line in read:
        for event in events(line):
            added[event["subject"].removeprefix("projects/"), event["type"]] += int(event["data"]["value"])
    return added


def write_events(read: Iterable[Line], path: Path) -> None:
    """Writes all events of these lines, one a line."""
    path.write_text("".join(json.dumps(event) + "\n" for line in read for event in events(line)))
