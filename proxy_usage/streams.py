"""Long streams: running totals in, differences out, each booked once.

Envoy's rows about a stream that stays open carry totals since its start. One owner keeps the highest totals
seen per stream and books ``max(0, new - highest)``: repeated, reordered and missing rows change nothing.

                       row that can be attributed: book the difference, raise the totals
                          ┌──────┐
     first row            │      ▼          silent for ``expire`` intervals: books its request, estimated
    ───────────────▶  ┌──────────────┐ ─────────────────────────────────────▶ ┌────────────┐
                      │     open     │                                        │  expired   │
                      └──────────────┘ ◀───────────────────────────────────── └────────────┘
                             │ end row        a late row goes on from there          │
                             ▼                                                       │
                      ┌──────────────┐      after ``remember``, or oldest first      │
                      │    ended     │ ─────────────────▶ forgotten ◀────────────────┘
                      └──────────────┘      when room is needed

A stream is known by peer, node, connection id, start time and stream id together: a client may choose the
stream id, and an Envoy that restarts counts its connections from 1 again. State is a 16-byte digest and one
packed record per stream, in shards that are saved and looked through in turn, so that a million streams
never hold up the event loop.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

from proxy_usage.decode import StreamRow
from proxy_usage.model import Amounts, Key, Quantity

DIGEST = 16
SHARDS = 256
SCAN = 4_096
"""Records looked at in one turn, and up to a shard more."""
MOVES = 512
"""Records that one turn expires or forgets at the most: an Envoy that dies takes all its streams along."""
RESERVE = 8
"""One in so many: from this share below the limit on ended streams are forgotten early, and up to as much
above it streams are remembered that are seen at their end first."""
OPEN, ENDED, EXPIRED = range(3)
TCP = 4
"""Bit beside the state: the stream is a TCP connection, which is no request."""

HEAD = struct.Struct("<qIB")  # last seen in ms, number of the key, state; digest before, totals behind it
_STREAM = struct.Struct("<IIIIq")  # lengths of what follows, start in ns


class Delta(NamedTuple):
    """Usage that a stream's expiry adds."""

    key: Key
    at_ms: int
    amounts: Amounts


class Advance(NamedTuple):
    """What became of a row."""

    fate: tuple[str, str]
    amounts: Amounts | None
    """The difference to book; None when nothing is."""


class StreamTurn(NamedTuple):
    """What one turn saves of the streams."""

    number: int
    """Of the turn; rises."""
    keep_from: int
    """Turns before this number are obsolete: each shard that they changed was saved whole since."""
    record_size: int
    changed: dict[bytes, bytes]
    """Records by digest."""
    forgotten: set[bytes]
    """Digests."""
    keys: tuple[tuple[int, str, tuple[str, ...]], ...]
    """Keys that records refer to by number, new ones alone: ``(number, tenant, dimensions)``."""
    dropped: tuple[int, ...]
    """Numbers of keys that no record refers to any more."""
    shard: int | None
    """A shard that is saved whole in this turn: what earlier turns said of it is obsolete."""
    whole: Mapping[bytes, bytes]
    since: int | None = None
    """The first turn that ``shard`` has changes of which are in no earlier whole save: for ``rollback``."""

    @property
    def is_empty(self) -> bool:
        """Whether the turn has nothing to save."""
        return not (self.changed or self.forgotten or self.dropped or self.shard is not None)


class SavedStreams(NamedTuple):
    """The long streams as the last turn of a former process left them."""

    turn: int = 0
    keys: tuple[tuple[int, Key], ...] = ()
    records: tuple[bytes, ...] = ()
    """Digest and record in one."""
    dirty: tuple[tuple[int, int], ...] = ()
    """``(shard, first turn whose changes are in no whole save of it)``, the oldest turn first."""


