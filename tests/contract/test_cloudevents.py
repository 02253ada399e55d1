"""Events as the outside reads them: the CloudEvents SDK, and the endpoint's own checks."""

import json
from datetime import UTC, datetime, timedelta

from cloudevents.core.formats.json import JSONFormat
from hypothesis import given
from hypothesis import strategies as st
from money import DIMENSIONS, METERS, MINUTE_MS, SOURCE, T0, cell, mint

from proxy_usage.attribution import Attributor
from proxy_usage.config.models import TenantConfig
from proxy_usage.config.sources import DimensionConfig
from proxy_usage.demo.checks import Refusal, billed, findings, read
from proxy_usage.model import NS_PER_SECOND, Amounts, Event, Identity, Key, Origin
from proxy_usage.outputs.billing import Billing
from proxy_usage.samples import read_event
from proxy_usage.store import Queued

ATTRIBUTOR = Attributor(
    TenantConfig.model_validate({"rules": [{"custom_tag": "project_name"}]}),
    {name: DimensionConfig.model_validate({"custom_tag": name, "default": ""}) for name in DIMENSIONS},
)
LABELS = st.from_regex(r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")
AMOUNTS = st.tuples(*[st.integers(0, 1 << 61)] * 3, st.integers(0, 400 * 86_400 * NS_PER_SECOND))


def events(amounts: Amounts, key: Key, window_ms: int) -> tuple[Event, ...]:
    found = mint().mint(cell(amounts, key=key, window_ms=window_ms), (0, 0, 0, 0), window_ms + 65_000)
    assert len(found.events) == sum(
        amount >= meter.divisor for amount, meter in zip(amounts, METERS, strict=True)
    )
    return found.events


@given(
    amounts=AMOUNTS,
    tenant=LABELS,
    raw=st.tuples(st.binary(max_size=300), st.binary(max_size=300)),
    minute=st.integers(0, 10_000_000),
)
def test_every_event_is_what_the_sdk_and_the_strictest_reader_expect(
    amounts: Amounts, tenant: str, raw: tuple[bytes, bytes], minute: int
) -> None:
    """Whatever bytes a client chose for what becomes a dimension."""
    identity = Identity(Origin("", "envoy", "http"), 0, tenant.encode(), raw, routed=True)
    key = ATTRIBUTOR.attribute(identity)
    assert isinstance(key, Key)
    window_ms = T0 + minute * MINUTE_MS
    for event in events(amounts, key, window_ms):
        meter = METERS[event.meter]
        parsed = JSONFormat().read(None, event.body)
        assert parsed.get_specversion() == "1.0"
        assert parsed.get_id() == event.id
        assert parsed.get_type() == meter.type
        assert parsed.get_source() == SOURCE
        assert parsed.get_subject() == f"projects/{tenant}"
        assert parsed.get_datacontenttype() == "application/json"
        time = parsed.get_time()
        assert time is not None
        start = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=window_ms)
        assert start <= time < start + timedelta(milliseconds=MINUTE_MS)
        data = parsed.get_data()
        assert isinstance(data, dict)
        assert data == {
            "value": str(event.value),
            "dimensions": dict(zip(DIMENSIONS, key.dimensions, strict=True)),
        }
        taken = read(event.body)
        assert not isinstance(taken, Refusal), taken
        assert findings(taken, [meter.type for meter in METERS], DIMENSIONS) == []
        assert billed(taken) == event.value == amounts[event.meter] // meter.divisor
        assert read_event(event.body)["data"] == data


def test_a_batch_is_an_array_of_exactly_the_events_bytes() -> None:
    made = events((1, 2, 3, 4 * NS_PER_SECOND), Key("alpha", ("eu", 'ü"')), T0)
    queued = [Queued(n, event.id, "alpha", "", event.value, event.body) for n, event in enumerate(made)]
    body = Billing().encode(queued).body
    assert [read_event(json.dumps(item).encode())["id"] for item in json.loads(body)] == [
        event.id for event in made
    ]
    position = 0
    for event in made:
        position = body.index(event.body, position) + len(event.body)
