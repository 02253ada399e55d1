"""Whom a row belongs to, as the plan has it: the first rule that takes its field's value, and dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from proxy_usage.decode.values import Reader
from proxy_usage.model import Field, FoldPlan

NO_VALUE = b"-"
"""What Envoy's formatters write where there is nothing."""
MAX_TEXT_BYTES = 256
"""A longer text is not remembered: clients choose values of up to a header's size."""
_MAX_VERDICTS = 65_536

Whose = tuple[int, bytes, tuple[bytes, ...], bool]
"""An Identity without its origin."""


class Fields(NamedTuple):
    """Readers of the plan's fields, all from the same argument."""

    rules: tuple[tuple[int, Reader], ...]
    dimensions: tuple[Reader, ...]


class Identities:
    """Asks the plan's rules, and remembers their verdicts."""

    def __init__(self, plan: FoldPlan, accepts: Callable[[int, str], bool]) -> None:
        """``accepts`` as for ``ProtobufFold``."""
        self._plan = plan
        self._accepts = accepts
        self._verdicts: dict[tuple[int, bytes], bool] = {}

    def fields(self, reader: Callable[[Field], Reader]) -> Fields:
        """The plan's fields, each read as ``reader`` says."""
        rules = enumerate(map(reader, self._plan.rules))
        return Fields(tuple(rules), tuple(map(reader, self._plan.dimensions)))

    def of(self, fields: Fields, row: Any, *, routed: bool) -> Whose:
        """Whose a row is; ``row`` is what ``fields`` read, and whatever they raise is raised."""
        rule, value = self._tenant_value(fields.rules, row)
        dimensions = [b"" if (text := read(row)) == NO_VALUE else text for read in fields.dimensions]
        return rule, value, tuple(dimensions), routed

    def _tenant_value(self, rules: tuple[tuple[int, Reader], ...], row: Any) -> tuple[int, bytes]:
        """The first rule that takes its field's value, and that; else the first value and its ``~rule``."""
        refused, first = -1, b""
        for rule, read in rules:
            value = read(row)
            if value and value != NO_VALUE:
                verdict = self._verdicts.get((rule, value))
                if self._judge(rule, value) if verdict is None else verdict:
                    return rule, value
                if not first:
                    refused, first = ~rule, value
        return refused, first

    def _judge(self, rule: int, value: bytes) -> bool:
        verdict = self._accepts(rule, value.decode("utf-8", "surrogateescape"))
        if len(value) <= MAX_TEXT_BYTES:
            if len(self._verdicts) >= _MAX_VERDICTS:
                self._verdicts.clear()
            self._verdicts[rule, value] = verdict
        return verdict
