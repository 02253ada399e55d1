"""Into a JetStream stream: each event is a message, delivered when the stream says that it has stored it.

``Nats-Msg-Id`` is the event's id, so that the stream recognises an event that comes again within its
duplicate window; ``Nats-Expected-Stream`` keeps a subject that another stream took from swallowing usage.
What an answer means:

    stored, or recognised as stored        delivered
    no answer, connection broken           the event goes again: whether it is stored nobody knows
    larger than stream or server take      dead letter `too_large`
    stream full, no leader, no room        again, with backoff
    another stream, no such stream, no     the output is paused: nothing was stored, and nothing will be until
    JetStream, not permitted               somebody mends it

Verdicts are per event: what was acknowledged is settled, whatever became of the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

import structlog

from proxy_usage.delivery.jetstream import (
    ApiError,
    Link,
    Lost,
    NoResponder,
    Unreachable,
    is_token,
    read,
    subject_of,
)
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.outputs.base import Paused, Retry, Settled, Verdict
from proxy_usage.store import Fate, Queued

if TYPE_CHECKING:
    from nats.aio.msg import Msg

log = structlog.get_logger()

HEADER_BYTES = 256
"""More than our two headers take: an id is 26 characters, a stream's name is bounded below."""
NS_PER_MS = 1_000_000
TOO_LARGE = 10054
WRONG_STREAM = 10060
FULL = 10077
"""Also other failures to store: the description says which."""
_HOPELESS = frozenset({WRONG_STREAM, 10039, 10076, 10109})
"""Another stream's subject; JetStream off for the account, or altogether; the stream is sealed."""


@dataclass(slots=True)
class _Tally:
    """What became of the events of one batch."""

    fates: dict[int, Fate] = field(default_factory=dict)
    lost: Lost | None = None
    failed: ApiError | None = None


