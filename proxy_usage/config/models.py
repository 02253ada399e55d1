"""The configuration as data: frozen, validated, every key with its default.

Attribute names are the YAML keys (``if_`` and ``from_`` for the two that Python reserves). Durations are
integers of milliseconds, sizes integers of bytes, ``off`` and null are None, lists are tuples.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from proxy_usage.config.fields import (
    Address,
    AnyPath,
    Count,
    Duration,
    FilePath,
    Flag,
    HttpUrl,
    Interval,
    PositiveDuration,
    PositiveSize,
    Regex,
    Section,
    Text,
    Whole,
)
from proxy_usage.config.mistakes import Wrong, WrongMany
from proxy_usage.config.nats import ForwardConfig
from proxy_usage.config.outputs import OutputConfig
from proxy_usage.config.skip import SkipRule
from proxy_usage.config.sources import DimensionConfig, RuleConfig
from proxy_usage.model import NS_PER_SECOND, FieldKind, FoldPlan, Meter, Quantity

_MIB = 1 << 20
_GIB = 1 << 30
_DAY = 86_400_000

METER_TYPES = {
    "requests": "networking.datumapis.com/gateway/requests",
    "ingress_bytes": "networking.datumapis.com/gateway/ingress-bytes",
    "egress_bytes": "networking.datumapis.com/gateway/egress-bytes",
    "connection_seconds": "networking.datumapis.com/gateway/connection-seconds",
}
"""The meters there are, and the CloudEvents type each has by default."""
_UNITS = {"requests": "{request}", "ingress_bytes": "By", "egress_bytes": "By", "connection_seconds": "s"}
_QUANTITIES = {
    ("ingress_bytes", "wire"): Quantity.WIRE_IN,
    ("ingress_bytes", "body"): Quantity.BODY_IN,
    ("egress_bytes", "wire"): Quantity.WIRE_OUT,
    ("egress_bytes", "body"): Quantity.BODY_OUT,
}


_COUNTS = {
    "streams": Quantity.OPEN_NS,
    "upgraded_and_tcp": Quantity.UPGRADED_NS,
    "connections": Quantity.CONNECTION_NS,
}


class TlsConfig(Section):
    """TLS of the gRPC listeners. Files are read again when they change."""

    cert_file: FilePath | None = None
    """Certificate of the sink, PEM, with its chain."""
    key_file: FilePath | None = None
    """Its private key, PEM."""
    client_ca_file: FilePath | None = None
    """Authorities of client certificates; with it, clients without one are refused."""
    allow_san: tuple[Text, ...] = ()
    """Subject alternative names that may send; empty: every certificate the authorities signed."""
    node_from_san: Regex | None = None
    """Takes the node id from the certificate (first group) in place of what the client says it is."""


class LimitsConfig(Section):
    """Bounds of what clients can make the receiver hold."""

    message: PositiveSize = 64 * _MIB
    """Largest gRPC message: after an outage Envoy sends its backlog as one."""
    window: PositiveSize = _MIB
    """HTTP/2 flow-control window and frame size."""
    headers: PositiveSize = 16 << 10
    """Largest header block of a stream."""
    connections: Count = 256
    streams_per_connection: Count = 16
    connection_age: PositiveDuration = 3_600_000
    """Older connections are renewed, so that withdrawn trust reaches them."""
    new_streams: Count = 8
    """Streams that are read at once before they have sent a whole message."""
    first_message: PositiveDuration = 10_000
    """How long a new stream may take for it."""
    memory: PositiveSize = 2 * _GIB
    """Most that unfinished messages may take."""
    identities: Count = 100_000
    """Distinct identities of one node within an hour; usage of further ones is held."""

    def part(self, workers: int) -> LimitsConfig:
        """The bounds of one of so many workers: what memory may take is divided among them."""
        divided = {"memory": self.memory // workers, "new_streams": max(1, self.new_streams // workers)}
        return self.model_copy(update=divided)

    def needed(self) -> int:
        """Bytes that senders may need at once: every place for new streams taken by the largest message, one
        more that is being handed over, and a window for each connection."""
        return (self.new_streams + 1) * self.message + self.connections * self.window

    def unbounded(self) -> int:
        """Bytes if every allowed stream sent the largest allowed message at once, and nobody looked."""
        return self.connections * self.streams_per_connection * self.message


class ListenConfig(Section):
    """Addresses are ``host:port``; port 0 lets the system choose."""

    grpc: Address = "127.0.0.1:9001"
    streams: Address | None = None
    """Second gRPC port for rows of long streams, where several sinks share the short ones."""
    http: Address = "127.0.0.1:9090"
    """Metrics, health and the operator's page."""
    insecure: Flag = False
    """Allows plaintext on addresses that other machines can reach."""
    tls: TlsConfig | None = None
    """TLS of the two gRPC ports; unset: plaintext."""
    token_file: FilePath | None = None
    """Bearer token that clients must send."""
    http_token_file: FilePath | None = None
    """Bearer token for the HTTP port, without which it answers nobody but probes of health."""
    http_tenants: Flag = False
    """Lets the operator's page name tenants; the port must want a token, or listen on a loopback address."""
    limits: LimitsConfig = LimitsConfig()


