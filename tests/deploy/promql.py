"""What a PromQL expression names: enough of a reader for the expressions that are shipped here.

named("sum by (reason) (rate(x_total{reason!='a'}[5m]))")
→ {"x_total": {"reason": {"a"}}}, {"reason"}
"""

from __future__ import annotations

import re
from typing import NamedTuple

KEYWORDS = frozenset({"and", "or", "unless", "bool", "offset", "by", "without", "on", "ignoring"})
TOKEN = re.compile(
    r"""
      (?P<space>\s+)
    | (?P<text>"(?:[^"\\]|\\.)*")
    | (?P<range>\[[^\]]*\])
    | (?P<number>\d[\w.]*|\$__\w+)
    | (?P<name>[A-Za-z_:][\w:]*)
    | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>])
    """,
    re.VERBOSE,
)


class Named(NamedTuple):
    """What an expression names."""

    metrics: dict[str, dict[str, set[str]]]
    """Metric → label → the values it is compared with, alternatives of a regular expression one by one."""
    labels: set[str]
    """Labels that are grouped or matched by."""
    functions: set[str]


def tokens(expression: str) -> list[tuple[str, str]]:
    """Kind and text of each token. AssertionError at what this reader does not know."""
    found, at = [], 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        assert match, f"cannot read {expression[at : at + 20]!r} in {expression!r}"
        kind = match.lastgroup or ""
        if kind != "space":
            found.append((kind, match.group()))
        at = match.end()
    return found


def named(expression: str) -> Named:
    """Every metric with its matchers, every label and every function of an expression."""
    rest = tokens(expression)
    result = Named({}, set(), set())
    metric: dict[str, set[str]] = {}
    while rest:
        kind, text = rest.pop(0)
        if kind == "sign" and text == "{":
            _matchers(rest, metric)
        if kind != "name":
            continue
        if text in {"by", "without", "on", "ignoring"}:
            assert rest.pop(0)[1] == "("
            while (item := rest.pop(0)[1]) != ")":
                result.labels.update({item} - {","})
        elif text in KEYWORDS:
            continue
        elif rest and rest[0][1] in {"(", "by", "without"}:
            result.functions.add(text)
        else:
            metric = result.metrics.setdefault(text, {})
    return result


def _matchers(rest: list[tuple[str, str]], metric: dict[str, set[str]]) -> None:
    """Takes what stands between braces."""
    while (item := rest.pop(0)[1]) != "}":
        if item == ",":
            continue
        operator, value = rest.pop(0)[1], rest.pop(0)[1].strip('"')
        metric.setdefault(item, set()).update(value.split("|") if "~" in operator else [value])
