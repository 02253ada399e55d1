"""Alerts, dashboard and runbook say the same, and name what the program really has."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import yaml
from kustomize import build, needs_kubectl
from promql import named, tokens
from test_catalog import overlay

from proxy_usage.completeness import Track, judge
from proxy_usage.figures import Got, Sent, Sight
from proxy_usage.metrics import Metrics

ROOT = Path(__file__).resolve().parent.parent.parent
COMPONENT = ROOT / "deploy" / "components" / "monitoring"
RULES_FILE = COMPONENT / "rules.yaml"
CASES_FILE = Path(__file__).with_name("rules_test.yaml")

OTHERS = {
    "up": set[str](),
    "envoy_access_logs_grpc_access_log_logs_written": set[str](),
    "envoy_access_logs_grpc_access_log_logs_dropped": set[str](),
    "envoy_access_logs_grpc_access_log_grpc_entries_flushed": set[str](),
}
"""Metrics of Prometheus and of Envoy; tests/e2e/test_alerts.py finds the latter at a real Envoy."""
TARGET = {"job", "instance", "namespace"}
"""Labels that a scrape adds; the last one in a cluster alone."""
ROWS = ["Intake", "Attribution", "Windows", "Queue", "Delivery", "Completeness"]


def document(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return loaded


ALL_RULES: list[dict[str, Any]] = [
    rule for group in document(RULES_FILE)["groups"] for rule in group["rules"]
]
RULES: dict[str, dict[str, Any]] = {rule["alert"]: rule for rule in ALL_RULES if "alert" in rule}
RECORDED: dict[str, dict[str, Any]] = {rule["record"]: rule for rule in ALL_RULES if "record" in rule}
DASHBOARD: dict[str, Any] = json.loads((COMPONENT / "dashboard.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
TARGETS: list[dict[str, Any]] = [target for panel in PANELS for target in panel.get("targets", [])]
EXPRESSIONS = [*(rule["expr"] for rule in ALL_RULES), *(target["expr"] for target in TARGETS)]
CASES: list[dict[str, Any]] = document(CASES_FILE)["tests"]


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return found


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=180)


def declared() -> dict[str, set[str]]:
    """Every series name that a scrape of the program can show → its labels."""
    registry = Metrics().registry
    found = dict[str, set[str]]()
    for metric in registry._collector_to_names:
        assert isinstance(metric, prometheus_client.Counter | prometheus_client.Gauge)
        (family,) = metric.describe()
        suffix = "_total" if family.type == "counter" else ""
        found[family.name + suffix] = set(metric._labelnames)
    return found


KNOWN = {**declared(), **OTHERS}


# --- rules --------------------------------------------------------------------------------------------


def test_promtool_accepts_the_rules(promtool: str) -> None:
    checked = run(promtool, "check", "rules", "--lint=all", "--lint-fatal", str(RULES_FILE))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_should_and_only_then(promtool: str) -> None:
    tested = run(promtool, "test", "rules", str(CASES_FILE))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_the_cases_would_notice_an_alert_that_never_fires(promtool: str, tmp_path: Path) -> None:
    shutil.copytree(COMPONENT, tmp_path / "deploy" / "components" / "monitoring")
    cases = tmp_path / "tests" / "deploy" / CASES_FILE.name
    cases.parent.mkdir(parents=True)
    shutil.copy(CASES_FILE, cases)
    rules = tmp_path / RULES_FILE.relative_to(ROOT)
    rules.write_text(RULES_FILE.read_text().replace("output_paused == 1", "output_paused == 2"))
    tested = run(promtool, "test", "rules", str(cases))
    assert tested.returncode != 0
    assert "ProxyUsageOutputPaused" in tested.stdout + tested.stderr


def test_every_alert_has_a_firing_and_a_silent_case() -> None:
    firing, silent = set[str](), set[str]()
    for case in CASES:
        checks = defaultdict[str, list[bool]](list)
        for check in case.get("alert_rule_test", ()):
            checks[check["alertname"]].append(bool(check["exp_alerts"]))
        given = {re.split(r"[{ ]", series["series"])[0] for series in case.get("input_series", [])}
        for alert, fires in checks.items():
            if any(fires):
                firing.add(alert)
            # Silence without the series that it is about would show nothing.
            elif given & named(RULES[alert]["expr"]).metrics.keys():
                silent.add(alert)
    assert firing == RULES.keys()
    assert silent == RULES.keys()


def test_every_recorded_rule_has_a_case_with_a_value() -> None:
    checked = {
        check["expr"] for case in CASES for check in case.get("promql_expr_test", ()) if check["exp_samples"]
    }
    assert checked == RECORDED.keys()


def test_what_is_recorded_is_what_the_program_says_of_the_same_numbers() -> None:
    """promtool and the audit's arithmetic are given one case: 1,564 of 5,000 rows vanish."""
    (case,) = [case for case in CASES if case["name"].startswith("What is recorded agrees")]
    flushed, received = (series_at(case, name, (0, 70)) for name in ("flushed", "received"))
    track = Track("edge-1")
    for minute in (0, 1):
        sights = [
            Sight(
                second * 1_000, Sent(sent=flushed[minute], uptime_s=second), {"a": Got(rows=received[minute])}
            )
            for second in (minute * 4_200, minute * 4_200 + 10)
        ]
        verdict = judge(track, sights, settle_ms=10_000)
    assert verdict.figures is not None
    (check,) = [one for one in case["promql_expr_test"] if one["expr"].endswith("missing:delta1h")]
    assert check["exp_samples"][0]["value"] == verdict.figures.missing == 1_564