class TagsConfig(Section):
    """Names of the custom tags in which Envoy is told to carry what its rows lack."""

    connection_id: Text = "conn_id"
    """Custom tag that holds `%CONNECTION_ID%`."""
    duration_ms: Text = "dur_ms"
    """Custom tag that holds `%DURATION%`, for rows of open streams."""
    emit_us: Text = "emit_us"
    """Custom tag that holds `%EMIT_TIME(%s%6f)%`, likewise."""


class EnvoyConfig(Section):
    """What must agree with the configuration of the Envoys."""

    flush_interval: Interval = None
    """Envoy's access_log_flush_interval; `off` where Envoy sends no periodic rows."""
    long_streams: Literal["here", "elsewhere"] = "here"
    """Whether rows of long streams are another process's, to which Envoy's filters send them."""
    connection_logs: tuple[Text, ...] = ("conn",)
    """Log names whose rows are listener rows, one per connection."""
    untyped: Literal["skip", "end"] = "skip"
    """What rows without an access-log type are, which old Envoys send: skipped, or the end of a request."""
    tags: TagsConfig = TagsConfig()


class UnattributedConfig(Section):
    """What is kept of usage that has no tenant."""

    max_identities: Count = 10_000
    """Raw identities that are told apart; usage of further ones is one heap."""
    keep: PositiveDuration = 90 * _DAY
    """How long it is held for a decision; then it is written off."""


class TenantConfig(Section):
    """Who pays for a row."""

    rules: tuple[RuleConfig, ...] = (
        RuleConfig(custom_tag="project_name"),
        RuleConfig(custom_tag="vhost_project"),
    )
    """Tried in order."""
    allow_uuid: Flag = False
    """False holds tenants that look like a UUID: such a name never resolves to a project."""
    no_route: Literal["skip", "hold"] = "skip"
    """Rows that name no route: scanners, codec errors."""
    max_tenants: Count = 100_000
    unattributed: UnattributedConfig = UnattributedConfig()


class MeterConfig(Section):
    """One billable signal. In the file type and unit may be left out: a known name has both."""

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required"))

    type: Text
    """CloudEvents type: the meter's name in the service catalog."""
    unit: Text
    """UCUM unit in the catalog."""
    bytes: Literal["wire", "body"] = "wire"
    """For byte meters: all bytes on the wire, or the bodies alone."""
    count: Literal["streams", "upgraded_and_tcp", "connections"] = "streams"
    """For connection_seconds: whose open time is summed."""


