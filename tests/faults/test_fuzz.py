"""Mutated messages through decode and pipeline, in a process of their own.

FAULT_MESSAGES says how many (4,000 by default; ``make test-faults`` takes 100,000).
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

MESSAGES = int(os.environ.get("FAULT_MESSAGES", "4000"))
FUZZ = Path(__file__).with_name("fuzz_decode.py")

pytestmark = pytest.mark.timeout(120 + MESSAGES // 100)


@pytest.mark.parametrize("way", [(), ("--blind",)], ids=["guided", "blind"])
def test_no_message_breaks_decode(tmp_path: Path, way: tuple[str, ...]) -> None:
    command = (sys.executable, str(FUZZ), "--messages", str(MESSAGES), "--corpus", str(tmp_path), *way)
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    said = ended.stdout + ended.stderr[-3_000:]
    assert ended.returncode == 0, said
    (line,) = re.findall(r"^(\d+) messages, (\d+) rows, grown by -?\d+ MiB$", ended.stdout, re.MULTILINE)
    print(ended.stdout)
    assert int(line[0]) == MESSAGES
    assert int(line[1]) > MESSAGES  # most of them still hold rows: it is those that are tested
    assert not list(tmp_path.glob("broke-*"))
