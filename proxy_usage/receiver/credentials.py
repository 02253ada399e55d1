"""TLS of a listening port, with files that are read again at every handshake."""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import grpc
import structlog

from proxy_usage.errors import ConfigError

log = structlog.get_logger()

_SETTLE_S = 0.05
"""gRPC frees the certificates it replaces while a handshake that began a moment earlier may still take them
up, which ends the process (grpc/grpc issue 36693). New ones are therefore handed over only when they differ,
and only after such a handshake has had this long: gRPC keeps further ones waiting meanwhile."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With ``client_ca`` a client must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class _Contents(NamedTuple):
    """What the files held."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


class Credentials:
    """Server credentials whose files, and the names of these, may change while the port is open.

    Whether clients must show a certificate cannot: gRPC asks once. Connections that stand keep the trust
    they were opened with, so that they have to be renewed by age.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError when the certificate and the key cannot be used."""
        self.files = files
        self._used = _read(check(files))
        """What gRPC was given last."""
        self._unusable: _Contents | str | None = None
        """What was last found that cannot be used, or why nothing was: said once, not at every handshake."""

    def server(self) -> grpc.ServerCredentials:
        """What a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._used),
            self._fetch,  # type: ignore[arg-type]  # None means "no change"; the stubs do not know
            require_client_authentication=self.files.client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """New certificates, or None. Called at each handshake, on threads of gRPC's, one at a time."""
        found: _Contents | None = None
        try:
            found = _read(self.files)
            if found in (self._used, self._unusable):
                return None
            check(self.files)
            if _read(self.files) != found:  # being written: the next handshake will see all of it
                return None
        except (ConfigError, OSError) as error:
            unusable = found or str(error)
            if unusable != self._unusable:
                self._unusable = unusable
                log.warning("certificate not usable, the former one stays", error=str(error))
            return None
        time.sleep(_SETTLE_S)
        self._used, self._unusable = found, None
        log.info("certificate renewed", file=str(self.files.cert))
        return _configuration(found)


def _read(files: TlsFiles) -> _Contents:
    return _Contents(
        files.cert.read_bytes(),
        files.key.read_bytes(),
        files.client_ca.read_bytes() if files.client_ca else None,
    )


def _configuration(contents: _Contents) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(contents.key, contents.cert)], root_certificates=contents.client_ca
    )


def check(files: TlsFiles) -> TlsFiles:
    """The same files, if they can be used: gRPC itself would say nothing and refuse every client.

    Raises:
        ConfigError: the certificate, the key or the authorities are not PEM, or do not belong together.
    """
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(files.cert, files.key)
        if files.client_ca is not None:
            context.load_verify_locations(files.client_ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"listen.tls: cannot use {files.cert} with {files.key}: {error}",
            hint="all must be PEM, and the key must belong to the certificate",
        ) from None
    return files
