"""What is said of an endpoint that cannot be reached: where, and the system's word for why."""

from __future__ import annotations

import asyncio
import re
import ssl
from pathlib import Path

import pytest
import trustme

from proxy_usage.delivery.transport import Transport
from proxy_usage.delivery.trust import Trust
from proxy_usage.outputs.base import Paused, Request, Retry

UNUSED_PORT = 1
"""For privileged programs: nobody is given it by chance."""


async def asked(url: str, trust: Trust | None = None) -> Retry | Paused:
    async with Transport(url, timeout_ms=30_000, concurrency=1, trust=trust) as transport:
        answer = await transport.post(Request(b"[]"))
    assert isinstance(answer, Retry | Paused)
    return answer


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
async def test_nobody_listens(tmp_path: Path, scheme: str, host: str) -> None:
    authority = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(str(authority))
    answer = await asked(f"{scheme}://{host}:{UNUSED_PORT}/ingest", Trust(authority))
    assert isinstance(answer, Retry)
    assert answer.reason == "connect"
    # A machine without IPv6 has no such address.
    wanted = rf"{re.escape(host)}:{UNUSED_PORT}: (Connection refused|Cannot assign requested address)"
    assert re.fullmatch(wanted, answer.answer)


async def test_there_is_no_such_name() -> None:
    answer = await asked("http://nowhere.invalid/ingest")
    assert answer.reason == "connect"
    assert re.fullmatch(r"nowhere\.invalid:80: [A-Z][a-z ]+", answer.answer)


async def test_what_answers_is_not_trusted_or_speaks_no_tls() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)

    def served(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 ready\r\n")
        writer.close()

    for tls, reason in ((context, "CERTIFICATE_VERIFY_FAILED"), (None, "WRONG_VERSION_NUMBER")):
        async with await asyncio.start_server(served, "127.0.0.1", 0, ssl=tls) as server:
            port = server.sockets[0].getsockname()[1]
            answer = await asked(f"https://127.0.0.1:{port}/ingest")
        assert isinstance(answer, Paused)
        assert answer.reason == "tls"
        assert answer.answer.startswith(f"127.0.0.1:{port}: [SSL: {reason}] ")
