"""Where events are sent."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from proxy_usage.config.fields import (
    AnyPath,
    Count,
    Duration,
    FilePath,
    Flag,
    Instant,
    Name,
    PositiveDuration,
    PositiveSize,
    Section,
    Text,
    Whole,
    http_url,
)
from proxy_usage.config.mistakes import Wrong
from proxy_usage.config.nats import SCHEMES, NatsConfig, nats_url, tls_files

MAX_BATCH = 100
"""The billing endpoint refuses longer batches whole."""
MAX_EVENTS = 10_000
"""Of a batch of any other format, whose bytes are bounded as well."""
CLOUDEVENTS = "application/cloudevents-batch+json"
CLOUDEVENT = "application/cloudevents+json"
"""One event: then a batch is one."""
HTTP_KEYS = ("url", "token_file", "user", "password_file", "ca_file", "cert_file", "key_file", "gzip")
OWN_KEYS = (
    ("content_type", "cloudevents"),
    ("ceilometer", "ceilometer"),
    ("file", "file"),
    ("nats", "nats"),
)
"""What only one format knows, and which."""
_MIB = 1 << 20
_GIB = 1 << 30


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

    events: Whole = Field(default=MAX_BATCH, ge=1, le=MAX_EVENTS)
    """The billing endpoint takes 100 at most, other formats 10000."""
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


class CeilometerNames(Section):
    """The name that each meter has among Ceilometer's."""

    requests: Text = "network.services.http.requests"
    """Of requests."""
    ingress_bytes: Text = "network.services.http.ingress.bytes"
    """Of bytes that clients sent."""
    egress_bytes: Text = "network.services.http.egress.bytes"
    """Of bytes that clients were sent."""
    connection_seconds: Text = "network.services.http.connection.seconds"
    """Of open time."""


class CeilometerUnits(Section):
    """The unit that each meter is said to be in. Nothing is converted: a unit is a word."""

    requests: Text = "request"
    """Of requests."""
    ingress_bytes: Text = "B"
    """Of bytes that clients sent."""
    egress_bytes: Text = "B"
    """Of bytes that clients were sent."""
    connection_seconds: Text = "s"
    """Of open time."""


class CeilometerConfig(Section):
    """Samples of `format: ceilometer`."""

    names: CeilometerNames = CeilometerNames()
    units: CeilometerUnits = CeilometerUnits()
    resource_id: Text = "httproute/{httproute_namespace}/{httproute_name}"
    """Dimensions, `{tenant}` and `{meter}` in braces; the tenant alone where one of them is empty."""
    source: Text = "proxy-usage"
    """The samples' ``source``; not that of CloudEvents."""
    batch: Flag = True
    """An array a request; false: one bare sample a request, and `batch.events` is 1."""


