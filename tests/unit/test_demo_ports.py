"""Ports that the demo gives to its parts."""

from __future__ import annotations

import socket
import subprocess
import sys

from proxy_usage.demo.listener import lease_port

LEASE = "import sys; from proxy_usage.demo.listener import lease_port; print(lease_port(int(sys.argv[1])))"


def test_leased_ports_are_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        leased = lease_port(port)
        assert 20_000 <= leased < 32_000
    assert lease_port(port) == port


def test_ports_that_nobody_has_bound_yet_are_not_given_again() -> None:
    """Two listeners of one process had the same one, once in some thousand starts."""
    ports = [lease_port() for _ in range(150)]
    assert len(set(ports)) == 150


def test_another_process_gives_none_of_them() -> None:
    """Two demonstrations that begin at once want the same ports, and bind them a second later."""
    mine = lease_port()
    given = subprocess.run([sys.executable, "-c", LEASE, str(mine)], capture_output=True, check=True)
    assert int(given.stdout) != mine