class WindowsConfig(Section):
    """UTC-aligned windows in which usage is summed."""

    length: PositiveDuration = 60_000
    grace: Duration = 5_000
    """How long a window waits for rows after its end."""
    reopen: PositiveDuration = Field(default_factory=lambda data: data.get("length", 60_000))
    """How long a late row keeps a closed window open; by default the length of a window."""
    max_skew: Duration = 300_000
    """Rows from further in the future are counted in the present window."""
    late_horizon: PositiveDuration = 29 * _DAY
    """Rows older than this are counted in the present window, events of windows older than this are not sent:
    it has room for what a window takes until its events are made, and for 10 minutes of delivery."""
    checkpoint: PositiveDuration = 250
    max_keys: Count = 200_000


class StreamsConfig(Section):
    """Running totals of long streams."""

    max: Count = 1_000_000
    expire: Count = 3
    """Flush intervals of silence after which a stream is taken for gone."""
    remember: PositiveDuration = 30 * _DAY
    """How long the totals of a stream that is gone are kept, for a row that comes late."""


class StoreConfig(Section):
    """The one SQLite file. Its directory is made if the directory above it exists."""

    path: AnyPath = Field(default=Path("var/usage.db"), validate_default=True)
    max_bytes: PositiveSize = 8 * _GIB
    ledger_max_bytes: PositiveSize = _GIB
    """Bound on the ledger, its hourly sums and origins: beyond it, rows become hourly sums early."""
    keep_delivered: PositiveDuration = 7 * _DAY
    """How long rows stay in the ledger after delivery; then they become hourly sums."""
    keep_sums: PositiveDuration = 400 * _DAY
    """How long hourly sums stay."""


class AuditedEnvoy(Section):
    """Where one Envoy's counters are read, or those of all addresses that a name stands for."""

    url: HttpUrl
    """Admin port, or whatever serves /stats/prometheus; without a path, that one."""
    node: Text | None = None
    """Its `node.id`. Unset: as it says itself, or by the address that its log streams come from."""
    count: Literal["logs", "requests"] = "logs"
    """`requests`: where other gRPC loggers share the counters of access logs; else `logs`."""
    managers: tuple[Text, ...] = ()
    """``stat_prefix`` of the connection managers that log to the sinks; empty: all of them."""


