"""Long streams under everything that can happen to their rows: what is booked is the highest total seen.

A machine delivers rows of streams that are easily confused, in any order, again and again or not at all, with
a tenant or without; takes turns that the store commits or refuses, while rows go on; kills the process; lets
streams fall silent. After every step the booked sums are those of the rows that count.
"""

import sqlite3
from copy import deepcopy

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy_usage.decode import StreamRow
from proxy_usage.model import Identity, Key, Origin, Quantity
from proxy_usage.store.schema import TABLES
from proxy_usage.store.streams import load_streams, save_streams
from proxy_usage.streams import Streams, StreamTurn, stream_digest

QUANTITIES = (Quantity.WIRE_IN, Quantity.REQUESTS, Quantity.WIRE_OUT, Quantity.OPEN_NS)
REQUESTS, OPEN_NS = 1, 3
INTERVAL_MS = 60_000
START_MS = 1_795_300_000_000

_A = Origin("spiffe://a", "envoy-1", "http")
STREAMS = [
    (_A, b"1", 100, b"same"),
    (_A, b"1", 100, b"invented"),
    (_A, b"1", 999, b"same"),  # the node restarted and counts its connections from 1 again
    (_A, b"2", 100, b"same"),  # the client repeats a request id
    (_A._replace(node_id="envoy-2"), b"1", 100, b"same"),
    (_A._replace(peer="spiffe://b"), b"1", 100, b"same"),
    (_A, b"", 0, b""),  # nothing is known of it
    (_A, b"9", 100, b"tcp"),
]
TCP = len(STREAMS) - 1
END = 6
"""A stream's rows are numbered; this one is its last."""

Booked = list[list[int]]


def totals(stream: int, place: int, *, timed: bool = True) -> tuple[int, ...]:
    """Running totals as of a stream's row; each stream's are unlike the others'."""
    request = int(place == END and stream != TCP)
    return 100 * place + stream, request, 7 ** (stream + 1) * place, (10**9 * place + stream) * timed


def row(stream: int, place: int, now_ms: int, *, timed: bool = True) -> StreamRow:
    origin, conn_id, start_ns, stream_id = STREAMS[stream]
    return StreamRow(
        origin=origin,
        conn_id=conn_id,
        start_ns=start_ns,
        stream_id=stream_id,
        identity=Identity(origin, 0, b"", (), routed=True),
        window_ms=now_ms,
        amounts=totals(stream, place, timed=timed or place == END),
        end=place == END,
        http=stream != TCP,
        emit_ms=now_ms,
        now_ms=now_ms,
    )


def crowd(streams: int) -> None:
    """More streams, all in the first one's shard: shards are saved whole, one in a turn."""
    shard = stream_digest(row(0, 1, START_MS))[0]
    number = 0
    while streams:
        STREAMS.append((_A, b"7", 100, b"%d" % number))
        if stream_digest(row(len(STREAMS) - 1, 1, START_MS))[0] == shard:
            streams -= 1
        else:
            STREAMS.pop()
        number += 1


crowd(3)


def owner(limit: int = 1_000) -> Streams:
    return Streams(QUANTITIES, interval_ms=INTERVAL_MS, limit=limit, expire=3, remember_ms=10**12)


