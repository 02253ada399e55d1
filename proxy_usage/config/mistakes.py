"""What is wrong with a configuration, kept apart from where it is written.

A validator raises ``Wrong`` with a path relative to what it validates; ``load`` joins the two and finds the
line. Validators never see lines, so models stay plain data.
"""

from __future__ import annotations

from dataclasses import dataclass

Loc = tuple[str | int, ...]
"""Keys and list indexes from the root: ``("outputs", 0, "url")``."""


class Wrong(ValueError):
    """One mistake: what is wrong, and the remedy.

    ``at`` leads from the validated value to the part that is wrong. ``place`` replaces the line in the
    configuration where the mistake is in another file, such as a map file.
    """

    def __init__(self, what: str, remedy: str, *, at: Loc = (), place: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy
        self.at = at
        self.place = place


class WrongMany(ValueError):
    """Several mistakes found by one validator."""

    def __init__(self, mistakes: tuple[Wrong, ...]) -> None:
        super().__init__("; ".join(one.what for one in mistakes))
        self.mistakes = mistakes


@dataclass(frozen=True, slots=True)
class Finding:
    """A mistake with its path from the root of the configuration.

    ``{other}`` in ``what`` stands for the first of ``concerns``, as its path was written.

    ``concerns`` names the other keys the finding was concluded from: if one of those is itself mistaken,
    the conclusion may be false and is not shown.
    """

    loc: Loc
    what: str
    remedy: str
    place: str = ""
    concerns: tuple[Loc, ...] = ()


def dotted(loc: Loc) -> str:
    """``("outputs", 0, "url")`` as people write it: ``outputs[0].url``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
