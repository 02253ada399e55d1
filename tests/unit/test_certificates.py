"""When certificates expire, compared with what a library for them says."""

import contextlib
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from pki import Authority

from proxy_usage.certificates import _not_after, expires_s


def test_the_same_as_a_library_says(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "site")
    for path in (authority.file, authority.issue("a", dns=["a.example.org"] * 30).cert):
        wanted = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        assert expires_s(path) == int(wanted.timestamp())


def test_of_a_chain_it_is_the_first(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "site")
    pair = authority.issue("a")
    alone = expires_s(pair.cert)
    pair.cert.write_bytes(b"a comment\n" + pair.cert.read_bytes() + authority.file.read_bytes())
    assert expires_s(pair.cert) == alone


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n",
        b"-----END CERTIFICATE-----",
    ],
)
def test_what_is_none_has_no_end(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cert.pem"
    assert expires_s(path) is None
    path.write_bytes(content)
    assert expires_s(path) is None


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(der: bytes) -> None:
    with contextlib.suppress(ValueError, IndexError):
        _not_after(der)
