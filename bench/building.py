"""Builds the peers into build/bench, where Debian's packages for them are installed.

Envoy's schema comes from the descriptors of xds-protos, so that it is the one the messages are made with.
What cannot be built is left out, with a line that says what is missing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envoy.service.accesslog.v3 import als_pb2
from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
BUILD = ROOT / "build" / "bench"
CPP_PACKAGES = "g++ pkg-config libgrpc++-dev libprotobuf-dev protobuf-compiler protobuf-compiler-grpc"
GO_PACKAGES = (
    "golang-go golang-google-grpc-dev golang-google-protobuf-dev golang-github-golang-protobuf-1-5-dev"
)
GO_SOURCES = Path("/usr/share/gocode")
_GO_MODULE = "bench/"


class NotBuilt(Exception):
    """A program cannot be built here; says why."""


def build_cpp(name: str) -> Path:
    """``generator`` or ``sink`` of bench/peers. Raises NotBuilt."""
    source, program = PEERS / f"{name}.cc", BUILD / f"{name}-cpp"
    if _fresh(program, source):
        return program
    missing = [tool for tool in ("g++", "pkg-config", "protoc", "grpc_cpp_plugin") if not shutil.which(tool)]
    if missing or subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"], check=False).returncode:
        raise NotBuilt(f"no C++ {name}: apt-get install {CPP_PACKAGES}")
    generated: list[Path] = []
    if name == "sink":
        out = BUILD / "cpp"
        out.mkdir(parents=True, exist_ok=True)
        plugin = shutil.which("grpc_cpp_plugin")
        _protoc(f"--cpp_out={out}", f"--grpc_out={out}", f"--plugin=protoc-gen-grpc={plugin}")
        generated = sorted(out.rglob("*.pb.cc"))
    flags = _said("pkg-config", "--cflags", "--libs", "grpc++", "protobuf").split()
    sources = [str(path) for path in (source, *generated)]
    _run("g++", "-std=c++17", "-O2", "-o", str(program), f"-I{BUILD / 'cpp'}", *sources, *flags, "-lpthread")
    return _built(program, source)


def build_go() -> Path:
    """``sink.go``. Raises NotBuilt."""
    source, program = PEERS / "sink.go", BUILD / "sink-go"
    if _fresh(program, source):
        return program
    needed = [GO_SOURCES / "src/google.golang.org" / name for name in ("grpc", "protobuf")]
    if not shutil.which("go") or not shutil.which("protoc") or not all(path.is_dir() for path in needed):
        raise NotBuilt(f"no Go sink: apt-get install protobuf-compiler {GO_PACKAGES}")
    out = BUILD / "go"
    environment = {"GO111MODULE": "off", "GOPATH": f"{out}:{GO_SOURCES}", "GOCACHE": str(out / "cache")}
    plugin = BUILD / "protoc-gen-go"
    _run("go", "build", "-o", str(plugin), "google.golang.org/protobuf/cmd/protoc-gen-go", env=environment)
    packages = [
        f"--go_opt=M{file.name}={_GO_MODULE}{Path(file.name).parent}"
        for file in schema().file
        if not file.name.startswith("google/")
    ]
    (out / "src").mkdir(parents=True, exist_ok=True)
    _protoc(f"--go_out={out / 'src'}", f"--plugin=protoc-gen-go={plugin}", *packages)
    _run("go", "build", "-o", str(program), str(source), env=environment)
    return _built(program, source)


def schema() -> Any:
    """Envoy's access-log service and everything that it imports, as a ``FileDescriptorSet``."""
    found: dict[str, Any] = {}

    def visit(file: Any) -> None:
        if file.name not in found:
            for needed in file.dependencies:
                visit(needed)
            found[file.name] = file

    visit(als_pb2.DESCRIPTOR)
    whole = descriptor_pb2.FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(whole.file.add())
    return whole


def _protoc(*arguments: str) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    described = BUILD / "envoy.binpb"
    whole = schema()
    described.write_bytes(whole.SerializeToString())
    files = [file.name for file in whole.file if not file.name.startswith("google/")]
    _run("protoc", f"--descriptor_set_in={described}", *arguments, *files)


def _fresh(program: Path, source: Path) -> bool:
    """Whether a program was made of just this source: times say nothing after a checkout."""
    made_of = program.with_name(program.name + ".digest")
    return program.exists() and made_of.exists() and made_of.read_text() == _digest(source)


def _built(program: Path, source: Path) -> Path:
    program.with_name(program.name + ".digest").write_text(_digest(source))
    return program


def _digest(source: Path) -> str:
    return hashlib.sha256(source.read_bytes()).hexdigest()


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise NotBuilt(f"{Path(command[0]).name} failed: {(ran.stderr or ran.stdout)[-2_000:]}")


def _said(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def versions(commands: Sequence[Sequence[str]]) -> dict[str, str]:
    """First words of what each command says of its version; those that are not there are left out."""
    found = {}
    for command in commands:
        if shutil.which(command[0]):
            found[command[0]] = _said(*command).splitlines()[0].removeprefix("go version go").strip()
    return found
