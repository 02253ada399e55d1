"""The one durable truth: a SQLite file, and the only SQL of the program.

``Database`` owns the file and its space; ``Checkpoints`` is the pipeline's side of it, ``Queue`` delivery's,
``Retention`` and ``Merger`` keep it from growing, ``Reader`` looks without changing anything. ``schema`` says
what each table is for.
"""

from proxy_usage.store.checkpoint import Checkpoints
from proxy_usage.store.database import Database
from proxy_usage.store.held import Released, WantedHeld
from proxy_usage.store.letters import Letters, Wanted
from proxy_usage.store.merging import Merger
from proxy_usage.store.queue import Batch, Fate, Idle, Queue, Queued
from proxy_usage.store.retention import Retention
from proxy_usage.store.space import Measure
from proxy_usage.turn import Held, Layout, OutputSlot, Recovered, Turn

__all__ = [
    "Batch",
    "Checkpoints",
    "Database",
    "Fate",
    "Held",
    "Idle",
    "Layout",
    "Letters",
    "Measure",
    "Merger",
    "OutputSlot",
    "Queue",
    "Queued",
    "Recovered",
    "Released",
    "Retention",
    "Turn",
    "Wanted",
    "WantedHeld",
]
