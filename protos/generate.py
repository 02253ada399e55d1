"""Regenerates ``proxy_usage/als/v1/als_pb2.py`` from ``als.proto``.

Run as ``python protos/generate.py`` with the packages of ``requirements/dev.txt``: the generated code names
the protobuf version it was made for, and a test compares it byte for byte.
"""

# ruff: noqa: INP001 (a script beside its sources, not a package)
from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc  # type: ignore[import-untyped]

SOURCES = Path(__file__).resolve().parent
PROTO = "proxy_usage/als/v1/als.proto"


def generate(target: Path) -> None:
    """Writes the Python module below ``target``. Raises ``SystemExit`` if protoc refuses."""
    arguments = ["protoc", f"-I{SOURCES}", f"--python_out={target}", PROTO]
    if protoc.main(arguments) != 0:
        raise SystemExit(f"protoc refused {SOURCES / PROTO}; its message is above")


if __name__ == "__main__":
    generate(SOURCES.parent)
    sys.stdout.write("proxy_usage/als/v1/als_pb2.py is current\n")
