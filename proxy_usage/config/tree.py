"""YAML text as a tree in which every value knows its line.

Scalars follow YAML 1.2: ``true``, ``false``, ``null`` and decimal numbers are typed, everything else is
text, so that ``off``, ``NO`` and ``12:30`` mean what they look like. ``${VAR}`` is replaced inside scalars
after parsing, so that a value can never add structure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import yaml

from proxy_usage.config.fields import Expanded
from proxy_usage.config.mistakes import Finding, Loc

MAX_NODES = 200_000
"""More values than any real configuration has: aliases of aliases can ask for billions."""

_PLAIN = {"": None, "~": None, "null": None, "true": True, "false": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)", re.ASCII)
_FLOAT = re.compile(r"[-+]?[0-9]+\.[0-9]*([eE][-+][0-9]+)?", re.ASCII)
_VARIABLE = re.compile(r"\$(?:\$|\{([^{}]*)\}|(\{))")
_REFERENCE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::([-?])(.*))?", re.DOTALL)

_TAG = re.compile(r"tag:yaml\.org,2002:(str|int|float|bool|null|timestamp|map|seq|merge|value)")

Scalar = str | int | float | bool | None


@dataclass(slots=True)
class Node:
    """A value, the line (from 1) of it or of its key, and its path from the root."""

    line: int
    loc: Loc
    value: Scalar | dict[str, Node] | list[Node]

    def plain(self) -> object:
        """The value as dict, list and scalars."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def descend(self, loc: Loc) -> Iterator[Node]:
        """This node and those that ``loc`` leads through, as far as the tree goes."""
        node = self
        yield node
        for part in loc:
            value = node.value
            if isinstance(value, dict) and part in value:
                node = value[str(part)]
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                node = value[part]
            else:
                return
            yield node


def parse(text: str, env: Mapping[str, str]) -> tuple[Node, list[tuple[int, Finding]]]:
    """The tree of ``text``, and what is wrong with it as (line, mistake).

    Bad syntax leaves an empty tree; every other mistake leaves out only the value it is about.
    """
    builder = _Builder(env)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return Node(1, (), {}), []
        tree = builder.build(root, (), root.start_mark.line + 1)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ": ".join(part for part in (error.context, error.problem) if part)
        builder.add(mark.line + 1 if mark else 1, (), f"is not valid YAML: {what}", _syntax_remedy(what))
        tree = None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        builder.add(line, (), f"is not valid YAML: {error.reason}", "remove the character")
        tree = None
    except RecursionError:
        builder.add(1, (), "is nested too deeply", "close brackets that were left open")
        tree = None
    return tree or Node(1, (), {}), builder.found


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replaces ``${VAR}``, ``${VAR:-default}``, ``${VAR:?message}`` and ``$$``.

    A ``$`` before anything else stays. Raises KeyError for a variable that is not set, ValueError for a
    reference that cannot be read.
    """

    def replace(match: re.Match[str]) -> str:
        if match.group(0) == "$$":
            return "$"
        reference = _REFERENCE.fullmatch(match.group(1) or "")
        if reference is None:
            raise ValueError(f"{match.group(0)!r} is not a reference to a variable")
        name, operator, rest = reference.groups()
        if operator is None:
            return env[name]
        if value := env.get(name, ""):
            return value
        if operator == "?":
            raise KeyError(f"{name}: {rest}" if rest else name)
        return rest

    return _VARIABLE.sub(replace, text)


def escape(text: str) -> str:
    """Text that ``expand`` turns into ``text``."""
    return re.sub(r"\$(?=[${])", "$$", text)


class _Builder:
    def __init__(self, env: Mapping[str, str]) -> None:
        self.found: list[tuple[int, Finding]] = []
        self._env = env
        self._count = 0
        self._open: list[yaml.Node] = []

    def add(self, line: int, loc: Loc, what: str, remedy: str) -> None:
        self.found.append((line, Finding(loc, what, remedy)))

    def build(self, node: yaml.Node, loc: Loc, line: int) -> Node | None:
        """The tree under ``node``; None where a mistake left nothing to keep."""
        self._count += 1
        if self._count > MAX_NODES:
            if self._count == MAX_NODES + 1:
                self.add(line, loc, f"has more than {MAX_NODES} values", "write fewer aliases of aliases")
            return None
        if any(node is outer for outer in self._open):
            self.add(line, loc, "contains itself by an alias", "write the value out")
            return None
        if not _TAG.fullmatch(node.tag):
            self.add(line, loc, f"has the tag {node.tag}, which is not known", "remove the tag")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, loc, line)
        self._open.append(node)
        value = self._mapping(node, loc) if isinstance(node, yaml.MappingNode) else self._list(node, loc)
        self._open.pop()
        return Node(line, loc, value)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Node]:
        result: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, child in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                self.add(line, loc, "a key must be text", "write `key: value`")
            elif key.value == "<<" and key.style is None:
                self.add(line, (*loc, "<<"), "merge keys are not supported", "write the keys out")
            elif key.value in lines:
                self.add(
                    line,
                    (*loc, key.value),
                    f"this key is already on line {lines[key.value]}",
                    "keep one of the two",
                )
            else:
                lines[key.value] = line
                built = self.build(child, (*loc, key.value), line)
                if built is not None:
                    result[key.value] = built
        return result

    def _list(self, node: yaml.Node, loc: Loc) -> list[Node]:
        built = (
            self.build(child, (*loc, index), child.start_mark.line + 1)
            for index, child in enumerate(node.value)
        )
        return [child for child in built if child is not None]

    def _scalar(self, node: yaml.ScalarNode, loc: Loc, line: int) -> Node | None:
        text: str = node.value
        try:
            expanded = expand(text, self._env) if "$" in text else text
        except KeyError as error:
            what = f"environment variable {error.args[0]}"
            remedy = "set it, or give a default: ${NAME:-default}"
            self.add(line, loc, what if ":" in what else f"{what} is not set", remedy)
            return None
        except ValueError as error:
            self.add(
                line, loc, str(error), "write ${NAME}, ${NAME:-default} or ${NAME:?message}; $$ is a plain $"
            )
            return None
        if "$" in text:
            return Node(line, loc, Expanded(expanded))
        is_text = node.style is not None or node.tag.endswith(":str")
        return Node(line, loc, text if is_text else _typed(text))


def _typed(text: str) -> Scalar:
    lowered = text.lower()
    if lowered in _PLAIN and text in (lowered, lowered.capitalize(), lowered.upper()):
        return _PLAIN[lowered]
    if _INT.fullmatch(text) and len(text) < 20:
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _syntax_remedy(what: str) -> str:
    if "'\\t'" in what:
        return "indent with spaces, not tabs"
    if "flow" in what and "got '{'" in what:
        return 'inside { } and [ ] put quotes around "${NAME}"'
    if "mapping values are not allowed" in what:
        return "put text that contains ': ' in quotes, or correct the indentation"
    return "correct the syntax at this line or just above it: indentation, quotes, brackets"
