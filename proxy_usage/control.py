"""The control socket: how verbs that change the store reach the service that owns it.

A Unix socket beside the store, for its owner alone (0600). One request a line, one answer a line, JSON:

    {"verb": "deadletters.replay", "arguments": {"output": null}}  ─▶  {"result": {"replayed": 3}}
                                                                    or  {"error": {"type": "UsageError", …}}

Whoever listens holds the store's lock, so a socket file that nobody answers is left over from a dead process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from proxy_usage import errors
from proxy_usage.errors import ConfigError, ListenError, ProxyUsageError, UsageError
from proxy_usage.places import Place, place

MAX_REQUEST = 1 << 20
"""Bytes of a request, its newline included."""
MAX_ANSWER = 64 << 20
TIMEOUT_S = 300
"""How long ``call`` waits for an answer: a replay of everything takes a while."""
MAX_ADDRESS = 100
"""Bytes of a socket's address that every system takes (sun_path holds 104 on macOS, 108 on Linux)."""

Handler = Callable[[dict[str, object]], Awaitable[object]]


class NotRunning(ProxyUsageError):
    """Nobody listens on the control socket: no service runs on this store."""


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    verb: str
    arguments: dict[str, object] = {}


class _Failure(msgspec.Struct):
    type: str
    error: str
    hint: str = ""
    exit_code: int = 1
    mistakes: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: ProxyUsageError) -> _Failure:
        mistakes = error.mistakes if isinstance(error, ConfigError) else ()
        return cls(type(error).__name__, error.message, error.hint, error.exit_code, mistakes)

    def raised(self) -> ProxyUsageError:
        """The error as it was where it arose; of the base type where this program does not know its type."""
        kind = getattr(errors, self.type, None)
        if isinstance(kind, type) and issubclass(kind, ConfigError):
            return kind(self.error, hint=self.hint, mistakes=self.mistakes)
        if isinstance(kind, type) and issubclass(kind, ProxyUsageError):
            return kind(self.error, hint=self.hint)
        error = ProxyUsageError(self.error, hint=self.hint)
        error.exit_code = self.exit_code
        return error


class _Answer(msgspec.Struct, omit_defaults=True):
    result: object = None
    error: _Failure | None = None


def socket_path(store: Path) -> Path:
    """Where the service that owns a store listens."""
    return store.with_name(store.name + ".sock")


def supervisor_socket(store: Path) -> Path:
    """Where the supervisor of several workers listens, by the store of worker 0."""
    return store.with_name(store.name + ".supervisor.sock")


class ControlServer:
    """Listens on ``path`` and answers each request by its verb's handler.

    A handler takes the request's arguments and gives anything that JSON can hold; a ``ProxyUsageError`` it
    raises reaches the caller as the same error. Use one server on one event loop.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = dict(handlers)
        self._server: asyncio.Server | None = None
        self._place: Place | None = None  # of the socket's file
        self._talks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins to listen, in the place of a socket that a dead process left.

        Raises:
            ListenError: another process listens there, or the socket cannot be made.
            ConfigError: the path is too long for a socket.
        """
        listener = _bind(self._path)
        try:
            server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_REQUEST)
        except BaseException:  # cancelled, too: no socket stays behind
            listener.close()
            raise
        self._server, self._place = server, place(self._path)

    async def renew(self) -> None:
        """Listens at the path again, if it leads to another file by now, or to none: after its disk was
        mounted anew.

        Raises: as ``start``; then it listens nowhere, until it is called again.
        """
        if self._server is None or place(self._path) == self._place:
            return
        self._server.close()  # first: Python 3.13 removes what has the same inode number, on whatever disk
        await self.start()

    async def close(self) -> None:
        """Stops listening, ends what is under way and removes the socket."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        if place(self._path) == self._place:
            with contextlib.suppress(OSError):  # its disk may have failed
                self._path.unlink()
        talks = list(self._talks)
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talk = asyncio.current_task()
        assert talk is not None
        self._talks.add(talk)
        try:
            # A caller that goes away without waiting for its answer is no error of ours.
            with contextlib.suppress(ConnectionError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            self._talks.discard(talk)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer. Returns whether another may follow."""
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return False
        except asyncio.LimitOverrunError:
            answer = _Answer(error=_Failure.of(UsageError(f"a request has at most {MAX_REQUEST} bytes")))
            writer.write(msgspec.json.encode(answer) + b"\n")
            await writer.drain()
            return False
        writer.write(msgspec.json.encode(await self._answer(line)) + b"\n")
        await writer.drain()
        return True

    async def _answer(self, line: bytes) -> _Answer:
        try:
            request = msgspec.json.decode(line, type=_Request)
            handler = self._handlers.get(request.verb)
            if handler is None:
                known = ", ".join(sorted(self._handlers))
                raise UsageError(
                    f"the service does not know {request.verb!r}",
                    hint=f"it knows {known}; is it of another version than this program?",
                )
            return _Answer(result=await handler(request.arguments))
        except msgspec.MsgspecError as error:
            return _Answer(error=_Failure.of(UsageError(f"not a request: {error}")))
        except ProxyUsageError as error:
            return _Answer(error=_Failure.of(error))


