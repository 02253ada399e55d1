"""Samples of stored events: every value of them, and what a receiver's answers mean."""

from __future__ import annotations

import json
import uuid
from dataclasses import replace
from typing import Any

import pytest
from money import METERS, MINUTE_MS, T0, Store, cell, key
from samples_peer import KEYS, faults
from ulid import ULID

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery import HttpSender, Transport
from proxy_usage.delivery.sender import UNREADABLE
from proxy_usage.errors import DecodeError
from proxy_usage.events import Mint
from proxy_usage.model import MAX_EVENT_VALUE, Key
from proxy_usage.outputs import FORMATS
from proxy_usage.outputs.base import Answer, Paused, Refused, Retry, Settled
from proxy_usage.outputs.ceilometer import Ceilometer
from proxy_usage.store import Fate, Merger, Queued

ID = "01J8Q2VJXMFGT1KSM0XZ4W5E3R"
DIMENSIONS = ("region", "gateway", "gateway_class", "httproute_namespace", "httproute_name")
VALUES = ("us-east-1", "edge", "datum", "ns-1f0c", "web")
START_MS = 1_787_393_640_000  # 2026-08-22T10:14:00Z
MINT = Mint(METERS, DIMENSIONS, "//networking.datumapis.com/gateway", MINUTE_MS)


def wire(**settings: Any) -> Ceilometer:
    output = {"name": "a", "format": "ceilometer", "url": "http://127.0.0.1/x", "ceilometer": settings}
    if settings.get("batch") is False:
        output["batch"] = {"events": 1}
    return Ceilometer(OutputConfig.model_validate(output), MINUTE_MS)


def queued(meter: int = 2, value: int = 1_048_576, values: tuple[str, ...] = VALUES) -> Queued:
    time_ms = START_MS + MINUTE_MS - 1
    body = MINT.body(ID, meter, Key("p-abc", values), time_ms, value)
    return Queued(5, ID, "p-abc", METERS[meter].name, value, body, START_MS)


def test_a_sample_is_the_contracts_example() -> None:
    assert list(json.loads(wire().encode([queued()]).body)[0].items()) == [
        ("name", "network.services.http.egress.bytes"),
        ("type", "delta"),
        ("unit", "B"),
        ("volume", 1_048_576),
        ("user_id", None),
        ("user_name", None),
        ("project_id", "p-abc"),
        ("project_name", "p-abc"),
        ("resource_id", "httproute/ns-1f0c/web"),
        ("timestamp", "2026-08-22T10:14:59.999000+00:00"),
        (
            "resource_metadata",
            {
                "region": "us-east-1",
                "gateway": "edge",
                "gateway_class": "datum",
                "httproute_namespace": "ns-1f0c",
                "httproute_name": "web",
                "window_start": "2026-08-22T10:14:00.000000+00:00",
                "window_end": "2026-08-22T10:15:00.000000+00:00",
                "meter": "networking.datumapis.com/gateway/egress-bytes",
            },
        ),
        ("source", "proxy-usage"),
        ("id", str(uuid.UUID(int=int(ULID.from_str(ID))))),
        ("monotonic_time", None),
    ]


@pytest.mark.parametrize(
    ("meter", "name", "unit"),
    [
        (0, "network.services.http.requests", "request"),
        (1, "network.services.http.ingress.bytes", "B"),
        (2, "network.services.http.egress.bytes", "B"),
        (3, "network.services.http.connection.seconds", "s"),
    ],
)
def test_each_meter_has_a_name_and_a_unit(meter: int, name: str, unit: str) -> None:
    sample = wire().sample(queued(meter))
    assert (sample["name"], sample["unit"]) == (name, unit)
    assert faults(json.loads(json.dumps(sample))) == []
    # Where only the bytes are known, the type says which meter it is.
    sample = wire().sample(queued(meter)._replace(meter=""))
    assert (sample["name"], sample["unit"]) == (name, unit)


def test_names_units_resource_and_source_are_configured() -> None:
    one = wire(
        names={"egress_bytes": "bandwidth.out"},
        units={"egress_bytes": "byte"},
        resource_id="{gateway}/{tenant}/{meter}",
        source="site-1",
    )
    sample = one.sample(queued())
    assert (sample["name"], sample["unit"], sample["source"]) == ("bandwidth.out", "byte", "site-1")
    assert sample["resource_id"] == "edge/p-abc/networking.datumapis.com/gateway/egress-bytes"
    assert one.sample(queued(0))["name"] == "network.services.http.requests"


