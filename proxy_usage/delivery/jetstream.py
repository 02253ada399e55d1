"""A connection to a NATS server with JetStream: made when it is needed, made anew when it broke.

nats-py speaks the protocol; it is loaded when the first connection is made, so that a sink without NATS does
without it. What is ours: one connection at a time and no reconnecting behind our back (delivery has a backoff
of its own, and a request of which nobody knows the end must be told from one that never left), a bound on
everything, TLS that cannot be talked out of, and what a failure means, as a verdict.

Facts about the protocol are of nats-io/nats-architecture-and-design: ADR-4 (headers), ADR-2 (API errors and
their ``err_code``), ADR-15 (acknowledgements).
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.outputs.base import Paused, Retry

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

PENDING_BYTES = 8 << 20
"""What may wait for the socket; a batch is 1 MiB at the most."""
CONNECT_S = 10
"""A connection takes no longer, however patient the requests on it are."""
CLOSE_S = 1
PING_S = 20
"""A server that answers none of two pings, so far apart, is gone."""
_CREDENTIALS = re.compile(
    r"-+BEGIN NATS USER JWT-+\s+\S+\s+-+END NATS USER JWT-+.*-+BEGIN USER NKEY SEED-+\s+\S+\s+-+END",
    re.DOTALL,
)
_DENIED = re.compile(r'permissions violation for publish to "([^"]*)"', re.IGNORECASE)
MAX_DENIED = 1_000
_PROJECT = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", re.ASCII)
"""A tenant is a DNS label (``attribution``). Anything else would be several tokens of a subject, or none."""
NO_RESPONDERS = "503"


@dataclass(frozen=True, slots=True)
class Peer:
    """Whom to connect to, and as whom."""

    url: str
    """``tls://host:port``, or ``nats://``; several of one cluster with commas between."""
    timeout_ms: int
    """Of a connection, and of each answer."""
    creds_file: Path | None = None
    name: str = "proxy-usage"
    """What the server's own lists call the connection."""


class Unreachable(Exception):
    """Nothing was sent. ``verdict`` says why, and what that means."""

    def __init__(self, verdict: Retry | Paused) -> None:
        super().__init__(verdict.answer)
        self.verdict = verdict


class Lost(Exception):
    """The answer did not come: the connection broke, or (``late``) it took too long."""

    def __init__(self, text: str, *, late: bool = False) -> None:
        super().__init__(text)
        self.late = late


class ApiError(Exception):
    """The server's own word that a request failed."""

    def __init__(self, code: int, err_code: int, text: str) -> None:
        super().__init__(f"{text} ({code}, {err_code})")
        self.code = code
        self.err_code = err_code

    @classmethod
    def of(cls, error: Mapping[str, Any]) -> ApiError:
        """From the ``error`` of an answer."""
        return cls(
            int(error.get("code", 0)), int(error.get("err_code", 0)), str(error.get("description", ""))
        )


class NoResponder(ApiError):
    """Nobody listens to the subject: no stream takes it, or its stream has no leader at the moment."""

    def __init__(self) -> None:
        super().__init__(503, 0, "nobody listens to this subject")


