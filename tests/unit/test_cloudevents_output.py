"""``format: cloudevents``: its requests, and what an answer that says little means."""

from __future__ import annotations

from typing import Any

import pytest

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.outputs import FORMATS
from proxy_usage.outputs.base import Ambiguous, Answer, Paused, Refused, Retry, Settled
from proxy_usage.outputs.cloudevents import CloudEvents
from proxy_usage.store import Fate, Queued

SENT = [Queued(seq, str(seq), "alpha", "requests", 1, b'{"n":%d}' % seq) for seq in (1, 2)]


def wire(**settings: Any) -> CloudEvents:
    output = {"name": "a", "format": "cloudevents", "url": "http://127.0.0.1/x", **settings}
    return CloudEvents(OutputConfig.model_validate(output), 60_000)


def test_a_batch_is_the_stored_bytes_under_the_batch_type() -> None:
    assert FORMATS["cloudevents"] is CloudEvents
    request = wire().encode(SENT)
    assert request.body == b'[{"n":1},{"n":2}]'
    assert request.headers == {"Content-Type": "application/cloudevents-batch+json"}
    assert wire(content_type="application/json").encode(SENT).headers == {"Content-Type": "application/json"}


def test_a_single_event_is_its_bytes() -> None:
    request = wire(content_type="application/cloudevents+json", batch={"events": 1}).encode(SENT[:1])
    assert request.body == b'{"n":1}'
    assert request.headers == {"Content-Type": "application/cloudevents+json"}


@pytest.mark.parametrize("status", [200, 202, 204])
@pytest.mark.parametrize("body", [b"", b"{}", b"ok"])
def test_success_takes_all(status: int, body: bytes) -> None:
    delivered = Fate("delivered", status)
    assert wire().read(Answer(status, {}, body), SENT) == Settled({1: delivered, 2: delivered})


@pytest.mark.parametrize("status", [201, 203, 205, 206, 207, 226])
def test_other_successes_do_not_say_what_was_taken(status: int) -> None:
    assert isinstance(wire().read(Answer(status, {}, b""), SENT), Ambiguous)


def test_a_page_for_people_is_no_answer() -> None:
    page = Answer(200, {"content-type": "text/html; charset=utf-8"}, b"<html>Please log in")
    assert isinstance(wire().read(page, SENT), Ambiguous)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, Refused) for status in (400, 413, 422)),
        *((status, Paused) for status in (401, 403, 404, 412, 302)),
        *((status, Retry) for status in (429, 500, 503)),
    ],
)
def test_what_is_no_success(status: int, kind: type) -> None:
    verdict = wire().read(Answer(status, {}, b"why"), SENT)
    assert isinstance(verdict, kind)
    if isinstance(verdict, Refused):
        assert (verdict.too_large, verdict.event_code) == (status == 413, "")
