"""Writes docs/troubleshooting.md from the code: every error a person can meet, its cause and its remedy.

    python docs/write_pages.py

Errors say themselves what is wrong and what to do (``proxy_usage/errors.py``); this collects the places where
they are raised, so that the page is as true as the program. A test fails when it is not current.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from proxy_usage import errors

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
KINDS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.ProxyUsageError)
}

HEAD = """\
# Troubleshooting

<!-- Written by docs/write_pages.py from the code; do not edit. -->

An error says what is wrong and where, and a hint says what to do about it. `…` stands for what differs from
case to case. A verb ends with the exit code; the service logs the same text and goes on where it can.
"""

REMEDIES = {
    "ConfigError": "the lines below it name each mistake and what to do",
    "DecodeError": "the row or message is counted as invalid, nothing else is lost; "
    "`proxy-usage record` shows what is sent",
}
"""Where the kind says what to do, and the place cannot say more."""

MISTAKES = """\
## Mistakes in the configuration

`proxy-usage validate` names all of them at once, each with its file, line and key; the exit code is 78.

| what it says | remedy |
| --- | --- |
"""


class Found(NamedTuple):
    """A place in the code where something is said to a person."""

    kind: str
    text: str
    remedy: str


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page(), encoding="utf-8")


def page() -> str:
    """The page as it should be."""
    raised: dict[str, set[Found]] = {name: set() for name in KINDS}
    mistakes: set[Found] = set()
    for path in sorted((ROOT / "proxy_usage").rglob("*.py")):
        for found in said_in(ast.parse(path.read_text(encoding="utf-8"))):
            raised.get(found.kind, mistakes).add(found)
    parts = [HEAD]
    for name, kind in KINDS.items():
        if not raised[name]:
            continue
        cause = inspect.getdoc(kind) or ""
        again = " Trying again can help." if kind.retriable else ""
        parts.append(f"## {name}\n\n{' '.join(cause.split())}{again} Exit code {kind.exit_code}.\n")
        parts.append("| what it says | remedy |\n| --- | --- |")
        parts.extend(f"| {found.text} | {found.remedy} |" for found in sorted(raised[name]))
        parts.append("")
    parts.append(MISTAKES + "\n".join(f"| {found.text} | {found.remedy} |" for found in sorted(mistakes)))
    return "\n".join(parts) + "\n"


def said_in(tree: ast.Module) -> Iterator[Found]:
    """Errors and mistakes that are constructed in a module."""
    texts = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and wording(node.value)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or not node.args:
            continue
        name = node.func.id
        if name not in KINDS and name != "Wrong":
            continue
        text = wording(node.args[0])
        hints = [keyword.value for keyword in node.keywords if keyword.arg == "hint"] or node.args[1:2]
        hints = [texts.get(hint.id, hint) if isinstance(hint, ast.Name) else hint for hint in hints]
        if text:
            yield Found(name, text, (wording(hints[0]) if hints else "") or REMEDIES.get(name, ""))


def wording(node: ast.expr) -> str:
    """The text of a string or f-string, with an ellipsis for what it is filled with; "" for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            said = text
        case ast.JoinedStr(values=parts):
            said = "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            said = (wording(left) or "…") + (wording(right) or "…")
        case ast.IfExp(body=body, orelse=other):
            said = " / ".join(filter(None, (wording(body), wording(other))))
        case _:
            said = ""
    return re.sub(r"\s+", " ", said).replace("|", "\\|").replace("<", "&lt;").strip()


if __name__ == "__main__":
    main()