def test_a_meter_that_nobody_knows_is_called_by_its_type() -> None:
    meter = replace(METERS[0], name="other", type="example.org/other")
    body = Mint([meter], (), "//h/x", MINUTE_MS).body(ID, 0, Key("p", ()), START_MS, 1)
    sample = wire().sample(Queued(1, ID, "p", "other", 1, body))
    assert (sample["name"], sample["unit"]) == ("example.org/other", "1")


@pytest.mark.parametrize("values", [("", "", "", "", "web"), ("", "", "", "ns-1f0c", "")])
def test_the_tenant_is_the_resource_where_the_route_is_not_known(values: tuple[str, ...]) -> None:
    assert wire().sample(queued(values=values))["resource_id"] == "p-abc"


def test_a_value_is_a_number_to_the_last_unit() -> None:
    body = wire().encode([queued(value=MAX_EVENT_VALUE)]).body
    assert b'"volume":9223372036854775807,' in body


def test_a_request_is_an_array_or_one_bare_sample() -> None:
    assert FORMATS["ceilometer"] is Ceilometer
    two = wire().encode([queued(0), queued(1)])
    assert [list(sample) for sample in json.loads(two.body)] == [list(KEYS)] * 2
    assert two.headers == {"Content-Type": "application/json"}
    one = wire(batch=False).encode([queued()])
    assert list(json.loads(one.body)) == list(KEYS)
    assert one == wire(batch=False).encode([queued()])  # the same bytes again


def test_where_a_window_began_is_taken_from_its_length_if_the_store_does_not_say() -> None:
    metadata = wire().sample(queued()._replace(window_ms=None))["resource_metadata"]
    assert metadata == wire().sample(queued())["resource_metadata"]
    metadata = wire().sample(queued()._replace(window_ms=START_MS - 240_000))["resource_metadata"]
    assert metadata["window_start"] == "2026-08-22T10:10:00.000000+00:00"  # windows were longer then


def test_the_store_says_where_a_window_began_and_a_merged_event_is_of_the_latest(tmp_path: Any) -> None:
    with Store(tmp_path) as store:
        for minute in range(3):
            store.close_window(cell((1, 10, 0, 0), key=key("a"), window_ms=T0 + minute * MINUTE_MS))
        merger = Merger(store.database, store.mint)
        while not merger.step(T0).done:
            continue
        batch = store.batch(events=10)
        samples = [wire().sample(event) for event in batch.events]
    assert sorted(sample["volume"] for sample in samples) == [3, 30]
    for sample in samples:
        assert sample["timestamp"] == "2026-11-22T00:02:59.999000+00:00"
        assert sample["resource_metadata"]["window_start"] == "2026-11-22T00:02:00.000000+00:00"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"id":"x"}', b"\xff", b"[" * 100_000])
async def test_bytes_that_are_no_event_become_a_refusal_of_their_own(body: bytes) -> None:
    spoiled = queued()._replace(body=body)
    with pytest.raises(DecodeError):
        wire().encode([queued(), spoiled])
    sender = HttpSender(wire(), Transport("http://127.0.0.1:9/", timeout_ms=1, concurrency=1))
    verdict = await sender.send([queued(), spoiled])
    assert isinstance(verdict, Refused)
    assert (verdict.event_code, verdict.too_large) == (UNREADABLE, False)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
@pytest.mark.parametrize("body", [b"", b"<html>", b'{"accepted":0}'])
def test_any_2xx_takes_the_whole_batch(status: int, body: bytes) -> None:
    verdict = wire().read(Answer(status, {}, body), [queued(), queued()._replace(seq=6)])
    assert verdict == Settled({5: Fate("delivered", status), 6: Fate("delivered", status)})


@pytest.mark.parametrize(
    ("status", "kind", "what"),
    [
        (400, Refused, None),
        (413, Refused, None),
        (422, Refused, None),
        (401, Paused, "unauthorized"),
        (403, Paused, "unauthorized"),
        (404, Paused, "misconfigured"),
        (405, Paused, "misconfigured"),
        (501, Paused, "misconfigured"),
        (302, Paused, "redirected"),
        (408, Retry, "timeout"),
        (429, Retry, "throttled"),
        (500, Retry, "server_error"),
        (503, Retry, "server_error"),
    ],
)
def test_what_is_no_success_is_kept(status: int, kind: type, what: str | None) -> None:
    verdict = wire().read(Answer(status, {"retry-after": "7"}, b"no"), [queued()])
    assert isinstance(verdict, kind)
    assert getattr(verdict, "reason", None) == what
    if isinstance(verdict, Refused):
        assert (verdict.too_large, verdict.event_code) == (status == 413, "")
    else:
        assert getattr(verdict, "after_ms") == 7_000  # noqa: B009 (either of two)
