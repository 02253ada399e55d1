"""What differs between two configurations, and what of it a running service can take over (SIGHUP)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from proxy_usage.config.models import Config

RELOADABLE = frozenset(
    {
        "tenant.rules",
        "tenant.allow_uuid",
        "tenant.no_route",
        "tenant.max_tenants",
        "tenant.unattributed.max_identities",
        "dimensions.*",
        "skip",
        "listen.tls.cert_file",
        "listen.tls.key_file",
        "listen.tls.client_ca_file",
        "listen.tls.allow_san",
        "listen.tls.node_from_san",
        "listen.token_file",
        "listen.http_token_file",
        "outputs.*.token_file",
        "outputs.*.password_file",
        "outputs.*.ca_file",
        "outputs.*.cert_file",
        "outputs.*.key_file",
        "log",
    }
)
"""Keys that can change while the service runs, with all below them; ``*`` is any one name.

The names of the dimensions are not among them: windows that are open have their values by position. Nor is
``listen.tls`` itself, which is what changed when TLS, or the demand for client certificates, came or went.
"""


def changed(old: Config, new: Config) -> tuple[str, ...]:
    """The dotted keys that differ; outputs by name. A map file whose contents changed is a change too."""
    keys = _differences(old, new, "")
    before, after = old.listen.tls, new.listen.tls
    if before and after and (before.client_ca_file is None) != (after.client_ca_file is None):
        keys = [key for key in keys if not key.startswith("listen.tls.")] + ["listen.tls"]
    return tuple(keys)


def needs_restart(keys: Iterable[str]) -> tuple[str, ...]:
    """Those of ``keys`` (from ``changed``) that a running service cannot take over."""
    return tuple(key for key in keys if not any(_covers(pattern, key) for pattern in RELOADABLE))


def _differences(old: Any, new: Any, key: str) -> list[str]:
    if isinstance(old, BaseModel) and isinstance(new, BaseModel):
        below = _below(_fields(old), _fields(new), key)
        if below or old == new:
            return below
        return [key]  # the fields are equal: the contents of a map file differ
    named_old, named_new = _by_name(old), _by_name(new)
    if named_old is not None and named_new is not None:
        same_names = list(named_old) == list(named_new)  # in order: dimensions are stored by position
        return _below(named_old, named_new, key) if same_names else [key]
    return [] if old == new else [key]


def _below(old: Mapping[str, Any], new: Mapping[str, Any], key: str) -> list[str]:
    prefix = f"{key}." if key else ""
    return [
        difference for name in old for difference in _differences(old[name], new[name], f"{prefix}{name}")
    ]


def _fields(model: BaseModel) -> dict[str, Any]:
    return {field.alias or name: getattr(model, name) for name, field in type(model).model_fields.items()}


def _by_name(value: Any) -> Mapping[str, Any] | None:
    """Items by name, for mappings and for the outputs, which carry their names; None for all else."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, tuple) and all(hasattr(item, "name") for item in value):
        return {item.name: item for item in value}
    return None


def _covers(pattern: str, key: str) -> bool:
    wanted, parts = pattern.split("."), key.split(".")
    return len(parts) >= len(wanted) and all(
        want in ("*", part) for want, part in zip(wanted, parts, strict=False)
    )
