"""The compiled fold under AddressSanitizer and UndefinedBehaviorSanitizer: it never leaves its input.

FAULT_MESSAGES says how many messages (600 by default; ``make test-faults`` takes 100,000).
"""

from __future__ import annotations

import os
import random
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from decode_target import scramble, seeds
from odd_rows import Writer

from proxy_usage.decode import split
from proxy_usage.decode.source_digest import NATIVE

ROOT = Path(__file__).resolve().parents[2]
MESSAGES = int(os.environ.get("FAULT_MESSAGES", "600"))
CHECKED = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -Werror"

pytestmark = [
    pytest.mark.timeout(240 + MESSAGES // 20),
    pytest.mark.skipif(
        shutil.which("gcc") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists(),
        reason="no gcc, or no Python headers",
    ),
]


def run(*command: str, **environ: str) -> str:
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-2_000:] + ran.stderr[-6_000:]
    return ran.stdout


def test_both_folds_agree_under_sanitizers(tmp_path: Path) -> None:
    build = (
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "temp"),
    )
    run(sys.executable, *build, FOLD_CFLAGS=CHECKED)
    asan = run("gcc", "-print-file-name=libasan.so").strip()
    said = run(
        sys.executable,
        str(Path(__file__).with_name("sanitized_fold.py")),
        str(tmp_path),
        "7",
        str(MESSAGES),
        LD_PRELOAD=asan,
        ASAN_OPTIONS="detect_leaks=0",  # Python itself keeps what it has until the end
        PYTHONMALLOC="malloc",  # each object in memory of its own
    )
    found = re.fullmatch(r"(\d+) messages, (\d+) rows, no complaint\n", said)
    assert found, said
    assert int(found[2]) > MESSAGES


def test_no_row_is_read_past_its_last_byte(tmp_path: Path) -> None:
    """Rows in memory of exactly their size, cut at every byte and changed at random."""
    program = str(tmp_path / "walk_rows")
    sources = (str(Path(__file__).with_name("walk_rows.c")), str(NATIVE / "row.c"))
    run(
        "gcc", "-std=c11", "-O1", "-Wall", "-Wextra", *CHECKED.split(), f"-I{NATIVE}", *sources, "-o", program
    )
    dice = random.Random(7)
    sent = [row for raw in seeds().values() for row in split(raw).entries][:60]
    odd = [Writer(seed, 0.02).row(http=seed % 2 == 0) for seed in range(300)]
    rows = [row[:at] for row in (*sent[:12], *odd[:40]) for at in range(min(len(row), 1_500))]
    rows += odd + [scramble(dice.choice(sent), dice) for _ in range(8_000)]
    packed = tmp_path / "rows"
    packed.write_bytes(b"".join(struct.pack("=I", len(row)) + row for row in rows))
    found = re.fullmatch(r"(\d+) rows, (\d+) plain, \d+\n", run(program, str(packed)))
    assert found
    assert int(found[1]) == len(rows)
    assert int(found[2]) > 300


def test_the_sanitizer_would_see_it(tmp_path: Path) -> None:
    """The check above can fail: a walk that goes a byte too far ends the process."""
    program = str(tmp_path / "walk_rows")
    (tmp_path / "wire.h").write_text(
        (NATIVE / "wire.h").read_text().replace("size > length(*rest)", "size > length(*rest) + 1")
    )
    shutil.copy(NATIVE / "row.c", tmp_path)
    shutil.copy(NATIVE / "row.h", tmp_path)
    sources = (str(shutil.copy(Path(__file__).with_name("walk_rows.c"), tmp_path)), str(tmp_path / "row.c"))
    run("gcc", "-std=c11", "-O1", *CHECKED.split(), f"-I{tmp_path}", *sources, "-o", program)
    row = b"\x0a\x04\x9a\x01\x02x"  # a route name of two bytes, of which one is there
    (tmp_path / "rows").write_bytes(struct.pack("=I", len(row)) + row)
    ran = subprocess.run((program, str(tmp_path / "rows")), capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "heap-buffer-overflow" in ran.stderr
