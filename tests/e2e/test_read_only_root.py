"""The program where only its state can be written, as the image and the cluster run it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import AlsClient
from program import Sink, eventually
from wire import http_row, message

from proxy_usage.demo.billing import BillingStandIn

pytestmark = pytest.mark.e2e

READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro / && exec "$@"'
"""In a mount namespace of its own: everything below / is read-only, but for the state."""


async def test_a_read_only_root_file_system_is_enough(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    wrapper = ("unshare", "--mount", "sh", "-c", READ_ONLY, str(state))
    tried = subprocess.run([*wrapper, "touch", str(tmp_path / "x")], capture_output=True, text=True)
    if "Read-only" not in tried.stderr:
        pytest.skip(f"cannot make the root file system read-only: {tried.stderr.strip()}")
    async with BillingStandIn() as billing:
        sink = Sink(tmp_path, url=billing.url, settings={"store": {"path": str(state / "usage.db")}})
        sink.wrapper = wrapper
        async with sink:
            async with AlsClient(sink.grpc_port) as client:
                row = http_row(tags={"project_name": "alpha"}, wire=(10, 20))
                await client.send(message(row, row, node_id="envoy-1"))
            await eventually(lambda: len(billing.arrived.stored) == 3, "it is delivered", why=sink.said)
            assert await sink.stop() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"state", "proxy-usage.yaml", "proxy-usage.log"}
