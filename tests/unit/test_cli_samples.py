"""Sample events: what the SDK reads is what was meant, and what it refuses is a mistake with its meter."""

import json
from dataclasses import replace

import pytest

from proxy_usage.errors import ConfigError, DecodeError
from proxy_usage.events import Mint
from proxy_usage.model import Meter, Quantity
from proxy_usage.samples import check_samples, read_event

METER = Meter("requests", "example.com/requests", "{request}", Quantity.REQUESTS)


def mint(meter: Meter = METER, source: str = "//example.com/gateway") -> Mint:
    return Mint((meter,), ("region", "route"), source, 60_000)


def test_a_sound_configuration_passes() -> None:
    check_samples(mint(), ("", "überall"))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (mint(replace(METER, type="")), "'type' must not be None or empty"),
        (mint(source=""), "'source' must not be None or empty"),
    ],
)
def test_an_event_the_sdk_refuses_is_a_mistake_of_its_meter(made: Mint, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_samples(made, ("", ""))
    assert caught.value.exit_code == 78
    assert len(caught.value.mistakes) == 1
    assert caught.value.mistakes[0].startswith("meters.requests: not a CloudEvent: ")
    assert said in caught.value.mistakes[0]


def test_an_event_that_says_something_else_is_a_mistake() -> None:
    class Cut(Mint):
        def body(self, *arguments: object) -> bytes:
            event = json.loads(super().body(*arguments))  # type: ignore[arg-type]
            event["data"]["value"] = 1
            return json.dumps(event).encode()

    cut = Cut((METER,), ("region",), "//example.com/gateway", 60_000)
    with pytest.raises(ConfigError) as caught:
        check_samples(cut, ("",))
    assert "data is read as" in caught.value.mistakes[0]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b"\xff", b'{"specversion":"1.0","id":"1","source":"s","type":"t","time":1}']
)
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError, match="not a CloudEvent"):
        read_event(body)


def test_an_event_without_a_time_is_read() -> None:
    read = read_event(b'{"specversion":"1.0","id":"1","source":"s","type":"t","data":[1]}')
    assert (read["id"], read["data"]) == ("1", [1])
