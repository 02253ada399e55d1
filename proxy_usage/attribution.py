"""Identity → whom the usage is billed to, or why that cannot be known.

Decode tries the tenant rules in order for each row and lets the first one contribute whose value is present
and satisfies the rule (``Attributor.accepts``). Here each *distinct* identity becomes a ``Key`` once:

    value ─ host names normalised ─▶ pattern ─ named group ─▶ map file ─▶ is it a project's name? ─▶ Key
                                        │ no_match               │ unmapped     │ invalid_tenant, …
                                        └────────────────────────┴──────────────┴──▶ Unattributed

A value that a rule accepts and that is no project name stays with that rule: handing it to the next one would
bill somebody else. Everything here is pure and bounded; any bytes give a Key or a reason, never an exception.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from proxy_usage.bulk import Remembered
from proxy_usage.config.models import TenantConfig
from proxy_usage.config.sources import DimensionConfig, RuleConfig
from proxy_usage.model import Field, FieldKind, Identity, Key, Origin

MAX_TENANT = 63
"""Characters of a tenant: it is a DNS label."""
MAX_DIMENSION = 256
"""Characters of a dimension's value; what is longer is cut."""
MAX_TEXT = 4096
"""Characters of a raw value that patterns and maps see: bounds what a client can make an expression cost."""
MAX_HOST = 253
"""Characters of a host name (RFC 1035); a longer one matches no wildcard."""
CACHE = 100_000
"""Identities whose keys are remembered, by default."""
MAX_CACHED = 1024
"""Bytes of raw values up to which an identity is cached: bounds the cache in bytes, too."""

# The endpoint makes the tenant one token of a subject in its log: with a dot in it an event is accepted and
# never read, with a space or a wildcard it is refused for ever.
_TENANT = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# A namespace's UID (or the namespace made from it) where a project's name belongs: it resolves to nobody.
UUID_SHAPED = re.compile(
    r"(ns-)?[0-9a-f]{8}(-?)[0-9a-f]{4}\2[0-9a-f]{4}\2[0-9a-f]{4}\2[0-9a-f]{12}", re.IGNORECASE
)
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ROWLESS = {FieldKind.NODE, FieldKind.LITERAL}
_PORT = re.compile(r"(\[[^\]]*\]|[^:\[\]]*):[0-9]*")


class Reason(StrEnum):
    """Why usage has no tenant: what the held usage is filed under."""

    NO_ROUTE = "no_route"
    NO_TENANT = "no_tenant"
    NO_MATCH = "no_match"
    UNMAPPED = "unmapped"
    INVALID_TENANT = "invalid_tenant"
    UUID_TENANT = "uuid_tenant"
    INVALID_UTF8 = "invalid_utf8"
    TOO_LONG = "too_long"
    TENANT_LIMIT = "tenant_limit"
    NO_OWNER = "no_owner"
    IDENTITY_LIMIT = "identity_limit"

    @property
    def meaning(self) -> str:
        """The reason in words."""
        return _MEANINGS[self]


_MEANINGS = {
    Reason.NO_ROUTE: "no rule matched, and the row names no route",
    Reason.NO_TENANT: "no field that a tenant rule reads is present",
    Reason.NO_MATCH: "a value is present, and its rule's pattern does not match it",
    Reason.UNMAPPED: "a value is present, and its rule's map file does not have it",
    Reason.INVALID_TENANT: "not a project's name: 1 to 63 of a-z, 0-9 and -, neither first nor last a -",
    Reason.UUID_TENANT: "an identifier where a project's name belongs (tenant.allow_uuid lets it pass)",
    Reason.INVALID_UTF8: "the value is not UTF-8",
    Reason.TOO_LONG: f"longer than the {MAX_TENANT} characters of a tenant, or too long to be looked at",
    Reason.TENANT_LIMIT: "one tenant more than tenant.max_tenants within a day",
    Reason.NO_OWNER: "a connection that no attributed request used",
    Reason.IDENTITY_LIMIT: "its node brought more than listen.limits.identities within an hour",
}


