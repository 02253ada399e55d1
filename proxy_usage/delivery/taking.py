"""What a forwarder has taken from its stream, from the moment it is handed an event until that is settled.

An event is this forwarder's while the server knows that it is alive: a sign of life for all that is held,
each third of ``ack_wait``, confirmed. Without one for so long the server has handed the events to another
forwarder, and this one must let go of them: sent from here as well, and late enough, the endpoint would no
longer know them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import structlog

from proxy_usage.config.units import parse_instant
from proxy_usage.delivery.consumer import Consumer, StreamSettings, delivery
from proxy_usage.delivery.jetstream import ApiError, Link, Lost, Unreachable, is_token, read, subject_of
from proxy_usage.errors import StreamUnavailable
from proxy_usage.metrics import Metrics
from proxy_usage.store import Fate, Queued

if TYPE_CHECKING:
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

log = structlog.get_logger()

EXPIRES_S = 5
"""How long the server keeps a request for events that are not there yet."""
INFO_S = 5.0
RETRY_S = 1.0
ANSWER_CHARS = 500
UNKNOWN = "unknown"
"""The project of a dead letter that names none."""
LETTERS = frozenset({"dead", "unconfirmed"})
"""Fates whose events somebody may want to see again."""


class _Data(msgspec.Struct):
    value: str = "0"


class _Event(msgspec.Struct):
    """What must be known of a CloudEvent to deliver it."""

    id: str
    type: str
    subject: str
    time: str
    data: _Data = msgspec.field(default_factory=_Data)


@dataclass(slots=True)
class Held:
    """An event that was taken from the stream. Times in milliseconds since the epoch."""

    event: Queued
    reply: str
    """Where it is acknowledged."""
    published_ms: int
    before: bool
    """Somebody else was, or may have been, handed it: perhaps it was sent."""
    since_ms: int
    time_ms: int | None
    """The event's own time; None: it is no event of usage."""
    buried: bool = False
    """It is a dead letter already, and only has to be acknowledged."""