class Streams:
    """The owner's memory of long streams.

    Args:
        quantities: ``FoldPlan.quantities``.
        interval_ms: Envoy's flush interval.
        limit: streams remembered at the most; past it new ones are metered at their end only.
        expire: intervals of silence after which a stream is taken for gone.
        remember_ms: how long an ended or expired stream's totals are kept.
    """

    def __init__(
        self,
        quantities: Sequence[Quantity],
        *,
        interval_ms: int,
        limit: int,
        expire: int,
        remember_ms: int,
    ) -> None:
        self._count = len(quantities)
        self._requests = tuple(i for i, quantity in enumerate(quantities) if quantity is Quantity.REQUESTS)
        self._record = struct.Struct(f"{HEAD.format}{self._count}Q")  # … and the highest totals
        self._silence_ms = interval_ms * expire
        self._limit = limit
        self._reserve = limit // RESERVE
        self._remember_ms = remember_ms
        self._shards: list[dict[bytes, bytes]] = [{} for _ in range(SHARDS)]
        self._size = 0
        self._next_shard = 0
        self._listening_ms: int | None = 0  # None: from the next look on
        self._changed: dict[bytes, bytes] = {}
        self._dirty_since: dict[int, int] = {}  # shard → first turn not in its last whole save; oldest first
        self._turn = 1
        self._forgotten: set[bytes] = set()
        self._keys = _Keys()
        self.at_limit = 0
        """Rows that could not be tracked since the last look."""
        self.estimated = 0
        """Streams closed by expiry since the last look."""

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"<Streams {self._size} changed={len(self._changed)}>"

    @property
    def record_size(self) -> int:
        """Bytes of one saved record."""
        return DIGEST + self._record.size

    def advance(self, row: StreamRow, key: Key | None) -> Advance:
        """Takes a row of running totals.

        Args:
            key: whom the row is attributed to. Without one a periodic row books nothing and raises nothing,
                so that a later row that can be attributed books it all; an end row's difference is the
                caller's to hold.
        """
        if key is None and not row.end:
            return Advance(("skipped", "awaits_tenant"), None)
        digest = stream_digest(row)
        packed = self._shards[digest[0]].get(digest)
        new = row.amounts
        if packed is None:
            # What is first seen at its end is remembered beyond the limit, in case its rows come again.
            if self._size >= self._limit + (self._reserve if row.end else 0):
                self.at_limit += 1
                if row.end:  # nothing was booked of it: its end row brings it all
                    return Advance(("counted", ""), new)
                return Advance(("skipped", "stream_limit"), None)
            self._size += 1
            number, state = 0, OPEN if row.http else OPEN | TCP
            amounts = highest = new
        else:
            _, number, state, *before = self._record.unpack(packed)
            amounts = tuple([now - had if now > had else 0 for now, had in zip(new, before, strict=True)])
            highest = tuple(map(max, new, before))
        if row.end:
            state = ENDED | state & TCP
        elif state & ~TCP == EXPIRED:
            state = OPEN | state & TCP
        number = self._keys.swap(number, key)
        self._put(digest, self._record.pack(row.now_ms, number, state, *highest))
        return Advance(("counted", ""), amounts)

    def expire(self, now_ms: int) -> list[Delta]:
        """Looks through a part of the streams for those that fell silent. Call it once a turn.

        A stream that expires adds its one request, since its end row may never come; if it does come, its
        request is booked already.
        """
        if self._listening_ms is None:
            self._listening_ms = now_ms
        # While nobody listened, nobody was silent.
        expires = now_ms - self._listening_ms > self._silence_ms
        crowded = self._size > self._limit - self._reserve
        deltas: list[Delta] = []
        seen = moves = 0
        for _ in range(SHARDS):
            shard = self._shards[self._next_shard]
            if seen and seen + len(shard) > SCAN:
                break
            seen += len(shard)
            moving = []
            for digest, packed in shard.items():
                last_ms, _, state = HEAD.unpack_from(packed)
                silent_ms = now_ms - last_ms
                if silent_ms <= self._silence_ms:
                    continue
                state &= ~TCP
                if state == OPEN:
                    if expires:
                        moving.append((digest, packed, True))
                elif silent_ms > self._remember_ms or (crowded and state == ENDED):
                    moving.append((digest, packed, False))
            for digest, packed, expired in moving[: MOVES - moves]:
                if expired:
                    deltas.extend(self._expire(digest, packed, now_ms))
                else:
                    self._forget(digest)
            moves += len(moving)
            if moves > MOVES:
                break  # the next turn goes on with this shard
            self._next_shard = (self._next_shard + 1) % SHARDS
        return deltas

    def begin(self) -> StreamTurn:
        """What changed since the last turn. ``rollback`` must follow if it does not become durable.

        Nothing is packed here: that is left to who saves it, outside the event loop.
        """
        shard = next(iter(self._dirty_since), None)
        since = None if shard is None else self._dirty_since.pop(shard)
        turn = StreamTurn(
            number=self._turn,
            keep_from=min(self._dirty_since.values(), default=self._turn + 1),
            record_size=self.record_size,
            changed=self._changed,
            forgotten=self._forgotten,
            keys=self._keys.born(),
            dropped=self._keys.dropped(),
            shard=shard,
            whole={} if shard is None else self._shards[shard].copy(),
            since=since,
        )
        self._turn += 1
        self._changed = {}
        self._forgotten = set()
        return turn

    def rollback(self, turn: StreamTurn) -> None:
        """The turn did not become durable: the next one holds it again. What it holds is taken back."""
        # A disk may be full for hours, so this costs what changed since, not all that waits to be saved.
        changed, forgotten = turn.changed, turn.forgotten
        changed.update(self._changed)
        for digest in self._forgotten:
            changed.pop(digest, None)
        forgotten.difference_update(self._changed)
        forgotten.update(self._forgotten)
        self._changed, self._forgotten = changed, forgotten
        self._keys.rollback(turn)
        if turn.shard is not None and turn.since is not None:
            self._dirty_since = {turn.shard: turn.since} | self._dirty_since  # the next to be saved whole

    def restore(self, saved: SavedStreams) -> None:
        """Takes over what a former process saved, under the same meters and dimensions."""
        if not saved.turn:
            return
        self._turn = saved.turn + 1
        self._dirty_since = dict(saved.dirty)
        self._listening_ms = None
        self._keys.restore(saved.keys)
        for record in saved.records:
            self._shards[record[0]][record[:DIGEST]] = record[DIGEST:]
            self._keys.refer(HEAD.unpack_from(record, DIGEST)[1])
        self._size = len(saved.records)

    def _put(self, digest: bytes, packed: bytes) -> None:
        self._shards[digest[0]][digest] = packed
        self._changed[digest] = packed
        self._forgotten.discard(digest)
        self._dirty_since.setdefault(digest[0], self._turn)

    def _expire(self, digest: bytes, packed: bytes, now_ms: int) -> Iterator[Delta]:
        _, number, state, *highest = self._record.unpack(packed)
        key = self._keys.get(number)
        added = [0] * self._count
        if key is not None and not state & TCP:
            for index in self._requests:
                added[index] = 1 - min(1, highest[index])
                highest[index] = max(1, highest[index])
        # From here on the time counts towards ``remember``.
        self._put(digest, self._record.pack(now_ms, number, EXPIRED | state & TCP, *highest))
        self.estimated += 1
        if key is not None and any(added):
            yield Delta(key, now_ms, tuple(added))

    def _forget(self, digest: bytes) -> None:
        packed = self._shards[digest[0]].pop(digest)
        self._keys.swap(HEAD.unpack_from(packed)[1], None)
        self._size -= 1
        self._changed.pop(digest, None)
        self._forgotten.add(digest)
        self._dirty_since.setdefault(digest[0], self._turn)


