"""Who may send: certificates by their names, tokens, and nodes a certificate speaks for."""

import re

import pytest

from proxy_usage.admission import Admission, SanPattern

URI = {"peer_uri": [b"spiffe://example.org/envoy/a"]}
DNS = {"peer_dns": [b"a.edge.example"]}


def admission(*allow: str, token: str | None = None, node: str | None = None) -> Admission:
    return Admission(
        allow=[SanPattern.parse(text) for text in allow],
        token=None if token is None else lambda: token,
        node_from_san=None if node is None else re.compile(node),
    )


def reason(found: tuple[str, object]) -> str | None:
    refusal = found[1]
    return None if refusal is None else str(getattr(refusal, "reason", None))


def test_without_conditions_everybody_may_and_nobody_has_a_name() -> None:
    assert Admission().admit({}, {}) == ("", None)


def test_a_certificates_name_is_the_peers_the_uri_first() -> None:
    assert Admission().admit(DNS | URI, {}) == ("spiffe://example.org/envoy/a", None)
    assert Admission().admit(DNS, {}) == ("a.edge.example", None)


@pytest.mark.parametrize(
    ("pattern", "context", "peer"),
    [
        ("uri:spiffe://example.org/envoy/*", URI, "spiffe://example.org/envoy/a"),
        ("dns:*.edge.example", DNS, "a.edge.example"),
        ("dns:*.edge.example", URI | DNS, "a.edge.example"),  # the name that was allowed, not the first
    ],
)
def test_an_allowed_name_may_send(pattern: str, context: dict[str, list[bytes]], peer: str) -> None:
    assert admission(pattern).admit(context, {}) == (peer, None)


@pytest.mark.parametrize(
    ("pattern", "context"),
    [
        ("uri:spiffe://example.org/envoy/*", {}),
        ("uri:spiffe://example.org/envoy/*", {"peer_uri": [b"spiffe://example.org/other/a"]}),
        ("uri:spiffe://example.org/envoy/*", {"peer_dns": [b"spiffe://example.org/envoy/a"]}),
        ("dns:*.edge.example", {"peer_dns": [b"a.edge.example.evil"]}),
        ("dns:a.edge.example", {"peer_dns": [b"aXedge.example"]}),
        ("dns:*.edge.example", {"peer_dns": [b"\xff"]}),
    ],
)
def test_any_other_name_may_not(pattern: str, context: dict[str, list[bytes]]) -> None:
    assert reason(admission(pattern).admit(context, {})) == "san"


@pytest.mark.parametrize("text", ["*.edge.example", "dns:", "ip:10.0.0.1", ""])
def test_a_pattern_without_a_type_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="does not begin with uri: or dns:"):
        SanPattern.parse(text)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("Bearer s3cret", None),
        ("Bearer s3cre", "token"),
        ("Bearer s3crets", "token"),
        ("bearer s3cret", "token"),
        ("s3cret", "token"),
        ("Bearer ", "token"),
        ("", "token"),
        ("Bearer s3cr\u00e9t", "token"),
    ],
)
def test_a_token_is_compared_whole(given: str, refused: str | None) -> None:
    assert reason(admission(token="s3cret").admit({}, {"authorization": given})) == refused


def test_a_token_file_that_cannot_be_read_lets_nobody_in() -> None:
    assert reason(admission(token="").admit({}, {"authorization": "Bearer "})) == "token"
    assert reason(admission(token="").admit({}, {})) == "token"


def test_both_proofs_are_asked_for_where_both_are_configured() -> None:
    both = admission("dns:*.edge.example", token="s3cret")
    good = {"authorization": "Bearer s3cret"}
    assert both.admit(DNS, good) == ("a.edge.example", None)
    assert reason(both.admit(DNS, {})) == "token"
    assert reason(both.admit({}, good)) == "san"


@pytest.mark.parametrize(
    ("peer", "node", "may"),
    [
        ("spiffe://example.org/envoy/a", "a", True),
        ("spiffe://example.org/envoy/a", "b", False),
        ("spiffe://example.org/envoy/", "", False),
        ("spiffe://example.org/envoy/a/b", "a", False),
        ("", "a", False),
        ("", "", False),
    ],
)
def test_a_certificate_speaks_for_its_own_node_alone(peer: str, node: str, may: bool) -> None:
    refusal = admission(node="spiffe://example.org/envoy/([^/]+)").refuse_node(peer, node)
    assert (refusal is None) == may


def test_without_a_pattern_any_node_may_be_spoken_for() -> None:
    assert Admission().refuse_node("a", "b") is None


def test_a_refusal_repeats_no_more_of_a_name_than_fits_a_line() -> None:
    refusal = admission(node="x").refuse_node("y", "n" * 10_000)
    assert refusal is not None
    assert len(refusal.text) < 300
