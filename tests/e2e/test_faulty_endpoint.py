"""A billing endpoint that fails in every way it can: what it did not take waits, nothing is billed twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from harness import World, delivered
from program import eventually

from proxy_usage.demo.checks import METERS
from proxy_usage.demo.faults import Fault, Faults
from proxy_usage.demo.truth import Truth
from proxy_usage.store.views import OutputStatus

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="module")]

REQUESTS, INGRESS, EGRESS, SECONDS = METERS
METER_OF = {"requests": REQUESTS, "ingress_bytes": INGRESS, "egress_bytes": EGRESS}
Sums = dict[tuple[str, str, str], int]


def sent(truth: Truth) -> Sums:
    """What the clients counted, by tenant, route and event type; time is not theirs to count."""
    return {
        (*key, meter): amount
        for key, count in truth.by_route().items()
        for meter, amount in ((REQUESTS, count.requests), (INGRESS, count.wire_in), (EGRESS, count.wire_out))
    }


def delivered_and_dead(world: World) -> Sums:
    """What the endpoint stored and what the sink kept as dead letters, each event once by its id."""
    sums: Counter[tuple[str, str, str]] = Counter()
    for event in world.billing.stored.values():
        tenant, data = event["subject"].removeprefix("projects/"), event["data"]
        sums[tenant, data["dimensions"]["httproute_name"], event["type"]] += int(data["value"])
    with world.sink.reader() as reader:
        for letter in reader.dead_letters(limit=100_000):
            # An event that was stored, whose answer was lost, and that was refused when it went again.
            if letter.id in world.billing.stored or letter.meter not in METER_OF:
                continue
            view = reader.event(letter.id)
            assert view is not None
            sums[letter.tenant, view.dimensions["httproute_name"], METER_OF[letter.meter]] += letter.value
    return {key: value for key, value in sums.items() if key[2] != SECONDS}


def dead(world: World) -> int:
    with world.sink.reader() as reader:
        return reader.status().outputs[0].dead


def attempts(world: World) -> int:
    """How often the batch that waits for longest has been tried."""
    with world.sink.reader() as reader:
        return max((batch.attempts for batch in reader.batches()), default=0)


async def heal(world: World) -> None:
    """The endpoint is well again: everything arrives, and readiness says so."""
    world.billing.faults = Faults()
    await world.equal()
    await eventually(world.sink.is_ready, "ready again", why=world.sink.said)
    assert world.billing.arrived.violations == []
    with world.sink.reader() as reader:
        assert reader.conservation(deep=True).balanced
        assert reader.status().outputs[0].delivered == len(world.billing.stored)


async def paused(world: World) -> str:
    """Waits until readiness says why the output is paused."""

    async def reason() -> bool:
        return "output billing paused" in await world.sink.reasons()

    await eventually(reason, "the output is paused", why=world.sink.said)
    pause = (await world.sink.reasons())["output billing paused"]

    def stored() -> OutputStatus:
        with world.sink.reader() as reader:
            (output,) = reader.status().outputs
        return output

    # What the endpoint said is for status: it may name a tenant. The store is told a moment later.
    await eventually(lambda: stored().paused == pause, "the store knows why", why=world.sink.said)
    return f"{pause}: {stored().detail}"


async def test_a_fifth_of_the_answers_is_wrong(tmp_path: Path) -> None:
    # Batches of one, so that there are many answers; a late one comes after the sink has given up on it.
    output = {"batch": {"events": 1}, "timeout": "400ms"}
    async with World(tmp_path, tenants=4, output=output) as world:
        names = [tenant.name for tenant in world.tenants]
        kinds = (Fault.BUSY, Fault.UNAVAILABLE, Fault.REJECT, Fault.LOST, Fault.LATE)
        world.billing.faults = Faults(
            seed=4, per_mille=dict.fromkeys(kinds, 40), retry_after="1", delay_ms=1000, script=kinds
        )
        await world.send(2_400, strays=24)
        await world.stop_envoy()
        await eventually(lambda: delivered_and_dead(world) == sent(world.truth), "all is accounted for")
        await eventually(world.sink.idle, "everything is settled", why=world.sink.said)
        answers = world.billing.answers
        wrong = [answers[name] for name in ("429", "503", "207", "lost")]  # a late answer is a 200 at last
        assert min(wrong) >= 1
        assert sum(answers.values()) > 100
        assert sum(wrong) * 10 > sum(answers.values())
        assert delivered_and_dead(world) == sent(world.truth)
        refused = dead(world)
        assert refused > 0
        assert world.differences(), "with dead letters, what was delivered alone cannot be all"
        with world.sink.reader() as reader:
            assert reader.conservation(deep=True).balanced
            assert {letter.reason for letter in reader.dead_letters()} == {"INVALID_VALUE_TYPE"}
            # What was stored, and refused when it went again, is a dead letter here.
            shown, arrived = delivered(reader, names), world.billing.arrived.sums()
            assert all(shown[place] <= arrived[place] for place in shown)

        world.billing.faults = Faults()
        replay = await world.sink.cli("deadletters", "replay")
        assert replay.status == 0, replay.said
        assert f"{refused} dead letters are back" in replay.said
        await world.equal()
        assert dead(world) == 0
        assert world.billing.arrived.violations == []
        with world.sink.reader() as reader:
            status, sums = reader.status(), reader.conservation(deep=True)
            assert delivered(reader, names) == world.billing.arrived.sums()
        assert sums.balanced, sums
        assert status.outputs[0].delivered == len(world.billing.stored)
        assert await world.sink.stop() == 0


async def test_the_token_is_wrong_until_its_file_changes(tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("yesterday's")
    async with World(tmp_path, token="today's", output={"token_file": str(token_file)}) as world:
        await world.send(60)
        assert (await paused(world)).startswith("unauthorized: 401")
        assert world.billing.stored == {}
        token_file.write_text("today's")
        await heal(world)
        assert dead(world) == 0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One world for faults that must leave no trace: each test heals it."""
    async with World(tmp_path_factory.mktemp("faults"), output={"timeout": "300ms"}) as world:
        yield world
        assert await world.sink.stop() == 0