class Unattributed(NamedTuple):
    """Usage that is nobody's. ``skip``: not to be held either (``tenant.no_route: skip``)."""

    reason: Reason
    skip: bool = False


class Explained(NamedTuple):
    """One value on its way: what it was read from, what it was and what became of it, in words."""

    name: str
    """Name of the dimension, or ``tenant``."""
    field: str
    """The field as ``Field`` prints it; empty where no rule matched."""
    raw: str
    """As found, undecodable bytes as U+FFFD; empty where absent."""
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """How an identity is attributed, step by step, for a person to read."""

    rule: int
    """Index of the tenant rule that matched, or -1."""
    tenant: Explained
    dimensions: tuple[Explained, ...]
    values: tuple[str, ...]
    """The dimensions' values; known for unattributed usage, too."""
    result: Key | Unattributed


class _Reading(NamedTuple):
    """What a source made of a text: ``value``, unless ``reason`` says why there is none."""

    value: str
    reason: Reason | None = None
    host: str = ""
    """The text as a host name, where it is one."""
    selected: str = ""
    """What the pattern selected."""


class _Found(NamedTuple):
    text: str
    reading: _Reading


class _Tenant(NamedTuple):
    """What became of an identity's value, with what an explanation needs."""

    outcome: str | Unattributed
    text: str
    source: _Source | None = None
    reading: _Reading | None = None


class _Source:
    """A field with its pattern and map, compiled for one purpose: to give a tenant or a dimension."""

    __slots__ = ("_exact", "_group", "_host", "_node", "_regex", "_wild", "field", "plain", "rowless")

    def __init__(
        self, config: RuleConfig | DimensionConfig, group: str, nodes: dict[tuple[str, ...], int]
    ) -> None:
        self.field = config.field
        self._node = (
            nodes.setdefault(self.field.path, len(nodes)) if self.field.kind is FieldKind.NODE else -1
        )
        self._host = self.field.kind in {FieldKind.AUTHORITY, FieldKind.SNI}
        self._regex = config.regex
        self._group = _group(config.regex, group if config.mapping is None else "key")
        self._exact: Mapping[str, str] | None = config.mapping
        self._wild: Mapping[str, str] = {}
        if config.mapping is not None and self._host:
            self._exact = {_host(name): text for name, text in config.mapping.items()}
            self._wild = {name[1:]: text for name, text in self._exact.items() if name.startswith("*.")}
        self.rowless = self.field.kind in _ROWLESS
        """Whether the value is known without the row."""
        self.plain = self._regex is None and self._exact is None
        """Whether any text is a value."""

    def text(self, origin: Origin, found: bytes, errors: str) -> str:
        """What the field holds: in the row, or where no row is needed to know it.

        Raises:
            UnicodeDecodeError: the row's bytes are not UTF-8 and ``errors`` is ``strict``.
        """
        if self._node >= 0:
            return origin.node[self._node] if self._node < len(origin.node) else ""
        if self.field.kind is FieldKind.LITERAL:
            return self.field.path[0]
        return found.decode("utf-8", errors)

    def read(self, text: str) -> _Reading:
        """The value in a text, by way of pattern and map."""
        if not text:
            return _Reading("", Reason.NO_TENANT)
        host = selected = ""
        if self._host:
            text = host = _host(text)
        if self._regex is not None:
            match = self._regex.search(text)
            text = selected = (match[self._group] if match else None) or ""
            if not text:
                return _Reading("", Reason.NO_MATCH, host)
        if self._exact is not None:
            mapped = self._exact.get(text)
            if mapped is None:
                mapped = self._wildcard(text)
            if mapped is None:
                return _Reading("", Reason.UNMAPPED, host, selected)
            text = mapped
        return _Reading(text, None, host, selected)

    def _wildcard(self, host: str) -> str | None:
        """The map's value for the longest ``*.suffix`` of a host name."""
        if not self._wild or len(host) > MAX_HOST:
            return None
        dot = host.find(".", 1)
        while dot >= 0:
            if (found := self._wild.get(host[dot:])) is not None:
                return found
            dot = host.find(".", dot + 1)
        return None

    def words(self, text: str, reading: _Reading) -> tuple[str, ...]:
        """How ``read`` came to its reading."""
        steps: list[str] = []
        if reading.reason is Reason.NO_TENANT:
            return ("absent",)
        if reading.host and reading.host != text:
            steps.append(f"as a host name: {reading.host!r}")
        if self._regex is not None:
            took = f"selects {reading.selected!r}" if reading.selected else "does not match"
            steps.append(f"the pattern {self._regex.pattern!r} {took}")
        if self._exact is not None and reading.reason is not Reason.NO_MATCH:
            key = reading.selected or reading.host or text
            gave = "does not have it" if reading.reason else f"says {reading.value!r}"
            steps.append(f"the map file, asked for {key!r}, {gave}")
        return tuple(steps)