class _Keys:
    """Keys by number, counted by the records that refer to them. Number 0 is no key."""

    def __init__(self) -> None:
        self._numbers: dict[Key, int] = {}
        self._keys: dict[int, Key] = {}
        self._references: dict[int, int] = {}
        self._born: set[int] = set()
        self._dropped: set[int] = set()
        self._next = 1

    def get(self, number: int) -> Key | None:
        return self._keys.get(number)

    def swap(self, old: int, key: Key | None) -> int:
        """A record refers to ``key`` in place of number ``old``. Returns the key's number."""
        if key is not None and self._keys.get(old) == key:
            return old
        number = 0
        if key is not None:
            number = self._numbers.get(key, 0)
            if not number:
                number, self._next = self._next, self._next + 1
                self._numbers[key] = number
                self._keys[number] = key
                self._born.add(number)
            self.refer(number)
        if old:
            self._references[old] -= 1
            if not self._references[old]:
                del self._references[old], self._numbers[self._keys.pop(old)]
                if old in self._born:
                    self._born.discard(old)
                else:
                    self._dropped.add(old)
        return number

    def refer(self, number: int) -> None:
        if number:
            self._references[number] = self._references.get(number, 0) + 1

    def born(self) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
        born, self._born = self._born, set()
        return tuple((number, *self._keys[number]) for number in sorted(born))

    def dropped(self) -> tuple[int, ...]:
        dropped, self._dropped = self._dropped, set()
        return tuple(sorted(dropped))

    def rollback(self, turn: StreamTurn) -> None:
        self._born.update(number for number, _, _ in turn.keys if number in self._keys)
        self._dropped.update(turn.dropped)

    def restore(self, keys: Iterable[tuple[int, Key]]) -> None:
        for number, key in keys:
            self._numbers[key] = number
            self._keys[number] = key
            self._next = max(self._next, number + 1)


def stream_digest(row: StreamRow) -> bytes:
    """16 bytes that stand for the stream a row is about."""
    parts = row.origin.peer.encode(), row.origin.node_id.encode(), row.conn_id, row.stream_id
    head = _STREAM.pack(*map(len, parts), row.start_ns)
    return blake2b(b"".join((head, *parts)), digest_size=DIGEST).digest()


def rearranged(record: bytes, columns: Sequence[int | None], numbers: Mapping[int, int]) -> bytes:
    """A saved record under other meters.

    Args:
        columns: where each meter's total stands in the record; None for a meter it lacks, which is then
            booked from the stream's beginning.
        numbers: the keys' new numbers by their old ones.
    """
    last_ms, number, state = HEAD.unpack_from(record, DIGEST)
    at = DIGEST + HEAD.size
    totals = struct.unpack_from(f"<{(len(record) - at) // 8}Q", record, at)
    kept = [0 if column is None else totals[column] for column in columns]
    head = HEAD.pack(last_ms, numbers.get(number, 0), state)
    return record[:DIGEST] + head + struct.pack(f"<{len(kept)}Q", *kept)
