"""Calls a verb as a person does and keeps what it says."""

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from proxy_usage.cli import main
from proxy_usage.control import NotRunning, socket_path
from proxy_usage.control import call as control


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


def until_it_serves(process: "subprocess.Popen[bytes]", store: Path, log: Path) -> None:
    """Waits until a service has opened all its ports: its control socket answers before."""
    while True:
        try:
            health = control(socket_path(store), "health")
        except NotRunning:
            assert process.poll() is None, log.read_text()
        else:
            assert isinstance(health, dict)
            if "starting" not in health["reasons"]:
                return
        time.sleep(0.05)
