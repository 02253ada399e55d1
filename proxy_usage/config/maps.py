"""Map files: a YAML or JSON mapping from one text to another, such as namespace to tenant."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from proxy_usage.config.mistakes import Wrong, WrongMany

MAX_SHOWN = 20
"""Mistakes named per map file; one wrong column would otherwise fill the screen."""

# The endpoint makes the tenant a NATS subject token: anything but a DNS label is lost or refused for ever.
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def is_label(text: str) -> bool:
    """Whether ``text`` can name a tenant: an RFC 1123 DNS label of at most 63 characters."""
    return _LABEL.fullmatch(text) is not None


def load_map(path: Path, *, labels: bool) -> dict[str, str]:
    """Reads ``path``; with ``labels`` every value must be a DNS label, because it names a tenant.

    Values are taken as written (``123`` and ``yes`` are text). Raises WrongMany, each mistake with its line.
    """
    root = _compose(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise WrongMany((_at(path, root, "is not a mapping", "write one `key: value` a line"),))
    wrong: list[Wrong] = []
    result: dict[str, str] = {}
    first: dict[str, int] = {}
    for key, value in root.value:
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            wrong.append(_at(path, key, "is not `text: text`", "write one `key: value` a line"))
            continue
        line = key.start_mark.line + 1
        if key.value in first:
            wrong.append(
                _at(
                    path,
                    key,
                    f"key {key.value!r} is already on line {first[key.value]}",
                    "keep one of the two",
                )
            )
            continue
        first[key.value] = line
        mistake = _entry_mistake(path, key, value, labels=labels)
        if mistake is None:
            result[key.value] = value.value
        else:
            wrong.append(mistake)
    if len(wrong) > MAX_SHOWN:
        rest = len(wrong) - MAX_SHOWN
        wrong = [*wrong[:MAX_SHOWN], _at(path, root, f"has {rest} more mistakes", "correct the first ones")]
    if wrong:
        raise WrongMany(tuple(wrong))
    return result


def _entry_mistake(path: Path, key: yaml.Node, value: yaml.Node, *, labels: bool) -> Wrong | None:
    if not key.value or not value.value:
        return _at(path, key, f"{key.value!r}: key or value is empty", "complete or remove the line")
    if "*" in key.value and not re.fullmatch(r"\*\.[^*]+", key.value):
        return _at(
            path,
            key,
            f"wildcard {key.value!r} is not understood",
            "a wildcard is the first label: *.example.com",
        )
    if labels and not is_label(value.value):
        return _at(
            path,
            value,
            f"tenant {value.value!r} is not a DNS label, the endpoint would lose its events",
            "use lower-case letters, digits and '-', at most 63",
        )
    return None


def _compose(path: Path) -> yaml.Node | None:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WrongMany((Wrong(f"{path} is not UTF-8: byte {error.start}", "save it as UTF-8"),)) from None
    except OSError as error:
        raise WrongMany((Wrong(f"{path} cannot be read: {error.strerror}", "correct the file"),)) from None
    if path.suffix == ".json":
        text = text.replace(
            "\t", " "
        )  # JSON is indented with tabs at will, YAML is not; strings hold no raw tab
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        wrong = Wrong(
            f"is not valid {'JSON' if path.suffix == '.json' else 'YAML'}: {error.problem}",
            "correct the syntax at this line or just above it",
            place=f"{path}:{line}",
        )
        raise WrongMany((wrong,)) from None
    except yaml.YAMLError as error:
        raise WrongMany((Wrong(f"{path} is not valid YAML: {error}", "correct the syntax"),)) from None
    return node


def _at(path: Path, node: yaml.Node, what: str, remedy: str) -> Wrong:
    return Wrong(what, remedy, place=f"{path}:{node.start_mark.line + 1}")
