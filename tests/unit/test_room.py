"""Who is read in which turn, and who has to go when too much of unfinished messages is held."""

import asyncio
import socket

import pytest

from proxy_usage.receiver.arrivals import Arrivals, Connection, connection
from proxy_usage.receiver.room import Room, RoomLimits

A, B, C = (Connection("10.0.0.1", port) for port in (1, 2, 3))
MIB = 1 << 20


def room(memory: int = 80 * MIB, *opened: Connection) -> Room:
    made = Room(RoomLimits(memory=memory))
    for one in opened:
        made.opened(one, {})
    return made


def test_nobody_goes_while_it_fits() -> None:
    crowded = room(80 * MIB, A, B)
    assert crowded.look({A: 35 * MIB, B: 34 * MIB}) == []
    assert crowded.held == pytest.approx(69 * MIB, abs=1_000)


def test_who_holds_most_goes_first_and_no_more_than_must() -> None:
    crowded = room(80 * MIB, A, B, C)
    assert crowded.look({A: 30 * MIB, B: 50 * MIB, C: 5 * MIB}) == [B]
    assert crowded.look({A: 60 * MIB, B: 75 * MIB, C: 5 * MIB}) == [B]
    assert crowded.look({A: 75 * MIB, B: 75 * MIB, C: 65 * MIB}) == [A, B]


def test_what_was_handed_over_is_held_no_more() -> None:
    crowded = room(80 * MIB, A)
    received = 0
    for _ in range(100):
        received += 10 * MIB + 10_000  # frames and records around the message
        crowded.took(A, 10 * MIB)
        assert crowded.look({A: received}) == []
    assert crowded.held == 0


def test_many_small_messages_hide_no_large_one() -> None:
    crowded = room(80 * MIB, A)
    received = 0
    for _ in range(1_000):
        received += 500 + 40 + 100_000  # a row on one stream, and a piece of the large one on another
        crowded.took(A, 500)
        crowded.look({A: received})
    assert crowded.held > 95 * MIB


def test_pings_and_acknowledgements_add_up_to_nothing() -> None:
    crowded = room(80 * MIB, A)
    received = 0
    for _ in range(1_000_000 // 60):  # at one look a tenth of a second
        received += 17
        crowded.look({A: received})
    assert crowded.held == 0


def test_what_came_before_the_first_stream_and_after_the_last_is_nobodys() -> None:
    crowded = room()
    crowded.opened(A, {A: 500 * MIB})
    crowded.opened(A, {A: 900 * MIB})
    assert crowded.look({A: 500 * MIB}) == []
    crowded.closed(A)
    assert crowded.connections == 1
    crowded.closed(A)
    assert (crowded.connections, crowded.held) == (0, 0)


def test_where_nobody_can_tell_nobody_goes() -> None:
    crowded = room(1, A, B)
    crowded.took(A, 100)
    assert crowded.look({}) == []


async def test_places_are_few_and_given_on() -> None:
    crowded = Room(RoomLimits(new_streams=4))
    inside: list[str] = []
    leave = asyncio.Event()

    async def come(sender: str) -> None:
        async with crowded.place(sender):
            inside.append(sender)
            await leave.wait()

    tasks = [asyncio.create_task(come(sender)) for sender in "aaaaabbbbcc"]
    await asyncio.sleep(0.01)
    assert inside == ["a", "a", "b", "b"]  # half of the places at most for one sender
    leave.set()
    await asyncio.gather(*tasks)
    assert sorted(inside) == sorted("aaaaabbbbcc")


async def test_a_place_is_kept_for_a_while_only_and_so_is_the_wait() -> None:
    crowded = Room(RoomLimits(new_streams=1, first_message_ms=20))

    async def come(sender: str) -> None:
        async with crowded.place(sender):
            assert sender == "a"
            await asyncio.Event().wait()

    keeping = asyncio.create_task(come("a"))
    with pytest.raises(TimeoutError):
        await keeping
    # Whose place is given up in no time: the wait alone takes too long.
    crowded._new["a"] += 1
    with pytest.raises(TimeoutError):
        await come("b")
    crowded._new["a"] -= 1
    async with crowded.place("b"):
        pass


async def test_who_is_cancelled_gives_the_place_back() -> None:
    crowded = Room(RoomLimits(new_streams=1))

    async def come() -> None:
        async with crowded.place("a"):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(come()) for _ in range(3)]
    await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with crowded.place("b"):
        pass


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        ("ipv4:10.0.0.1:5000", Connection("10.0.0.1", 5000)),
        ("ipv6:%5B::1%5D:5000", Connection("::1", 5000)),
        ("ipv6:[fe80::1]:5000", Connection("fe80::1", 5000)),
        ("unix:/run/x", None),
        ("ipv4:", None),
        ("", None),
    ],
)
def test_peers_are_connections(peer: str, expected: Connection | None) -> None:
    assert connection(peer) == expected


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_kernel_says_what_arrived(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as server:
        arrivals = Arrivals(server.getsockname()[1])
        with socket.create_connection(server.getsockname()[:2]) as client, server.accept()[0] as accepted:
            here = Connection(*client.getsockname()[:2])
            client.sendall(b"x" * 1_000)
            accepted.recv(10)
            assert arrivals.known == bool(arrivals.received([here]))
            if arrivals.known:
                assert arrivals.received([here, A]) == {here: 1_000}
        assert arrivals.received([here]) == {}  # its descriptor is closed
    assert server.fileno() == -1
