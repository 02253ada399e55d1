"""What the billing stand-in can be told to do wrong, and when.

A fault is decided once per request: by the ``script`` first (exact, for tests), then by ``always``, then by
a seeded draw over ``per_mille``. The same seed and the same order of requests give the same faults.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from proxy_usage.errors import UsageError


class Fault(StrEnum):
    """One way of answering wrongly. ``stores`` says what happens to the events meanwhile."""

    REDIRECT = "302"  # to a login page; stores nothing
    REFUSE = "400"  # INVALID_REQUEST to everything, as an intermediary would; stores nothing
    UNAUTHENTICATED = "401"
    FORBIDDEN = "403"
    NOT_FOUND = "404"
    TIMEOUT = "408"
    TOO_LARGE = "413"
    BUSY = "429"  # with Retry-After; stores nothing
    ERROR = "500"
    UNAVAILABLE = "503"
    REJECT = "207"  # a share of the events is refused, the rest stored
    SHORT = "short"  # 200 that silently left out a share of the events
    MIDWAY = "midway"  # stores the first events, then 429: as when the log fills up in mid-batch
    LOST = "lost"  # stores everything, then closes the connection without an answer
    RESET = "reset"  # closes the connection without storing
    LATE = "late"  # stores everything and answers after ``delay_ms``
    HTML = "html"  # 200 with a page; stores nothing
    EMPTY = "empty"  # 200 without a body; stores nothing
    HANG = "hang"  # never answers; stores nothing


_KEYS = {
    "seed",
    "per_mille",
    "always",
    "script",
    "times",
    "retry_after",
    "delay_ms",
    "share",
    "reject_tenants",
    "reject_types",
    "drop_tenants",
}


class Faults:
    """Which requests are answered wrongly.

    - ``per_mille``: fault → how many of 1,000 requests show it; together at most 1,000.
    - ``always``: a fault for every request. ``script``: faults (or ``None``) for the next requests.
    - ``times``: how many requests may still be faulted by ``per_mille`` or ``always``; ``None``: no end.
    - ``retry_after``: header of a 429 (seconds or an HTTP date); ``None`` leaves it out.
    - ``delay_ms``: how late a late answer is. ``share``: per mille of a batch that 207 and short hit.
    - ``reject_tenants``, ``reject_types``: such events are always refused with a per-event code.
    - ``drop_tenants``: such events are left out of ``accepted`` without a word, as the endpoint does with
      a project without an active binding.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        per_mille: Mapping[Fault, int] | None = None,
        always: Fault | None = None,
        script: Sequence[Fault | None] = (),
        times: int | None = None,
        retry_after: str | None = "1",
        delay_ms: int = 1000,
        share: int = 200,
        reject_tenants: Iterable[str] = (),
        reject_types: Iterable[str] = (),
        drop_tenants: Iterable[str] = (),
    ) -> None:
        self.per_mille = dict(per_mille or {})
        if any(share < 0 for share in self.per_mille.values()) or sum(self.per_mille.values()) > 1000:
            raise UsageError(
                "faults: per_mille is below 0 or adds up to more than 1000", hint="use smaller shares"
            )
        self.seed = seed
        self.always = always
        self.script: deque[Fault | None] = deque(script)
        self.times = times
        self.retry_after = retry_after
        self.delay_ms = delay_ms
        self.share = share
        self.reject_tenants = frozenset(reject_tenants)
        self.reject_types = frozenset(reject_types)
        self.drop_tenants = frozenset(drop_tenants)
        self._random = random.Random(seed)  # noqa: S311 - repeatable faults are the point

    @classmethod
    def from_json(cls, body: Any) -> Faults:
        """Reads what ``PUT /faults`` sends: an object with the constructor's names.

        Raises UsageError that names the key and what is allowed.
        """
        if not isinstance(body, dict) or (unknown := sorted(set(body) - _KEYS)):
            what = f"unknown keys {unknown}" if isinstance(body, dict) else "not a JSON object"
            raise UsageError(f"faults: {what}", hint=f"known keys: {', '.join(sorted(_KEYS))}")
        named = dict(body)
        try:
            named["per_mille"] = {
                Fault(name): int(share) for name, share in named.get("per_mille", {}).items()
            }
            named["always"] = Fault(named["always"]) if named.get("always") is not None else None
            named["script"] = [None if name is None else Fault(name) for name in named.get("script", ())]
            return cls(**named)
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"faults: {error}", hint=f"faults are: {', '.join(Fault)}") from error

    def as_json(self) -> dict[str, Any]:
        """The present setting, in the form that ``from_json`` reads."""
        return {
            "seed": self.seed,
            "per_mille": {fault.value: share for fault, share in self.per_mille.items()},
            "always": self.always,
            "script": list(self.script),
            "times": self.times,
            "retry_after": self.retry_after,
            "delay_ms": self.delay_ms,
            "share": self.share,
            "reject_tenants": sorted(self.reject_tenants),
            "reject_types": sorted(self.reject_types),
            "drop_tenants": sorted(self.drop_tenants),
        }

    def decide(self) -> Fault | None:
        """The fault of the request that just arrived."""
        if self.script:
            return self.script.popleft()
        if self.times is not None and self.times <= 0:
            return None
        fault = self.always or self._draw()
        if fault is not None and self.times is not None:
            self.times -= 1
        return fault

    def _draw(self) -> Fault | None:
        if not self.per_mille:
            return None
        ticket = self._random.randrange(1000)
        for fault, share in self.per_mille.items():
            if ticket < share:
                return fault
            ticket -= share
        return None

    def pick(self, count: int) -> frozenset[int]:
        """The positions of a batch of ``count`` events that a 207 or a short answer hits: at least one."""
        picked = {index for index in range(count) if self._random.randrange(1000) < self.share}
        if not picked and count:
            picked = {self._random.randrange(count)}
        return frozenset(picked)

    def cut(self, count: int) -> int:
        """How many events of a batch are stored before it fails midway."""
        return self._random.randrange(count) if count else 0
