"""``proxy-usage unattributed``: usage that has no tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy_usage.cli.options import ConfigOption, JsonOption, LimitOption, load_config, reading_config
from proxy_usage.cli.repair import repaired, when
from proxy_usage.cli.show import Cell, emit, lossy, moment, table

if TYPE_CHECKING:
    from proxy_usage.model import FoldPlan
    from proxy_usage.store.views import HeldUsage

unattributed = typer.Typer(help="Usage that has no tenant.", no_args_is_help=True)


@unattributed.command("ls")
def ls(config: ConfigOption = None, limit: LimitOption = 100, as_json: JsonOption = False) -> None:
    """List what is held: per UTC hour, reason and raw identity."""
    from proxy_usage.cli.stores import opened

    loaded = reading_config(config)
    with opened(loaded) as stores:
        held = stores.listed(lambda reader: reader.unattributed(limit), limit)
    plan = loaded.fold_plan()
    shown = [_shown(one, plan) | stores.mark(worker) for worker, one in held]
    if as_json:
        emit({"unattributed": shown})
        return
    meters = list(dict.fromkeys(name for _, one in held for name in one.amounts))
    rows = [
        {**_row(one, meters), **stores.mark(worker)} for (worker, _), one in zip(held, shown, strict=True)
    ]
    table(rows, empty="nothing is held")


@unattributed.command("replay")
def replay(
    config: ConfigOption = None,
    reason: Annotated[
        str | None, typer.Option("--reason", metavar="REASON", help="Held for this reason only.")
    ] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", metavar="ID", help="Only this one, at whatever hour; repeatable."),
    ] = None,
    redate: Annotated[
        bool, typer.Option("--redate", help="What is too old for the endpoint goes into the present window.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run held usage through the present tenant rules.

    What has a tenant now becomes events of its own hour; the rest stays held. A running service applies the
    rules it runs with (SIGHUP takes over new ones).
    """
    from proxy_usage.cli.stores import opened

    loaded = load_config(config)
    wanted = list(dict.fromkeys(ids or []))
    done = repaired(
        loaded,
        "unattributed.replay",
        {"ids": wanted, "reason": reason, "redate": redate},
        lambda repairs, some: repairs.release(some, reason, redate=redate),
        ids=wanted,
        knows=lambda reader, one: reader.holds(one),
        minting=True,
    )
    counts = done.counts
    if as_json:
        emit(counts | {"service": done.service})
        return
    if not any(counts.values()):
        with opened(loaded) as stores:
            others = stores.other_reasons(lambda reader: reader.held_reasons(), reason)
        if others:
            print(f"nothing is held for this reason; there are: {others}")
            return
    released = counts.get("released", 0)
    print(
        f"{released} of what was held have a tenant now: {counts.get('minted', 0)} events; {when(done)}"
        if released
        else "nothing of what is held has a tenant"
    )
    for name, words in _LEFT.items():
        if counts.get(name):
            print(f"{counts[name]} stay held: {words}")


_LEFT = {
    "unattributed": "the present rules name nobody",
    "too_late": "too old for the endpoint; --redate puts them into the present window",
    "lost": "of identities past tenant.unattributed.max_identities, whose rows nobody knows any more",
}


def _shown(held: HeldUsage, plan: FoldPlan) -> dict[str, Any]:
    """What is held, with the fields that the present configuration reads at its places."""
    identity = held.identity
    shown: dict[str, Any] = {
        "id": held.id,
        "hour_ms": held.hour_ms,
        "reason": held.reason,
        "overflow": identity is None,
        "node": None,
        "log_name": None,
        "rule": None,
        "field": None,
        "value": None,
        "dimensions": [],
        "rows": held.rows,
        "amounts": dict(held.amounts),
        "first_ms": held.first_ms,
        "last_ms": held.last_ms,
    }
    if identity is not None:
        named = len(plan.dimensions) == len(identity.dimensions)
        matched = 0 <= identity.rule < len(plan.rules)
        shown |= {
            "node": identity.origin.node_id,
            "log_name": identity.origin.log_name,
            "rule": identity.rule if identity.rule >= 0 else None,
            "field": str(plan.rules[identity.rule]) if matched else None,
            "value": lossy(identity.value),
            "dimensions": [
                {"field": str(plan.dimensions[index]) if named else None, "value": lossy(raw)}
                for index, raw in enumerate(identity.dimensions)
            ],
        }
    return shown


def _row(one: dict[str, Any], meters: list[str]) -> dict[str, Cell]:
    dimensions = [entry for entry in one["dimensions"] if entry["value"]]
    matched = None if one["rule"] is None else f"{one['rule']} {one['field'] or ''}".strip()
    return {
        "id": one["id"],
        "hour": moment(one["hour_ms"]),
        "reason": one["reason"],
        "node": "(identities past their bound)" if one["overflow"] else one["node"],
        "log": one["log_name"],
        "rule": matched,
        "value": one["value"],
        "dimensions": " ".join(f"{entry['field'] or '?'}={entry['value']}" for entry in dimensions),
        "rows": one["rows"],
        **{name: one["amounts"].get(name, 0) for name in meters},
    }
