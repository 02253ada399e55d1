"""The demo as people run it: one command, a real Envoy, the sink as a process, and the bill compared."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy_usage", "demo", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def demo(*arguments: str) -> tuple[int | None, str]:
    """Exit status, and what it said."""
    process = await start(*arguments)
    said, _ = await process.communicate()
    return process.returncode, said.decode()


async def test_once_the_bill_is_right(tmp_path: Path) -> None:
    directory = tmp_path / "demo"
    status, said = await demo("--once", "--requests", "400", "--dir", str(directory))
    assert status == 0, said
    assert "equal: 400 requests are" in said
    assert "; 4 more were for a host that nobody owns" in said
    assert "differs" not in said
    for tenant in ("alpha", "bravo", "charlie"):
        assert re.search(rf"{tenant}: sent/delivered requests ([1-9]\d*)/\d+", said)
    rows = [json.loads(line) for line in (directory / "access.jsonl").read_text().splitlines()]
    assert len(rows) == 404
    assert (directory / "usage.db").is_file()


async def test_once_while_the_endpoint_fails(tmp_path: Path) -> None:
    status, said = await demo("--once", "--fail", "--requests", "300", "--tenants", "8")
    assert status == 0, said
    assert "the billing endpoint now answers late" in said
    assert "equal: 300 requests are" in said


async def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    process = await start("--requests", "100", "--dir", str(tmp_path / "demo"))
    assert process.stdout is not None
    said = ""
    while "wave 2:" not in said:
        line = await process.stdout.readline()
        assert line, said
        said += line.decode()
    process.send_signal(signal.SIGINT)
    rest, _ = await process.communicate()
    assert process.returncode == 0, said + rest.decode()
    assert "draining Envoy" in rest.decode()
    assert "equal: " in rest.decode()


async def test_duration_ends_it(tmp_path: Path) -> None:
    status, said = await demo("--duration", "1s", "--requests", "50")
    assert status == 0, said
    assert "wave 1:" in said


async def test_bad_arguments(tmp_path: Path) -> None:
    status, said = await demo("--duration", "soon")
    assert status == 2, said
    assert "'soon'" in said
    (tmp_path / "old").touch()
    status, said = await demo("--once", "--dir", str(tmp_path))
    assert status == 2, said
    assert "is not empty" in said


async def test_the_story_ends_with_all_counts_side_by_side(tmp_path: Path) -> None:
    """The endpoint fails and heals, the sink is killed and comes back; the audit accounts for it all.

    Each is played, though there is not the time for it.
    """
    status, said = await demo(
        "--story", "--duration", "1s", "--requests", "150", "--dir", str(tmp_path / "demo")
    )
    assert status == 0, said
    acts = [
        "503 to everything",
        "well again",
        "SIGKILL",
        "the sink is back",
        "draining Envoy",
        "counted by each",
    ]
    places = [said.index(words) for words in acts]
    assert places == sorted(places)
    counts = {
        who: int(match[1].replace(",", ""))
        for who in ("clients", "Envoy", "sink", "delivered", "audit")
        if (match := re.search(rf"│ {who} +│ +([\d,]+) │", said))
    }
    assert len(counts) == 5, said
    assert counts["clients"] == counts["Envoy"] > 300
    assert counts["delivered"] == counts["audit"] > 300
    if "rows were lost" not in said:  # nearly always
        assert counts["sink"] == counts["clients"]
        assert "complete" in said
        assert "equal: " in said
    else:
        assert "accounted for: " in said
