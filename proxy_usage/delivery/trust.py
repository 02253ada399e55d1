"""TLS towards an endpoint: whom we believe, and the certificate that we show, in files that may change."""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.errors import ConfigError

log = structlog.get_logger()


class Trust:
    """The roots in a file, or the system's; and a client certificate where the endpoint asks for one.

    The files are looked at before each request and read again when they changed; half of a renewal leaves the
    former ones in place.

    Raises:
        ConfigError: a file cannot be used.
    """

    def __init__(
        self, ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
    ) -> None:
        self._ca, self._cert, self._key = ca_file, cert_file, key_file
        self._seen = self._look()
        self._context = self._read()

    @classmethod
    def of(cls, output: OutputConfig) -> Trust:
        """As the output's configuration says. Raises ConfigError: a file cannot be used."""
        return cls(output.ca_file, output.cert_file, output.key_file)

    def context(self) -> ssl.SSLContext:
        """For the next request. A new one when something changed, so that connections are made anew."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._context = self._read()
            except ConfigError as error:
                log.warning("certificates not usable, the former ones stay", error=error.message)
        return self._context

    def _look(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in (self._ca, self._cert, self._key))

    def _read(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self._ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"cannot read the certificates in {self._ca}: {error}", hint="ca_file wants PEM certificates"
            ) from None
        if self._cert is not None:
            try:
                context.load_cert_chain(self._cert, self._key)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(
                    f"outputs: cannot use {self._cert} with {self._key}: {error}",
                    hint="both must be PEM, and the key must belong to the certificate",
                ) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        return context


def _stamp(path: Path | None) -> object:
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return "missing"
    return status.st_mtime_ns, status.st_ino, status.st_size
