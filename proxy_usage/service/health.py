"""What /healthz and /readyz of a sink are made of: signs of life, the store, and the outputs."""

from __future__ import annotations

from collections.abc import Iterable

from proxy_usage.delivery import Courier
from proxy_usage.service.housekeeping import Housekeeping
from proxy_usage.service.turns import Turns
from proxy_usage.service.watching import QueueWatch
from proxy_usage.web import Health

STALE_BEAT_MS = 30_000
"""A stage that shows no life for so long makes the process unready, and unhealthy after ten times that."""
STALLED_MS = 600_000
"""Events older than this that no output took make the process unready."""


def health_of(
    turns: Turns,
    couriers: Iterable[Courier],
    housekeeping: Housekeeping,
    queues: QueueWatch,
    now_ms: int,
) -> Health:
    """How the parts are. What a person must mend, and what lasts, is a reason."""
    reasons: dict[str, str] = {}
    beats = {"turns": turns.beat_ms}
    beats.update({f"output {c.settings.name}": c.beat_ms for c in couriers})
    for stage, beat_ms in beats.items():
        if now_ms - beat_ms > STALE_BEAT_MS:
            reasons[stage] = f"no sign of life for {(now_ms - beat_ms) // 1_000} s"
    if turns.full:
        reasons["store"] = housekeeping.describe()
    elif turns.failure is not None:
        reasons["store"] = turns.failure.message
    for courier in couriers:
        name, policy = courier.settings.name, courier.policy
        oldest_ms = queues.oldest_ms.get(courier.settings.output)
        if policy.paused is not None:
            # Its answer is for `status`: it may name a tenant.
            reasons[f"output {name} paused"] = policy.paused
        elif oldest_ms is not None and now_ms - oldest_ms > STALLED_MS:
            reasons[f"output {name} stalled"] = f"oldest event is {(now_ms - oldest_ms) // 1_000} s old"
    return Health(all(now_ms - beat_ms <= 10 * STALE_BEAT_MS for beat_ms in beats.values()), reasons)
