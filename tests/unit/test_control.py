"""The control socket: requests, errors that arrive as they arose, and sockets of the dead and the living."""

import asyncio
import socket
import stat
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from proxy_usage.control import MAX_REQUEST, ControlServer, Handler, NotRunning, call, socket_path
from proxy_usage.errors import ConfigError, ListenError, ProxyUsageError, StoreFull, UsageError


async def echo(arguments: dict[str, object]) -> object:
    return {"got": arguments}


async def full(_arguments: dict[str, object]) -> object:
    raise StoreFull("store is full", hint="free disk space")


async def unconfigured(_arguments: dict[str, object]) -> object:
    raise ConfigError("2 mistakes", hint="correct them", mistakes=("one", "two"))


async def own(_arguments: dict[str, object]) -> object:
    class Peculiar(ProxyUsageError):
        exit_code = 7

    raise Peculiar("peculiar", hint="as it is")


HANDLERS: Mapping[str, Handler] = {"echo": echo, "full": full, "unconfigured": unconfigured, "own": own}


@asynccontextmanager
async def serving(path: Path, handlers: Mapping[str, Handler] = HANDLERS) -> AsyncIterator[ControlServer]:
    server = ControlServer(path, handlers)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def ask(path: Path, verb: str, **arguments: object) -> object:
    return await asyncio.to_thread(call, path, verb, **arguments)


async def talk(path: Path, *lines: bytes) -> list[bytes]:
    """The answers to raw lines sent over one connection, up to its end."""
    reader, writer = await asyncio.open_unix_connection(str(path), limit=4 * MAX_REQUEST)
    try:
        writer.write(b"".join(lines))
        writer.write_eof()
        return (await reader.read()).splitlines()
    finally:
        writer.close()


def test_the_socket_lies_beside_the_store() -> None:
    assert socket_path(Path("var/usage.db")) == Path("var/usage.db.sock")


async def test_a_request_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "usage.db.sock"
    async with serving(path):
        assert await ask(path, "echo", ids=["a"], limit=1 << 62, output=None) == {
            "got": {"ids": ["a"], "limit": 1 << 62, "output": None}
        }
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


async def test_one_connection_may_ask_more_than_once(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        answers = await talk(path, b'{"verb":"echo"}\n', b'{"verb":"echo","arguments":{"n":2}}\n')
    assert answers == [b'{"result":{"got":{}}}', b'{"result":{"got":{"n":2}}}']


async def test_an_error_arrives_as_it_arose(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        with pytest.raises(StoreFull) as caught:
            await ask(path, "full")
        assert (caught.value.message, caught.value.hint, caught.value.retriable) == (
            "store is full",
            "free disk space",
            True,
        )
        with pytest.raises(ConfigError) as mistaken:
            await ask(path, "unconfigured")
        assert (mistaken.value.mistakes, mistaken.value.exit_code) == (("one", "two"), 78)


async def test_an_error_of_an_unknown_type_keeps_its_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        with pytest.raises(ProxyUsageError, match="peculiar") as caught:
            await ask(path, "own")
    assert (type(caught.value), caught.value.exit_code) == (ProxyUsageError, 7)


async def test_an_unknown_verb_names_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        with pytest.raises(UsageError, match="does not know 'fly'") as caught:
            await ask(path, "fly")
    assert "echo, full" in caught.value.hint


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b'{"verb":1}\n', b'{"verb":"echo","x":1}\n', b"\xff\n"])
async def test_what_is_no_request_is_refused_and_the_next_is_heard(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        refused, heard = await talk(path, line, b'{"verb":"echo"}\n')
    assert b"not a request" in refused
    assert heard == b'{"result":{"got":{}}}'


async def test_a_request_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        with pytest.raises(UsageError, match=f"at most {MAX_REQUEST} bytes"):
            await ask(path, "echo", text="x" * MAX_REQUEST)
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"x" * (MAX_REQUEST + 1))
        assert b"at most" in await reader.readline()
        writer.close()
        assert await ask(path, "echo") == {"got": {}}


async def test_a_large_answer_arrives_whole(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        assert await ask(path, "echo", text="x" * 900_000) == {"got": {"text": "x" * 900_000}}


async def test_a_service_that_ends_meanwhile_gives_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "s"
    entered = asyncio.Event()

    async def hang(_arguments: dict[str, object]) -> object:
        entered.set()
        return await asyncio.Event().wait()

    server = ControlServer(path, {"hang": hang})
    await server.start()
    asked = asyncio.create_task(ask(path, "hang"))
    await entered.wait()
    await server.close()
    with pytest.raises(ProxyUsageError, match="hang"):
        await asked


def test_without_a_service_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no service listens"):
        call(tmp_path / "s", "status")
    leave_stale(tmp_path / "s")
    with pytest.raises(NotRunning):
        call(tmp_path / "s", "status")


def leave_stale(path: Path) -> None:
    """What a killed service leaves: a socket that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


async def test_the_socket_of_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    leave_stale(path)
    async with serving(path):
        assert await ask(path, "echo") == {"got": {}}


async def test_a_living_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path):
        with pytest.raises(ListenError, match="another process listens"):
            await ControlServer(path, HANDLERS).start()
        assert await ask(path, "echo") == {"got": {}}


async def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    with pytest.raises(ListenError, match="in the way"):
        await ControlServer(path, HANDLERS).start()
    assert path.read_text() == "mine"


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ListenError, match="nowhere"):
        await ControlServer(tmp_path / "nowhere" / "s", HANDLERS).start()


async def test_a_long_path_is_reached_by_its_directory(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    path = directory / "usage.db.sock"
    async with serving(path):
        assert await ask(path, "echo") == {"got": {}}
        assert path.is_socket()
    assert not path.exists()


async def test_a_name_too_long_for_any_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a socket"):
        await ControlServer(tmp_path / ("n" * 120), HANDLERS).start()


async def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    server = ControlServer(tmp_path / "s", HANDLERS)
    await server.start()
    await server.close()
    await server.close()


async def test_a_socket_whose_place_is_empty_is_made_again(tmp_path: Path) -> None:
    """As after its disk was mounted anew."""
    path = tmp_path / "usage.db.sock"
    async with serving(path) as server:
        await server.renew()  # it is in its place
        made = path.stat().st_ino
        path.rename(tmp_path / "away")
        with pytest.raises(NotRunning):
            await ask(path, "echo")
        await server.renew()
        assert path.stat().st_ino != made
        assert await ask(path, "echo", a=1) == {"got": {"a": 1}}
    assert not path.exists()


async def test_what_lies_in_the_place_of_a_socket_stays_when_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "usage.db.sock"
    async with serving(path) as server:
        path.rename(tmp_path / "away")
        async with serving(path):
            with pytest.raises(ListenError):
                await server.renew()
            await server.close()
            assert await ask(path, "echo", a=1) == {"got": {"a": 1}}
