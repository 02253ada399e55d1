"""HTTP to an endpoint: one request, one answer, everything about it bounded."""

from __future__ import annotations

import base64
import gzip
import os
import socket
import ssl
from pathlib import Path
from types import TracebackType

import aiohttp

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery.trust import Trust
from proxy_usage.outputs.base import Answer, Paused, Request, Retry

MAX_ANSWER = 1 << 20
"""An answer is read up to here; no endpoint needs more to say what it accepted."""
GZIP_LEVEL = 1  # 17 times smaller for 1 µs an event; level 9 is 21 times for ten


class TokenFile:
    """Credentials in a file, read again whenever the file changes: a bearer token.

    Raises nothing: an unreadable file, or one that holds what no header can carry (a second line, say), is
    reported by ``header`` as no token, and the endpoint's 401 pauses the output with a reason.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None
        self._token = ""

    def header(self) -> dict[str, str]:
        """The Authorization header for the present token."""
        token = self.token()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def token(self) -> str:
        """The present token; empty when the file cannot be read."""
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_ino, status.st_size)
            if seen != self._seen:
                self._token = self._usable(self._path.read_text("utf-8"))
                self._seen = seen
        except (OSError, UnicodeDecodeError):
            self._token, self._seen = "", None
        return self._token

    @staticmethod
    def _usable(text: str) -> str:
        text = text.strip()
        return text if text.isascii() and text.isprintable() else ""


class Password(TokenFile):
    """A user, and the password in a file: HTTP Basic authentication (RFC 7617), in UTF-8."""

    def __init__(self, user: str, path: Path) -> None:
        super().__init__(path)
        self._user = user

    def header(self) -> dict[str, str]:
        """The Authorization header for the present password."""
        password = self.token()
        pair = base64.b64encode(f"{self._user}:{password}".encode()).decode()
        return {"Authorization": f"Basic {pair}"} if password else {}

    @staticmethod
    def _usable(text: str) -> str:
        text = text.rstrip("\r\n")  # spaces may be meant
        return text if text.isprintable() else ""


def credentials(output: OutputConfig) -> TokenFile | None:
    """What an output says who it is with; None: nothing."""
    if output.user is not None and output.password_file is not None:
        return Password(output.user, output.password_file)
    return TokenFile(output.token_file) if output.token_file is not None else None


class Transport:
    """A connection pool to one URL.

    Args:
        timeout_ms: for a whole request. It says nothing about what the endpoint committed.
        trust: whom it believes, and the certificate it shows.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: int,
        concurrency: int,
        token: TokenFile | None = None,
        trust: Trust | None = None,
        compress: bool = False,
    ) -> None:
        self._url = url
        self._token = token
        self._compress = compress
        self._timeout = aiohttp.ClientTimeout(total=timeout_ms / 1_000)
        self._concurrency = concurrency
        self._trust = trust or Trust()
        self._session: aiohttp.ClientSession | None = None

    def trust(self, token: TokenFile | None, trust: Trust) -> None:
        """Requests from now on carry this token and believe whom this says."""
        self._token, self._trust = token, trust

    async def __aenter__(self) -> Transport:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            timeout=self._timeout,
            auto_decompress=False,  # a small answer must not become a large one
            headers={"User-Agent": "proxy-usage", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, request: Request) -> Answer | Retry | Paused:
        """Sends a request. A failure to get an answer comes back as the verdict it deserves."""
        assert self._session is not None
        headers = dict(request.headers)
        body = request.body
        if self._compress:
            body = gzip.compress(body, GZIP_LEVEL, mtime=0)
            headers["Content-Encoding"] = "gzip"
        if self._token is not None:
            headers.update(self._token.header())
        try:
            async with self._session.post(
                self._url, data=body, headers=headers, allow_redirects=False, ssl=self._trust.context()
            ) as response:
                answer = await response.content.read(MAX_ANSWER)
                while len(answer) < MAX_ANSWER and (more := await response.content.read(MAX_ANSWER)):
                    answer += more
                return Answer(
                    response.status,
                    {name.lower(): _text(value) for name, value in response.headers.items()},
                    answer[:MAX_ANSWER],
                )
        except TimeoutError:
            return Retry("timeout", "no whole answer in time")
        except aiohttp.ClientSSLError as error:
            return Paused("tls", _unconnected(error))
        except aiohttp.ClientConnectorError as error:
            return Retry("connect", _unconnected(error))
        except (aiohttp.ClientError, OSError) as error:
            return Retry("broken_answer", _text(f"{type(error).__name__}: {error}"))


def _unconnected(error: aiohttp.ClientConnectorError) -> str:
    """Where nobody was reached and why, in the system's words: aiohttp's name its own objects."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        cause: Exception = error.certificate_error
    else:
        cause = error.os_error
    reason = str(cause)
    if isinstance(cause, socket.gaierror):  # its number is of a list of its own
        reason = cause.strerror or reason
    elif not isinstance(cause, ssl.SSLError) and isinstance(cause, OSError) and cause.errno is not None:
        reason = os.strerror(cause.errno)
    host = f"[{error.host}]" if ":" in error.host else error.host
    return _text(f"{host}:{error.port}: {reason or type(cause).__name__}")


def _text(value: str) -> str:
    """What a peer said, as text that can be stored: its bytes that are not UTF-8 come as surrogates."""
    return value.encode("utf-8", "replace").decode()
