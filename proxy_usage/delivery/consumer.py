"""The durable pull consumer that forwarders share: made where it never was, looked at closely where it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import structlog

from proxy_usage.delivery.jetstream import ApiError, Link, subjects_overlap

log = structlog.get_logger()

NS_PER_MS = 1_000_000
NOT_FOUND = 404
_ACK = ("$JS", "ACK")
_V1_TOKENS = 9
_V2_TOKENS = 11


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """What is read of which stream."""

    stream: str
    durable: str
    subject: str
    """Filter: which subjects of the stream."""
    dead_letters: str
    """Template of the subject for dead letters."""
    ack_wait_ms: int
    max_ack_pending: int


class Delivery(NamedTuple):
    """What the acknowledgement's address says of a message."""

    seq: int
    """Its sequence in the stream."""
    deliveries: int
    """How often it was handed to somebody, this time included."""
    published_ms: int


def delivery(reply: str) -> Delivery | None:
    """Reads ``$JS.ACK.…`` (ADR-15); None: the message is none of a stream."""
    tokens = reply.split(".")
    if tuple(tokens[:2]) != _ACK:
        return None
    if len(tokens) == _V1_TOKENS:
        deliveries, seq, time_ns = tokens[4], tokens[5], tokens[7]
    elif len(tokens) >= _V2_TOKENS:
        deliveries, seq, time_ns = tokens[6], tokens[7], tokens[9]
    else:
        return None
    return Delivery(int(seq), int(deliveries), int(time_ns) // NS_PER_MS)


class Consumer:
    """The durable consumer, over a link that may break."""

    def __init__(self, link: Link, settings: StreamSettings) -> None:
        self.ack_wait_ms = settings.ack_wait_ms
        """As the server has it, once it was looked at."""
        self._link = link
        self._settings = settings
        self._seen = False

    async def look(self) -> None:
        """Finds the stream and the consumer, and makes the latter where it never was.

        Raises:
            Unreachable, Lost: it cannot be asked. ApiError: there is no such stream, or (code 400) what is
                there cannot be used.
        """
        wanted = self._settings
        config = (await self._link.api(f"STREAM.INFO.{wanted.stream}"))["config"]
        await self._dead_letters_go_somewhere()
        try:
            found = await self._link.api(f"CONSUMER.INFO.{wanted.stream}.{wanted.durable}")
        except ApiError as error:
            if error.code != NOT_FOUND:
                raise
            if self._seen:  # made anew it would begin with what was delivered long ago
                raise ApiError(
                    400, 0, f"the consumer {wanted.durable} is gone; a restart makes it anew, from the start"
                ) from None
            found = await self._make()
        self._check(found["config"], config)
        self._seen = True

    async def progress(self) -> tuple[int, int]:
        """How many events nobody has settled, and the highest sequence that was handed to somebody.

        Raises as ``look``.
        """
        info = await self._link.api(f"CONSUMER.INFO.{self._settings.stream}.{self._settings.durable}")
        unsettled = int(info.get("num_pending", 0)) + int(info.get("num_ack_pending", 0))
        return unsettled, int(info["delivered"]["stream_seq"])

    async def ask(self, inbox: str, events: int, expires_s: int) -> None:
        """Asks for up to so many events, which come to ``inbox`` as they are there. Raises Unreachable."""
        request = msgspec.json.encode({"batch": events, "expires": expires_s * 1_000 * NS_PER_MS})
        name = f"{self._settings.stream}.{self._settings.durable}"
        await self._link.tell(f"$JS.API.CONSUMER.MSG.NEXT.{name}", request, inbox)

    async def _make(self) -> dict[str, Any]:
        wanted = self._settings
        body = {
            "stream_name": wanted.stream,
            "action": "create",
            "config": {
                "name": wanted.durable,
                "durable_name": wanted.durable,
                "ack_policy": "explicit",
                "ack_wait": wanted.ack_wait_ms * NS_PER_MS,
                "max_ack_pending": wanted.max_ack_pending,
                "max_deliver": -1,
                "deliver_policy": "all",
                "filter_subject": wanted.subject,
            },
        }
        name = f"{wanted.stream}.{wanted.durable}.{wanted.subject}"
        found = await self._link.api(f"CONSUMER.CREATE.{name}", body)
        log.info("made the durable consumer", stream=wanted.stream, durable=wanted.durable)
        return found

    def _check(self, consumer: dict[str, Any], stream: dict[str, Any]) -> None:
        """Raises ApiError: usage could be lost with a consumer like this."""
        wanted = self._settings
        wrong = ""
        if consumer.get("deliver_subject"):
            wrong = "pushes; it must be one that is pulled from"
        elif consumer.get("ack_policy") != "explicit":
            wrong = f"has ack_policy {consumer.get('ack_policy')}; it must be explicit"
        elif int(consumer.get("max_deliver") or -1) > 0:
            wrong = f"gives events up after max_deliver {consumer['max_deliver']}; it must be -1"
        elif consumer.get("filter_subject", "") != wanted.subject:
            wrong = f"reads {consumer.get('filter_subject') or 'everything'}, not {wanted.subject}"
        if wrong:
            raise ApiError(400, 0, f"the consumer {wanted.durable} {wrong}")
        self.ack_wait_ms = int(consumer["ack_wait"]) // NS_PER_MS
        for name, value in (("ack_wait", self.ack_wait_ms), ("max_ack_pending", consumer["max_ack_pending"])):
            ours = wanted.ack_wait_ms if name == "ack_wait" else wanted.max_ack_pending
            if value != ours and not self._seen:
                log.warning(
                    "the consumer's own setting counts", setting=name, consumer=value, configured=ours
                )
        if stream.get("discard") == "old" and not self._seen:
            log.warning(
                "the stream drops its oldest events when it is full: discard: new loses none",
                stream=wanted.stream,
            )

    async def _dead_letters_go_somewhere(self) -> None:
        """Raises ApiError: no stream takes dead letters, or they would be forwarded again."""
        wanted = self._settings
        subject = wanted.dead_letters.replace("{project}", "*")
        takers = (await self._link.api("STREAM.NAMES", {"subject": subject})).get("streams") or []
        if not takers:
            raise ApiError(404, 0, f"no stream takes dead letters, {subject}")
        if wanted.stream in takers and subjects_overlap(subject.split("."), wanted.subject.split(".")):
            raise ApiError(400, 0, f"dead letters, {subject}, would be forwarded again")