def call(path: Path, verb: str, /, **arguments: object) -> object:
    """Asks the service that listens on ``path`` and waits for its answer.

    Raises:
        NotRunning: nobody listens there.
        ProxyUsageError: what the service raised, or that it gave no answer.
    """
    request = msgspec.json.encode(_Request(verb, arguments)) + b"\n"
    if len(request) > MAX_REQUEST:
        raise UsageError(f"a request has at most {MAX_REQUEST} bytes", hint="name fewer things at once")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        _connect(connection, path)
        try:
            connection.sendall(request)
            line = _line(connection)
        except TimeoutError:
            raise ProxyUsageError(
                f"the service did not answer {verb} within {TIMEOUT_S} s", hint="see its log; ask again later"
            ) from None
        except OSError as error:
            raise ProxyUsageError(
                f"the service went away during {verb}: {error.strerror}", hint="see its log, then ask again"
            ) from None
    return _result(verb, line)


async def ask(path: Path, verb: str, timeout_s: float) -> object:
    """As ``call``, from an event loop and without arguments.

    Raises:
        NotRunning: nobody listens there.
        ProxyUsageError: what the service raised, or that it gave no answer in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            with _address(path) as address:
                reader, writer = await asyncio.open_unix_connection(address, limit=MAX_ANSWER)
            try:
                writer.write(msgspec.json.encode(_Request(verb)) + b"\n")
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        raise ProxyUsageError(f"no answer within {timeout_s:g} s", hint="see its log") from None
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise NotRunning(f"no service listens on {path}", hint="see its log") from None
    except (OSError, ValueError) as error:
        raise ProxyUsageError(f"{path} cannot be asked: {error}", hint="see its log") from None
    return _result(verb, line)


def _result(verb: str, line: bytes) -> object:
    try:
        answer = msgspec.json.decode(line, type=_Answer)
    except msgspec.MsgspecError:
        raise ProxyUsageError(
            f"the service gave no answer to {verb}", hint="see its log; it stopped or failed meanwhile"
        ) from None
    if answer.error is not None:
        raise answer.error.raised()
    return answer.result


def _connect(connection: socket.socket, path: Path) -> None:
    try:
        with _address(path) as address:
            connection.connect(address)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        raise NotRunning(
            f"no service listens on {path}", hint="start it: proxy-usage run --config FILE"
        ) from None
    except OSError as error:
        raise ProxyUsageError(
            f"cannot reach the service on {path}: {error.strerror}",
            hint="run this as the user that the service runs as",
        ) from None


def _line(connection: socket.socket) -> bytes:
    """Bytes up to the newline, or as many as came before the connection ended."""
    received = bytearray()
    while not received.endswith(b"\n") and len(received) < MAX_ANSWER:
        piece = connection.recv(1 << 16)
        if not piece:
            break
        received += piece
    return bytes(received)


def _bind(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        _remove_stale(path)
        with _address(path) as address:
            listener.bind(address)
        # Before it listens nobody can connect, so there is no moment in which others could.
        path.chmod(0o600)
        listener.listen(16)
    except OSError as error:
        listener.close()
        raise ListenError(
            f"cannot make the control socket {path}: {error.strerror}",
            hint="the store's directory must be writable and on a file system that knows sockets",
        ) from None
    except BaseException:  # interrupted, too: no socket stays behind
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} is in the way of the control socket", hint="move that file elsewhere")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            with _address(path) as address:
                probe.connect(address)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
    raise ListenError(
        f"another process listens on {path}", hint="stop it, or give this one a store.path of its own"
    )


@contextlib.contextmanager
def _address(path: Path) -> Iterator[str]:
    """An address of ``path`` that is short enough for a socket, valid inside the block.

    Raises:
        ConfigError: there is none.
    """
    if len(os.fsencode(path)) <= MAX_ADDRESS:
        yield str(path)
        return
    with _short(path.parent) as directory:
        address = f"{directory}/{path.name}"
        if len(os.fsencode(address)) > MAX_ADDRESS:
            raise ConfigError(
                f"{path} has a name too long for a socket ({len(os.fsencode(path.name))} bytes)",
                hint="give store.path a shorter name: the control socket's is that and .sock",
            )
        yield address


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A short name of a directory: on Linux by its open descriptor, elsewhere by a link."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = Path(f"/proc/self/fd/{descriptor}")
        if short.is_dir():
            yield str(short)
            return
        with tempfile.TemporaryDirectory() as private:
            link = Path(private) / "d"
            link.symlink_to(directory.absolute())
            yield str(link)
    finally:
        os.close(descriptor)
