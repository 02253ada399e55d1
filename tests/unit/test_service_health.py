"""What /healthz and /readyz say of stages that show no life or died, and of events that nobody takes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from proxy_usage.config import Config, load_text
from proxy_usage.control import call, socket_path
from proxy_usage.errors import StageDied
from proxy_usage.service.build import Storage, clock_ms, open_storage
from proxy_usage.service.health import STALE_BEAT_MS, STALLED_MS
from proxy_usage.service.service import Service

SETTINGS = """
listen: {grpc: "127.0.0.1:0", http: "127.0.0.1:0"}
outputs: [{name: billing, url: "http://127.0.0.1:9/v1/usage/events:batchIngest"}]
"""


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """A service that serves, on ports of its own."""
    made, storage = await started(tmp_path)
    yield made
    await made.drain()
    await made.end()
    storage.close()


async def started(tmp_path: Path) -> tuple[Service, Storage]:
    config = load_text(
        f"{SETTINGS}store: {{path: {tmp_path}/usage.db}}", origin="test", base=tmp_path, env={}
    )

    def reload() -> Config:
        return config

    storage = open_storage(config)
    made = Service(config, storage, reload=reload)
    await made.start()
    return made, storage


async def test_all_is_well(service: Service) -> None:
    assert (service.health().alive, service.health().reasons) == (True, {})


@pytest.mark.parametrize("times", [2, 11])
async def test_a_stage_without_a_sign_of_life_is_named_and_in_time_a_reason_to_restart(
    service: Service, times: int
) -> None:
    service._turns.stop()  # it would show one at once
    await service._stages["turns"]
    silent = asyncio.create_task(asyncio.Event().wait())
    service._stages["turns"] = silent  # type: ignore[assignment]
    service._turns.beat_ms = clock_ms() - times * STALE_BEAT_MS
    health = service.health()
    assert health.reasons["turns"].startswith("no sign of life for ")
    assert health.alive is (times < 10)
    silent.cancel()


async def test_events_that_no_output_takes_for_long_are_a_reason(service: Service) -> None:
    (courier,) = service._couriers
    service._queues.oldest_ms[courier.settings.output] = clock_ms() - STALLED_MS - 1_000
    ((name, why),) = service.health().reasons.items()
    assert name == "output billing stalled"
    assert re.fullmatch(r"oldest event is 6\d\d s old", why)


@pytest.mark.parametrize("stage", ["turns", "watch", "output billing", "http port"])
async def test_a_stage_that_ended_ends_the_process_and_is_named(service: Service, stage: str) -> None:
    service._stages[stage].cancel()
    with pytest.raises(StageDied, match=f"the stage '{stage}' ended by itself"):
        await service.supervise()
    assert not service.health().alive


async def test_the_guard_of_a_port_is_a_stage(service: Service) -> None:
    (guard,) = [stage for name, stage in service._stages.items() if name.startswith("port ")]
    guard.cancel()
    with pytest.raises(StageDied, match="the stage 'port "):
        await service.supervise()


def test_usage_that_is_in_no_store_is_told_by_node_and_so_is_who_else_knows(
    service: Service,
) -> None:
    intake = service._storage.intake
    intake.add("envoy-1", 7, "log", "http")
    intake.add("envoy-1", 2, "log", "tcp")
    with capture_logs() as lines:
        service.tell_unsaved("stopping")
        intake.path.rename(intake.path.with_name("away"))  # where the next start will not find it
        service.tell_unsaved("stopping")
    assert [line["rows"] for line in lines] == [{"envoy-1": 9}] * 2
    assert lines[0]["hint"] == "the next start reports as lost what of them is in no store"
    assert "perhaps only this line tells of them" in lines[1]["hint"]


def test_a_stop_with_everything_saved_says_so(service: Service) -> None:
    with capture_logs() as lines:
        service.tell_unsaved("stopped before the drain was done")
    assert lines == [
        {
            "event": "stopped before the drain was done",
            "hint": "all that was read is in the store",
            "log_level": "warning",
        }
    ]


async def test_the_control_socket_is_made_again_where_the_store_is(service: Service) -> None:
    path = socket_path(service.config.store.path)
    path.unlink()
    await service._reach.renew()
    assert "version" in await asyncio.to_thread(call, path, "status")  # type: ignore[operator]
    path.unlink()
    store = service.config.store.path
    store.rename(store.with_name("away"))
    await service._reach.renew()
    assert not path.exists()  # it may be the place where its disk will be mounted
    store.with_name("away").rename(store)
    await service._reach.renew()
    assert path.exists()


async def test_a_drain_ends_in_order_where_the_store_is_away(tmp_path: Path) -> None:
    service, storage = await started(tmp_path)
    store = service.config.store.path
    store.rename(store.with_name("away"))
    await service.drain()
    await service.end()
    storage.close()
    assert all(task.done() for task in service._stages.values())
