"""Mistakes that only show when keys are seen together, each found without touching anything.

Every check takes the configuration and yields what is wrong; ``check`` runs them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from proxy_usage.config.fields import is_loopback, split_address
from proxy_usage.config.mistakes import Finding, Loc
from proxy_usage.config.models import METER_TYPES, Config
from proxy_usage.config.output_checks import output_findings
from proxy_usage.config.place_checks import archive_places, store_place
from proxy_usage.config.sources import RuleConfig
from proxy_usage.config.units import format_duration, format_size
from proxy_usage.model import FieldKind

_HOUR = 3_600_000
_LATEST = 30 * 24 * _HOUR
_DELIVERY = 600_000
"""What an event must have to get out before it is too late: /readyz calls an output stalled after as long."""
MIN_STORE = 1 << 20
"""Below, a store holds little more than its empty tables: it would exceed what it may have."""
_INT32 = (1 << 31) - 1
_FRAME = (1 << 14, (1 << 24) - 1)
"""Least and greatest SETTINGS_MAX_FRAME_SIZE: RFC 9113, 6.5.2."""
MAX_DIMENSIONS = 32
"""A metric of the service catalog declares no more."""
_DIMENSION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}", re.ASCII)


def check(config: Config, *, files: bool = True) -> Iterator[Finding]:
    """Every mistake there is between the keys of ``config``, whose single values are right.

    Args:
        files: whether to look also at the directories that are written to.
    """
    for one in (
        _addresses,
        _plaintext,
        _tenants_named,
        _tls,
        _limits,
        _envoy,
        _rules,
        _dimensions,
        _meters,
        _windows,
        _streams,
        _store,
        output_findings,
        _forward,
        _workers,
        *((store_place, archive_places) if files else ()),
    ):
        yield from one(config)


def _addresses(config: Config) -> Iterator[Finding]:
    listen = config.listen
    seen: dict[tuple[str, int], str] = {}
    for name in ("grpc", "streams", "http"):
        address = getattr(listen, name)
        if address is None or split_address(address)[1] == 0:
            continue
        other = seen.setdefault(split_address(address), name)
        if other != name:
            yield Finding(
                ("listen", name),
                f"{address} is listen.{other} already",
                "give each listener its own port",
                concerns=(("listen", other),),
            )


def _plaintext(config: Config) -> Iterator[Finding]:
    listen = config.listen
    if listen.insecure:
        return
    for name in ("grpc", "streams", "http"):
        address = getattr(listen, name)
        if address is None or is_loopback(address) or (name != "http" and listen.tls is not None):
            continue
        way = "set" if name == "http" else "set listen.tls, or"
        yield Finding(
            ("listen", name),
            f"{address} is plaintext that other machines can reach",
            f"{way} listen.insecure: true if the network is trusted, or listen on 127.0.0.1",
            concerns=(("listen", "insecure"), ("listen", "tls")),
        )


def _tenants_named(config: Config) -> Iterator[Finding]:
    listen = config.listen
    if listen.http_tenants and listen.http_token_file is None and not is_loopback(listen.http):
        yield Finding(
            ("listen", "http_tenants"),
            f"tenants would be named to everybody who reaches {listen.http}",
            "give listen.http_token_file, or listen on 127.0.0.1",
            concerns=(("listen", "http_token_file"), ("listen", "http")),
        )


def _tls(config: Config) -> Iterator[Finding]:
    tls = config.listen.tls
    if tls is None:
        return
    place = ("listen", "tls")
    for name, other in (("cert_file", "key_file"), ("key_file", "cert_file")):
        if getattr(tls, name) is None:
            yield Finding(
                (*place, name),
                "is missing",
                f"TLS needs both: give {name} beside {other}"
                if getattr(tls, other)
                else f"give {name} and {other}",
            )
    exposed = [
        name
        for name in ("grpc", "streams")
        if (address := getattr(config.listen, name)) is not None and not is_loopback(address)
    ]
    if exposed and tls.client_ca_file is None and not (config.listen.token_file or config.listen.insecure):
        yield Finding(
            (*place, "client_ca_file"),
            f"is missing, so anybody who reaches listen.{exposed[0]} may send rows, and bill",
            "give client_ca_file (or listen.token_file), or listen.insecure: true if the network is trusted",
            concerns=(("listen", "token_file"), ("listen", "insecure")),
        )
    for name, value in (("allow_san", tls.allow_san), ("node_from_san", tls.node_from_san)):
        if value and tls.client_ca_file is None:
            yield Finding(
                (*place, name),
                "reads client certificates, but none are asked for",
                "give client_ca_file too",
                concerns=((*place, "client_ca_file"),),
            )


def _limits(config: Config) -> Iterator[Finding]:
    limits = config.listen.limits
    place = ("listen", "limits")
    message, window = format_size(limits.message), format_size(limits.window)
    sound = limits.message <= _INT32 and _FRAME[0] <= limits.window <= _FRAME[1]
    if limits.message > _INT32:
        yield Finding((*place, "message"), "is more than gRPC can take", "use at most 2047MiB")
    if not _FRAME[0] <= limits.window <= _FRAME[1]:
        yield Finding(
            (*place, "window"),
            f"{window} is not between 16KiB and 16777215 bytes, as HTTP/2 demands",
            "use 1MiB",
        )
    part = limits.part(config.workers)
    if sound and part.needed() > part.memory:
        of = f" of each of {config.workers} workers" if config.workers > 1 else ""
        yield Finding(
            (*place, "memory"),
            f"{format_size(part.memory)}{of} is less than the {format_size(part.needed())} that senders may"
            f" need at once: ({part.new_streams} new_streams + 1) × {message} message"
            f" + {limits.connections} connections × {window} window",
            "raise memory, or lower one of the others",
            concerns=(
                *((*place, name) for name in ("new_streams", "message", "connections", "window")),
                ("workers",),
            ),
        )
    if limits.headers > 1 << 20:
        yield Finding((*place, "headers"), "is more than any sender needs", "use 16KiB; at most 1MiB")


def _envoy(config: Config) -> Iterator[Finding]:
    if config.listen.streams is not None and config.envoy.flush_interval is None:
        yield Finding(
            ("listen", "streams"),
            "is for rows of long streams, but envoy.flush_interval is off",
            "set envoy.flush_interval to Envoy's access_log_flush_interval, or remove listen.streams",
            concerns=(("envoy", "flush_interval"),),
        )
    if config.envoy.long_streams == "elsewhere":
        if config.listen.streams is not None:
            yield Finding(
                ("envoy", "long_streams"),
                "says that another process owns long streams, but listen.streams is their port here",
                "remove one of the two: exactly one process owns them",
                concerns=(("listen", "streams"),),
            )
        elif config.envoy.flush_interval is None:
            yield Finding(
                ("envoy", "long_streams"),
                "is elsewhere, but envoy.flush_interval is off: nobody can say which rows are long",
                "set envoy.flush_interval to Envoy's access_log_flush_interval",
                concerns=(("envoy", "flush_interval"),),
            )


def _rules(config: Config) -> Iterator[Finding]:
    rules = config.tenant.rules
    if not rules:
        yield Finding(("tenant", "rules"), "is empty: nobody would be billed", "add a rule, e.g. custom_tag")
    for index, rule in enumerate(rules):
        for before, earlier in enumerate(rules[:index]):
            what = _hides(earlier, rule)
            if what:
                yield Finding(
                    ("tenant", "rules", index),
                    f"is never reached: {what}",
                    "remove one of the two, or put this one first",
                    concerns=(("tenant", "rules", before),),
                )
                break


def _hides(earlier: RuleConfig, rule: RuleConfig) -> str:
    """Why ``rule`` can never match behind ``earlier``; empty when it can."""
    if earlier.field.kind is FieldKind.LITERAL:
        return "the literal of {other} always matches"
    if earlier.field != rule.field:
        return ""
    if _pattern(earlier) == _pattern(rule) and earlier.mapping == rule.mapping:
        return "it repeats {other}"
    if earlier.regex is None and earlier.mapping is None:
        return "{other} takes every value of the same source"
    return ""


def _pattern(rule: RuleConfig) -> str | None:
    return rule.regex.pattern if rule.regex else None


def _dimensions(config: Config) -> Iterator[Finding]:
    for name in config.dimensions:
        if not _DIMENSION.fullmatch(name):
            yield Finding(
                ("dimensions", name),
                f"{name!r} cannot name a dimension",
                "use letters, digits and '_', at most 63, e.g. gateway_class",
            )
    if len(config.dimensions) > MAX_DIMENSIONS:
        yield Finding(
            ("dimensions",),
            f"has {len(config.dimensions)} dimensions",
            f"the service catalog allows {MAX_DIMENSIONS}",
        )


def _meters(config: Config) -> Iterator[Finding]:
    if not config.meters:
        yield Finding(
            ("meters",), "is empty: nothing would be metered", f"meters are {', '.join(METER_TYPES)}"
        )
    types: dict[str, str] = {}
    for name, meter in config.meters.items():
        place = ("meters", name)
        other = types.setdefault(meter.type, name)
        if other != name:
            yield Finding(
                (*place, "type"),
                f"meters.{other} has this type already: the two would be added up",
                "give each meter its own type",
                concerns=(("meters", other, "type"),),
            )
        for key in foreign_keys(name):
            if key in meter.model_fields_set:
                yield Finding((*place, key), f"says nothing about {name}", "remove it")
        if not _unit_fits(name, meter.unit):
            yield Finding(
                (*place, "unit"),
                f"{meter.unit!r} is not what {name} is counted in",
                "By for bytes, s for seconds, {request} or 1 for requests; the endpoint does not convert",
            )


def foreign_keys(meter: str) -> tuple[str, ...]:
    """The keys of a meter that say nothing about ``meter``."""
    if meter == "connection_seconds":
        return ("bytes",)
    return ("count",) if meter.endswith("_bytes") else ("bytes", "count")


def _unit_fits(name: str, unit: str) -> bool:
    if name == "requests":
        return unit == "1" or (unit.startswith("{") and unit.endswith("}"))
    return unit == ("s" if name == "connection_seconds" else "By")


def _windows(config: Config) -> Iterator[Finding]:
    windows = config.windows
    length: Loc = ("windows", "length")
    if _HOUR % windows.length or windows.length % 1_000:
        yield Finding(
            length,
            f"{format_duration(windows.length)} does not divide an hour into whole seconds",
            "use 10s, 15s, 30s, 1m, 5m, 15m, 1h or the like",
        )
    if windows.checkpoint > windows.length:
        yield Finding(
            ("windows", "checkpoint"),
            f"{format_duration(windows.checkpoint)} is longer than a window",
            f"use at most {format_duration(windows.length)}; 250ms is the default",
            concerns=(length,),
        )
    if windows.late_horizon >= _LATEST:
        yield Finding(
            ("windows", "late_horizon"),
            f"{format_duration(windows.late_horizon)} is too long: the endpoint takes nothing 30 days old",
            "use at most 29d",
        )
    # From the beginning of a window to its last event: until all its keys are closed, and once more for rows
    # that were late for that.
    made = windows.length + windows.grace + windows.length // 4 + windows.reopen
    if config.forward is None and windows.late_horizon < made + _DELIVERY:
        yield Finding(
            ("windows", "late_horizon"),
            f"{format_duration(windows.late_horizon)} is too short: a window's events are made up to"
            f" {format_duration(made)} after it began, and need time to be delivered",
            f"use at least {format_duration(made + _DELIVERY)}; 29d is the default",
            concerns=(length, ("windows", "grace"), ("windows", "reopen")),
        )


def _streams(config: Config) -> Iterator[Finding]:
    interval, streams = config.envoy.flush_interval, config.streams
    if interval is not None and streams.remember < interval * streams.expire:
        yield Finding(
            ("streams", "remember"),
            f"{format_duration(streams.remember)} is shorter than the silence after which a stream expires",
            f"use at least {format_duration(interval * streams.expire)}; 30d is the default",
            concerns=(("envoy", "flush_interval"), ("streams", "expire")),
        )


def _store(config: Config) -> Iterator[Finding]:
    least, each = config.workers * MIN_STORE, ", 1MiB for each worker" if config.workers > 1 else ""
    if config.forward is None and config.store.max_bytes < least:
        yield Finding(
            ("store", "max_bytes"),
            f"{format_size(config.store.max_bytes)} holds no more than empty tables",
            f"use at least {format_size(least)}{each}; 8GiB is the default",
            concerns=(("workers",),),
        )
    if config.store.ledger_max_bytes > config.store.max_bytes:
        yield Finding(
            ("store", "ledger_max_bytes"),
            "is more than the whole store may have",
            "use less than store.max_bytes",
            concerns=(("store", "max_bytes"),),
        )


def _forward(config: Config) -> Iterator[Finding]:
    if config.forward is None or not config.outputs:
        return
    output = config.outputs[0]
    if len(config.outputs) > 1:
        yield Finding(
            ("outputs", 1),
            "is one too many for a forwarder",
            "run a forwarder for each output, with a durable of its own",
        )
    if output.format in ("file", "nats", "none"):
        yield Finding(
            ("outputs", 0, "format"),
            f"{output.format!r} is nothing that a forwarder can deliver to",
            "name a format that is sent over HTTP",
        )
    if 4 * config.forward.ack_wait > output.dedup_window:
        yield Finding(
            ("forward", "ack_wait"),
            f"{format_duration(config.forward.ack_wait)} is more than a quarter of {{other}}",
            "an event of a forwarder that died must come again while the endpoint remembers it: lower it",
            concerns=(("outputs", 0, "dedup_window"),),
        )


def _workers(config: Config) -> Iterator[Finding]:
    """What several processes cannot do apart: the kernel gives a connection to whichever it likes."""
    if config.workers == 1:
        return
    envoy, place = config.envoy, ("workers",)
    if envoy.flush_interval is not None and envoy.long_streams == "here" and config.listen.streams is None:
        yield Finding(
            place,
            f"{config.workers} workers share listen.grpc, but rows of a long stream must meet at one",
            "set listen.streams, which worker 0 alone serves, or envoy.long_streams: elsewhere",
            concerns=(("envoy", "flush_interval"), ("envoy", "long_streams"), ("listen", "streams")),
        )
    for name, meter in config.meters.items():
        if name == "connection_seconds" and meter.count == "connections":
            yield Finding(
                place,
                f"{config.workers} workers share listen.grpc, but rows of a connection must meet at one",
                "write 1, or another meters.connection_seconds.count",
                concerns=(("meters", name, "count"),),
            )