def series_at(case: dict[str, Any], name: str, minutes: tuple[int, ...]) -> list[int]:
    """Sums of the series whose names end so, at some minutes, of ``value`` or ``start+stepxcount``."""
    found = []
    for minute in minutes:
        total = 0
        for series in case["input_series"]:
            if not series["series"].split("{")[0].endswith(name):
                continue
            values: list[int] = []
            for part in series["values"].split():
                start, step, count = (int(text) for text in re.split(r"[+x]", part))
                values.extend(start + step * number for number in range(count + 1))
            total += values[minute]
        found.append(total)
    return found


def on_counters() -> dict[str, set[str]]:
    """Alert → counters whose growth it looks for; the comparison with Envoy is not about growth."""
    compared = {"ProxyUsageEntriesMissing"}
    found = {
        alert: set(re.findall(r"increase\((\w+)", rule["expr"]))
        for alert, rule in RULES.items()
        if alert not in compared
    }
    return {alert: counters for alert, counters in found.items() if counters}


def test_alerts_on_counters_see_the_first_value_of_a_series() -> None:
    """increase() does not: it would miss the only row, or all that a crash lost."""
    assert len(on_counters()) > 5
    totals = {alert for alert, rule in RULES.items() if "_total" in rule["expr"]}
    assert totals - {"ProxyUsageEntriesMissing"} <= on_counters().keys()
    pattern = re.compile(
        r"increase\((?P<series>.+?)\[(?P<back>\w+)\]\) > 0\n"
        r"or \(\n  (?P=series) > 0\n  unless max_over_time\((?P=series)\[5m\] offset (?P=back)\)\n\)\n"
    )
    assert [alert for alert in on_counters() if not pattern.fullmatch(RULES[alert]["expr"])] == []
    begins = {
        check["alertname"]
        for case in CASES
        for check in case.get("alert_rule_test", ())
        if check["exp_alerts"] and any(s["values"].startswith("_x") for s in case.get("input_series", []))
    }
    assert begins >= on_counters().keys()


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_says_what_it_must(alert: str) -> None:
    rule = RULES[alert]
    assert set(rule["labels"]) == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert set(rule["annotations"]) == {"summary", "impact", "runbook_url"}
    assert all(text.strip() and len(text) <= 120 for text in rule["annotations"].values())


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_shows_labels_that_it_has(alert: str) -> None:
    used = set(re.findall(r"\$labels\.(\w+)", "".join(RULES[alert]["annotations"].values())))
    metrics = named(RULES[alert]["expr"]).metrics
    assert used <= set.union({"instance"}, *(KNOWN[metric] for metric in metrics))
    if used and not metrics.keys() & OTHERS.keys():
        assert not re.search(r"\b(sum|count|absent)\b", RULES[alert]["expr"])


