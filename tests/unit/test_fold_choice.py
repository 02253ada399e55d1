"""Which fold runs, and why; and that an installation works where nothing can be compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest
from folding import COMPILED, needs_extension

from proxy_usage.decode.choice import choose, load
from proxy_usage.decode.source_digest import NATIVE, source_digest

ROOT = Path(__file__).resolve().parents[2]


def built(digest: str) -> ModuleType:
    return cast("ModuleType", SimpleNamespace(DIGEST=digest))


def not_there() -> ModuleType:
    raise ImportError("no module named _fold")


def test_the_compiled_fold_runs_where_it_was_built_from_this_source() -> None:
    choice = choose({}, load=lambda: built("1"), digest=lambda: "1")
    assert choice.native is not None
    assert choice.reason == "compiled"


def test_an_installed_package_has_no_source_to_compare_with() -> None:
    assert choose({}, load=lambda: built("1"), digest=lambda: "").reason == "compiled"


def test_without_the_extension_protobuf_folds() -> None:
    assert choose({}, load=not_there) == (None, "protobuf: not built")


def test_an_extension_of_other_source_does_not_run() -> None:
    assert choose({}, load=lambda: built("1"), digest=lambda: "2") == (None, "protobuf: stale build")


def test_the_compiled_fold_can_be_switched_off() -> None:
    choice = choose({"PROXY_USAGE_FOLD": "protobuf"}, load=lambda: built("1"), digest=lambda: "1")
    assert choice == (None, "protobuf: PROXY_USAGE_FOLD=protobuf")


def test_this_checkout_was_not_built_from_other_source() -> None:
    assert COMPILED.reason != "protobuf: stale build", "make setup builds it anew"


@needs_extension
def test_this_checkout_was_built_from_its_source() -> None:
    assert COMPILED.reason == "compiled"
    assert source_digest() == load().DIGEST


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    shutil.copytree(NATIVE, tmp_path / "same")
    assert source_digest(tmp_path / "same") == source_digest()
    (tmp_path / "same" / "wire.h").rename(tmp_path / "same" / "wired.h")
    renamed = source_digest(tmp_path / "same")
    (tmp_path / "same" / "wired.h").write_text("")
    assert len({source_digest(), renamed, source_digest(tmp_path / "same"), source_digest(tmp_path)}) == 4
    assert source_digest(tmp_path) == ""


def wheel(directory: Path, **environ: str) -> tuple[Path, str]:
    """A wheel of this checkout, built without a download; and what was said."""
    source = directory / "source"
    source.mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "proxy_usage", source / "proxy_usage", ignore=ignore)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v", "--no-index")
    ran = subprocess.run(
        (*pip, "--no-build-isolation", "--no-deps", "--wheel-dir", str(directory), str(source)),
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (made,) = directory.glob("*.whl")
    return made, ran.stdout + ran.stderr


def version_says(made: Path, directory: Path) -> str:
    """What `version` of an unpacked wheel says of the fold."""
    with zipfile.ZipFile(made) as packed:
        packed.extractall(directory)
    program = (
        "import proxy_usage, proxy_usage.decode as d; print(proxy_usage.__file__); print(d.CHOICE.reason);"
        "from proxy_usage.cli.version import version; version()"
    )
    ran = subprocess.run(
        (sys.executable, "-c", program), cwd=directory, capture_output=True, text=True, check=True
    )
    place, reason, *shown = ran.stdout.splitlines()
    assert Path(place).is_relative_to(directory)
    assert any(line.split() == ["fold", *reason.split()] for line in shown), ran.stdout
    return reason


def test_an_installation_works_without_a_compiler(tmp_path: Path) -> None:
    made, said = wheel(tmp_path / "build", CC="false")
    assert "building extension" in said
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith((".so", ".pyd"))]
    assert version_says(made, tmp_path / "installed") == "protobuf: not built"


def test_a_wheel_brings_the_compiled_fold_and_not_its_source(tmp_path: Path) -> None:
    if shutil.which("gcc") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("no compiler, or no Python headers")
    made, _ = wheel(tmp_path / "build", FOLD_CFLAGS="-Werror")  # a warning would leave the extension out
    assert not [name for name in zipfile.ZipFile(made).namelist() if name.endswith((".c", ".h"))]
    assert version_says(made, tmp_path / "installed") == "compiled"
