"""Calls a verb as a person does and keeps what it says."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from proxy_usage.cli import main


class Said(NamedTuple):
    """What a verb answered."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its answer as data."""
        return json.loads(self.out)


class Caller:
    """``call("queue", "ls")``: the verb with the configuration of a directory, ``proxy-usage.yaml`` in it."""

    def __init__(self, directory: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.config = directory / "proxy-usage.yaml"
        self.store = directory / "usage.db"
        self._capture = capture
        self.configure()

    def configure(self, **sections: Any) -> None:
        """Writes the configuration: two meters and one dimension, and what is given."""
        document = {
            "meters": {"requests": {}, "connection_seconds": {}},
            "dimensions": {"region": {"custom_tag": "gateway"}},
            "store": {"path": str(self.store)},
            "listen": {"grpc": "127.0.0.1:0", "http": "127.0.0.1:0"},
            "outputs": [
                {"name": "billing", "url": "http://127.0.0.1:1/"},
                {"name": "shadow", "url": "http://127.0.0.1:1/"},
            ],
        }
        self.config.write_text(yaml.safe_dump(document | sections))

    def __call__(self, *arguments: str) -> Said:
        return self.bare(*arguments, "--config", str(self.config))

    def bare(self, *arguments: str) -> Said:
        """Without naming a configuration."""
        return said(arguments, self._capture)


def said(arguments: Sequence[str], capture: pytest.CaptureFixture[str]) -> Said:
    """Runs a verb in this process."""
    capture.readouterr()
    code = main(arguments)
    out, err = capture.readouterr()
    assert "Traceback" not in err
    return Said(code, out, err)
