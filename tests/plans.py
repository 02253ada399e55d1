"""Folds under every kind of plan and setting, for tests that compare the two implementations."""

from __future__ import annotations

import re

from folding import EVERYTHING, LONG, Both, plan

from proxy_usage.decode import EnvoySettings, SkipTest
from proxy_usage.model import Field, FieldKind, Origin, Quantity

FIELDS = (
    Field(FieldKind.CUSTOM_TAG, ("project_name",)),
    Field(FieldKind.DYNAMIC_METADATA, ("datum", "project", "name")),
    Field(FieldKind.REQUEST_HEADER, ("x-project",)),
    Field(FieldKind.ROUTE_NAME),
    Field(FieldKind.AUTHORITY),
    Field(FieldKind.SNI),
    Field(FieldKind.NODE, ("cluster",)),
    Field(FieldKind.LITERAL, ("fixed",)),
)
SKIP = (
    SkipTest("not_found", status=frozenset({404}), flag=re.compile("NR|UAEX")),
    SkipTest("unrouted", flag=re.compile(".*F")),
    SkipTest("direct", details=re.compile("direct_.*"), method=re.compile("GET|")),
    SkipTest("web", route=re.compile("we."), log_name=re.compile("http")),
)
ORIGINS = (
    Origin("peer", "envoy-1", "http", ("gateway",), "10.0.0.1"),
    Origin("peer", "envoy-1", "http", ("gateway",), "10.0.0.2"),
    Origin("", "envoy-2", "conn", ("-",)),
)
KINDS = ("everything", "long", "refusing", "skipping", "short", "old", "few", "connections")


def fold_of(kind: str) -> Both:
    """A fold of a kind, and its reference beside it."""
    wide = plan(
        rules=FIELDS,
        dimensions=(*FIELDS[:6], Field(FieldKind.CUSTOM_TAG, ("region",))),
        node_paths=(("cluster",),),
        quantities=(*EVERYTHING, Quantity.UPGRADED_NS),
    )
    match kind:
        case "everything":
            return Both(wide, accepts=lambda _rule, _text: True, envoy=EnvoySettings(), plain=range(8))
        case "long":
            return Both(plan(window_ms=1_000), accepts=lambda _rule, text: "a" in text, envoy=LONG)
        case "refusing":
            return Both(wide, accepts=lambda rule, text: rule > 2 and len(text) > 3, envoy=LONG)
        case "skipping":
            return Both(wide, accepts=lambda rule, _text: rule == 3, envoy=LONG, skip=SKIP, plain=[3])
        case "short":
            settings = EnvoySettings(flush_interval_ms=60_000, short_only=True)
            return Both(plan(), accepts=lambda _rule, _text: False, envoy=settings)
        case "old":
            settings = EnvoySettings(untyped="end", connection_logs=frozenset())
            return Both(plan(dimensions=FIELDS[:1]), accepts=lambda _rule, _text: True, envoy=settings)
        case "few":
            return Both(
                plan(rules=(), quantities=(Quantity.REQUESTS,), late_horizon_ms=3_600_000),
                accepts=lambda _rule, _text: True,
                envoy=EnvoySettings(),
            )
        case _:
            settings = EnvoySettings(flush_interval_ms=60_000, connections=True)
            return Both(wide, accepts=lambda _rule, _text: True, envoy=settings, plain=range(8))