class FileConfig(Section):
    """The archive of `format: file`."""

    path: AnyPath
    """The file that is written. Its directory is made if the directory above it exists."""
    rotate_bytes: PositiveSize = 64 * _MIB
    """A file that would become larger is given its final name first, which has the time in it."""
    rotate_every: PositiveDuration = 3_600_000
    """So is one that was written in an earlier hour, counted from midnight UTC, or whatever this says."""
    max_bytes: PositiveSize = 8 * _GIB
    """All files of the archive together. Then the output pauses: only you may take files away."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.rotate_bytes > self.max_bytes:
            raise Wrong("is more than max_bytes", "raise max_bytes or lower this", at=("rotate_bytes",))
        return self


def _content_type(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9.+-]+/[a-z0-9.+-]+", value):
        raise Wrong(
            f"{value!r} is not a bare media type",
            f"write {CLOUDEVENTS} without parameters: some endpoints compare it exactly",
        )
    return value


OutputUrl = Annotated[
    str, AfterValidator(_url), WithJsonSchema({"type": "string", "pattern": "^(https?|nats|tls)://[^@]+$"})
]


class OutputConfig(Section):
    """One receiver of events, with its own pending state."""

    name: Name
    """Names the output in the store: renaming it makes another output of it."""
    format: Literal["billing", "ceilometer", "cloudevents", "file", "nats", "none"] = "billing"
    """``billing``: JSON batches for the billing endpoint. ``ceilometer``: samples as Ceilometer posts them.
    ``cloudevents``: batches for OpenMeter and the like. ``file``: an archive on disk. ``nats``: into a
    JetStream stream. ``none``: nothing is sent, the ledger is kept."""
    url: OutputUrl | None = None
    """Where batches are posted, or the NATS server: required, but `format: file` has none, and `format: none`
    needs none."""
    source: Annotated[str, AfterValidator(_source)] = "//networking.datumapis.com/gateway"
    """The CloudEvents ``source`` of all events."""
    token_file: FilePath | None = None
    """Bearer token, re-read when it changes."""
    user: Text | None = None
    """User of HTTP Basic authentication, in place of a token."""
    password_file: FilePath | None = None
    """The user's password, re-read when it changes."""
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
    """Only windows that begin at or after this time are sent: RFC 3339, with zone: `2026-12-01T00:00:00Z`."""
    until: Instant | None = None
    """Only windows that begin before this time are sent; written likewise."""
    content_type: Annotated[Text, AfterValidator(_content_type)] | None = None
    """Of `format: cloudevents`; unset: `application/cloudevents-batch+json`."""
    ceilometer: CeilometerConfig | None = None
    """Of `format: ceilometer`; unset: the defaults."""
    file: FileConfig | None = None
    """Of `format: file`, which needs it."""
    nats: NatsConfig | None = None
    """Of `format: nats`, which needs it."""

    @model_validator(mode="after")
    def _of_its_format(self) -> Self:
        for name, of in OWN_KEYS:
            if getattr(self, name) is not None and self.format not in (of, "none"):
                raise Wrong(
                    f"{name} says nothing about format {self.format}",
                    f"remove it, or write format: {of}",
                    at=(name,),
                )
        if self.format == "file":
            if self.file is None:
                raise Wrong("format file needs a file", "give file: {path: …}")
            for name in HTTP_KEYS:
                if getattr(self, name):
                    raise Wrong(f"{name} has no use with a file", f"remove {name}", at=(name,))
        if self.events_at_most < self.batch.events:
            raise Wrong(
                f"{self.batch.events} is too large",
                f"at most {self.events_at_most}, for what format {self.format} sends at once",
                at=("batch", "events"),
            )
        return self

    @property
    def events_at_most(self) -> int:
        """How many events the receiver takes at once."""
        if self.format == "ceilometer" and self.ceilometer is not None and not self.ceilometer.batch:
            return 1
        if self.content_type == CLOUDEVENT:
            return 1
        return MAX_BATCH if self.format in ("billing", "none") else MAX_EVENTS

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.format not in ("none", "file") and self.url is None:
            raise Wrong(f"format {self.format} needs a url", "give url, or format: none to send nothing")
        if self.format == "nats" and self.nats is None:
            raise Wrong("format nats needs a section nats", "give nats: {stream: …}")
        if self.format == "nats" and self.gzip:
            raise Wrong("NATS compresses nothing from here", "remove gzip", at=("gzip",))
        if self.format == "nats" and self.user is not None:
            raise Wrong("NATS takes no user from here", "use token_file, or nats.creds_file", at=("user",))
        _fits(self.format, self.url)
        tls_files(self, self.url)
        if (self.user is None) != (self.password_file is None):
            there, missing = ("password_file", "user") if self.user is None else ("user", "password_file")
            raise Wrong(
                f"{missing} is missing", f"Basic authentication needs both: give {missing} beside {there}"
            )
        if self.user is not None and (
            self.token_file is not None or not self.user.isprintable() or ":" in self.user
        ):
            raise Wrong(
                "cannot be sent: it has a colon in it, or token_file is there too",
                "HTTP knows one kind of credentials at a time, and no user with a colon",
                at=("user",),
            )
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
