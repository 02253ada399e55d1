"""An archive of events on disk: a JSON object a line, whole and durable or not there at all.

    append ──▶ usage.ndjson ──full, or of another hour──▶ usage-20260822T101500.123Z.ndjson
               written here                               finished: yours to move, compress, remove

- What ``append`` says is delivered was fsynced before, and so was the directory after each new name.
- A batch that could not be written whole is cut off again. After a crash the next process cuts off what is
  no line, and finds the lines of the batch that was never settled: resent, they are not written twice.
- An event that was attempted before the file was last written, and is not found at its end, may be further
  back, or in a file that was taken away: it is written, and whether it is there twice is in doubt.
- What is read back after a crash is written again before it is believed: a disk that failed to sync once may
  show from memory what it does not have.
- Files are never removed. At ``max_bytes`` the output pauses, and events wait in the store.
- One process writes an archive, by a lock file beside it.
- A file that is gone was moved away, and a new one begins; a directory that is gone, or whose disk is, pauses
  the output: an archive that went on in an empty mount point would be found by nobody.

Everything here blocks; it runs on a thread of its own.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import re
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import structlog

from proxy_usage.config.outputs import FileConfig
from proxy_usage.delivery.disk import Disk, NotMounted
from proxy_usage.outputs.base import Memory, Paused, Retry, Settled, Verdict
from proxy_usage.store import Fate, Queued

log = structlog.get_logger()

TAIL = 2 << 20
"""Bytes that are looked at after a crash: more than the largest batch, and only one is ever unsettled."""
MODE = 0o640
DISK_FULL, ARCHIVE_FULL, IN_USE = "disk_full", "archive_full", "archive_in_use"
NOT_MOUNTED = "not_mounted"
BEGINNING = b'{"specversion":'
"""Of every event. What a file ends in and begins otherwise, but for a lost block of zeros, is not ours."""
_BEGUN = re.compile(rb'\{"specversion":"[^"]*","id":"([^"\\]+)"')
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_WRONG = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ELOOP,
        errno.EINVAL,
    }
)
_STAMP = "%Y%m%dT%H%M%S"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Line(msgspec.Struct):
    id: str


@dataclass(slots=True)
class _Open:
    """The file that is being written."""

    fd: int
    lock: int
    end: int
    """Up to here it holds whole lines that are durable."""
    written_ms: int
    """When it was last written; 0 where it is empty."""
    known: frozenset[str]
    """Ids of the events that were found at its end when it was opened."""
    last: str
    """Id of the last of them, also where its line was cut off; empty where there is none."""
    found_ms: int
    """When it had last been written, or was made, when it was opened."""


class Archive:
    """The files of one archive. Not for two threads at once."""

    def __init__(self, config: FileConfig) -> None:
        self.config = config
        self._path = config.path
        self._open: _Open | None = None
        self._disk: Disk | None = None
        """Where the directory was when a file was last opened; None: not found yet."""
        self._last_ms = 0
        """Time in the newest name that was given."""
        self._finished_bytes: int | None = None
        self._decoder = msgspec.json.Decoder(_Line)

    def append(self, events: Sequence[Queued], now_ms: int) -> Verdict:
        """Writes the events that are not there yet, and says so once they are durable."""
        try:
            return self._append(events, now_ms)
        except BlockingIOError:
            return Paused(IN_USE, f"another process writes {self._path}: {self._owner()}")
        except OSError as error:
            self.close()
            return _verdict(error)

    def rotate(self, now_ms: int) -> None:
        """Finishes the file where its time has passed, though nothing is written. Raises nothing."""
        if self._open is None or not self._due(self._open, now_ms):
            return
        try:
            self._finish(self._opened(), now_ms)
        except OSError as error:  # the next batch meets it again, and says so
            log.debug("an archive is not rotated", file=str(self._path), error=str(error))
            self.close()

    def close(self) -> None:
        """Gives the archive up; it can be opened again."""
        if self._open is not None:
            for fd in (self._open.fd, self._open.lock):
                with suppress(OSError):
                    os.close(fd)
            self._open = None

    def _append(self, events: Sequence[Queued], now_ms: int) -> Verdict:
        one = self._opened()
        fresh = [event for event in events if event.id not in one.known]
        # In JSON a line break is white space between two tokens, never part of a text.
        lines = b"".join(event.body.replace(b"\n", b" ") + b"\n" for event in fresh)
        if lines:
            if self._due(one, now_ms) or (one.end and one.end + len(lines) > self.config.rotate_bytes):
                self._finish(one, now_ms)
                one = self._opened()
            if not self._has_room(one.end + len(lines)):
                return Paused(
                    ARCHIVE_FULL,
                    f"{self._finished_bytes} bytes are finished in {self._path.parent}:"
                    " move files away, or raise file.max_bytes",
                )
            self._write(one, lines)
            one.end, one.written_ms = one.end + len(lines), now_ms
        ids = [event.id for event in events]
        # Where the file ended in the midst of this batch, what follows there was never written.
        before = set(ids[: ids.index(one.last)] if one.last in ids else ids)
        unseen = frozenset(event.seq for event in fresh if event.id in before)
        return Settled({event.seq: Fate("delivered") for event in events}, Memory(unseen, one.found_ms))

    @staticmethod
    def _write(one: _Open, lines: bytes) -> None:
        """Writes and syncs, or leaves nothing of it behind. Raises OSError."""
        at = 0
        try:
            while at < len(lines):
                at += os.pwrite(one.fd, lines[at:], one.end + at)
            os.fsync(one.fd)
        except OSError:
            with suppress(OSError):  # where this fails too, the next opening finds out what is there
                os.ftruncate(one.fd, one.end)
            raise

    # --- files ------------------------------------------------------------------------------------------

    def finished(self) -> list[Path]:
        """The files that are finished, oldest first."""
        stem, suffix = self._path.stem, self._path.suffix
        found = self._path.parent.glob(f"{glob.escape(stem)}-*{glob.escape(suffix)}")
        return sorted(path for path in found if _moment_ms(path, stem, suffix) is not None)

    def _has_room(self, wanted: int) -> bool:
        """Whether so many bytes may be in the file that is written, beside those that are finished."""
        if self._finished_bytes is None or self._finished_bytes + wanted > self.config.max_bytes:
            self._finished_bytes = sum(map(_size, self.finished()))
        return self._finished_bytes + wanted <= self.config.max_bytes

    def _due(self, one: _Open, now_ms: int) -> bool:
        """Whether what it holds is of another stretch of time than what would be written now."""
        every = self.config.rotate_every
        return one.end > 0 and one.written_ms // every != now_ms // every

    def _finish(self, one: _Open, now_ms: int) -> None:
        """Gives the file its final name, which no file ever had, in the order of time."""
        newest = self.finished()[-1:]
        before_ms = max([self._last_ms, *(self._stamp(path) for path in newest)])
        self._last_ms = max(now_ms, before_ms + 1)
        moment = _EPOCH + timedelta(milliseconds=self._last_ms)
        name = f"{moment:{_STAMP}}.{self._last_ms % 1_000:03d}Z"
        self._path.rename(self._path.with_name(f"{self._path.stem}-{name}{self._path.suffix}"))
        _sync_directory(self._path.parent)
        former, one.fd = one.fd, -1
        os.close(former)
        one.fd = self._create()
        one.end, one.written_ms = 0, 0
        self._finished_bytes = None

    def _stamp(self, path: Path) -> int:
        return _moment_ms(path, self._path.stem, self._path.suffix) or 0

    def _opened(self) -> _Open:
        """The file, opened, and opened anew where its name leads elsewhere by now.

        Raises:
            BlockingIOError: another process has it.
            NotMounted: its directory, or the disk under it, went away since it was opened first.
            OSError: it cannot be opened, read or repaired.
        """
        if self._open is not None and not (
            _same(self._open.fd, self._path) and _same(self._open.lock, self._lock_path)
        ):
            self._look_at_disk()
            log.warning("an archive was moved away while it was written", file=str(self._path))
            self.close()
        if self._open is None:
            self._look_at_disk()
            self._disk = Disk.of(self._path.parent)
            self._finished_bytes = None
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
            fd = -1
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(OSError):  # a full disk: the lock itself holds all the same
                    os.ftruncate(lock, 0)
                    os.pwrite(lock, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
                there = self._path.exists()
                fd = self._create()
                self._open = self._recover(fd, lock, there)
            except BaseException:  # whatever it is, no lock stays behind
                os.close(lock)
                if fd >= 0:
                    os.close(fd)
                raise
        return self._open

    def _look_at_disk(self) -> None:
        """Makes the directory, once: from then on it has to be there, and on its disk. Raises OSError."""
        directory = self._path.parent
        if self._disk is not None:
            self._disk.check(directory)
        elif not directory.exists():
            directory.mkdir()
            _sync_directory(directory.parent)

    def _create(self) -> int:
        """The file's descriptor; a new file's name is durable before anything is written to it."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        try:
            _sync_directory(self._path.parent)
            self._look_at_disk()  # it may have gone since this was asked before
        except OSError:
            os.close(fd)
            raise
        return fd

    def _recover(self, fd: int, lock: int, there: bool) -> _Open:
        """Cuts off what is no line, makes what is left durable, and learns the ids at the end.

        ``there`` False: the file is new, and nobody knows what was in one that may have been taken away.
        """
        status = os.fstat(fd)
        start, tail = _read_tail(fd, status.st_size)
        end, found = self._whole(tail, complete=start == 0)
        if end < len(tail):
            rest = tail[end : end + len(BEGINNING)]
            if (start > 0 and end == 0) or not (BEGINNING.startswith(rest) or rest[0] == 0):
                raise OSError(
                    errno.EINVAL, "it does not end as an archive does; nothing is cut off", self._path
                )
            log.warning("an archive ended in half a line", file=str(self._path), cut_bytes=len(tail) - end)
            os.ftruncate(fd, start + end)
        if end:
            os.pwrite(fd, tail[:end], start)
        os.fsync(fd)
        with suppress(OSError):  # another's file: then it looks as if it had been written just now
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        if start == 0:  # it may have been finished just before the crash
            for path in self.finished()[-1:]:
                found = self._ids_of(path) + found
        last = "".join(found[-1:]) if there else ""
        if cut := _BEGUN.match(tail, end):
            last = cut[1].decode(errors="replace")
        found_ms, size = status.st_mtime_ns // 1_000_000, start + end
        return _Open(fd, lock, size, found_ms if size else 0, frozenset(found), last, found_ms)

    def _ids_of(self, path: Path) -> list[str]:
        """Ids at the end of a finished file, which was durable when it was finished; none if it is gone."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return []
        try:
            start, tail = _read_tail(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        return self._whole(tail, complete=start == 0)[1]

    def _whole(self, tail: bytes, *, complete: bool) -> tuple[int, list[str]]:
        """Where the last line ends that is an event, and the ids of all lines that are, in their order.

        Args:
            complete: it is the whole file; otherwise its first line may be the end of one.
        """
        end, at, ids = 0, 0, []
        if not complete:
            at = tail.find(b"\n") + 1
        while (newline := tail.find(b"\n", at)) >= 0:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                ids.append(self._decoder.decode(tail[at:newline]).id)
                end = newline + 1
            at = newline + 1
        return end, ids

    @property
    def _lock_path(self) -> Path:
        return self._path.with_name(self._path.name + ".lock")

    def _owner(self) -> str:
        with suppress(OSError):
            return self._lock_path.read_text(errors="replace").strip()[:100] or "unknown"
        return "unknown"


def _verdict(error: OSError) -> Retry | Paused:
    text = f"{error.filename or 'archive'}: {error.strerror}"
    if isinstance(error, NotMounted):
        return Paused(NOT_MOUNTED, text)
    if error.errno in _FULL:
        return Paused(DISK_FULL, text)
    return Paused("misconfigured", text) if error.errno in _WRONG else Retry("io_error", text)


def _size(path: Path) -> int:
    """Bytes of a file; 0 where somebody takes it away just now."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _same(fd: int, path: Path) -> bool:
    """Whether a name still leads to what is open."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


def _read_tail(fd: int, size: int) -> tuple[int, bytes]:
    """The last bytes of a file, and where they begin."""
    start = max(0, size - TAIL)
    tail = b""
    while start + len(tail) < size and (more := os.pread(fd, size - start - len(tail), start + len(tail))):
        tail += more
    return start, tail


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _moment_ms(path: Path, stem: str, suffix: str) -> int | None:
    """The time in the name of a finished file; None: it is another file."""
    text = path.name.removeprefix(f"{stem}-").removesuffix(suffix)
    try:
        moment = datetime.strptime(text, f"{_STAMP}.%fZ").replace(tzinfo=UTC)
    except ValueError:
        return None
    return (moment - _EPOCH) // timedelta(milliseconds=1)
