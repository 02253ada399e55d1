"""From a file and the environment to a ``Config``, or to every mistake in it at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from pydantic import ValidationError

from proxy_usage.config import explain
from proxy_usage.config.checks import check
from proxy_usage.config.mistakes import Finding, Loc, dotted
from proxy_usage.config.models import Config
from proxy_usage.config.tree import Node, parse
from proxy_usage.errors import ConfigError


def load(path: Path, env: Mapping[str, str], *, files: bool = True) -> Config:
    """Reads the configuration at ``path``; relative file names in it start at its directory.

    Args:
        files: whether the files that it names must be there, and the directories that are written to.

    Raises ConfigError, which holds every mistake found.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start})", hint="save it as UTF-8") from None
    except FileNotFoundError:
        raise ConfigError(
            f"configuration {path} does not exist",
            hint="name it by --config or PROXY_USAGE_CONFIG; config/proxy-usage.yaml shows every key",
        ) from None
    except OSError as error:
        raise ConfigError(
            f"configuration {path} cannot be read: {error.strerror}", hint="name a file this user can read"
        ) from None
    return load_text(text, origin=str(path), base=path.absolute().parent, env=env, files=files)


def load_text(text: str, *, origin: str, base: Path, env: Mapping[str, str], files: bool = True) -> Config:
    """As ``load`` for text that is already read; ``origin`` is what mistakes call it.

    Raises ConfigError, which holds every mistake found.
    """
    tree, in_text = parse(text, env)
    mistakes = _Mistakes(origin)
    for line, finding in in_text:
        mistakes.add(finding, line)
    if not isinstance(tree.value, dict):
        mistakes.add(
            Finding((), "is not a mapping", "write sections such as `listen:` and `outputs:`"), tree.line
        )
        tree = Node(1, (), {})
    config = _validate(tree, {"base": base, "files": files}, mistakes)
    if config is not None:
        mistakes.add_located(check(config, files=files), tree)
    if mistakes:
        raise mistakes.error()
    assert config is not None
    return config


def _validate(tree: Node, context: Mapping[str, object], mistakes: _Mistakes) -> Config | None:
    """Validates, leaving out what is wrong until the rest is right, so that the checks can still be made."""
    while True:
        data = tree.plain()
        assert isinstance(data, dict)
        if data.get("store") is None:
            data["store"] = {}  # validated, its default path is taken from the base too
        try:
            return Config.model_validate(data, context=dict(context))
        except ValidationError as error:
            findings = list(explain.findings(error))
        mistakes.add_located(findings, tree)
        if not _prune(tree, [finding.loc for finding in findings]):
            return None


def _prune(tree: Node, locs: list[Loc]) -> bool:
    """Takes the innermost value at each of ``locs`` out of the tree; false when nothing was left to take."""
    doomed = []
    for loc in locs:
        way = list(tree.descend(loc))
        if len(way) > 1:
            doomed.append((way[-2], way[-1]))
    for parent, node in doomed:
        if isinstance(parent.value, dict):
            parent.value = {key: child for key, child in parent.value.items() if child is not node}
        elif isinstance(parent.value, list):
            parent.value = [child for child in parent.value if child is not node]
    return bool(doomed)


def _original(loc: Loc, tree: Node) -> Loc:
    """``loc`` as it was before mistaken list items were taken out."""
    way = list(tree.descend(loc))
    return (*way[-1].loc, *loc[len(way) - 1 :])


class _Mistakes:
    """Mistakes by line, each said once; a conclusion from something mistaken is left out."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._texts: dict[str, int] = {}
        self._wrong: set[Loc] = set()

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, finding: Finding, line: int) -> None:
        where = finding.place or f"{self._origin}:{line}"
        key = f" {dotted(finding.loc)}:" if finding.loc else ""
        self._wrong.add(finding.loc)
        self._texts.setdefault(f"{where}:{key} {finding.what}; {finding.remedy}", line)

    def add_located(self, findings: Iterable[Finding], tree: Node) -> None:
        """Adds ``findings`` of one round, each at the line and original path of the nearest node there is."""
        sound = [
            finding
            for finding in findings
            if not any(self._touches(loc, tree) for loc in (finding.loc, *finding.concerns))
        ]
        for finding in sound:
            nearest = list(tree.descend(finding.loc))[-1]
            what = finding.what
            if finding.concerns:
                what = what.replace("{other}", dotted(_original(finding.concerns[0], tree)))
            self.add(replace(finding, loc=_original(finding.loc, tree), what=what), nearest.line)

    def _touches(self, loc: Loc, tree: Node) -> bool:
        """Whether ``loc`` is, contains or lies in something an earlier round found wrong."""
        here = _original(loc, tree)
        return any(wrong[: len(here)] == here or here[: len(wrong)] == wrong for wrong in self._wrong)

    def error(self) -> ConfigError:
        ordered = [text for text, _ in sorted(self._texts.items(), key=itemgetter(1))]
        count = "1 mistake" if len(ordered) == 1 else f"{len(ordered)} mistakes"
        return ConfigError(
            f"{self._origin}: {count} in the configuration",
            hint="config/proxy-usage.yaml lists every key; `proxy-usage config schema` helps an editor",
            mistakes=tuple(ordered),
        )
