"""What is wrong, since when, and what to do: for people who have no time to read.

Each problem says first what is the case, then whether anything is lost, then what mends it. The advice is
that of the README's table of reasons and of docs/runbook.md, whose section is named.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from proxy_usage.attribution import Reason
from proxy_usage.page.names import name
from proxy_usage.page.snapshot import OutputFigures, Snapshot

DAY_MS = 86_400_000
LIFE = ("starting", "draining")
"""Readiness reasons that pass by themselves."""
FULL_PERCENT = 80
"""Of its room the store may use so much before somebody should know: as the alert ProxyUsageQueueFilling."""


class Level(StrEnum):
    """How bad it is."""

    FAILING = "failing"  # usage waits where it can be lost, or the sink is not ready
    WARNING = "warning"  # somebody must do something; nothing gets worse meanwhile
    NOTE = "note"  # passes by itself


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    key: str
    """Stays the same for as long as the problem does."""
    level: Level
    title: str
    lost: str
    """What is lost by it."""
    do: str
    runbook: str = ""
    """Heading in docs/runbook.md."""
    since_ms: int | None = None
    """None: when it was first seen."""
    detail: str = ""
    command: str = ""
    private: bool = False
    """``detail`` may name a tenant."""
    waiting: int | None = None
    """The events that ``lost`` says are waiting; None: it does not."""


PAUSED = {
    "unauthorized": "The endpoint does not take our token. Renew the token file; it is read again by itself.",
    "credentials": "The credentials file cannot be used. Put one with a user's JWT and seed in its place.",
    "disk_full": "The archive's disk is full. Take finished files of the archive away.",
    "archive_full": "The archive is as large as it may become. Take finished files of it away.",
    "archive_in_use": "Another process writes the archive; its lock file says which. Give each its own.",
    "not_mounted": "The archive's disk, or its directory, is gone. Mount it; nothing is written elsewhere.",
    "misconfigured": "There is no such address at the endpoint, or it forbids us. Correct the url, then"
    " restart.",
    "redirected": "The endpoint sends us elsewhere, perhaps to a login page. Correct the url, then restart.",
    "tls": "The endpoint's certificate is not trusted, or ours is not. Correct the certificates.",
}
_NOT_THE_ENDPOINT = "What answers there is not the endpoint, or it is broken. Ask who runs it."
FAILING = {
    "connect": "nobody answers at its address",
    "timeout": "no whole answer came in time",
    "broken_answer": "the connection broke off before an answer",
    "throttled": "the endpoint asks us to slow down (429)",
    "server_error": "the endpoint reports an error of its own",
    "unavailable": "the endpoint is not available",
    "stream_full": "the stream is full",
    "io_error": "the archive cannot be written",
    "too_early": "the endpoint asks us to come later (425)",
    "ambiguous": "the endpoint says yes, without saying what it took",
}
DEAD = {
    "not_accepted": "taken with a 200, but not counted: as for a project without an account",
    "refused": "refused alone, while others were taken",
    "too_large": "larger than the endpoint takes",
    "too_late": "older than windows.late_horizon, and not sent any more",
    "salvaged": "out of a damaged store; perhaps delivered already",
    "restored": "out of a backup; perhaps delivered already",
}
"""Reasons of dead letters in words; others are the endpoint's own codes."""
HELD = {
    Reason.NO_TENANT: "Let the route carry the project's metadata, or add a tenant rule.",
    Reason.NO_MATCH: "Correct the rule's pattern.",
    Reason.UNMAPPED: "Add the value to the rule's map file.",
    Reason.INVALID_TENANT: "Correct the value where it is set, or add a rule that maps it.",
    Reason.UUID_TENANT: "Map the identifier to its project's name.",
    Reason.INVALID_UTF8: "Correct the value where it is set.",
    Reason.TOO_LONG: "Correct the value where it is set.",
    Reason.TENANT_LIMIT: "Raise tenant.max_tenants.",
    Reason.NO_OWNER: "No request on these connections had a tenant: look at the other reasons first.",
    Reason.IDENTITY_LIMIT: "One node brings very many values: look at what its rules read.",
    Reason.NO_ROUTE: "Rows without a route: tenant.no_route: skip leaves them out.",
}
_RELOAD = " Send SIGHUP, then run the command."


def command(snapshot: Snapshot, *words: str) -> str:
    """A command line that works from anywhere on the sink's machine."""
    return shlex.join(("proxy-usage", *words, "--config", snapshot.config_file))


def held_advice(reason: str) -> tuple[str, str]:
    """What a reason of held usage means, and what mends it."""
    try:
        known = Reason(reason)
    except ValueError:
        return reason, "See docs/runbook.md."
    return known.meaning, HELD[known] + _RELOAD


