"""What is wrong where several workers are added up: with usage as a whole, and with which of the workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from proxy_usage.page.problems import (
    LIFE,
    Level,
    Problem,
    in_order,
    of_process,
    of_usage,
    problems,
    waiting,
)
from proxy_usage.page.snapshot import Snapshot, WorkerFigures


def found_problems(now: Snapshot) -> tuple[Problem, ...]:
    """All problems of one process, or of several, in order.

    What all workers have is said once; what some have, with their numbers.
    """
    if not now.workers:
        return problems(now)
    passing = [one for one in of_process(now) if one.key in LIFE]
    silent = [] if passing else list(map(_silence, filter(_does_not_answer, now.workers)))
    return in_order([*passing, *silent, *_named(now.workers, passing=bool(passing)), *of_usage(now)])


def _does_not_answer(worker: WorkerFigures) -> bool:
    return bool(worker.silent) or worker.said is None


def _silence(worker: WorkerFigures) -> Problem:
    key, reason = f"worker {worker.number} silent", worker.silent or "it has not answered yet"
    if worker.since_ms is None:
        title = f"Worker {worker.number} is starting"
        return Problem(key, Level.NOTE, title, "Nothing.", f"Wait: {reason}.")
    return Problem(
        key,
        Level.FAILING,
        f"Worker {worker.number} does not answer",
        "If it was killed, what it had read and not saved: its next start says how much. The others go on.",
        "Wait: it is started again by itself. If it does not come back, the log says why.",
        since_ms=worker.since_ms,
        detail=reason,
    )


def _named(workers: Sequence[WorkerFigures], *, passing: bool) -> Iterator[Problem]:
    """The problems that workers have by themselves. ``passing``: that one starts or stops is said already."""
    groups: dict[tuple[object, ...], list[tuple[int, Problem]]] = {}
    for worker in workers:
        if worker.said is None or worker.silent:
            continue
        for one in of_process(worker.said):
            if passing and one.key in LIFE:
                continue
            since_ms = one.since_ms if one.since_ms is not None else worker.said.since.get(one.key)
            counted = worker.number if one.key == "crash" or one.key.startswith("remark ") else None
            same = one.key, one.level, one.title, one.do, one.command, counted
            groups.setdefault(same, []).append((worker.number, replace(one, since_ms=since_ms)))
    for group in groups.values():
        numbers = [number for number, _ in group]
        together = _together([one for _, one in group])
        yield together if len(numbers) == len(workers) else _of(numbers, together)


def _together(group: Sequence[Problem]) -> Problem:
    """Since the first of them; details are those of the first that has any."""
    since = [one.since_ms for one in group if one.since_ms is not None]
    counts = [one.waiting for one in group if one.waiting is not None]
    return replace(
        group[0],
        since_ms=min(since, default=None),
        detail=next((one.detail for one in group if one.detail), ""),
        lost=waiting(sum(counts)) if counts else group[0].lost,
    )


def _of(numbers: Sequence[int], problem: Problem) -> Problem:
    who = f"worker{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    title = f"{problem.title[0].lower()}{problem.title[1:]}"
    if problem.key in LIFE:
        title = f"it is {problem.key}" if len(numbers) == 1 else f"they are {problem.key}"
    return replace(problem, key=f"{who} {problem.key}", title=f"{who.capitalize()}: {title}")
