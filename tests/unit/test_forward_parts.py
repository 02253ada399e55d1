"""What of a forwarder needs no server: which verb a configuration is for, and what addresses say."""

import subprocess
import sys
from pathlib import Path

import pytest

from proxy_usage.cli import main
from proxy_usage.delivery.consumer import Delivery, delivery
from proxy_usage.delivery.jetstream import is_token, subject_of, subjects_overlap

OUTPUT = "outputs: [{name: billing, url: 'http://127.0.0.1:9/'}]\n"
FORWARD = "forward: {url: 'nats://127.0.0.1:9', stream: USAGE}\n"


@pytest.mark.parametrize(
    ("verb", "text", "said"),
    [
        ("run", OUTPUT + FORWARD, "start it with proxy-usage forward"),
        ("forward", OUTPUT, "start a sink with proxy-usage run"),
    ],
)
def test_a_configuration_is_for_one_verb(
    verb: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "proxy-usage.yaml"
    path.write_text(text)
    assert main([verb, "--config", str(path)]) == 78
    assert said in capsys.readouterr().err


def test_validate_says_what_is_forwarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "proxy-usage.yaml"
    path.write_text(OUTPUT + FORWARD)
    assert main(["validate", "--config", str(path)]) == 0
    assert "billing.usage.*.ingest of USAGE at nats://127.0.0.1:9" in capsys.readouterr().out


def test_plain_text_that_leaves_the_machine_is_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "proxy-usage.yaml"
    nats = "outputs: [{name: a, format: nats, url: 'nats://edge.example:4222', nats: {stream: USAGE}}]\n"
    for text, said in (
        (nats, "outputs 'a': all usage travels in plain text to edge.example"),
        (OUTPUT + FORWARD.replace("127.0.0.1", "hub.example"), "in plain text from hub.example"),
    ):
        path.write_text(text)
        assert main(["validate", "--config", str(path)]) == 0
        shown = capsys.readouterr()
        assert said in shown.out + shown.err


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [
        ("$JS.ACK.S.D.2.17.4.1795595705234073301.0", Delivery(17, 2, 1795595705234)),
        ("$JS.ACK.hub.ACCHASH.S.D.1.18.5.1795595705234073301.3.token", Delivery(18, 1, 1795595705234)),
        ("$JS.ACK._.ACCHASH.S.D.1.18.5.1795595705234073301.3", Delivery(18, 1, 1795595705234)),
        ("", None),
        ("_INBOX.abc", None),
        ("$JS.ACK.S.D", None),
    ],
)
def test_the_acknowledgements_address_tells_sequence_count_and_time(
    reply: str, wanted: Delivery | None
) -> None:
    assert delivery(reply) == wanted


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("a.*.b", "a.*.b", True),
        ("a.*.b", "a.x.b", True),
        ("a.*.b", "a.*.c", False),
        ("a.>", "a.x.b", True),
        ("a.x", "a.x.b", False),
        ("a.x.b", "a.x", False),
    ],
)
def test_subjects_that_one_message_could_match(one: str, other: str, overlap: bool) -> None:
    assert subjects_overlap(one.split("."), other.split(".")) is overlap


def test_a_sink_without_nats_does_not_load_it() -> None:
    program = "import proxy_usage.service, sys; print({'nats', 'nkeys', 'nacl'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "set()"


def test_a_project_is_one_token() -> None:
    assert is_token("shop-1")
    assert subject_of("billing.usage.{project}.ingest", "shop-1") == "billing.usage.shop-1.ingest"
    assert not any(map(is_token, ["", "a.b", "*", ">", "a b", "A", "-a", "a-", "a" * 64, "a\n"]))
