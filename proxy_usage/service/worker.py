"""One of several workers, seen from inside: which part it has, and how its life depends on its supervisor's.

Its standard input is a pipe that the supervisor holds open and never writes to. When that process is gone,
however it ended, the pipe ends, and the worker drains and ends too: no store stays taken by a process that
nobody looks after.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import msgspec

from proxy_usage.config import Config
from proxy_usage.config.workers import worker_config
from proxy_usage.errors import UsageError

ORPHAN_S = 30.0
"""So long a worker may take to drain once its supervisor is gone: more than a drain takes."""


class Part(msgspec.Struct, frozen=True):
    """What the supervisor tells a worker on its command line."""

    number: int
    of: int
    grpc: str
    """The address of ``listen.grpc``, its port known."""
    again: bool = False
    """Whether it takes the place of a process that served: then it makes no store where there is none."""

    @classmethod
    def decode(cls, text: str) -> Part:
        """Raises UsageError for what no supervisor wrote."""
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise UsageError(f"--worker: {error}", hint="set workers in the configuration instead") from None

    def encode(self) -> str:
        """The part as an argument."""
        return msgspec.json.encode(self).decode()

    def config(self, whole: Config) -> Config:
        """This worker's part of the configuration."""
        return worker_config(whole, self.number, self.of, grpc=self.grpc)


def depend_on_supervisor() -> None:
    """Ends this process when the supervisor ends."""
    threading.Thread(target=_wait_for_end, name="supervisor", daemon=True).start()


def _wait_for_end() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHAN_S)
    os._exit(1)
