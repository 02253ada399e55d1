"""Text that somebody else chose, made fit to be shown."""

from __future__ import annotations

MOST = 80
"""Characters of a name that are shown."""


def visible(text: str) -> str:
    """Text in which whatever cannot be seen, or moves or hides other text, is escaped as in Python.

    Control characters, line ends, zero-width characters and the marks that turn the direction of text are
    among them.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def name(text: str, most: int = MOST) -> str:
    """A name that may be anything: visible, and cut where it is long, with a word about what is missing."""
    shown = visible(text[:most])
    if len(text) <= most and len(shown) <= 2 * most:
        return shown
    return f"{shown[: 2 * most]}… ({len(text)} characters)"


def octets(raw: bytes, most: int = MOST) -> str:
    """Bytes that ought to be UTF-8, likewise; what is not appears as ``\\xff``."""
    return name(raw.decode("utf-8", "backslashreplace"), most)
