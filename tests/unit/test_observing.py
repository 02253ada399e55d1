"""What rows are worth in the log and in `status`."""

import pytest
import structlog
from prometheus_client import CollectorRegistry

from proxy_usage.metrics import Metrics
from proxy_usage.service.observing import LINES, MINUTE_MS, Observer
from proxy_usage.turn import Observed
from proxy_usage.windows import Windows


class Rows:
    """What the observer sees of a pipeline."""

    def __init__(self) -> None:
        self.streams = None
        self.windows = Windows(
            length_ms=MINUTE_MS,
            grace_ms=0,
            reopen_ms=MINUTE_MS,
            spread_ms=1,
            salt=b"",
            defaults=(),
            max_keys=1,
            max_tenants=1,
        )
        self.next = Observed()

    def observe(self) -> Observed:
        observed, self.next = self.next, Observed()
        return observed


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"proxy_usage_{name}", labels)


def test_lines_about_entries_are_bounded_and_what_is_left_out_is_counted() -> None:
    observer, rows = Observer(Metrics()), Rows()
    with structlog.testing.capture_logs() as lines:
        for _ in range(10):
            rows.next.complaints.extend(f"row {number}" for number in range(LINES))
            observer.look(rows, MINUTE_MS)  # type: ignore[arg-type]
        assert len(lines) == LINES
        observer.look(rows, 2 * MINUTE_MS)  # type: ignore[arg-type]
    assert [line["entries"] for line in lines[LINES:]] == [9 * LINES]


@pytest.mark.parametrize("reason", ["unknown_type", "misrouted"])
def test_what_somebody_must_hear_of_is_one_line_a_minute(reason: str) -> None:
    metrics = Metrics()
    observer, rows = Observer(metrics), Rows()
    with structlog.testing.capture_logs() as lines:
        for turn in range(3 * 240):
            rows.next.rows["skipped", reason] += 1
            observer.look(rows, MINUTE_MS + turn * 250)  # type: ignore[arg-type]
    assert [line["entries"] for line in lines] == [1, 240, 240]  # the first at once
    assert {line["reason"] for line in lines} == {reason}
    assert value(metrics.registry, "entries_skipped_total", reason=reason) == 720
    assert value(metrics.registry, "entries_read_total") == 720


def test_status_says_that_open_streams_have_no_time() -> None:
    observer, rows = Observer(Metrics()), Rows()
    assert observer.remarks() == {}
    rows.next.notes.update({"no_duration": 3, "malformed_message": 1})
    observer.look(rows, MINUTE_MS)  # type: ignore[arg-type]
    assert list(observer.remarks()) == ["no_duration"]
    assert observer.remarks()["no_duration"].startswith("3 entries without a duration")