class Taking:
    """The stream's side of a forwarder.

    Args:
        output: the output's name, for metrics and dead letters.
        room: events that may wait for their first attempt.
        wake: called when there is something new in ``ready``.
        clock_ms: the wall clock, in milliseconds since the epoch.
        monotonic: seconds that never go back.
    """

    def __init__(
        self,
        link: Link,
        settings: StreamSettings,
        *,
        output: str,
        room: int,
        metrics: Metrics,
        wake: Callable[[], None],
        clock_ms: Callable[[], int],
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.problem: tuple[str, str] | None = ("starting", "the stream was not looked at yet")
        """Why nothing comes from the stream, in a word and at length; None while it does."""
        self.pending = 0
        """Events of the stream that no forwarder has settled, as the server says."""
        self.beat_ms = clock_ms()
        self.held: dict[int, Held] = {}
        """By sequence in the stream."""
        self.ready: dict[int, Held] = {}
        """Those that nobody here has attempted."""
        self.lapsed: set[int] = set()
        """Held, and the server was not told in time that they are looked after."""
        self._link = link
        self._consumer = Consumer(link, settings)
        self._output = output
        self._room = room
        self._metrics = metrics
        self._notify = wake
        self._clock_ms = clock_ms
        self._monotonic = monotonic
        self._lived = monotonic()
        self._asked = 0  # events asked for and not come yet
        self._wake = asyncio.Event()
        self._stopping = False
        self._unread: list[str] = []
        self._inbox: Subscription | None = None
        self._seen = 0  # the highest sequence that anybody was handed, as far as is known
        self._water = 0  # the same, when this connection was made

    def oldest_ms(self) -> int | None:
        """When the oldest event that is held was published: by its server's clock, which may be ahead."""
        return min((min(held.published_ms, held.since_ms) for held in self.held.values()), default=None)

    def room_again(self) -> None:
        """Something of ``ready`` was taken away."""
        self._wake.set()

    # --- the stream -------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Takes events from the stream, and shows that those held are still looked after, until cancelled."""
        while True:
            self.beat_ms = self._clock_ms()
            try:
                await self._consumer.look()
                self._inbox = await self._link.listen(self._take)
                await self._serve(self._inbox.subject)
            except Unreachable as error:
                self._say((error.verdict.reason, error.verdict.answer))
            except Lost as error:
                self._say(("unavailable", str(error)))
            except ApiError as error:
                self._say(("misconfigured" if error.code in (400, 403, 404) else "unavailable", str(error)))
            await asyncio.sleep(RETRY_S)

    def stop(self) -> None:
        """Takes nothing more."""
        self._stopping = True

    async def close(self) -> None:
        """Gives back what is not settled, so that another forwarder need not wait for it."""
        self._stopping = True
        if self._link.open:
            if self._inbox is not None:  # or they would come back here
                await self._link.unlisten(self._inbox)
            with contextlib.suppress(Unreachable):
                for reply in (*(held.reply for held in self.held.values()), *self._unread):
                    await self._link.tell(reply, b"-NAK")
        self._return(len(self.held))
        self.held.clear()
        self.ready.clear()
        await self._link.close()

    def check(self) -> None:
        """Looks whether what is held still is this forwarder's."""
        if self._monotonic() - self._lived > self._consumer.ack_wait_ms / 1_000:
            self.lapsed.update(self.held)

    def let_go(self, keep: Container[int]) -> None:
        """Forgets what lapsed, but ``keep``: the server hands all of it to somebody, if it has not yet."""
        gone = [seq for seq in self.lapsed if seq in self.held and seq not in keep]
        for seq in self.lapsed & self.held.keys():
            self.held[seq].before = True
        for seq in gone:
            del self.held[seq]
            self.ready.pop(seq, None)
        self.lapsed.clear()
        self._return(len(gone))

    def _return(self, events: int) -> None:
        if events:
            self._metrics.forward_returned.inc(events)
            log.info("given back to the stream", events=events)

    def _say(self, problem: tuple[str, str] | None) -> None:
        if problem is not None and (self.problem is None or self.problem[0] != problem[0]):
            log.warning("nothing comes from the stream", reason=problem[0], detail=problem[1])
        elif problem is None and self.problem is not None:
            log.info("reading the stream", stream=self.settings.stream, durable=self.settings.durable)
        self.problem = problem

    async def _serve(self, inbox: str) -> None:
        """Asks for events while there is room, on one connection. Returns when it broke."""
        self._asked = 0
        asked_at = self._monotonic()
        self._water = self._seen
        self.check()
        await self._live()
        self._say(None)
        while self._link.open:
            self.beat_ms = self._clock_ms()
            self._wake.clear()
            now = self._monotonic()
            room = self._room - len(self.ready)
            if self._asked == 0 or now - asked_at > EXPIRES_S + 1:  # nobody said that the request ended
                self._asked = 0
                if room > 0 and not self._stopping:
                    self._asked, asked_at = room, now
                    await self._consumer.ask(inbox, room, EXPIRES_S)
            third_s = self._consumer.ack_wait_ms / 3_000
            if now - self._lived >= min(third_s, INFO_S):
                await self._live()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), min(1.0, third_s))

    async def _live(self) -> None:
        """A sign of life for each event held; that the server got them shows by its answer to what follows.

        Raises Unreachable, Lost, ApiError.
        """
        began = self._monotonic()
        for held in tuple(self.held.values()):
            await self._link.tell(held.reply, b"+WPI")
        self.pending, handed_out = await self._consumer.progress()
        self._seen = max(self._seen, handed_out)
        self._lived = began

    def _take(self, message: Msg) -> None:
        """One message, or the server's word that a request for messages ended."""
        found = delivery(message.reply)
        if found is None:
            if (message.headers or {}).get("Status", "") != "100":
                self._asked = 0
                self._wake.set()
            return
        self._asked = max(0, self._asked - 1)
        if self._asked == 0:
            self._wake.set()
        if self._stopping:
            self._unread.append(message.reply)  # as many as were asked for, at the most
            return
        known = self.held.get(found.seq)
        if known is not None:  # it was thought that this forwarder had died; the newer address counts
            known.reply = message.reply
            known.before = True  # and whoever was handed it in between may have sent it
            self.lapsed.discard(found.seq)
            return
        event, time_ms = _parsed(message, found.seq)
        # A server that crashed may have forgotten what it handed out, and acknowledgements: those are not
        # flushed at once. What was out before the connection broke may have been sent, whatever it counts.
        before = found.deliveries > 1 or found.seq <= self._water
        self._seen = max(self._seen, found.seq)
        held = Held(event, message.reply, found.published_ms, before, self._clock_ms(), time_ms)
        self.held[found.seq] = self.ready[found.seq] = held
        self._metrics.forward_read.inc()
        self._notify()

    # --- ends -------------------------------------------------------------------------------------------

    async def end(self, fates: Mapping[int, Fate]) -> None:
        """Dead letters first, then acknowledgements: what was neither stays with the stream.

        Raises:
            StreamUnavailable: one of them was not confirmed. The others are done with, and no longer held.
        """
        failure: Exception | None = None
        try:
            await self._bury({seq: fate for seq, fate in fates.items() if fate.name in LETTERS})
            asked = [(seq, await self._link.ask(self.held[seq].reply, b"+ACK")) for seq in fates]
        except (Unreachable, Lost, ApiError) as error:
            _unavailable(error)
        for seq, answer in asked:
            try:
                if (said := await self._link.wait(answer)).headers:
                    read(said)
            except (Lost, ApiError) as error:
                failure = error
            else:
                self.ready.pop(seq, None)
                self.held.pop(seq, None)
        if failure is not None:
            _unavailable(failure)

    async def _bury(self, fates: Mapping[int, Fate]) -> None:
        """Publishes dead letters. Raises Unreachable, Lost, ApiError."""
        asked = []
        for seq, fate in fates.items():
            held = self.held[seq]
            if held.buried:
                continue
            project = held.event.tenant if is_token(held.event.tenant) else UNKNOWN
            headers = {
                "Nats-Msg-Id": f"{held.event.id}.dead",
                "Proxy-Usage-Reason": fate.reason or fate.name,
                "Proxy-Usage-Status": str(fate.status),
                "Proxy-Usage-Answer": fate.answer[:ANSWER_CHARS],
                "Proxy-Usage-Output": self._output,
            }
            subject = subject_of(self.settings.dead_letters, project)
            asked.append((held, await self._link.ask(subject, held.event.body, headers)))
        for held, answer in asked:
            read(await self._link.wait(answer))
            held.buried = True


def _unavailable(error: Exception) -> NoReturn:
    raise StreamUnavailable(
        f"the stream does not confirm: {error}",
        hint="what is held is acknowledged when it does; after ack_wait another forwarder has it",
    ) from None


def _parsed(message: Msg, seq: int) -> tuple[Queued, int | None]:
    """The event in a message and its time; None: it is no event of usage."""
    try:
        event = msgspec.json.decode(message.data, type=_Event)
        time_ms = parse_instant(event.time)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, OverflowError):
        known: Any = (message.headers or {}).get("Nats-Msg-Id", f"{seq}")
        return Queued(seq, str(known), UNKNOWN, "", 0, message.data), None
    value = int(event.data.value) if event.data.value.isdecimal() and len(event.data.value) < 20 else 0
    project = event.subject.removeprefix("projects/")
    return Queued(seq, event.id, project, event.type, value, message.data), time_ms
