"""What every test shares: how hypothesis searches, and when a skip counts as a failure.

`--require-tools`, or REQUIRE_TOOLS=1 in the environment, says that every optional tool (kubectl, promtool,
a browser, a compiler) ought to be here: a skipped test or module then fails with its reason. CI runs so.
"""

import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# What the end-to-end tests are made of serves the fault tests, too.
sys.path.insert(0, str(Path(__file__).parent / "e2e"))

# Debian 12 has kubectl 1.20, whose kustomize does not know components: the one thing CI may lack.
ALLOWED_SKIP = "kubectl older than 1.21"

# No deadline, and none for making examples: what a shared machine takes for one says nothing about the code.
# Where CI is set, hypothesis' own profile, which has neither, makes the search repeatable, so that a change
# is judged by what it changed.
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("everyday", unhurried)
settings.register_profile("thorough", unhurried, max_examples=5000)
settings.load_profile("ci" if os.environ.get("CI") else "everyday")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-tools",
        action="store_true",
        default=os.environ.get("REQUIRE_TOOLS") == "1",
        help="fail a test that would be skipped (also: REQUIRE_TOOLS=1)",
    )


# Both hooks run where the test does, so that a worker of xdist reports the failure like any other.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _fail_if_skipped(report, item.config)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _fail_if_skipped(report, collector.config)
    return report


def _fail_if_skipped(report: pytest.TestReport | pytest.CollectReport, config: pytest.Config) -> None:
    if report.skipped and config.getoption("--require-tools"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if ALLOWED_SKIP not in reason:
            report.outcome = "failed"
            report.longrepr = f"{reason}\n--require-tools: nothing may be skipped here"
