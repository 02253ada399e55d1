"""What an output says who it is with: a token, or a user with a password, read anew when its file changes."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery.transport import Password, credentials


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_an_output_has_one_kind_of_credentials(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(" pässword \n")
    output = {"name": "a", "url": "http://127.0.0.1/x"}
    assert credentials(OutputConfig.model_validate(output)) is None
    by_user = credentials(OutputConfig.model_validate({**output, "user": "me", "password_file": secret}))
    assert by_user is not None
    assert by_user.header() == basic("me", " pässword ")  # spaces may be meant, a line's end is not
    secret.write_text("t0ken\n")
    by_token = credentials(OutputConfig.model_validate({**output, "token_file": secret}))
    assert by_token is not None
    assert by_token.header() == {"Authorization": "Bearer t0ken"}


def test_a_password_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("one")
    one = Password("me", file)
    assert one.header() == basic("me", "one")
    (tmp_path / "new").write_text("two!")
    (tmp_path / "new").replace(file)
    assert one.header() == basic("me", "two!")
    file.unlink()
    assert one.header() == {}  # a request without credentials: its 401 pauses the output


@pytest.mark.parametrize("text", [b"", b"\n", b"two\nlines", b"\xff", b"a\0b"])
def test_a_file_that_holds_no_password_is_none(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "password").write_bytes(text)
    assert Password("me", tmp_path / "password").header() == {}
