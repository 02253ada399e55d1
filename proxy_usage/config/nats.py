"""What is said of a NATS server: by an output that publishes, and by a forwarder that reads."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from proxy_usage.config.fields import Count, FilePath, PositiveDuration, Section
from proxy_usage.config.mistakes import Wrong
from proxy_usage.config.units import format_duration

PROJECT = "{project}"
SUBJECT = f"billing.usage.{PROJECT}.ingest"
"""Where the billing platform's own gateway publishes, and its consumer reads."""
SCHEMES = ("nats", "tls")
_TOKEN = re.compile(r"[^\s.*>{}\x00-\x1f\x7f]+")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,255}")
ACK_PENDING = 10_000
"""A forwarder with two requests in flight holds 400."""


def nats_url(value: str) -> str:
    """One address, or several of a cluster with commas between. Raises Wrong."""
    remedy = "write tls://host:4222 or nats://host:4222; several of a cluster with commas between"
    for one in value.split(","):
        try:
            url = urlsplit(one)
            port = url.port
        except ValueError as error:
            raise Wrong(f"not a URL: {error}", remedy) from None
        if url.scheme not in SCHEMES:
            raise Wrong(f"scheme {url.scheme!r} is neither tls nor nats", remedy)
        if url.username is not None or url.password is not None:
            raise Wrong(
                "a URL must not hold a user or password (it would show in logs)",
                "use token_file, or creds_file in the section nats",
            )
        if not url.hostname or port == 0 or url.path or url.query or url.fragment or re.search(r"\s", one):
            raise Wrong(f"{one!r} is not just a host and a port", remedy)
    if len({urlsplit(one).scheme for one in value.split(",")}) > 1:
        raise Wrong("some addresses are encrypted and some are not", "write tls:// everywhere")
    return value


def _subject(value: str) -> str:
    remedy = f"write tokens with dots between, e.g. {SUBJECT}"
    for token in value.split("."):
        if token != PROJECT and not _TOKEN.fullmatch(token):
            raise Wrong(f"{token!r} is no token of a subject that something can be published to", remedy)
    if value.startswith("$"):
        raise Wrong("subjects that begin with $ are the server's own", remedy)
    return value


def _filter(value: str) -> str:
    remedy = "write tokens with dots between; * stands for one token, > at the end for the rest"
    tokens = value.split(".")
    for place, token in enumerate(tokens):
        if token == "*" or (token == ">" and place == len(tokens) - 1):  # noqa: S105
            continue
        if not _TOKEN.fullmatch(token):
            raise Wrong(f"{token!r} is no token of a subject", remedy)
    return value


def _stream(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise Wrong(f"{value!r} is not a name", "use letters, digits, '-' and '_'")
    return value


NatsUrl = Annotated[
    str, AfterValidator(nats_url), WithJsonSchema({"type": "string", "pattern": "^(nats|tls)://[^@]+$"})
]
Subject = Annotated[str, AfterValidator(_subject)]
Filter = Annotated[str, AfterValidator(_filter)]
StreamName = Annotated[str, AfterValidator(_stream)]


class NatsConfig(Section):
    """How an output of ``format: nats`` publishes."""

    stream: StreamName
    """The JetStream stream that must store the events; another one is refused."""
    subject: Subject = SUBJECT
    """What is published to; ``{project}`` is the event's tenant."""
    creds_file: FilePath | None = None
    """Credentials (JWT and seed), as `nsc` writes them; read at every connection."""
    window: Count = Field(default=256, le=65_536)
    """Events published whose acknowledgement is awaited, of all batches together."""


class ForwardConfig(Section):
    """What ``proxy-usage forward`` reads."""

    url: NatsUrl
    """The server, or several of a cluster with commas between."""
    stream: StreamName
    """The JetStream stream that sinks publish to."""
    durable: StreamName = "proxy-usage"
    """The durable consumer that all forwarders share; made where it is not there."""
    subject: Filter = SUBJECT.replace(PROJECT, "*")
    """Which subjects of the stream are forwarded."""
    dead_letters: Subject = f"billing.usage.{PROJECT}.quarantine.proxy-usage"
    """Where dead letters are published; a stream must take it, and not to forward it again."""
    ack_wait: PositiveDuration = 60_000
    """After so long without a sign of its forwarder an event goes to another one."""
    max_ack_pending: Count = ACK_PENDING
    """Events that all forwarders together may hold."""
    token_file: FilePath | None = None
    """Token to log in with; read at every connection."""
    creds_file: FilePath | None = None
    """Credentials (JWT and seed), as `nsc` writes them; read at every connection."""
    ca_file: FilePath | None = None
    """Authorities to trust in place of the system's."""
    cert_file: FilePath | None = None
    """Client certificate, for servers that ask for one."""
    key_file: FilePath | None = None
    """Private key of the client certificate."""
    timeout: PositiveDuration = 5_000
    """Of a connection, and of each answer of the server."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        tls_files(self, self.url)
        if self.ack_wait < 1_000:
            raise Wrong(
                f"{format_duration(self.ack_wait)} is too short to show a sign of life in",
                "write 1s or more; 60s suits most",
                at=("ack_wait",),
            )
        return self


def tls_files(section: Any, url: str | None) -> None:
    """What holds for ``ca_file``, ``cert_file`` and ``key_file`` beside ``url``. Raises Wrong."""
    scheme = (url or "").partition(":")[0]
    for name in ("ca_file", "cert_file", "key_file"):
        if getattr(section, name) is not None and scheme in ("http", "nats"):
            secure = {"http": "https", "nats": "tls"}[scheme]
            raise Wrong(
                f"{name} has no use with {scheme}", f"write {secure} in url, or remove {name}", at=(name,)
            )
    for name, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
        if getattr(section, name) is None and getattr(section, other) is not None:
            raise Wrong(f"{name} is missing", f"a client certificate needs both: give {name} beside {other}")
