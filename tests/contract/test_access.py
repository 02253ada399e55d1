"""Who may send, over real connections: certificates, names, tokens, nodes, and trust that is withdrawn."""

import asyncio
import contextlib
import random
import re
from pathlib import Path

import grpc
import grpc.aio
import pytest
from listening import Client, Listening, soon
from pki import Authority, Pair
from structlog.testing import capture_logs
from wire import http_row, message

from proxy_usage.admission import Admission, SanPattern
from proxy_usage.receiver import ReceiverLimits, TlsFiles
from proxy_usage.receiver.arrivals import Connection
from proxy_usage.receiver.credentials import Credentials

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
DENIED = grpc.StatusCode.PERMISSION_DENIED
ROWS = message(http_row(), node_id="edge-1")
SPIFFE = "spiffe://example.org/envoy/edge-1"


class Site:
    """An authority, and what it issued."""

    def __init__(self, directory: Path, name: str = "ours") -> None:
        self.authority = Authority(directory, name)
        self.sink = self.authority.issue(f"{name}-sink", dns=["sink.example.org"])
        self.envoy = self.authority.issue(f"{name}-envoy", uri=[SPIFFE], dns=["edge-1.example.org"])
        self.web = self.authority.issue(f"{name}-web", dns=["web.example.org"])

    @property
    def tls(self) -> TlsFiles:
        return TlsFiles(self.sink.cert, self.sink.key, self.authority.file)

    def client(self, port: int, pair: Pair | None, token: str | None = None) -> Client:
        return Client(port, ca=self.authority.file, pair=pair, token=token)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def allow(*names: str, node: str | None = None, token: str | None = None) -> Admission:
    return Admission(
        allow=[SanPattern.parse(name) for name in names],
        token=None if token is None else lambda: token,
        node_from_san=None if node is None else re.compile(node),
    )


async def test_a_uri_in_the_certificate_lets_in_and_names_the_peer(site: Site) -> None:
    async with Listening(tls=site.tls, admission=allow("uri:spiffe://example.org/envoy/*")) as port:
        async with site.client(port.port, site.envoy) as client:
            await client.send(ROWS)
        async with site.client(port.port, site.web) as client:
            assert await client.refused(ROWS) is DENIED
        assert port.peers == {SPIFFE}
        assert port.read == 1
        assert port.refused("san") >= 1


async def test_a_dns_name_that_looks_like_a_uri_is_none(site: Site) -> None:
    fake = site.authority.issue("fake", dns=["spiffe://example.org/envoy/edge-1"])
    async with Listening(tls=site.tls, admission=allow("uri:*")) as port:
        async with site.client(port.port, fake) as client:
            assert await client.refused(ROWS) is DENIED
        assert port.read == 0


async def test_no_certificate_or_a_strangers_does_not_get_past_the_handshake(
    site: Site, tmp_path: Path
) -> None:
    stranger = Site(tmp_path, "strange")
    async with Listening(tls=site.tls) as port:
        for pair in (None, stranger.envoy):
            async with site.client(port.port, pair) as client:
                assert await client.refused(ROWS) is UNAVAILABLE
        async with Client(port.port) as plaintext:
            assert await plaintext.refused(ROWS) is UNAVAILABLE
        async with site.client(port.port, site.envoy) as client:
            await client.send(ROWS)
        assert port.read == 1


async def test_garbage_in_place_of_a_handshake_bothers_nobody(site: Site) -> None:
    dice = random.Random(3)
    async with Listening(tls=site.tls) as port, site.client(port.port, site.envoy) as client:
        await client.send(ROWS)
        for number in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", port.port)
            hello = b"\x16\x03\x01" + dice.randbytes(2) + b"\x01" if number % 2 else b""
            with contextlib.suppress(OSError):
                writer.write(hello + dice.randbytes(dice.randrange(2_000)))
                await writer.drain()
            writer.transport.abort()
        await client.send(ROWS)
        assert port.read == 2
        assert port.counted("receiver_streams") == 0


async def test_a_certificate_speaks_for_its_own_node_alone(site: Site) -> None:
    admission = allow("uri:*", node="spiffe://example.org/envoy/([^/]+)")
    async with (
        Listening(tls=site.tls, admission=admission) as port,
        site.client(port.port, site.envoy) as client,
    ):
        await client.send(ROWS)
        assert await client.refused(message(http_row(), node_id="edge-2")) is DENIED
        assert await client.refused(message(http_row())) is DENIED  # does not say
        assert port.read == 1
        assert port.refused("node") >= 2


async def test_a_token_is_asked_for_beside_the_certificate(site: Site) -> None:
    async with Listening(tls=site.tls, admission=allow("dns:*.example.org", token="s3cret")) as port:
        async with site.client(port.port, site.envoy, "s3cret") as client:
            await client.send(ROWS)
        for token in ("other", None):
            async with site.client(port.port, site.envoy, token) as client:
                assert await client.refused(ROWS) is DENIED
        assert port.read == 1
        assert port.refused("token") >= 2


async def test_certificates_are_read_again_at_each_handshake(site: Site, tmp_path: Path) -> None:
    async with Listening(tls=site.tls) as port:
        async with site.client(port.port, site.envoy) as client:
            await client.send(ROWS)
        # Another authority takes over, under the same file names.
        new = Site(tmp_path, "new")
        site.sink.key.write_bytes(new.sink.key.read_bytes())
        site.sink.cert.write_bytes(new.sink.cert.read_bytes())
        old_ca = site.authority.file.read_bytes()
        site.authority.file.write_bytes(new.authority.file.read_bytes())
        async with new.client(port.port, new.envoy) as client:
            await client.send(ROWS)
        async with new.client(port.port, site.envoy) as client:
            assert await client.refused(ROWS) is UNAVAILABLE
        # Half of a renewal is no certificate: the one that worked stays.
        site.sink.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
        site.authority.file.write_bytes(old_ca)
        async with new.client(port.port, new.envoy) as client:
            await client.send(ROWS)
        assert port.read == 3


