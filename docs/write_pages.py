"""Writes the pages that are made from the code, so that they are as true as the program.

    python docs/write_pages.py

- docs/troubleshooting.md: every error a person can meet, its cause and its remedy. Errors say themselves what
  is wrong and what to do (``proxy_usage/errors.py``); this collects the places where they are raised.
- docs/configuration.md: every key, from the models in ``proxy_usage/config``.

A test fails when one of them is not current.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel

from proxy_usage import errors
from proxy_usage.config import Config, load_text, needs_restart, show

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
REFERENCE = ROOT / "config" / "proxy-usage.yaml"
CONFIGURATION = ROOT / "docs" / "configuration.md"
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
    """Writes the pages."""
    PAGE.write_text(page(), encoding="utf-8")
    CONFIGURATION.write_text(configuration(), encoding="utf-8")


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


CONFIGURATION_HEAD = """\
# Configuration

<!-- Written by docs/write_pages.py from the models; do not edit. -->

One YAML file, named by `--config` or `PROXY_USAGE_CONFIG`. An unknown key is an error that names line and
nearest key. `${VAR}`, `${VAR:-default}` and `${VAR:?message}` are replaced inside values, after parsing.
Durations are written like `250ms`, `60s`, `1h30m`, sizes like `64MiB`, times like `2026-12-01T00:00:00Z`.
Names of files are relative to the configuration file.
[config/proxy-usage.yaml](../config/proxy-usage.yaml) is
the same with comments and examples; `proxy-usage config schema` prints the JSON Schema,
`proxy-usage config show` what is in force. Keys marked ↻ are taken over at SIGHUP, the others need a restart.
"""


def configuration() -> str:
    """The page of all keys."""
    shown = yaml.safe_load(show(load_text(EXAMPLE, origin="example", base=Path("/"), env={})))
    shown["store"]["path"] = shown["store"]["path"].removeprefix("/")
    return CONFIGURATION_HEAD + "".join(section(Config, "", shown, comments()))


EXAMPLE = "outputs: [{name: billing, url: 'https://billing.example.org/v1/usage/events:batchIngest'}]\n"


def comments() -> dict[str, str]:
    """What stands behind the keys of the commented reference, by dotted key."""
    found: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in REFERENCE.read_text(encoding="utf-8").splitlines():
        read = re.match(r"( *(?:- )?)(\w+):(?: .*?)?(?:\s+# +(.*))?$", line)
        if read is None:
            continue
        indent, key, comment = len(read[1]), read[2], read[3]
        while above and above[-1][0] >= indent:
            above.pop()
        above.append((indent, key))
        if comment:
            found[".".join(name for _, name in above)] = comment
    return found


def section(model: type[BaseModel], path: str, shown: Any, said: Mapping[str, str]) -> Iterator[str]:
    """A model's keys as a table, then those of the models in it."""
    inner: list[tuple[type[BaseModel], str, Any]] = []
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        dotted = f"{path}.{key}" if path else key
        value = shown.get(key) if isinstance(shown, dict) else None
        below, many = models(field.annotation)
        if below is not None:
            place = f"{dotted}.NAME" if many == "mapping" else f"{dotted}[]" if many else dotted
            default = None if many else value
            default = default or below.model_construct().model_dump(mode="json", by_alias=True)
            inner.append((below, place, default))
        marked = f"`{key}`" + (" ↻" if not needs_restart([dotted.replace("[]", ".NAME")]) else "")
        plain = re.sub(r"\[\]|\.NAME", "", dotted)
        about = field.description or said.get(plain) or (inspect.getdoc(below) if below else None) or ""
        if field.is_required():
            # What may be left out all the same has a default for each name.
            stands = "required" if key in model.model_json_schema().get("required", ()) else "by its name"
        elif many:
            stands = several(field.get_default(call_default_factory=True), value)
        else:
            stands = "see below" if below and value else shortly(value)
        rows.append(f"| {marked} | {stands} | {sentence(about)}{choices(field.annotation, about)} |")
    title = f"`{path}`" if path else "The whole file"
    about = " ".join((inspect.getdoc(model) or "").split())
    yield f"\n## {title}\n\n{about.replace('``', '`')}\n\n"
    yield "| key | default | what it is |\n| --- | --- | --- |\n"
    yield "\n".join(row.replace("``", "`") for row in rows) + "\n"
    for below, place, value in inner:
        yield from section(below, place, value, said)


def sentence(text: str) -> str:
    """Begins like one and ends like one."""
    text = " ".join(text.split())
    return text[:1].upper() + text[1:] + ("" if not text or text[-1] in ".:?!)" else ".")


def models(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The model that a field holds, and whether it holds a ``mapping`` or a ``list`` of them."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin = get_origin(annotation)
    for part in get_args(annotation):
        found, many = models(part)
        if found is not None:
            kind = "mapping" if origin is Mapping else "list" if origin is tuple else many
            return found, kind
    return None, ""


def several(default: Any, example: Any) -> str:
    """The default of a list or a mapping of models: it belongs to the whole, not to its members."""
    if isinstance(default, Mapping):
        return ", ".join(f"`{name}`" for name in default)
    written = [
        yaml.safe_dump(one.model_dump(exclude_defaults=True), default_flow_style=True) for one in default
    ]
    if not written:
        return "required" if example else "`[]`"
    return ", ".join(f"`{one.strip()}`" for one in written)


def choices(annotation: Any, about: str) -> str:
    """The values that a key may have, as they are written, where ``about`` does not name them."""
    if get_origin(annotation) is not Literal or all(f"`{one}`" in about for one in get_args(annotation)):
        return ""
    *others, last = (f"`{one}`" for one in get_args(annotation))
    return f" {', '.join(others)} or {last}."


def shortly(value: Any) -> str:
    """A default as it is written."""
    if value is None:
        return "unset"
    return "`" + (json.dumps(value).strip('"').replace("|", "\\|") or '""') + "`"


if __name__ == "__main__":
    main()