class Link:
    """The connection. ``connected`` makes it; whoever finds it broken calls that again.

    Not for use by several at once while it is being made: callers share one attempt.
    """

    def __init__(self, peer: Peer, token: TokenFile | None, trust: Trust) -> None:
        self.peer = peer
        self.max_payload = 0
        """Bytes of a message, with its headers, that the server takes."""
        self._denied: set[str] = set()
        self._token = token
        self._trust = trust
        self._client: Client | None = None
        self._stale = False
        self._making = asyncio.Lock()
        self._inbox = ""
        self._asked = 0
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._error: Exception | None = None

    @property
    def open(self) -> bool:
        """Whether there is a connection to go on with, as far as this side knows."""
        return self._client is not None and self._client.is_connected and not self._stale

    def renew(self, token: TokenFile | None, trust: Trust) -> None:
        """The next connection carries this token and believes whom this says, and the present one is left."""
        self._token, self._trust, self._stale = token, trust, True

    async def connected(self) -> Client:
        """The client, connected.

        Raises:
            Unreachable: it cannot be had now.
        """
        async with self._making:
            if self._client is None or not self.open:
                await self.close()
                self._stale = False
                self._client = await self._connect()
            return self._client

    async def close(self) -> None:
        """Ends the connection; what waits for an answer learns that none comes."""
        client, self._client = self._client, None
        if client is not None and not client.is_closed:
            try:
                async with asyncio.timeout(CLOSE_S):
                    await client.close()
            except (TimeoutError, OSError):
                pass  # it was to end, and nobody waits for it any more
        self._broken()

    async def _connect(self) -> Client:
        from nats.aio.client import RawCredentials
        from nats.errors import Error
        from nkeys import NkeysError

        client = _client(must_encrypt=self.peer.url.startswith("tls:"))
        self._error = None
        options: dict[str, Any] = {}
        if self.peer.url.startswith("tls:"):
            options["tls"] = self._trust.context()
        if self._token is not None and (token := self._token.token()):
            options["token"] = token
        if self.peer.creds_file is not None:
            options["user_credentials"] = RawCredentials(credentials(self.peer.creds_file))
        wait_s = min(CONNECT_S, self.peer.timeout_ms / 1_000)
        try:
            async with asyncio.timeout(wait_s):
                await client.connect(
                    self.peer.url.split(","),
                    name=self.peer.name,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,  # 0 would be without end
                    reconnect_time_wait=0,
                    connect_timeout=CONNECT_S,
                    flush_timeout=wait_s,
                    ping_interval=PING_S,
                    pending_size=PENDING_BYTES,
                    error_cb=self._noted,
                    disconnected_cb=self._disconnected,
                    **options,
                )
                self._inbox = client.new_inbox()
                await client.subscribe(f"{self._inbox}.*", cb=self._answered)
        except (TimeoutError, OSError, Error, ValueError, NkeysError) as error:
            await _discard(client)
            raise Unreachable(_verdict(self._error or error)) from None
        except asyncio.CancelledError:
            await _discard(client)
            raise
        self.max_payload = client.max_payload
        self._denied.clear()
        return client

    async def _noted(self, error: Exception) -> None:
        """nats-py reports beside the call what went wrong."""
        self._error = error
        denied = _DENIED.search(str(error))
        if denied and len(self._denied) < MAX_DENIED:
            self._denied.add(denied[1].lower())

    async def _disconnected(self) -> None:
        self._broken()

    def _broken(self) -> None:
        for answer in tuple(self._answers.values()):
            if not answer.done():
                answer.set_exception(Lost("the connection broke before the answer came"))

    def denies(self, subject: str) -> bool:
        """Whether the server said, beside the request, that this connection may not publish to it."""
        return subject.lower() in self._denied  # nats-py knows what was said in lower case alone

    # --- asking -----------------------------------------------------------------------------------------

    async def ask(
        self, subject: str, payload: bytes = b"", headers: dict[str, str] | None = None
    ) -> asyncio.Future[Msg]:
        """Publishes with a place for the answer, which is a future. Cancel it to forget about it.

        Raises:
            Unreachable: there is no connection; nothing left.
        """
        from nats.errors import Error

        client = await self.connected()
        self._asked += 1
        place = f"{self._inbox}.{self._asked}"
        answer: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
        self._answers[place] = answer
        answer.add_done_callback(lambda _: self._forget(place))
        try:
            await client.publish(subject, payload, reply=place, headers=headers)
        except (OSError, Error) as error:
            answer.cancel()
            raise Unreachable(Retry("connect", f"{type(error).__name__}: {error}")) from None
        return answer

    def _forget(self, place: str) -> None:
        answer = self._answers.pop(place, None)
        if answer is not None and not answer.cancelled():
            answer.exception()  # whoever gave up on it does not look

    async def tell(self, subject: str, payload: bytes, reply: str = "") -> None:
        """Publishes without waiting for anything.

        Raises:
            Unreachable: there is no connection.
        """
        from nats.errors import Error

        client = await self.connected()
        try:
            await client.publish(subject, payload, reply=reply)
        except (OSError, Error) as error:
            raise Unreachable(Retry("connect", f"{type(error).__name__}: {error}")) from None

    async def listen(self, call: Callable[[Msg], Any]) -> Subscription:
        """Hands messages of a new inbox to ``call``, while this connection lasts.

        Raises:
            Unreachable: there is no connection.
        """
        client = await self.connected()
        inbox = client.new_inbox()

        async def take(message: Msg) -> None:
            call(message)

        return await client.subscribe(inbox, cb=take)

    async def unlisten(self, inbox: Subscription) -> None:
        """Wants no more messages of an inbox, which may be of a connection that is gone."""
        from nats.errors import Error

        with contextlib.suppress(Error, OSError):
            await inbox.unsubscribe()

    async def _answered(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def api(self, request: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """An answer of JetStream's own API, e.g. ``STREAM.INFO.name``.

        Raises:
            Unreachable: there is no connection. Lost: no answer. ApiError: the server's refusal.
        """
        answer = await self.ask(f"$JS.API.{request}", msgspec.json.encode(body) if body else b"")
        return read(await self.wait(answer))

    async def wait(self, answer: asyncio.Future[Msg]) -> Msg:
        """An answer, within the peer's timeout. Raises Lost: it did not come."""
        done, _ = await asyncio.wait([answer], timeout=self.peer.timeout_ms / 1_000)
        if not done:
            answer.cancel()
            raise Lost("no answer in time", late=True)
        return answer.result()


def read(message: Msg) -> dict[str, Any]:
    """The JSON of an answer. Raises ApiError: it is a refusal, or nobody was there to answer."""
    if message.headers and message.headers.get("Status") == NO_RESPONDERS:
        raise NoResponder
    try:
        answer = msgspec.json.decode(message.data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError(500, 0, "the answer is not JetStream's") from None
    if isinstance(error := answer.get("error"), dict):
        raise ApiError.of(error)
    return answer


def credentials(path: Path) -> str:
    """The text of a credentials file, with its two parts in it.

    Raises:
        Unreachable: it cannot be read, or is none. (nats-py would read on for ever where a part is missing.)
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Unreachable(Paused("credentials", f"{path}: {error}")) from None
    if not _CREDENTIALS.search(text):
        raise Unreachable(Paused("credentials", f"{path} does not hold a user's JWT and seed"))
    return text


def is_token(project: str) -> bool:
    """Whether a project's name is one token of a subject, as every DNS label is."""
    return _PROJECT.fullmatch(project) is not None


def subject_of(template: str, project: str) -> str:
    """The subject that ``project``'s events are published to."""
    return template.replace("{project}", project)


def subjects_overlap(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether a subject can match both patterns, given as tokens."""
    for place, token in enumerate(one):
        if place == len(other):
            return False
        if ">" in (token, other[place]):
            return True
        if "*" not in (token, other[place]) and token != other[place]:
            return False
    return len(one) == len(other)


def _client(*, must_encrypt: bool) -> Client:
    from nats.aio.client import Client
    from nats.errors import SecureConnRequiredError

    class Encrypted(Client):
        """nats-py encrypts when the server says so; we do, whatever it says.

        Whoever sits in between could leave that word out, and be given the credentials.
        """

        def _connect_command(self) -> bytes:
            if not self._server_info.get("tls_required"):
                raise SecureConnRequiredError
            return super()._connect_command()

    return Encrypted() if must_encrypt else Client()


async def _discard(client: Client) -> None:
    """A client whose connection failed half way keeps its socket."""
    with contextlib.suppress(Exception):  # it was never connected: what is left of it is of no use
        async with asyncio.timeout(CLOSE_S):  # a socket whose TLS failed does not say that it is closed
            await client.close()


def _verdict(error: Exception) -> Retry | Paused:
    """What a connection that could not be made means for an output."""
    import ssl

    from nats.errors import SecureConnRequiredError
    from nkeys import NkeysError

    text = str(error) or type(error).__name__
    if "authorization" in text.lower() or "authentication" in text.lower():
        return Paused("unauthorized", text)
    if isinstance(error, SecureConnRequiredError):
        return Paused("tls", "the server does not insist on TLS, and url says tls")
    if isinstance(error, ssl.SSLError):
        return Paused("tls", text)
    if isinstance(error, ValueError | NkeysError):
        return Paused("credentials", text)
    if isinstance(error, TimeoutError):
        return Retry("connect", "no connection in time")
    return Retry("connect", text)