async def test_handshakes_and_renewals_at_once_bother_nobody(site: Site, tmp_path: Path) -> None:
    """gRPC would take up certificates that it has freed, and the process would end with a signal."""
    pairs = [
        (p.cert.read_bytes(), p.key.read_bytes())
        for p in (site.sink, site.authority.issue("next", dns=["sink.example.org"]))
    ]
    renewals = 0

    async def knock(port: int) -> None:
        for _ in range(150):
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"\x16\x03\x01\x00\x05\x01")
                await writer.drain()
                await asyncio.sleep(0)
                writer.transport.abort()

    async with Listening(tls=site.tls) as port, soon():
        knocking = [asyncio.create_task(knock(port.port)) for _ in range(8)]
        while not all(task.done() for task in knocking):
            renewals += 1
            cert, key = pairs[renewals % 2]
            site.sink.key.write_bytes(key)
            site.sink.cert.write_bytes(cert)
            await asyncio.sleep(0.02)
        async with site.client(port.port, site.envoy) as client:
            while await client.refused(ROWS) is not OK:  # until the many that knocked are gone
                await asyncio.sleep(0.05)
        assert port.read == 1
    assert renewals > 2


async def test_a_certificate_that_cannot_be_used_is_said_once(site: Site) -> None:
    credentials = Credentials(site.tls)
    whole = site.sink.cert.read_bytes()
    with capture_logs() as logs:
        assert credentials._fetch() is None  # nothing has changed
        site.sink.cert.write_bytes(b"-----BEGIN CERTIFICATE-----\n")
        assert credentials._fetch() is credentials._fetch() is None
        site.sink.cert.unlink()
        assert credentials._fetch() is credentials._fetch() is None
        site.sink.cert.write_bytes(whole)
        assert credentials._fetch() is None
        other = site.authority.issue("other")
        credentials.files = TlsFiles(other.cert, other.key, site.authority.file)
        assert credentials._fetch() is not None
        assert credentials._fetch() is None
    assert [line["event"] for line in logs] == [
        "certificate not usable, the former one stays",
        "certificate not usable, the former one stays",
        "certificate renewed",
    ]


async def test_whom_new_rules_refuse_is_sent_away_at_once(site: Site) -> None:
    async with (
        Listening(tls=site.tls, admission=allow("uri:*")) as port,
        site.client(port.port, site.envoy) as client,
        site.client(port.port, site.envoy) as idle,
    ):
        streams = [client.stream(), idle.stream()]
        await streams[0].write(ROWS)
        await port_has(port, rows=1)
        port.receiver.admit(allow("dns:other.example.org"), site.tls)
        async with soon():
            assert [await stream.code() for stream in streams] == [DENIED, DENIED]
        assert port.refused("san") == 2


async def test_whom_new_rules_still_allow_is_left_alone(site: Site) -> None:
    async with (
        Listening(tls=site.tls, admission=allow("uri:*")) as port,
        site.client(port.port, site.envoy) as client,
    ):
        stream = client.stream()
        await stream.write(ROWS)
        await port_has(port, rows=1)
        port.receiver.admit(allow("dns:edge-*"), site.tls)
        await stream.write(ROWS)
        await stream.done_writing()
        assert await stream == b""
        assert port.read == 2


async def test_a_connection_past_its_age_is_renewed_and_its_streams_end_well(site: Site) -> None:
    async with Listening(tls=site.tls, limits=ReceiverLimits(connection_age_ms=1_000)) as port:
        sent = crossed = ends = 0
        handshakes: set[Connection] = set()
        async with site.client(port.port, site.envoy) as client, soon():
            while len(handshakes) < 3 or not ends:
                stream = client.stream()
                try:
                    while not stream.done():
                        await stream.write(ROWS)
                        sent += 1
                        # One at a time, as Envoy flushes: on a busy machine several would cross the end.
                        while port.read + crossed < sent and not stream.done():
                            handshakes |= set(port.receiver._since_ms)
                            await asyncio.sleep(0.01)
                        crossed = sent - port.read
                        handshakes |= set(port.receiver._since_ms)
                        await asyncio.sleep(0.01)
                except (asyncio.InvalidStateError, grpc.aio.UsageError):
                    pass  # its end was noticed by the write
                except grpc.aio.AioRpcError as error:
                    # The client's library calls a write that meets the end of its stream an error of its own.
                    if error.details() != "Internal error from Core":
                        raise
                    continue
                assert await stream.code() is OK
                ends += 1
        assert port.read >= sent - len(handshakes)  # at most the row that crossed the end of its stream
        assert port.metrics.broken_streams._value.get() == 0


async def test_two_peers_with_the_same_ids_have_streams_of_their_own(site: Site) -> None:
    """Peer, not node id, keeps them apart: everything that a sender can choose is the same here."""
    other = site.authority.issue("other", uri=["spiffe://example.org/envoy/evil"])
    async with Listening(tls=site.tls, admission=allow("uri:*")) as port:
        for pair in (site.envoy, other):
            async with site.client(port.port, pair) as client:
                await client.send(ROWS)
        assert port.peers == {SPIFFE, "spiffe://example.org/envoy/evil"}
        assert {origin.node_id for origin in port.origins} == {"edge-1"}


async def port_has(port: Listening, *, rows: int) -> None:
    async with soon():
        while port.read < rows:
            await asyncio.sleep(0.01)