def test_the_operators_rule_has_the_same_groups() -> None:
    rule = document(COMPONENT / "prometheusrule.yaml")
    assert (rule["apiVersion"], rule["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert rule["spec"] == document(RULES_FILE), "the first lines of prometheusrule.yaml say how to renew it"


# --- names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_what_exists(expression: str) -> None:
    found = named(expression)
    assert found.metrics
    assert found.metrics.keys() <= KNOWN.keys()
    for metric, matchers in found.metrics.items():
        assert matchers.keys() <= KNOWN[metric] | TARGET
    allowed = set.union(TARGET, *(KNOWN[metric] for metric in found.metrics))
    assert found.labels <= allowed


def test_values_that_labels_are_compared_with_exist() -> None:
    """By the program's sources: a misspelt reason would make an alert that never fires."""
    sources = "\n".join(path.read_text() for path in (ROOT / "proxy_usage").rglob("*.py"))
    values = {
        value
        for expression in EXPRESSIONS
        for matchers in named(expression).metrics.values()
        for label, among in matchers.items()
        if label not in TARGET
        for value in among
    }
    assert {"misrouted", "unconfirmed", "future", "past_horizon", "used"} <= values
    assert [value for value in sorted(values) if f'"{value}"' not in sources] == []


def test_nothing_is_shown_or_grouped_by_tenant() -> None:
    labels = set.union(*KNOWN.values())
    assert {"reason", "output"} <= labels
    assert not any("tenant" in label or "project" in label for label in labels)


@pytest.mark.parametrize(
    ("expression", "metrics", "labels"),
    [
        ('a_total{reason=~"x|y",output!="z"}', {"a_total": {"reason": {"x", "y"}, "output": {"z"}}}, set()),
        ("sum by (b, c) (rate(a[5m] offset 1h)) > 0.5", {"a": {}}, {"b", "c"}),
        ("a / ignoring (part) d and on (e) count(f) == 1", {"a": {}, "d": {}, "f": {}}, {"part", "e"}),
        ("increase(a[$__range]) unless b", {"a": {}, "b": {}}, set()),
    ],
)
def test_the_reader_of_expressions(
    expression: str, metrics: dict[str, dict[str, set[str]]], labels: set[str]
) -> None:
    found = named(expression)
    assert (found.metrics, found.labels) == (metrics, labels)


def test_the_reader_refuses_what_it_does_not_know() -> None:
    with pytest.raises(AssertionError, match="cannot read"):
        tokens("a @ b")


# --- runbook ------------------------------------------------------------------------------------------


def test_every_alert_has_its_section_in_the_runbook_and_the_reverse() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert headings == list(RULES)
    for alert, rule in RULES.items():
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (ROOT / page).is_file()
        assert anchor == alert.lower()


def test_every_section_says_all_four_things() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    for section in text.split("\n## ")[1:]:
        said = re.findall(r"^\*\*(\w+)[.\*]", section, re.MULTILINE)
        assert said == ["Means", "Lost", "Do", "Ends"], section.splitlines()[0]


# --- dashboard ----------------------------------------------------------------------------------------


def test_the_dashboard_has_its_rows_in_order() -> None:
    assert DASHBOARD["schemaVersion"] >= 38  # Grafana 10
    assert [panel["title"] for panel in PANELS if panel["type"] == "row"] == ROWS
    kinds = [panel["type"] for panel in sorted(PANELS, key=lambda one: tuple(at(one)))]
    assert kinds[0] == "row"
    assert ("row", "row") not in list(itertools.pairwise(kinds)), "a row without a panel"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def at(panel: dict[str, Any]) -> tuple[int, int]:
    return panel["gridPos"]["y"], panel["gridPos"]["x"]


def test_panels_do_not_overlap() -> None:
    taken = set[tuple[int, int]]()
    for panel in PANELS:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_panels_take_the_data_source_that_is_chosen() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(panel["datasource"] == source for panel in PANELS if panel["type"] != "row")
    assert all(target["datasource"] == source for target in TARGETS)
    metric, label = re.findall(r"\((\w+), (\w+)\)", variables["instance"]["query"]["query"])[0]
    assert metric in KNOWN
    assert label in TARGET


def test_legends_show_labels_that_the_expressions_keep() -> None:
    for target in TARGETS:
        used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        found = named(target["expr"])
        kept = found.labels
        if not found.functions & {"sum", "count"}:
            kept = set.union(TARGET, *(KNOWN[metric] for metric in found.metrics))
        assert used <= kept, target


# --- what is applied ----------------------------------------------------------------------------------


def test_the_component_lists_its_files() -> None:
    component = document(COMPONENT / "kustomization.yaml")
    assert component["kind"] == "Component"
    (generated,) = component["configMapGenerator"]
    others = {"kustomization.yaml", "rules.yaml"}  # the latter for a Prometheus without the operator
    assert {*component["resources"], *generated["files"], *others} == {p.name for p in COMPONENT.iterdir()}


def test_the_sinks_are_scraped_under_the_name_that_the_rules_know() -> None:
    monitor = document(COMPONENT / "servicemonitor.yaml")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["path"] == "/metrics"
    (job,) = [one["replacement"] for one in endpoint["relabelings"] if one["targetLabel"] == "job"]
    jobs = {value for text in EXPRESSIONS for value in named(text).metrics.get("up", {}).get("job", ())}
    assert jobs == {job}
    compose = document(ROOT / "deploy" / "compose" / "prometheus.yml")
    assert job in {scraped["job_name"] for scraped in compose["scrape_configs"]}


@needs_kubectl
def test_an_overlay_builds_with_it(tmp_path: Path) -> None:
    built = build(overlay(tmp_path, "components", COMPONENT))
    assert built.returncode == 0, built.stderr
    objects = {one["kind"]: one for one in yaml.safe_load_all(built.stdout)}
    assert objects.keys() == {"ConfigMap", "PrometheusRule", "ServiceMonitor"}
    assert objects["PrometheusRule"]["spec"] == document(RULES_FILE)
    assert json.loads(objects["ConfigMap"]["data"]["dashboard.json"]) == DASHBOARD
    assert objects["ConfigMap"]["metadata"]["name"] == "proxy-usage-dashboard"