async def test_everything_is_refused_for_a_while(shared: World) -> None:
    shared.billing.faults = Faults(always=Fault.REFUSE)
    before = len(shared.billing.stored)
    for _ in range(3):
        await shared.send(100)
        assert (await paused(shared)).startswith("refusing_everything: INVALID_REQUEST")
    refusals = shared.billing.answers["400"]
    await eventually(lambda: shared.billing.answers["400"] >= refusals + 10, "many more are refused")
    assert dead(shared) == 0
    assert len(shared.billing.stored) == before
    status = await shared.sink.cli("status")
    assert "refusing_everything" in status.said
    await heal(shared)
    assert dead(shared) == 0


PAUSES = {
    Fault.REDIRECT: "redirected: 302 to http",
    Fault.HTML: "ambiguous: 200: not JSON: <!doctype html>",
    Fault.EMPTY: "ambiguous: 200: not JSON: ",
    Fault.FORBIDDEN: "unauthorized: 403",
    Fault.NOT_FOUND: "misconfigured: 404",
}


@pytest.mark.parametrize("fault", PAUSES)
async def test_an_answer_that_only_an_operator_can_end(shared: World, fault: Fault) -> None:
    shared.billing.faults = Faults(always=fault)
    await shared.send(30)
    assert (await paused(shared)).startswith(PAUSES[fault])
    assert dead(shared) == 0
    await heal(shared)
    assert dead(shared) == 0


@pytest.mark.parametrize(
    "fault", [Fault.HANG, Fault.RESET, Fault.TIMEOUT, Fault.BUSY, Fault.ERROR, Fault.LOST, Fault.MIDWAY]
)
async def test_an_answer_that_time_heals(shared: World, fault: Fault) -> None:
    duplicates = shared.billing.arrived.duplicates
    shared.billing.faults = Faults(always=fault, retry_after="0")
    await shared.send(30)
    await eventually(lambda: attempts(shared) >= 3, "a batch is tried again and again", why=shared.sink.said)
    assert dead(shared) == 0
    if fault in (Fault.LOST, Fault.MIDWAY):  # what was stored comes again, once a try of it has arrived
        await eventually(lambda: shared.billing.arrived.duplicates > duplicates, "it is stored")
    else:
        assert shared.billing.arrived.duplicates == duplicates
    await heal(shared)
    assert dead(shared) == 0


async def test_events_left_out_without_a_word_are_found(shared: World) -> None:
    # The endpoint answers 200 and counts fewer: what it does with a project that has no account.
    before = len(shared.billing.stored)
    shared.billing.faults = Faults(drop_tenants=["bravo"])
    await shared.send(90)
    with shared.sink.reader() as reader:
        await eventually(
            lambda: shared.sink.idle() and len(shared.billing.stored) > before and dead(shared) > 0,
            "every event has a fate",
        )
        await eventually(
            lambda: delivered_and_dead(shared) == sent(shared.truth), "delivered and dead are all there is"
        )
        letters = reader.dead_letters()
    assert {(letter.tenant, letter.reason) for letter in letters} == {("bravo", "not_accepted")}
    shared.billing.faults = Faults()
    assert (await shared.sink.cli("deadletters", "replay", "--reason", "not_accepted")).status == 0
    await heal(shared)
    assert dead(shared) == 0
