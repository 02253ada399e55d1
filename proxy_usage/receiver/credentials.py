"""TLS of a listening port, with files that are read again at every handshake."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc
import structlog

from proxy_usage.errors import ConfigError

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. With ``client_ca`` a client must show a certificate that it signed."""

    cert: Path
    key: Path
    client_ca: Path | None = None


class Credentials:
    """Server credentials whose files, and the names of these, may change while the port is open.

    Whether clients must show a certificate cannot: gRPC asks once. Connections that stand keep the trust
    they were opened with, so that they have to be renewed by age.
    """

    def __init__(self, files: TlsFiles) -> None:
        """Raises ConfigError when the certificate and the key cannot be used."""
        self.files = files
        self._first = self._read(check(files))

    def server(self) -> grpc.ServerCredentials:
        """What a port is opened with."""
        return grpc.dynamic_ssl_server_credentials(
            self._first,
            self._fetch,  # type: ignore[arg-type]  # None means "no change"; the stubs do not know
            require_client_authentication=self.files.client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Called at each handshake, on a thread of gRPC's."""
        try:
            return self._read(check(self.files))
        except ConfigError as error:
            log.warning("certificate not usable, the former one stays", error=error.message)
        except OSError as error:
            log.warning("certificate unreadable, the former one stays", error=str(error))
        return None

    @staticmethod
    def _read(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration(
            [(files.key.read_bytes(), files.cert.read_bytes())],
            root_certificates=files.client_ca.read_bytes() if files.client_ca else None,
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