class NatsSender:
    """Publishes batches to one stream.

    Args:
        window: messages whose acknowledgement is awaited, of all batches together.
        remembers: told the stream's own duplicate window, in milliseconds, whenever it is looked at.
    """

    def __init__(
        self,
        link: Link,
        *,
        stream: str,
        subject: str,
        window: int,
        dedup_window_ms: int,
        remembers: Callable[[int], None],
    ) -> None:
        self._link = link
        self._stream = stream
        self._subject = subject
        self._room = asyncio.Semaphore(window)
        self._dedup_window_ms = dedup_window_ms
        self._remembers = remembers
        self._largest = 0  # of a message, as server and stream have it; 0: not looked at on this connection
        self._said: object = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._link.close()

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        """The next connection goes with this token, to whom this trusts; the present one is left."""
        self._link.renew(token, trust)

    async def send(self, events: Sequence[Queued]) -> Verdict:
        """Publishes the events and waits for the stream's word on each."""
        try:
            if not self._link.open or not self._largest:
                self._largest = await self._look()
            tally = await self._publish(events)
        except Unreachable as error:
            return error.verdict
        except Lost as error:  # it was only looked
            return Retry("unavailable", str(error))
        except ApiError as error:
            return await self._failed(error, "unavailable")
        return await self._verdict(events, tally)

    # --- the stream -------------------------------------------------------------------------------------

    async def _look(self) -> int:
        """Looks at the stream before anything is published on a connection. Returns what a message may weigh.

        Raises:
            Unreachable, Lost, ApiError: as ``Link.api``.
        """
        await self._link.connected()
        request = f"STREAM.INFO.{self._stream}"
        try:
            config = (await self._link.api(request))["config"]
        except Lost:
            if not self._link.denies(f"$JS.API.{request}"):
                raise
            self._say("not permitted to look at the stream: dedup_window is taken as configured", request)
            return self._link.max_payload
        window_ms = int(config.get("duplicate_window") or 0) // NS_PER_MS
        self._remembers(window_ms)
        if window_ms < self._dedup_window_ms:
            self._say(
                "the stream forgets ids sooner than dedup_window says: its own window counts",
                f"{window_ms} ms, not {self._dedup_window_ms} ms",
            )
        of_stream = int(config.get("max_msg_size") or -1)
        return min(self._link.max_payload, of_stream) if of_stream > 0 else self._link.max_payload

    def _say(self, text: str, detail: str) -> None:
        """Once, not at every connection."""
        if self._said != (text, detail):
            self._said = (text, detail)
            log.warning(text, stream=self._stream, detail=detail)

    # --- publishing -------------------------------------------------------------------------------------

    async def _publish(self, events: Sequence[Queued]) -> _Tally:
        tally = _Tally()
        fitting = []
        for event in events:
            if len(event.body) + HEADER_BYTES > self._largest:
                text = f"{len(event.body)} bytes and headers, at most {self._largest}"
                tally.fates[event.seq] = Fate("dead", 0, "too_large", text)
            elif not is_token(event.tenant):
                tally.fates[event.seq] = Fate(
                    "dead", 0, "refused", "its tenant is not one token of a subject"
                )
            else:
                fitting.append(event)
        asked: list[tuple[Queued, asyncio.Future[Msg]]] = []
        try:
            async with asyncio.timeout(self._link.peer.timeout_ms / 1_000):
                for event in fitting:
                    asked.append((event, await self._ask(event)))  # noqa: PERF401  # kept where it breaks off
                if asked:
                    await asyncio.wait([answer for _, answer in asked])
        except TimeoutError:
            tally.lost = Lost("not every acknowledgement came in time", late=True)
        except Unreachable as error:
            if not asked:
                raise
            await asyncio.sleep(0)
            tally.lost = Lost(str(error))  # broke in the middle: of those before nobody knows
        for event, answer in asked:
            self._count(tally, event, answer)
        return tally

    async def _ask(self, event: Queued) -> asyncio.Future[Msg]:
        """Publishes one event, when there is room for one more without an answer."""
        await self._room.acquire()
        try:
            answer = await self._link.ask(
                subject_of(self._subject, event.tenant),
                event.body,
                {"Nats-Msg-Id": event.id, "Nats-Expected-Stream": self._stream},
            )
        except BaseException:  # cancelled, too: its place is free again
            self._room.release()
            raise
        answer.add_done_callback(lambda _: self._room.release())
        return answer

    def _count(self, tally: _Tally, event: Queued, answer: asyncio.Future[Msg]) -> None:
        if not answer.done():
            answer.cancel()
            subject = subject_of(self._subject, event.tenant)
            if self._link.denies(subject):
                tally.failed = ApiError(403, 0, f"not permitted to publish to {subject}")
            elif tally.lost is None:
                tally.lost = Lost("an acknowledgement did not come", late=True)
            return
        try:
            self._check(answer.result())
        except Lost as error:
            tally.lost = error
        except ApiError as error:
            if error.err_code == TOO_LARGE:
                tally.fates[event.seq] = Fate("dead", error.code, "too_large", str(error))
            else:
                tally.failed = error
        else:
            tally.fates[event.seq] = Fate("delivered")

    def _check(self, message: Msg) -> None:
        """Raises ApiError: it is no acknowledgement of this stream."""
        said = read(message)
        if said.get("stream") != self._stream or not isinstance(said.get("seq"), int):
            raise ApiError(500, 0, "the acknowledgement is not this stream's")

    # --- what it means ----------------------------------------------------------------------------------

    async def _verdict(self, events: Sequence[Queued], tally: _Tally) -> Verdict:
        if len(tally.fates) == len(events):
            return Settled(tally.fates)
        if tally.failed is not None and tally.failed.code == 403:  # it is why answers do not come
            tally.lost = None
        if tally.lost is not None:
            reason = "timeout" if tally.lost.late else "broken_answer"
            return Retry(reason, str(tally.lost), fates=tally.fates)
        assert tally.failed is not None
        return replace(await self._failed(tally.failed, "server_error"), fates=tally.fates)

    async def _failed(self, error: ApiError, otherwise: str) -> Retry | Paused:
        if isinstance(error, NoResponder):
            return await self._nobody()
        if error.code == 403:
            return Paused("unauthorized", str(error))
        if error.err_code in _HOPELESS or error.code in (400, 404):
            return Paused("misconfigured", f"stream {self._stream}: {error}")
        return Retry("stream_full" if error.err_code == FULL else otherwise, str(error))

    async def _nobody(self) -> Retry | Paused:
        """Nobody took a message: is there no such stream, or is it without a leader for a moment?"""
        self._largest = 0  # it will be another stream, when there is one: look again
        try:
            config = (await self._link.api(f"STREAM.INFO.{self._stream}"))["config"]
        except ApiError as error:
            if error.code == 404:
                return Paused("misconfigured", f"stream {self._stream}: {error}")
            return Retry("unavailable", str(error))
        except (Unreachable, Lost) as error:
            return Retry("unavailable", str(error))
        subjects = ", ".join(config.get("subjects") or ["nothing"])
        return Paused("misconfigured", f"stream {self._stream} takes {subjects}, not {self._subject}")