class Owner(RuleBasedStateMachine):
    """The owner of the streams and its store, beside a model that is two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.db = sqlite3.connect(":memory:", isolation_level=None)
        self.db.executescript(TABLES)
        self.streams = owner()
        self.now_ms = START_MS
        self.booked: Booked = [[0] * len(QUANTITIES) for _ in STREAMS]
        self.seen: Booked = deepcopy(self.booked)
        """The highest totals of rows that count."""
        self.durable = deepcopy((self.booked, self.seen))
        self.turn: StreamTurn | None = None
        self.in_turn = self.durable

    @rule(
        stream=st.sampled_from(range(len(STREAMS))),
        place=st.sampled_from(range(1, END + 1)),
        tenant=st.sampled_from(("", "", "eu", "us")),
        timed=st.booleans(),
    )
    def deliver(self, stream: int, place: int, tenant: str, timed: bool) -> None:
        key = Key(f"{stream}", (tenant,)) if tenant else None
        advance = self.streams.advance(row(stream, place, self.now_ms, timed=timed), key)
        if key is None and place != END:
            assert advance == (("skipped", "awaits_tenant"), None)
            return
        assert advance.fate == ("counted", "")
        assert advance.amounts is not None
        self._book(stream, advance.amounts)
        new = totals(stream, place, timed=timed or place == END)
        self.seen[stream] = list(map(max, self.seen[stream], new))

    @rule(silence_ms=st.sampled_from((1_000, INTERVAL_MS, 4 * INTERVAL_MS)))
    def look(self, silence_ms: int) -> None:
        self.now_ms += silence_ms
        for delta in self.streams.expire(self.now_ms):
            assert sum(delta.amounts) == delta.amounts[REQUESTS] == 1
            assert self.seen[int(delta.key.tenant)][REQUESTS] == 0
            self._book(int(delta.key.tenant), delta.amounts)
            self.seen[int(delta.key.tenant)][REQUESTS] = 1  # estimated; its end adds no other

    @precondition(lambda self: self.turn is None)
    @rule()
    def begin(self) -> None:
        self.turn = self.streams.begin()
        self.in_turn = deepcopy((self.booked, self.seen))

    @precondition(lambda self: self.turn is not None)
    @rule()
    def commit(self) -> None:
        assert self.turn is not None
        self.db.execute("BEGIN")
        save_streams(self.db, self.turn)
        self.db.execute("COMMIT")
        self.durable, self.turn = self.in_turn, None

    @rule(meanwhile=st.lists(st.sampled_from(range(len(STREAMS))), max_size=3))
    def refuse(self, meanwhile: list[int]) -> None:
        """A turn that the store refuses, after more rows came."""
        if self.turn is None:
            self.begin()
        assert self.turn is not None
        for stream in meanwhile:
            self.deliver(stream, min(END, self.seen[stream][0] // 100 + 1), "eu", timed=True)
        self.streams.rollback(self.turn)
        self.turn = None

    @rule()
    def die(self) -> None:
        """What no turn saved is lost, from the windows as well."""
        self.streams = owner()
        self.streams.restore(load_streams(self.db))
        self.booked, self.seen = deepcopy(self.durable)
        self.turn = None

    @rule()
    def save(self) -> None:
        """All that changed is saved, and a start would read back what is in memory."""
        if self.turn is not None:
            self.commit()
        self.begin()
        self.commit()
        read = owner()
        read.restore(load_streams(self.db))
        assert read._shards == self.streams._shards
        assert read._keys._keys == self.streams._keys._keys
        assert read._keys._references == self.streams._keys._references
        assert len(read) == len(self.streams)

    @invariant()
    def booked_is_the_highest_seen(self) -> None:
        assert self.booked == self.seen

    def teardown(self) -> None:
        """Every stream ends: now its sums are its end's, its request is one."""
        for stream in range(len(STREAMS)):
            self.deliver(stream, END, "eu", timed=True)
            self.deliver(stream, END, "", timed=True)
            assert self.booked[stream] == list(totals(stream, END)) == self.seen[stream]
        self.db.close()

    def _book(self, stream: int, amounts: tuple[int, ...]) -> None:
        assert min(amounts) >= 0
        self.booked[stream] = [have + more for have, more in zip(self.booked[stream], amounts, strict=True)]


TestOwner = Owner.TestCase
TestOwner.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


@settings(max_examples=200, deadline=None)
@given(
    limit=st.sampled_from((0, 1, 2, 5)),
    order=st.lists(st.sampled_from(range(len(STREAMS))), max_size=60),
    lost=st.sets(st.tuples(st.sampled_from(range(len(STREAMS))), st.sampled_from(range(1, END)))),
    looks=st.sets(st.sampled_from(range(60))),
)
def test_at_the_limit_streams_are_metered_at_their_end(
    limit: int, order: list[int], lost: set[tuple[int, int]], looks: set[int]
) -> None:
    """However streams meet the limit, and whoever makes room meanwhile: never too much, in the end all."""
    streams = owner(limit)
    places = [0] * len(STREAMS)
    booked = [[0] * len(QUANTITIES) for _ in STREAMS]
    now_ms = START_MS

    def deliver(stream: int) -> None:
        places[stream] += 1
        place = places[stream]
        if (stream, place) in lost:
            return
        advance = streams.advance(row(stream, place, now_ms), Key(f"{stream}", ()))
        if advance.amounts is None:
            assert advance.fate == ("skipped", "stream_limit")
            return
        have = booked[stream] = list(map(sum, zip(booked[stream], advance.amounts, strict=True)))
        assert have == [max(a, b) for a, b in zip(have, totals(stream, place), strict=True)]
        assert have[:1] + have[2:] == [*totals(stream, place)[:1], *totals(stream, place)[2:]]

    for step, stream in enumerate(order):
        if places[stream] < END:
            deliver(stream)
        if step in looks:
            now_ms += 4 * INTERVAL_MS
            for delta in streams.expire(now_ms):
                booked[int(delta.key.tenant)][REQUESTS] += delta.amounts[REQUESTS]
        assert len(streams) <= limit + limit // 8
    for stream in range(len(STREAMS)):
        while places[stream] < END:
            deliver(stream)
        assert booked[stream] == list(totals(stream, END))
