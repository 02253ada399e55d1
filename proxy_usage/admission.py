"""Who may send: whoever connects can bill, so a peer is known before its rows are read.

Two proofs, each optional and both required when both are configured: a client certificate with an allowed
subject alternative name, and a bearer token. The name that the certificate proves becomes part of the rows'
origin, so that one peer can never touch another peer's streams.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import translate
from typing import NamedTuple

from proxy_usage.model import Origin

MAX_NAME = 1024
"""Characters of a node's id and of a log's name."""
MAX_NODE_VALUE = 4096
"""Characters of each value that rules and dimensions read from the node."""
_TYPES = {"uri": "peer_uri", "dns": "peer_dns"}
"""Prefix of an allowed name → property of gRPC's authentication context that holds names of this type."""


class Refusal(NamedTuple):
    """Why a peer may not send. ``reason`` is a metric's label, ``text`` goes to the peer."""

    reason: str
    text: str
    limit: bool = False
    """Whether it asked for too much, rather than for what it may not have."""


@dataclass(frozen=True, slots=True)
class SanPattern:
    """An allowed subject alternative name: ``uri:spiffe://example.org/envoy/*`` or ``dns:*.edge.example``.

    Typed, since a DNS name that looks like a URI must not pass for one. ``*`` stands for any characters.
    """

    kind: str
    pattern: re.Pattern[str]

    @classmethod
    def parse(cls, text: str) -> SanPattern:
        """Reads a pattern. Raises ValueError when it names no type."""
        kind, colon, glob = text.partition(":")
        if not colon or kind not in _TYPES or not glob:
            raise ValueError(f"{text!r} does not begin with uri: or dns:")
        return cls(kind, re.compile(translate(glob)))


class Admission:
    """Decides about peers.

    Args:
        allow: allowed names; empty: every certificate that the authorities signed.
        token: gives the bearer token at the moment, None where none is asked for.
        node_from_san: takes from a peer's name the node id that it may claim (first group).
    """

    def __init__(
        self,
        *,
        allow: Sequence[SanPattern] = (),
        token: Callable[[], str] | None = None,
        node_from_san: re.Pattern[str] | None = None,
    ) -> None:
        self._allow = tuple(allow)
        self._token = token
        self._node_from_san = node_from_san

    def admit(
        self, context: Mapping[str, Sequence[bytes]], metadata: Mapping[str, str]
    ) -> tuple[str, Refusal | None]:
        """The peer's proven name (``""`` without a certificate), and why it is refused if it is.

        Args:
            context: gRPC's authentication context.
            metadata: the stream's metadata, names in lower case.
        """
        names = [
            (kind, value.decode("utf-8", "replace"))
            for kind, name in _TYPES.items()
            for value in context.get(name, ())
        ]
        peer = names[0][1] if names else ""
        if self._allow:
            allowed = [
                name
                for kind, name in names
                if any(pattern.kind == kind and pattern.pattern.fullmatch(name) for pattern in self._allow)
            ]
            if not allowed:
                return peer, Refusal("san", "the certificate's subject alternative name may not send here")
            peer = allowed[0]
        if self._token is not None:
            given = metadata.get("authorization", "")
            wanted = self._token()
            expected = f"Bearer {wanted}"
            if not wanted or not hmac.compare_digest(given.encode(), expected.encode()):
                return peer, Refusal("token", "a bearer token is required here, and this is not it")
        return peer, None

    def refuse_node(self, peer: str, node_id: str) -> Refusal | None:
        """Why a peer may not speak for a node, or None when it may."""
        if self._node_from_san is None:
            return None
        match = self._node_from_san.fullmatch(peer)
        if match and (match.group(1) if match.re.groups else match.group()) == node_id:
            return None
        return Refusal("node", f"the certificate does not speak for node {node_id[:200]!r}")


def refuse_identifier(origin: Origin) -> Refusal | None:
    """Why nobody may send under such names, or None. All that is kept of a stream's rows carries them."""
    for what, text, most in (
        ("node id", origin.node_id, MAX_NAME),
        ("log name", origin.log_name, MAX_NAME),
        *(("value of the node", value, MAX_NODE_VALUE) for value in origin.node),
    ):
        if len(text) > most:
            said = f"a {what} has {len(text)} characters, {most} is the most"
            return Refusal("identifier", said, limit=True)
    return None
