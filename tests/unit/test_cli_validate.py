"""``validate``: what was checked, what may surprise, and a catalog that does not declare what is sent."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_call import Caller

ROOT = Path(__file__).resolve().parents[2]
CATALOG = ROOT / "config" / "components" / "service-catalog"
BILLING = {"name": "billing", "url": "https://billing.example.com/v1"}


@pytest.fixture
def call(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.delenv("PROXY_USAGE_CONFIG", raising=False)
    return Caller(tmp_path, capsys)


def test_the_reference_configuration_fits_the_catalog(call: Caller) -> None:
    reference = ROOT / "config" / "proxy-usage.yaml"
    answer = call.bare("validate", "--json", "--config", str(reference), "--catalog", str(CATALOG))
    assert answer.code == 0
    assert answer.json["ok"] is True
    assert answer.json["warnings"] == []
    assert [meter["name"] for meter in answer.json["meters"]] == [
        "requests",
        "ingress_bytes",
        "egress_bytes",
        "connection_seconds",
    ]
    assert answer.json["memory"] == {
        "limit": 2 << 30,
        "needed": 832 << 20,
        "worst_case": 2368 << 20,
        "unbounded": 256 << 30,
    }


def test_what_was_checked_is_said_in_words(call: Caller) -> None:
    said = call("validate", "--catalog", str(CATALOG))
    assert said.code == 0
    assert "listen     gRPC 127.0.0.1:0, HTTP 127.0.0.1:0\n" in said.out
    assert "tenants    custom_tag:project_name, then custom_tag:vhost_project\n" in said.out
    assert "messages take at most 2368MiB: limit 2GiB, an eighth more, and one message of 64MiB" in said.out
    assert "samples    2 events read by the CloudEvents SDK\n" in said.out
    assert "warning: networking.datumapis.com/gateway/egress-bytes is declared by" in said.out
    assert f"{call.config} can be used; " in said.out


def test_where_each_output_goes_is_said(call: Caller, tmp_path: Path) -> None:
    archive = {"name": "archive", "format": "file", "file": {"path": str(tmp_path / "usage.ndjson")}}
    samples = {"name": "telemetry", "format": "ceilometer", "url": "https://telemetry.example.com/"}
    call.configure(outputs=[BILLING, samples, archive])
    said = call("validate")
    assert said.code == 0
    assert "output     telemetry (ceilometer) https://telemetry.example.com/\n" in said.out
    assert f"output     archive (file) {tmp_path}/usage.ndjson\n" in said.out
    shown = call("validate", "--json").json["outputs"]
    assert [output["file"] for output in shown] == [None, None, f"{tmp_path}/usage.ndjson"]


@pytest.mark.parametrize(
    ("sections", "warned"),
    [
        ({"outputs": [{"name": "shadow", "format": "none"}]}, "no output sends anything"),
        (
            {"outputs": [BILLING, BILLING | {"name": "second", "source": "//other.example.com"}]},
            "outputs 'second': source is not used",
        ),
        ({"outputs": [BILLING | {"until": "2026-01-01T00:00:00Z"}]}, "outputs 'billing': until has passed"),
        (
            {"outputs": [BILLING | {"from": "2026-01-01T00:00:30Z"}]},
            "outputs 'billing': from is within a window; windows are sent whole",
        ),
        (
            {"outputs": [BILLING | {"until": "2126-01-01T00:00:30Z"}]},
            "outputs 'billing': until is within a window; windows are sent whole",
        ),
        (
            {"outputs": [BILLING | {"url": "http://billing.example.com/"}]},
            "outputs 'billing': all usage travels in plain text to billing.example.com",
        ),
        (
            {"outputs": [BILLING | {"url": "http://[2001:db8::1]:80/", "token_file": "token"}]},
            "outputs 'billing': the credentials and all usage travel in plain text to 2001:db8::1",
        ),
    ],
)
def test_what_may_not_be_meant_is_a_warning(
    sections: dict[str, Any], warned: str, call: Caller, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("t")
    call.configure(**sections)
    answer = call("validate", "--json")
    assert answer.code == 0
    assert [warning for warning in answer.json["warnings"] if warned in warning]
    assert "\nwarning: " in call("validate").out


@pytest.mark.parametrize("text", ["", "\n", "two\nlines"])
def test_a_file_that_holds_no_secret_is_a_warning(text: str, call: Caller, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(text)
    sections: dict[str, dict[str, Any]] = {
        "listen.token_file": {"listen": {"token_file": "secret"}},
        "listen.http_token_file": {"listen": {"http_token_file": "secret"}},
        "audit.token_file": {"audit": {"token_file": "secret"}},
        "outputs 'billing': token_file": {"outputs": [BILLING | {"token_file": "secret"}]},
        "outputs 'billing': password_file": {
            "outputs": [BILLING | {"user": "me", "password_file": "secret"}],
        },
        "forward.token_file": {
            "forward": {"url": "nats://127.0.0.1:4222", "stream": "S", "token_file": "secret"},
            "outputs": [BILLING],
        },
    }
    for key, section in sections.items():
        call.configure(**{"outputs": [BILLING]} | section)
        (warning,) = call("validate", "--json").json["warnings"]
        assert warning.startswith(f"{key}: {tmp_path / 'secret'} holds nothing that can be sent"), key
    (tmp_path / "secret").write_text("one\n")
    call.configure(outputs=[BILLING | {"token_file": "secret"}])
    assert call("validate", "--json").json["warnings"] == []


def test_where_nothing_is_sent_nothing_travels_in_plain_text(call: Caller, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("")
    shadow = {"name": "shadow", "format": "none", "url": "http://billing.example.com/", "token_file": "token"}
    call.configure(outputs=[BILLING, shadow])
    assert call("validate", "--json").json["warnings"] == []


FORWARDER = {
    "forward": {"url": "tls://nats.example.com:4222", "stream": "USAGE"},
    "outputs": [BILLING],
    "listen": {"http": "127.0.0.1:9190"},
}


def test_of_a_forwarder_only_what_it_uses_is_said(call: Caller) -> None:
    call.configure(**FORWARDER)
    said = call("validate")
    assert said.code == 0
    keys = {line.split()[0] for line in said.out.splitlines()[:-1]}
    assert keys == {"listen", "forward", "durable", "output"}
    assert "listen   HTTP 127.0.0.1:9190\n" in said.out
    assert "billing.usage.*.ingest of USAGE at tls://nats.example.com:4222" in said.out
    shown = call("validate", "--json").json
    assert set(shown) == {"ok", "config", "listen", "forward", "outputs", "catalog", "warnings"}
    assert shown["forward"]["durable"] == "proxy-usage"


def test_a_forwarder_needs_no_place_for_a_store(call: Caller, tmp_path: Path) -> None:
    store = {"store": {"path": str(tmp_path / "no" / "such" / "usage.db")}}
    call.configure(**FORWARDER | store)
    assert call("validate").code == 0
    call.configure(**store)
    assert call("validate").code == 78


@pytest.mark.parametrize(
    "verb",
    [
        ("unattributed", "ls"),
        ("unattributed", "replay"),
        ("outputs", "retire", "billing"),
        ("store", "check"),
        ("queue", "ls"),
        ("deadletters", "ls"),
        ("deadletters", "replay"),
        ("compare", "--from", "2026-11-01", "--to", "2026-12-01", "--csv", "-"),
        ("record", "rows.binpb"),
        ("status",),
    ],
    ids=" ".join,
)
def test_verbs_about_a_store_say_that_a_forwarder_has_none(verb: tuple[str, ...], call: Caller) -> None:
    call.configure(**FORWARDER)
    said = call(*verb)
    assert said.code == 2
    assert "a forwarder has no store" in said.err
    assert "http://127.0.0.1:9190/metrics" in said.err


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:8080/", "http://localhost/", "http://[::1]:1/", "https://a.b/"]
)
def test_what_stays_here_or_is_encrypted_is_no_warning(url: str, call: Caller) -> None:
    call.configure(outputs=[BILLING | {"url": url}])
    assert call("validate", "--json").json["warnings"] == []


def test_bounds_where_a_window_begins_are_no_warning(call: Caller) -> None:
    bounds = {"from": "2026-01-01T00:00:00Z", "until": "2126-01-01T02:01:00+02:00"}
    call.configure(outputs=[BILLING | bounds])
    assert call("validate", "--json").json["warnings"] == []


def test_a_meter_that_nobody_declared_is_a_mistake(call: Caller) -> None:
    call.configure(meters={"requests": {"type": "example.com/requests"}})
    answer = call("validate", "--catalog", str(CATALOG))
    assert answer.code == 78
    assert "meter requests: no ServiceConfiguration declares example.com/requests" in answer.err
    assert call("validate").code == 0


def test_a_dimension_that_nobody_declared_is_a_mistake(call: Caller) -> None:
    call.configure(dimensions={"colour": {"custom_tag": "colour"}})
    answer = call("validate", "--catalog", str(CATALOG), "--json")
    assert answer.code == 78
    assert answer.json["ok"] is False
    assert any("colour" in mistake for mistake in answer.json["mistakes"])
    assert answer.json["hint"]
    assert answer.err == ""


def test_a_catalog_that_breaks_its_own_rules_is_a_warning(call: Caller, tmp_path: Path) -> None:
    documents = yaml.safe_load((CATALOG / "service-configuration.yaml").read_text())
    documents["metadata"]["namespace"] = "somewhere"
    directory = tmp_path / "catalog"
    directory.mkdir()
    (directory / "service-configuration.yaml").write_text(yaml.safe_dump(documents))
    warnings = call("validate", "--json", "--catalog", str(directory)).json["warnings"]
    assert [warning for warning in warnings if warning.startswith("catalog: ") and "namespace" in warning]


def test_a_catalog_that_is_not_there_is_named(call: Caller, tmp_path: Path) -> None:
    answer = call("validate", "--catalog", str(tmp_path / "nowhere"))
    assert answer.code == 78
    assert "nowhere" in answer.err


def test_mistakes_are_data_too(call: Caller) -> None:
    call.configure(windwos={})
    answer = call("validate", "--json")
    assert answer.code == 78
    assert (answer.json["ok"], answer.json["config"]) == (False, str(call.config))
    (mistake,) = answer.json["mistakes"]
    assert "did you mean windows?" in mistake


def test_a_source_that_makes_no_event_is_found_before_the_start(call: Caller) -> None:
    call.configure(outputs=[BILLING | {"source": "no uri at all"}])
    assert call("validate").code == 78
