"""The import contracts in pyproject.toml are kept, and each of them notices an import that breaks it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BREAKS = [
    ("layers", "windows", "from proxy_usage import store"),
    ("layers", "decode", "from proxy_usage.attribution import *"),
    ("layers", "store", "from proxy_usage import metrics"),
    ("layers", "no_layer_was_given_to_it", "from proxy_usage import model"),
    ("pure-core", "events", "import sqlite3"),
    ("pure-core", "windows", "import time"),
    ("pure-core", "decode", "import asyncio.locks"),
    ("config-io", "config", "import aiohttp"),
    ("grpc", "service", "from grpc import aio"),
    ("grpc", "web", "from grpc_health.v1 import health_pb2"),
    ("protobuf", "streams", "from google.protobuf.message import DecodeError"),
    ("protobuf", "receiver", "import proxy_usage.als.v1.als_pb2"),
    ("sql", "delivery", "import sqlite3"),
    ("http", "service", "import aiohttp.web"),
    ("envoy-data-plane", "receiver", "import envoy_data_plane.envoy.service"),
]


def lint_imports(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", code, "--no-cache", *arguments],
        cwd=directory,
        check=False,
        capture_output=True,
        text=True,
    )


def test_the_contracts_are_kept() -> None:
    checked = lint_imports(ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(("contract", "module", "line"), BREAKS)
def test_an_import_that_breaks_a_contract_is_noticed(
    contract: str, module: str, line: str, tmp_path: Path
) -> None:
    shutil.copytree(
        ROOT / "proxy_usage", tmp_path / "proxy_usage", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    package = tmp_path / "proxy_usage" / module
    target = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    with target.open("a") as file:
        file.write(f"\n{line}\n")
    checked = lint_imports(tmp_path, "--contract", contract)
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert "1 broken" in checked.stdout
