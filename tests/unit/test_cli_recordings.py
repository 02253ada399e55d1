"""Recordings of several workers, joined."""

from __future__ import annotations

import json
from pathlib import Path

from proxy_usage.cli.capture import read_capture
from proxy_usage.cli.recordings import join
from proxy_usage.recording import varint


def _part(path: Path, *messages: tuple[int, int, bytes], numbers: bool = True) -> Path:
    """A recording of ``(received_ms, stream, message)``."""
    path.write_bytes(b"".join(varint(len(raw)) + raw for _, _, raw in messages))
    if numbers:
        path.with_suffix(".streams.json").write_text(json.dumps([stream for _, stream, _ in messages]))
        path.with_suffix(".received.json").write_text(json.dumps([received for received, *_ in messages]))
    return path


def test_parts_are_joined_in_the_order_of_receipt_and_each_keeps_its_streams(tmp_path: Path) -> None:
    long = b"x" * 300
    one = _part(tmp_path / "one.bin", (10, 1, b"a"), (40, 2, long), (30, 1, b"set back"))
    two = _part(tmp_path / "two.bin", (20, 1, b"b"), (50, 1, b""))
    whole = tmp_path / "whole.bin"
    assert join([one, two], whole) == []
    messages = read_capture(whole, raw=False)
    assert [(one.stream, one.raw) for one in messages] == [
        (1, b"a"),
        (2, b"b"),
        (3, long),
        (1, b"set back"),
        (2, b""),
    ]
    assert json.loads(whole.with_suffix(".received.json").read_text()) == [10, 20, 40, 30, 50]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "whole.bin",
        "whole.received.json",
        "whole.streams.json",
    ]


def test_a_part_of_a_worker_that_died_stays_where_it_is(tmp_path: Path) -> None:
    one = _part(tmp_path / "one.bin", (10, 1, b"a"))
    cut = _part(tmp_path / "cut.bin", (10, 1, b"b"), numbers=False)
    whole = tmp_path / "whole.bin"
    assert join([one, cut], whole) == [cut]
    assert [message.raw for message in read_capture(whole, raw=False)] == [b"a"]
    assert cut.read_bytes() == b"\x01b"