def problems(now: Snapshot) -> tuple[Problem, ...]:
    """All of them of one process, in order."""
    return in_order([*of_process(now), *of_usage(now)])


def in_order(found: Iterable[Problem]) -> tuple[Problem, ...]:
    """First whether it starts or stops, then the worst before the others."""
    order = list(Level)
    return tuple(sorted(found, key=lambda problem: (problem.key not in LIFE, order.index(problem.level))))


def of_process(now: Snapshot) -> list[Problem]:
    """What is wrong with one process, its store and its outputs: of several, with one of them."""
    return [*_life(now), *_store(now), *_outputs(now), *_crash(now), *_surroundings(now)]


def of_usage(now: Snapshot) -> list[Problem]:
    """What is wrong with usage: of several processes, with their figures added up."""
    return [*_missing(now), *_stuck(now)]


def _life(now: Snapshot) -> Iterator[Problem]:
    for key, reason in now.reasons.items():
        if key == "starting":
            yield Problem(key, Level.NOTE, "The sink is starting", "Nothing.", "Wait: " + reason + ".")
        elif key == "draining":
            yield Problem(
                key,
                Level.NOTE,
                "The sink is stopping",
                "Nothing: what was read becomes durable, and open windows stay in the store.",
                "Grant it 30 s, and leave it be. This page goes away with it.",
            )
        elif key != "store" and not key.endswith((" paused", " stalled")):
            yield Problem(
                key,
                Level.FAILING,
                f"No sign of life from {key}",
                "Nothing yet.",
                "The machine or its disk is stuck: look at both. A restart rarely mends it.",
                detail=reason,
            )


def _store(now: Snapshot) -> Iterator[Problem]:
    store = now.store
    if "store" in now.reasons:
        yield Problem(
            "store",
            Level.FAILING,
            "The store takes nothing more",
            "Nothing while the process lives: counting goes on in memory. If it ends now, what is only there"
            " is lost.",
            "Do not restart it. Make room on the disk, mend it, or let the endpoint take events; writing is"
            " tried again by itself.",
            "ProxyUsageStoreFailed",
            detail=now.reasons["store"],
        )
    elif _short(now):
        doing = {
            "ledger": "Old lines of the ledger become hourly sums before their time.",
            "merge": "Waiting events are merged within their hour: sums stay exact, minutes are lost.",
            "exhausted": "There is nothing left to merge: soon new usage waits in memory.",
        }
        yield Problem(
            "room",
            Level.WARNING,
            "The store is nearly full",
            "Nothing.",
            "Usually the endpoint does not take events: see the outputs. If the disk is short, make room;"
            " else raise store.max_bytes, which needs a restart.",
            "ProxyUsageQueueFilling",
            detail=doing.get(store.pressure, ""),
        )
    if now.store_error and "store" not in now.reasons:
        yield Problem(
            "store unread",
            Level.WARNING,
            "The store cannot be looked into",
            "Nothing.",
            "Figures out of the store are older than this page. Look at the disk.",
            detail=now.store_error,
        )


def _short(now: Snapshot) -> bool:
    """Whether most of the store's room is used, or already something is done about it."""
    store = now.store
    if store.used is None or store.room is None:
        return False
    return store.pressure != "none" or store.used * 100 >= store.room * FULL_PERCENT


def waiting(count: int) -> str:
    """What is lost where events only wait."""
    return f"Nothing: {count:,} events wait, and go with the bytes they have."


def _outputs(now: Snapshot) -> Iterator[Problem]:
    for output in now.outputs:
        count = output.fates.get("pending", 0)
        shown = name(output.name)
        if output.paused is not None:
            yield Problem(
                f"output {output.name}",
                Level.FAILING,
                f"Output {shown} is paused: {output.paused}",
                waiting(count),
                f"{PAUSED.get(output.paused, _NOT_THE_ENDPOINT)} It is tried again and resumes by itself.",
                "ProxyUsageOutputPaused",
                since_ms=output.paused_ms,
                detail=output.detail,
                private=True,
                waiting=count,
            )
        elif output.failures:
            yield Problem(
                f"output {output.name}",
                Level.FAILING if f"output {output.name} stalled" in now.reasons else Level.WARNING,
                f"Output {shown} delivers nothing: {FAILING.get(output.outcome, output.outcome)}",
                waiting(count),
                f"{_elsewhere(output)} It is tried again by itself (outputs.retry).",
                "ProxyUsageDeliveryStalled",
                detail=output.detail,
                private=True,
                waiting=count,
            )
        elif (stalled := now.reasons.get(f"output {output.name} stalled")) is not None:
            yield Problem(
                f"output {output.name}",
                Level.FAILING,
                f"Output {shown} takes less than comes",
                waiting(count),
                "If events are delivered, only too slowly, raise outputs.concurrency or outputs.batch; it"
                " needs a restart.",
                "ProxyUsageDeliveryStalled",
                since_ms=output.oldest_ms,
                detail=stalled,
                waiting=count,
            )


