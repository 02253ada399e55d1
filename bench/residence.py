"""Resident memory of ``proxy-usage run`` against how many connections are saturated at once.

For every number a fresh process: its memory when it is ready and nobody has connected, and the most it had
while the generator sent as fast as it was read.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from bench.building import BUILD
from bench.messages import KIB, write
from bench.processes import OurSink, generate, memory
from proxy_usage.demo.billing import BillingStandIn

CONNECTIONS = (1, 4, 16, 64)
SECONDS = 4.0


async def measure(fold: str) -> dict[str, Any]:
    """Bytes by number of connections."""
    messages = write(BUILD / "http-16.bin", "http", 16 * KIB)
    base, most = [], {}
    with tempfile.TemporaryDirectory(dir=BUILD) as directory:
        async with BillingStandIn() as billing:
            for connections in CONNECTIONS:
                sink = OurSink(Path(directory), billing.url, name=f"sink-{connections}", fold=fold)
                await sink.start()
                try:
                    base.append(memory(sink.pid))
                    await generate(
                        *(sink.port, messages),
                        connections=connections,
                        tenants=1_000,
                        seconds=SECONDS,
                        rate=0,
                        seed=1,
                    )
                    most[str(connections)] = memory(sink.pid, "VmHWM")
                finally:
                    await sink.kill()
    return {"base": base, "most": most}
