"""Answers: plain where no person looks, drawn on a terminal, and harmless to it either way."""

import os
import pty
import subprocess
import sys
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from proxy_usage.cli.show import emit, facts, moment, plain, safe, size, table


class Pair(NamedTuple):
    """Two numbers."""

    events: int
    value: int


@dataclass(frozen=True)
class Thing:
    """Something nested."""

    name: str
    pair: Pair
    raw: bytes


def test_a_table_is_aligned_and_empty_ones_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    table([{"name": "a", "value": 5}, {"name": "long name", "value": None}])
    table([], empty="nothing")
    table([])
    assert capsys.readouterr().out == "name       value\na              5\nlong name      -\nnothing\n"


def test_facts_leave_out_what_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    facts([("a", 1), ("longer", "x\ny"), ("none", None)])
    assert capsys.readouterr().out == "a       1\nlonger  x\\ny\n"


def test_json_keeps_integers_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    thing = Thing("ü\x9b", Pair(1 << 70, 2), b"a\xff")
    assert plain([thing]) == [
        {"name": "ü\x9b", "pair": {"events": 1 << 70, "value": 2}, "raw": "a\\xff"},
    ]
    emit(thing)
    out = capsys.readouterr().out
    assert out.isascii()
    assert str(1 << 70) in out


@pytest.mark.parametrize(
    ("text", "shown"), [("plain ü", "plain ü"), ("\x1b[2J", "\\x1b[2J"), ("a\nb\u202e", "a\\nb\\u202e")]
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert safe(text) == shown


def test_sizes_and_moments() -> None:
    assert [size(n) for n in (0, 9_999, 10 << 10, 11 << 20, 10 << 30)] == [
        "0 B",
        "9999 B",
        "10 KiB",
        "11 MiB",
        "10 GiB",
    ]
    assert (moment(None), moment(1)) == ("-", "1970-01-01T00:00:00.001Z")


def test_a_terminal_gets_a_drawn_table_without_the_text_s_own_codes() -> None:
    code = "from proxy_usage.cli.show import table; table([{'name': '\\x1b[31m[red]evil', 'n': 7}])"
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", code],
        stdout=theirs,
        check=True,
        env={"TERM": "xterm", "COLUMNS": "80", "NO_COLOR": "1"},
    )
    os.close(theirs)
    said = os.read(ours, 4096).decode()
    os.close(ours)
    assert "\\x1b[31m[red]evil" in said
    assert "\x1b[31m" not in said
    assert "─" in said