def _audited(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


_Audited = Annotated[AuditedEnvoy, BeforeValidator(_audited, json_schema_input_type=HttpUrl | AuditedEnvoy)]


class AuditConfig(Section):
    """Whose counters are compared with ours."""

    envoys: tuple[_Audited, ...] = ()
    """Where Envoys serve /stats/prometheus: a URL, or a mapping."""
    members: tuple[HttpUrl, ...] = ()
    """HTTP addresses of all sinks that share the rows; this one may be among them."""
    token_file: FilePath | None = None
    """Bearer token for the members; by default the one of `listen.http_token_file`."""
    interval: PositiveDuration = 60_000
    """How often the counters are compared."""
    settle: PositiveDuration = 3_000
    """How long nothing may move before it counts as settled: longer than Envoy's buffer_flush_interval."""


class LogConfig(Section):
    """Log lines go to standard output. Those that it does not take at once are dropped and counted."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """What is below it is not written."""
    format: Literal["auto", "json", "console"] = "auto"
    """``auto``: JSON when the output is not a terminal."""


def _typed_meters(value: Any) -> Any:
    """Meters of a known name have a type by default; an unknown name is a mistake."""
    if not isinstance(value, dict):
        return value
    wrong = tuple(
        Wrong(f"no meter is called {name!r}", f"meters are {', '.join(METER_TYPES)}", at=(name,))
        for name in value
        if name not in METER_TYPES
    )
    if wrong:
        raise WrongMany(wrong)
    return {
        name: _meter_defaults(name) | (body or {}) if isinstance(body, dict | None) else body
        for name, body in value.items()
    }


def _meter_defaults(name: str) -> dict[str, str]:
    return {"type": METER_TYPES[name], "unit": _UNITS[name]}


def _default_meters() -> dict[str, MeterConfig]:
    return {name: MeterConfig.model_validate(_meter_defaults(name)) for name in METER_TYPES}


def _default_dimensions() -> dict[str, DimensionConfig]:
    """All seven of the catalog. Envoy knows no Gateway API objects: those come in custom tags."""
    return {
        "region": DimensionConfig(node="locality.region"),
        "gateway": DimensionConfig(custom_tag="gateway"),
        "gateway_namespace": DimensionConfig(custom_tag="gateway_namespace"),
        "gateway_class": DimensionConfig(custom_tag="gateway_class"),
        "httproute_name": DimensionConfig(route_name="^httproute/[^/]+/(?P<value>[^/]+)"),
        "httproute_namespace": DimensionConfig(route_name="^httproute/(?P<value>[^/]+)/"),
        "project_name": DimensionConfig(custom_tag="project_name"),
    }


class Config(Section):
    """Everything the service can be told."""

    listen: ListenConfig = ListenConfig()
    envoy: EnvoyConfig = EnvoyConfig()
    tenant: TenantConfig = TenantConfig()
    dimensions: Mapping[str, DimensionConfig] = Field(default_factory=_default_dimensions)
    """What events say beside the tenant, in the order written."""
    skip: tuple[SkipRule, ...] = ()
    meters: Annotated[Mapping[str, MeterConfig], BeforeValidator(_typed_meters)] = Field(
        default_factory=_default_meters, json_schema_extra={"propertyNames": {"enum": [*METER_TYPES]}}
    )
    windows: WindowsConfig = WindowsConfig()
    streams: StreamsConfig = StreamsConfig()
    store: StoreConfig = StoreConfig()
    outputs: tuple[OutputConfig, ...] = ()
    forward: ForwardConfig | None = None
    """Set for `proxy-usage forward` alone, which needs nothing else but one output."""
    audit: AuditConfig = AuditConfig()
    log: LogConfig = LogConfig()
    workers: Whole = Field(default=1, ge=1, le=64)
    """Processes that share listen.grpc, each with a store of its own beside store.path."""

    def meter_list(self) -> tuple[Meter, ...]:
        """The meters in the order written."""
        return tuple(
            Meter(
                name=name,
                type=meter.type,
                unit=meter.unit,
                quantity=_quantity(name, meter),
                divisor=NS_PER_SECOND if name == "connection_seconds" else 1,
            )
            for name, meter in self.meters.items()
        )

    def fold_plan(self) -> FoldPlan:
        """What decode must read of a row for these rules, dimensions and meters."""
        rules = tuple(rule.field for rule in self.tenant.rules)
        dimensions = tuple(dimension.field for dimension in self.dimensions.values())
        in_origin = (FieldKind.NODE, FieldKind.LITERAL)
        return FoldPlan(
            rules=rules,
            dimensions=tuple(dict.fromkeys(field for field in dimensions if field.kind not in in_origin)),
            node_paths=tuple(
                dict.fromkeys(field.path for field in (*rules, *dimensions) if field.kind is FieldKind.NODE)
            ),
            quantities=tuple(meter.quantity for meter in self.meter_list()),
            window_ms=self.windows.length,
            max_skew_ms=self.windows.max_skew,
            late_horizon_ms=self.windows.late_horizon,
        )

    def worst_case_memory(self) -> int:
        """Bytes that messages take at most: unfinished ones, an eighth more for what arrives before somebody
        looks again, and the one that is being handed over; of all workers together."""
        limits = self.listen.limits.part(self.workers)
        return self.workers * (limits.memory + limits.memory // 8 + limits.message)


def _quantity(name: str, meter: MeterConfig) -> Quantity:
    if name == "requests":
        return Quantity.REQUESTS
    return _QUANTITIES.get((name, meter.bytes)) or _COUNTS[meter.count]
