"""What there may be a million of, held so that no operation takes a millisecond.

Python does some things in one go, with everybody else waiting:

* A dictionary that is full moves into one of twice the size: 24 ms at 87,000 entries, 175 ms at 700,000. So
  ``Shards`` and ``Numbered`` are many small ones.
* Its collector of cycles walks all that is young, and whole containers of it, and it does so the more seldom
  the less is made on balance: what replaces something does not count, yet is young. That was 128 ms when a
  million cells changed. So ``Columns`` are arrays, into which the collector does not look, and ``Pages`` are
  many small lists.
* What is let go is freed at once, with all that it holds. So it is let go by the page, or the block.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

SHARDS = 256
"""A power of two. At a million entries a shard has four thousand, and takes 0.1 ms to double."""
SPLIT = 500
"""A mapping of more entries has shards. Several may come to that in one step: 0.1 ms each."""
BLOCK_BITS = 10
"""Numbers that differ in no higher bit share a block: 1,024 of them."""
PAGE = 2_000
"""Rows, or things, on one page."""

K = TypeVar("K")
V = TypeVar("V")


class Shards(Generic[K, V]):
    """A mapping as many small ones; which one has a key is decided by the key's hash. A single one at first.

    Numbers given in order do not belong here: their shards would all double at the same time.
    """

    __slots__ = ("_size", "mask", "parts")

    def __init__(self) -> None:
        self.parts: tuple[dict[K, V], ...] = ({},)
        """What has a key is ``parts[hash(key) & mask]``: what is there may be read, and set anew."""
        self.mask = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def get(self, key: K) -> V | None:
        """The key's value, or None."""
        return self.parts[hash(key) & self.mask].get(key)

    def put(self, key: K, value: V) -> None:
        """Sets a key's value."""
        digest = hash(key)
        part = self.parts[digest & self.mask]
        if key not in part:
            self._size += 1
            if self._size > SPLIT and not self.mask:
                self._split()
                part = self.parts[digest & self.mask]
        part[key] = value

    def pop(self, key: K) -> V | None:
        """Takes out a key. Its value, or None where there was none."""
        part = self.parts[hash(key) & self.mask]
        if key not in part:
            return None
        self._size -= 1
        return part.pop(key)

    def _split(self) -> None:
        (whole,) = self.parts
        self.parts, self.mask = tuple({} for _ in range(SHARDS)), SHARDS - 1
        for key, value in whole.items():
            self.parts[hash(key) & self.mask][key] = value


class Remembered(Generic[K, V]):
    """What was found out, of at most ``limit`` keys: one more, and the oldest of some shard is forgotten."""

    __slots__ = ("_limit", "_next", "shards")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.shards: Shards[K, V] = Shards()
        """To be read."""
        self._next = 0  # the shard that forgets next

    def __len__(self) -> int:
        return len(self.shards)

    def put(self, key: K, value: V) -> None:
        """Remembers it of a key that nothing is remembered of."""
        if self._limit <= 0:
            return
        if len(self.shards) >= self._limit:  # one by one: to empty it takes long
            self._forget()
        self.shards.put(key, value)

    def _forget(self) -> None:
        parts = self.shards.parts
        while not (part := parts[self._next % len(parts)]):
            self._next += 1
        self.shards.pop(next(iter(part)))
        self._next += 1


class Numbered(Generic[V]):
    """Things by a number, where numbers are given in order: blocks of them, which go when they are empty."""

    __slots__ = ("_blocks",)

    def __init__(self) -> None:
        self._blocks: dict[int, dict[int, V]] = {}

    def __len__(self) -> int:
        """Adds up: not for each row."""
        return sum(map(len, self._blocks.values()))

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def __setitem__(self, number: int, value: V) -> None:
        block = self._blocks.get(number >> BLOCK_BITS)
        if block is None:
            block = self._blocks[number >> BLOCK_BITS] = {}
        block[number] = value

    def get(self, number: int) -> V | None:
        """What has the number, or None."""
        block = self._blocks.get(number >> BLOCK_BITS)
        return None if block is None else block.get(number)

    def __getitem__(self, number: int) -> V:
        return self._blocks[number >> BLOCK_BITS][number]

    def pop(self, number: int) -> V | None:
        """Takes out what has the number; None where nothing has."""
        block = self._blocks.get(number >> BLOCK_BITS)
        if block is None:
            return None
        value = block.pop(number, None)
        if not block:
            del self._blocks[number >> BLOCK_BITS]
        return value

    def __iter__(self) -> Iterator[int]:
        """The numbers. Nothing may be put in or taken out meanwhile."""
        for block in self._blocks.values():
            yield from block

    def values(self) -> Iterator[V]:
        """The things. Nothing may be put in or taken out meanwhile."""
        for block in self._blocks.values():
            yield from block.values()

    def items(self) -> Iterator[tuple[int, V]]:
        """Numbers and things. Nothing may be put in or taken out meanwhile."""
        for block in self._blocks.values():
            yield from block.items()

    def __del__(self) -> None:
        # Block by block: another thread that wants Python's lock gets it in between.
        while self._blocks:
            self._blocks.popitem()


class Columns:
    """Rows of whole numbers of 64 bits, all as wide as the first: arrays of ``PAGE`` rows each."""

    __slots__ = ("_room", "pages", "width")

    def __init__(self) -> None:
        self.pages: list[array[int]] = []
        """One row after the other, without a border between them."""
        self.width = 0
        self._room = 0

    def add(self, row: Sequence[int]) -> None:
        """Adds a row."""
        if self._room == 0:
            self.pages.append(array("q"))
            self.width = len(row)
            self._room = PAGE
        self._room -= 1
        self.pages[-1].extend(row)

    def __len__(self) -> int:
        return sum(map(len, self.pages)) // self.width if self.pages else 0

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The rows, made a page at a time."""
        for page in self.pages:
            numbers = iter(page.tolist())
            yield from zip(*[numbers] * self.width, strict=True)

    def handed_over(self) -> Columns:
        """All of its rows; none are left here."""
        heir = Columns()
        heir.pages, self.pages = self.pages, []
        heir.width, self._room = self.width, 0
        return heir

    def take_first(self) -> Iterator[int]:
        """The first number of each row; a page is let go when the next one is begun."""
        self.pages.reverse()
        self._room = 0
        while self.pages:
            yield from self.pages.pop()[:: self.width]


class Pages(Generic[V]):
    """Things in their order: lists of at most ``PAGE`` each."""

    __slots__ = ("pages",)

    def __init__(self) -> None:
        self.pages: list[list[V]] = []

    def add(self, one: V) -> None:
        """Adds one at the end."""
        if not self.pages or len(self.pages[-1]) == PAGE:
            self.pages.append([])
        self.pages[-1].append(one)

    def __len__(self) -> int:
        return sum(map(len, self.pages))

    def __iter__(self) -> Iterator[V]:
        for page in self.pages:
            yield from page