def _elsewhere(output: OutputFigures) -> str:
    if output.outcome == "throttled":
        return "The endpoint takes what it wants to; the rest waits."
    return f"See whether the endpoint runs and can be reached from here: {output.target or 'its url'}."


def _crash(now: Snapshot) -> Iterator[Problem]:
    if (now.crash_lost or now.crash_unknown) and now.now_ms - now.started_ms < DAY_MS:
        count = sum(now.crash_lost.values())
        unknown = f"{'and ' if count else ''}an unknown number of {now.crash_unknown} nodes"
        parts = [f"{count:,} entries"] * bool(count) + [unknown] * bool(now.crash_unknown)
        yield Problem(
            "crash",
            Level.WARNING,
            f"Entries are missing: the process before this one was killed and lost {' '.join(parts)}",
            "These entries. Their usage is not billed and cannot be brought back.",
            "Find out why it ended: a memory limit, kill -9, a termination grace of less than 30 s.",
            "ProxyUsageCrashLoss",
            since_ms=now.started_ms,
            detail=", ".join(
                f"{name(node)}: {rows:,}" for node, rows in sorted(now.crash_lost.items(), key=_most)[:10]
            ),
        )


def _missing(now: Snapshot) -> Iterator[Problem]:
    for node in now.audit or ():
        if node.state == "missing":
            yield Problem(
                f"audit {node.node}",
                Level.WARNING,
                f"Entries of {name(node.node)} are missing: {node.missing or 0:,} of {node.flushed or 0:,}",
                "These entries, if they do not arrive at another sink. Their usage is not billed.",
                "See whether a sink refused this Envoy, died, or hung: docs/audit.md.",
                "ProxyUsageEntriesMissing",
                since_ms=node.since_ms,
            )


def _most(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _stuck(now: Snapshot) -> Iterator[Problem]:
    by_output: dict[str, list[tuple[int, str]]] = {}
    for group in now.dead:
        by_output.setdefault(group.output, []).append((group.events, group.reason))
    for output, groups in by_output.items():
        count = sum(events for events, _ in groups)
        more = "More than " if now.dead_partial else ""
        yield Problem(
            f"dead {output}",
            Level.WARNING,
            f"{more}{count:,} dead letter{'s' * (count != 1)} of output {name(output)}",
            "Nothing is thrown away, and nothing of it is billed until somebody acts.",
            "Mend the cause, then send them again: see Dead letters below.",
            "ProxyUsageDeadLetters",
            since_ms=min(group.first_ms for group in now.dead if group.output == output),
            detail=", ".join(f"{events:,} {name(reason)}" for events, reason in groups[:5]),
        )
    if now.held:
        rows = sum(group.rows for group in now.held)
        more = "More than " if now.held_partial else ""
        yield Problem(
            "held",
            Level.WARNING,
            f"{more}{rows:,} entr{'y has' if rows == 1 else 'ies have'} no tenant: nobody pays for them yet",
            "Nothing: their usage is held.",
            "Correct the rules, then replay: see Unattributed usage below.",
            "ProxyUsageUnattributed",
            since_ms=min(group.first_ms for group in now.held),
            detail=", ".join(f"{group.rows:,} {name(group.reason)}" for group in now.held[:5]),
        )


def _surroundings(now: Snapshot) -> Iterator[Problem]:
    if now.config_error:
        yield Problem(
            "configuration",
            Level.WARNING,
            "The new configuration was refused; the former one goes on",
            "Nothing.",
            "Correct the file and send SIGHUP again, or restart for keys that cannot change while it runs.",
            "ProxyUsageConfigReloadRefused",
            detail=now.config_error,
            command=command(now, "validate"),
        )
    if now.asides:
        yield Problem(
            "aside",
            Level.WARNING,
            "A damaged store was set aside",
            "What could not be read of it: proxy-usage status says how much.",
            "Look at the dead letters with the reason salvaged, find out what is wrong with the disk, then"
            " move the files elsewhere.",
            "ProxyUsageStoresSetAside",
            command=command(now, "status"),
        )
    for number, remark in enumerate(now.remarks):
        title = "Something is odd about entries"
        yield Problem(f"remark {number}", Level.NOTE, title, "Nothing.", f"{remark}.")
