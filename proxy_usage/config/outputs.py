"""Where events are sent."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from proxy_usage.config.fields import (
    Count,
    Duration,
    FilePath,
    Flag,
    Instant,
    Name,
    PositiveDuration,
    Section,
    Whole,
    http_url,
)
from proxy_usage.config.mistakes import Wrong
from proxy_usage.config.nats import SCHEMES, NatsConfig, nats_url, tls_files

MAX_BATCH = 100
"""The endpoint refuses longer batches whole."""
PLANNED_FORMATS = ("ceilometer", "cloudevents", "file")


def _format(value: Any) -> Any:
    if value in PLANNED_FORMATS:
        raise Wrong(
            f"format {value!r} is not supported by this version", "use billing, or none for the ledger alone"
        )
    return value


def _url(value: str) -> str:
    return nats_url(value) if value.partition(":")[0] in SCHEMES else http_url(value)


def _source(value: str) -> str:
    remedy = "write an absolute URI or //host/path, and keep it for ever: receivers tell duplicates by it"
    try:
        url = urlsplit(value)
    except ValueError:
        raise Wrong(f"{value!r} is not a URI", remedy) from None
    if re.search(r"[\s\x00-\x1f]", value) or not (url.netloc or (url.scheme and url.path)):
        raise Wrong(f"{value!r} has neither scheme nor host", remedy)
    return value


class BatchConfig(Section):
    """How many events go into one request."""

    events: Whole = Field(default=MAX_BATCH, ge=1, le=MAX_BATCH)
    linger: Duration = 1_000
    """How long a batch that is not full waits for more."""


class RetryConfig(Section):
    """Full-jitter exponential backoff: each pause is random between 0 and a limit that doubles."""

    initial: PositiveDuration = 500
    """Limit of the first pause."""
    max: PositiveDuration = 60_000
    """Limit of any pause."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.initial > self.max:
            raise Wrong("is longer than max", "raise max or lower initial", at=("initial",))
        return self


OutputUrl = Annotated[
    str, AfterValidator(_url), WithJsonSchema({"type": "string", "pattern": "^(https?|nats|tls)://[^@]+$"})
]


class OutputConfig(Section):
    """One receiver of events, with its own pending state."""

    name: Name
    """Names the output in the store: renaming it makes another output of it."""
    format: Annotated[Literal["billing", "nats", "none"], BeforeValidator(_format)] = "billing"
    """``billing``: JSON batches for the billing endpoint. ``nats``: into a JetStream stream.
    ``none``: nothing is sent, the ledger is kept."""
    url: OutputUrl | None = None
    """Where batches are posted, or the NATS server; `format: none` needs none."""
    source: Annotated[str, AfterValidator(_source)] = "//networking.datumapis.com/gateway"
    """The CloudEvents ``source`` of all events."""
    token_file: FilePath | None = None
    """Bearer token, re-read when it changes."""
    ca_file: FilePath | None = None
    """Authorities to trust in place of the system's."""
    cert_file: FilePath | None = None
    """Client certificate, for endpoints that ask for one."""
    key_file: FilePath | None = None
    """Private key of the client certificate."""
    batch: BatchConfig = BatchConfig()
    timeout: PositiveDuration = 60_000
    """Of one request. The endpoint itself may take 500 ms per event."""
    concurrency: Count = 2
    """Requests in flight."""
    retry: RetryConfig = RetryConfig()
    dedup_window: Duration = 600_000
    """How long the endpoint recognises an event it has already stored."""
    gzip: Flag = False
    """Compresses requests."""
    from_: Instant | None = Field(default=None, alias="from")
    """Only windows that begin at or after this time are sent (milliseconds since the epoch)."""
    until: Instant | None = None
    """Only windows that begin before this time are sent."""
    nats: NatsConfig | None = None
    """What only `format: nats` needs."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.format != "none" and self.url is None:
            raise Wrong(f"format {self.format} needs a url", "give url, or format: none to send nothing")
        _fits(self.format, self.url)
        tls_files(self, self.url)
        if self.format == "nats" and self.nats is None:
            raise Wrong("format nats needs a section nats", "give nats: {stream: …}")
        if self.format != "nats" and self.nats is not None:
            raise Wrong("is of format nats", "remove it, or write format: nats", at=("nats",))
        if self.format == "nats" and self.gzip:
            raise Wrong("NATS compresses nothing from here", "remove gzip", at=("gzip",))
        if self.from_ is not None and self.until is not None and self.until <= self.from_:
            raise Wrong(
                "until is not after from, so nothing would be sent", "set a later until", at=("until",)
            )
        return self


def _fits(form: str, url: str | None) -> None:
    """Raises Wrong where the address's scheme is another format's."""
    if url is None or form == "none":
        return
    scheme = url.partition(":")[0]
    if form == "nats" and scheme not in SCHEMES:
        raise Wrong(f"scheme {scheme!r} is neither tls nor nats", "write tls://host:4222", at=("url",))
    if form != "nats" and scheme in SCHEMES:
        raise Wrong(
            f"scheme {scheme!r} is neither http nor https", "write https://…, or format: nats", at=("url",)
        )
