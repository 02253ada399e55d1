"""A real NATS server with JetStream, and the wire to it, which can be cut.

async with NatsServer(tmp_path) as server:
    await server.create("USAGE", ["billing.usage.*.ingest"])
    await server.kill(); await server.start()      # on the same port, with the same streams
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import nkeys
from nats.aio.client import Client
from nats.js.errors import NotFoundError
from program import eventually

from proxy_usage.demo.listener import lease_port

SUBJECTS = ("billing.usage.*.ingest",)
TEN_MINUTES_NS = 600 * 10**9


def _binary() -> str:
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    assert found, "nats-server is not installed: make setup"
    return found


class NatsServer:
    """The server; ``settings`` are laid over its configuration."""

    def __init__(self, directory: Path, settings: Mapping[str, Any] | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = lease_port()
        self.log = directory / "nats.log"
        self.settings: dict[str, Any] = {
            "listen": f"127.0.0.1:{self.port}",
            # Written through, so that a server that is killed has what it acknowledged.
            "jetstream": {"store_dir": str(directory / "jetstream"), "sync_interval": "always"},
            **(settings or {}),
        }
        self._file = directory / "nats.conf"
        self._process: asyncio.subprocess.Process | None = None
        self.login: dict[str, Any] = {}
        """How the tests' own connections log in."""

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Starts it and waits until it lets clients in."""
        self._file.write_text(json.dumps(self.settings))
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                _binary(), "-c", str(self._file), stdout=log, stderr=log, env={**os.environ}
            )
        process = self._process

        async def listens() -> bool:
            assert process.returncode is None, self.log.read_text()
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                return True
            return False

        await eventually(listens, "nats-server listens", why=self.log.read_text)

    async def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A connection of the test's own."""
        client = Client()
        await client.connect(self.url, **self.login)
        try:
            yield client
        finally:
            await client.close()

    async def api(self, request: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """JetStream's own API."""
        async with self.client() as client:
            answer = await client.request(f"$JS.API.{request}", json.dumps(body or {}).encode(), timeout=10)
        said: dict[str, Any] = json.loads(answer.data)
        return said

    async def create(self, name: str, subjects: Sequence[str] = SUBJECTS, **settings: Any) -> None:
        """A stream, on disk."""
        body = {"name": name, "subjects": list(subjects), "storage": "file", "num_replicas": 1}
        body |= {"retention": "limits", "discard": "new", "duplicate_window": TEN_MINUTES_NS, **settings}
        said = await self.api(f"STREAM.CREATE.{name}", body)
        assert "error" not in said, said

    async def stored(self, name: str) -> list[Stored]:
        """Every message of a stream, in order."""
        async with self.client() as client:
            js = client.jetstream()
            state = (await js.stream_info(name)).state
            found = []
            for seq in range(state.first_seq, state.last_seq + 1):
                try:
                    message = await js.get_msg(name, seq)
                except NotFoundError:
                    continue
                found.append(Stored(message.subject or "", message.headers or {}, message.data or b""))
        return found

    async def count(self, name: str) -> int:
        """Messages in a stream."""
        return int((await self.api(f"STREAM.INFO.{name}"))["state"]["messages"])


class Stored(NamedTuple):
    """A message in a stream."""

    subject: str
    headers: Mapping[str, str]
    data: bytes


class Wire:
    """A TCP proxy to a port: ``cut`` and ``heal``. What was on its way when it is cut is gone."""

    def __init__(self, target: int) -> None:
        self.port = lease_port()
        self._target = target
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self.bytes = 0
        """Sent towards the target."""
        self.mute = False
        """While it is, nothing comes back."""

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.heal()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()

    async def heal(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Nobody gets through any more, and who was through is reset."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in tuple(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far, near = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, near}
        try:
            await asyncio.gather(self._pump(reader, near, up=True), self._pump(far, writer, up=False))
        finally:
            self._open -= {writer, near}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                self.bytes += len(data) if up else 0
                if not up and self.mute:
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


# --- credentials: an operator, an account and a user, as nsc makes them -----


class Identity:
    """A key pair with a name in NATS's terms."""

    def __init__(self, prefix: int) -> None:
        raw = os.urandom(32)
        self.pair = nkeys.from_seed(nkeys.encode_seed(raw, prefix))
        self.public: str = self.pair.public_key.decode()
        self.seed: str = self.pair.seed.decode()


class Authority:
    """An operator with one account; ``creds`` makes users of it."""

    def __init__(self) -> None:
        self._operator = Identity(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = Identity(nkeys.PREFIX_BYTE_ACCOUNT)
        system = Identity(nkeys.PREFIX_BYTE_ACCOUNT)
        unlimited = {"subs": -1, "conn": -1, "data": -1, "payload": -1, "leaf": -1, "imports": -1}
        unlimited |= {"exports": -1, "mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
        plain = unlimited | {"mem_storage": 0, "disk_storage": 0}  # JetStream is not for the system's account
        account = {"limits": unlimited, "type": "account", "version": 2}
        self.settings: dict[str, Any] = {
            "operator": self._signed(
                self._operator, self._operator, {"type": "operator", "version": 2}, "operator"
            ),
            "resolver": "MEMORY",
            "resolver_preload": {
                self._account.public: self._signed(self._operator, self._account, account, "usage"),
                system.public: self._signed(self._operator, system, account | {"limits": plain}, "SYS"),
            },
            "system_account": system.public,
        }
        """What makes a server believe it."""

    def creds(self, path: Path, permissions: Mapping[str, Any] | None = None) -> Path:
        """The credentials file of a new user."""
        user = Identity(nkeys.PREFIX_BYTE_USER)
        claims = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1, **(permissions or {})}
        jwt = self._signed(self._account, user, claims, "sink")
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        return path

    @staticmethod
    def _signed(issuer: Identity, subject: Identity, claims: Mapping[str, Any], name: str) -> str:
        body = {"iat": int(time.time()), "iss": issuer.public, "sub": subject.public, "name": name}
        body |= {"nats": claims}
        body["jti"] = (
            base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
        )
        head = _b64(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
        text = f"{head}.{_b64(json.dumps(body).encode())}"
        return f"{text}.{_b64(issuer.pair.sign(text.encode()))}"


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
