"""The one document: what is wrong in words, who may see what, and how large it may become."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy_usage.attribution import Reason
from proxy_usage.page.document import NODES, PROBLEMS, document
from proxy_usage.page.problems import DEAD, FAILING, HELD, PAUSED, Level, problems
from proxy_usage.page.ring import LEVELS, POINTS, RATES, History
from proxy_usage.page.snapshot import (
    NodeAudit,
    NodeFigures,
    OutputFigures,
    Snapshot,
    StoreFigures,
    TenantFigures,
    TopFigures,
    WeekFigures,
)
from proxy_usage.store.glance import DeadGroup, HeldGroup, HeldTop

NOW = 1_800_000_000_000
ROOT = Path(__file__).parents[2]
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
WELL = Snapshot(
    now_ms=NOW,
    started_ms=NOW - 3_600_000,
    version="1",
    host="sink-0",
    config_file="/etc/proxy usage.yaml",
    settings=(("listen.grpc", "127.0.0.1:9001"),),
    reasons={},
    store=StoreFigures("usage.db", 100, 50, 1_000, 2_000, 10),
    figures_ms=NOW,
    nodes=(NodeFigures("envoy-1", 100, 60),),
    outputs=(OutputFigures("billing", "billing", "host:1", {"pending": 3, "delivered": 9}),),
)
OUTPUT = WELL.outputs[0]


def headline(now: Snapshot) -> tuple[str, str]:
    state = document(now, tenants=True)["state"]
    return state["word"], state["text"]


def test_all_is_well() -> None:
    assert headline(WELL) == ("ok", "All is well")
    assert problems(WELL) == ()


def test_nothing_has_arrived_yet() -> None:
    assert headline(replace(WELL, nodes=())) == ("waiting", "Nothing has arrived yet")


CASES: dict[str, tuple[Snapshot, str, str]] = {
    "starting": (
        replace(WELL, reasons={"starting": "not all ports are open yet"}),
        "starting",
        "is starting",
    ),
    "draining": (replace(WELL, reasons={"draining": "the service is stopping"}), "draining", "is stopping"),
    "stuck": (
        replace(WELL, reasons={"turns": "no sign of life for 31 s"}),
        "failing",
        "No sign of life from turns",
    ),
    "full": (replace(WELL, reasons={"store": "store full: …"}), "failing", "takes nothing more"),
    "near full": (replace(WELL, store=replace(WELL.store, used=801)), "warning", "nearly full"),
    "pressure": (replace(WELL, store=replace(WELL.store, pressure="merge")), "warning", "nearly full"),
    "unread": (replace(WELL, store_error="disk"), "warning", "cannot be looked into"),
    "paused": (
        replace(WELL, outputs=(replace(OUTPUT, paused="unauthorized", paused_ms=NOW - 5, failures=3),)),
        "failing",
        "Output billing is paused: unauthorized",
    ),
    "failing": (
        replace(WELL, outputs=(replace(OUTPUT, failures=3, outcome="connect"),)),
        "warning",
        "Output billing delivers nothing: nobody answers at its address",
    ),
    "stalled": (
        replace(WELL, reasons={"output billing stalled": "oldest event is 700 s old"}),
        "failing",
        "takes less than comes",
    ),
    "stalled and failing": (
        replace(
            WELL,
            reasons={"output billing stalled": "oldest event is 700 s old"},
            outputs=(replace(OUTPUT, failures=3, outcome="server_error"),),
        ),
        "failing",
        "delivers nothing",
    ),
    "crash": (replace(WELL, crash_lost={"envoy-1": 13}), "warning", "lost 13 entries"),
    "crash unknown": (replace(WELL, crash_unknown=2), "warning", "an unknown number of 2 nodes"),
    "audit": (
        replace(WELL, audit=(NodeAudit("envoy-1", "missing", NOW, 10, 0, 10, 7, 3, 0),)),
        "warning",
        "Entries of envoy-1 are missing: 3 of 10",
    ),
    "dead": (
        replace(WELL, dead=(DeadGroup("billing", "not_accepted", 1, NOW, NOW),)),
        "warning",
        "1 dead letter of output billing",
    ),
    "held": (
        replace(WELL, held=(HeldGroup("unmapped", 5, NOW, NOW),)),
        "warning",
        "5 entries have no tenant",
    ),
    "configuration": (replace(WELL, config_error="mistake"), "warning", "was refused"),
    "aside": (replace(WELL, asides=1), "warning", "was set aside"),
    "remark": (replace(WELL, remarks=("3 entries from the future",)), "ok", "All is well"),
}


@pytest.mark.parametrize("case", CASES)
def test_every_state_is_said_in_the_headline_with_what_is_lost_and_what_to_do(case: str) -> None:
    now, word, text = CASES[case]
    found = problems(now)
    assert headline(now)[0] == word
    assert text in headline(now)[1]
    for one in found:
        assert one.lost.endswith(".")
        assert one.do.endswith(".")
        if one.runbook:
            assert f"\n## {one.runbook}\n" in RUNBOOK, "the runbook has the section"
    (shown,) = document(now, tenants=True)["problems"]
    assert shown["title"] == found[0].title


def test_the_worst_comes_first_and_the_headline_counts_the_others() -> None:
    now = replace(CASES["paused"][0], held=CASES["held"][0].held, remarks=("odd",))
    assert [one.level for one in problems(now)] == [Level.FAILING, Level.WARNING, Level.NOTE]
    assert headline(now)[1] == "Output billing is paused: unauthorized (and 1 more)"
    stopping = replace(now, reasons={"draining": "the service is stopping"})
    assert headline(stopping) == ("draining", "The sink is stopping")


def test_since_when() -> None:
    paused = document(CASES["paused"][0], tenants=False)["problems"][0]
    assert paused["since_ms"] == NOW - 5, "as the store knows it, over restarts"
    full = replace(CASES["full"][0], since={"store": NOW - 77})
    assert document(full, tenants=False)["problems"][0]["since_ms"] == NOW - 77


def test_every_reason_that_there_is_has_advice() -> None:
    assert set(HELD) == set(Reason)
    written = "".join(path.read_text() for path in (ROOT / "proxy_usage").rglob("*.py"))
    assert set(re.findall(r'Paused\("(\w+)"', written)) <= set(PAUSED)
    assert set(re.findall(r'Retry\("(\w+)"', written)) <= set(FAILING)
    (row,) = re.findall(r"^\| `output NAME paused` \|(.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`(\w+)`", row))
    assert named - {"refusing_everything", "ambiguous"} <= set(PAUSED)


def test_commands_can_be_copied_as_they_are() -> None:
    groups = document(CASES["dead"][0], tenants=False)["dead"]["groups"]
    assert groups[0]["command"] == (
        "proxy-usage deadletters replay --output billing --reason not_accepted"
        " --config '/etc/proxy usage.yaml'"
    )
    held = document(CASES["held"][0], tenants=False)["unattributed"]["groups"][0]
    assert held["command"].startswith("proxy-usage unattributed replay --reason unmapped --config ")
    odd = replace(WELL, dead=(DeadGroup("billing", "; rm -rf /\n", 1, NOW, NOW),))
    assert "--reason '; rm -rf /\n' " in document(odd, tenants=False)["dead"]["groups"][0]["command"]


TENANT = "acme-7"
NAMING = replace(
    WELL,
    outputs=(replace(OUTPUT, failures=1, outcome="server_error", detail=f"no account {TENANT}"),),
    held=(HeldGroup("unmapped", 5, NOW, NOW),),
    held_top=(HeldTop("unmapped", "envoy-1", 0, TENANT.encode(), 5),),
    tenants=TenantFigures(NOW, (TopFigures("requests", "{request}", ((TENANT, 5),), 0, 1),)),
)


def test_tenants_are_named_to_those_alone_who_may_know_them() -> None:
    assert json.dumps(document(NAMING, tenants=True)).count(TENANT) == 4
    hidden = document(NAMING, tenants=False)
    assert TENANT not in json.dumps(hidden)
    assert hidden["tenants"] is None
    assert hidden["unattributed"]["top"] is None
    assert hidden["unattributed"]["groups"][0]["rows"] == 5


LONG = "\u202e<b>" * 2_000


def monstrous() -> Snapshot:
    """As much as there can be of everything, with the longest names."""
    point = (1 << 40,) * POINTS
    outputs = tuple(
        replace(OUTPUT, name=f"{number}{LONG}", paused="tls", detail=LONG, fates={"pending": 1 << 60})
        for number in range(100)
    )
    return replace(
        WELL,
        host=LONG,
        nodes=tuple(NodeFigures(f"{number}{LONG}", 1 << 60, number, 1, 1) for number in range(4_096)),
        rows={fate: {f"{n}{LONG}": 1 << 50 for n in range(500)} for fate in ("skipped", "invalid")},
        outputs=outputs,
        dead=tuple(DeadGroup("billing", f"{number}{LONG[:64]}", 1, NOW, NOW) for number in range(500)),
        held=tuple(HeldGroup("unmapped", 1, NOW, NOW) for _ in range(500)),
        held_top=tuple(HeldTop("unmapped", LONG, 0, LONG.encode(), 1) for _ in range(10)),
        crash_lost={f"{number}{LONG}": 1 for number in range(4_096)},
        audit=tuple(NodeAudit(f"{n}{LONG}", "missing", NOW, 1, 1, 1, 1, 1, 1) for n in range(4_096)),
        tenants=TenantFigures(
            NOW,
            tuple(
                TopFigures("requests", "{request}", tuple((f"{n}{LONG}", 1 << 60) for n in range(100)), 1, 1)
                for _ in range(4)
            ),
        ),
        history=History(NOW, dict.fromkeys((*RATES, *LEVELS), point)),
        week=WeekFigures(NOW, (1 << 40,) * 168, {"requests": (1,) * 168}, {}),
    )


def test_the_document_is_bounded_and_fit_to_be_shown() -> None:
    made = document(monstrous(), tenants=True)
    text = json.dumps(made)
    assert len(text) < 256_000
    assert len(made["problems"]) == PROBLEMS
    assert made["more_problems"] > 0
    assert len(made["intake"]["nodes"]) == NODES
    others = made["intake"]["others"]
    assert others["nodes"] == 4_096 - NODES
    shown = sum(node["read"] for node in made["intake"]["nodes"])
    assert shown + others["read"] == made["intake"]["read"] == 4_096 << 60
    assert all(one.isprintable() for one in _texts(made))


def _texts(value: Any) -> list[str]:
    """Every text in it but commands, whose quoting keeps what they are given as it is."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, one in value.items() if key != "command" for text in (key, *_texts(one))]
    if isinstance(value, list | tuple):
        return [text for one in value for text in _texts(one)]
    return []


def test_a_snapshot_can_be_sent_to_whoever_adds_up_several() -> None:
    for now in (WELL, NAMING, monstrous(), CASES["audit"][0]):
        sent = msgspec.json.decode(msgspec.json.encode(now), type=Snapshot)
        assert document(sent, tenants=True) == document(now, tenants=True)


def test_reasons_of_dead_letters_have_words_of_ours_or_are_the_endpoints() -> None:
    for reason, words in (*DEAD.items(), ("INVALID_ULID", "the endpoint's own code")):
        now = replace(WELL, dead=(DeadGroup("billing", reason, 1, NOW, NOW),))
        assert document(now, tenants=False)["dead"]["groups"][0]["meaning"] == words