@dataclass(frozen=True, slots=True)
class _Dimension:
    name: str
    source: _Source
    default: str
    index: int
    """Into ``Identity.dimensions``; -1 for what is known without the row."""

    def read(self, identity: Identity) -> _Found:
        raw = identity.dimensions[self.index] if 0 <= self.index < len(identity.dimensions) else b""
        text = self.source.text(identity.origin, raw, "replace")[:MAX_TEXT]
        return _Found(text, self.source.read(text))

    def value(self, found: _Found) -> str:
        return self.default if found.reading.reason else _printable(found.reading.value)


class Attributor:
    """Turns identities into keys; pure, but for a bounded cache.

    Indices follow ``Config.fold_plan()``: rules in the order of the configuration, node paths and the
    dimensions' distinct per-row fields in the order of their first use, rules first. ``rules``, ``fields``
    (the dimensions') and ``node_paths`` say what they stand for.
    """

    def __init__(
        self, tenant: TenantConfig, dimensions: Mapping[str, DimensionConfig], *, cache: int = CACHE
    ) -> None:
        nodes: dict[tuple[str, ...], int] = {}
        self._rules = tuple(_Source(rule, "tenant", nodes) for rule in tenant.rules)
        self.rules = tuple(source.field for source in self._rules)
        self.rule_names = tuple(f"{index} {rule}" for index, rule in enumerate(tenant.rules))
        """The rules as the configuration writes them, each behind its index."""
        fields: dict[Field, int] = {}
        self.plain_rules = frozenset(n for n, source in enumerate(self._rules) if source.plain)
        """Rules that accept any value."""
        self._dimensions = tuple(
            _Dimension(
                name,
                _Source(config, "value", nodes),
                _printable(config.default),
                -1 if config.field.kind in _ROWLESS else fields.setdefault(config.field, len(fields)),
            )
            for name, config in dimensions.items()
        )
        self.fields, self.node_paths = tuple(fields), tuple(nodes)
        self._allow_uuid = tenant.allow_uuid
        self._skip_no_route = tenant.no_route == "skip"
        self._cache: Remembered[Identity, Key | Unattributed] = Remembered(cache)

    def accepts(self, rule: int, text: str) -> bool:
        """Whether a present value satisfies the pattern and the map of a rule, so that the rule matches.

        Not whether it is a tenant: a value that a rule accepts and that is none is held, not passed on.
        """
        source = self._rules[rule]
        if source.plain:
            return bool(text)
        return len(text) <= MAX_TEXT and source.read(text).reason is None

    def attribute(self, identity: Identity, digest: int | None = None) -> Key | Unattributed:
        """Whom the usage is billed to, or why nobody is. ``digest``: the identity's hash, if known."""
        known = self._cache.shards
        found = known.parts[(hash(identity) if digest is None else digest) & known.mask].get(identity)
        if found is None:
            outcome = self._tenant(identity).outcome
            if isinstance(outcome, Unattributed):
                found = outcome
            else:
                found = Key(outcome, tuple(part.value(part.read(identity)) for part in self._dimensions))
            if len(identity.value) + sum(map(len, identity.dimensions)) <= MAX_CACHED:
                self._cache.put(identity, found)
        return found

    def explain(self, identity: Identity) -> Explanation:
        """How ``attribute`` comes to its answer; never cached."""
        found = self._tenant(identity)
        steps: tuple[str, ...] = ()
        if found.source is not None and found.reading is not None:
            steps = found.source.words(found.text, found.reading)
        if isinstance(found.outcome, Unattributed):
            steps = (*steps, f"{found.outcome.reason}: {found.outcome.reason.meaning}")
        field = "" if found.source is None else str(found.source.field)
        tenant = Explained("tenant", field, found.text, steps)
        dimensions: list[Explained] = []
        values: list[str] = []
        for part in self._dimensions:
            text, reading = part.read(identity)
            values.append(part.value(_Found(text, reading)))
            steps = part.source.words(text, reading)
            if reading.reason:
                steps = (*steps, f"the default {part.default!r}")
            dimensions.append(Explained(part.name, str(part.source.field), text, steps))
        result: Key | Unattributed
        if isinstance(found.outcome, Unattributed):
            result = found.outcome
        else:
            result = Key(found.outcome, tuple(values))
        return Explanation(identity.rule, tenant, tuple(dimensions), tuple(values), result)

    def _tenant(self, identity: Identity) -> _Tenant:
        if not 0 <= identity.rule < len(self._rules):
            return self._unmatched(identity)
        source = self._rules[identity.rule]
        try:
            text = source.text(identity.origin, identity.value, "strict")
        except UnicodeDecodeError:
            return _Tenant(Unattributed(Reason.INVALID_UTF8), _lossy(identity.value), source)
        if len(text) > MAX_TEXT:
            return _Tenant(Unattributed(Reason.TOO_LONG), text[:MAX_TEXT], source)
        reading = source.read(text)
        reason = reading.reason or self._why_invalid(reading.value)
        return _Tenant(Unattributed(reason) if reason else reading.value, text, source, reading)

    def _why_invalid(self, tenant: str) -> Reason | None:
        if not self._allow_uuid and UUID_SHAPED.fullmatch(tenant):
            return Reason.UUID_TENANT
        if len(tenant) > MAX_TENANT:
            return Reason.TOO_LONG
        return None if _TENANT.fullmatch(tenant) else Reason.INVALID_TENANT

    def _unmatched(self, identity: Identity) -> _Tenant:
        """No rule took the row: its value is that of the first rule whose field was present."""
        lossy = _lossy(identity.value)
        if not identity.routed:
            return _Tenant(Unattributed(Reason.NO_ROUTE, skip=self._skip_no_route), lossy)
        if not identity.value:
            return _Tenant(Unattributed(Reason.NO_TENANT), lossy)
        try:
            text = identity.value.decode("utf-8")
        except UnicodeDecodeError:
            return _Tenant(Unattributed(Reason.INVALID_UTF8), lossy)
        if len(text) > MAX_TEXT:
            return _Tenant(Unattributed(Reason.TOO_LONG), lossy)
        # Which rule that was is not recorded: the first that would refuse the value names the reason.
        for source in self._rules:
            if source.rowless and source.text(identity.origin, b"", "replace") != text:
                continue
            reading = source.read(text)
            if reading.reason is not None:
                return _Tenant(Unattributed(reading.reason), text, source, reading)
        return _Tenant(Unattributed(Reason.NO_MATCH), text)


def _group(regex: re.Pattern[str] | None, preferred: str) -> str | int:
    """The group that selects the text: the preferred one, else the first named one, else the whole match."""
    if regex is None or not regex.groupindex:
        return 0
    return (
        preferred
        if preferred in regex.groupindex
        else min(regex.groupindex, key=regex.groupindex.__getitem__)
    )


def _host(text: str) -> str:
    """A host name as maps and patterns see it: lower case, without port and trailing dot."""
    with_port = _PORT.fullmatch(text)
    return (with_port[1] if with_port else text).removesuffix(".").lower()


def _lossy(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")[:MAX_TEXT]


def _printable(text: str) -> str:
    """A dimension's value as it may go into an event: no control characters, bounded."""
    return _UNPRINTABLE.sub("\ufffd", text[:MAX_DIMENSION])
