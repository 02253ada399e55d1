"""From the configuration's outputs to couriers: the one place where a format meets what takes it away."""

from __future__ import annotations

import random

from proxy_usage.config import Config
from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery import (
    Courier,
    CourierSettings,
    HttpSender,
    Policy,
    RetrySettings,
    Sender,
    Transport,
)
from proxy_usage.delivery.filing import FileSender
from proxy_usage.delivery.transport import credentials
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.outputs import FORMATS
from proxy_usage.service.build import Storage, clock_ms
from proxy_usage.store.thread import StoreThread

FOR_EVER_MS = 1 << 62
"""An archive finds what it has by reading it back, however late."""


def build_sender(output: OutputConfig, window_ms: int) -> Sender | None:
    """What sends an output's batches; None where nothing is sent.

    Args:
        window_ms: length of a window, for events of which only the end is known.
    """
    if output.format == "file" and output.file is not None:
        return FileSender(output.file, clock_ms)
    if output.format == "none" or output.url is None:  # a shadow run may keep the url for later
        return None
    transport = Transport(
        output.url,
        timeout_ms=output.timeout,
        concurrency=output.concurrency,
        token=credentials(output),
        trust=Trust.of(output),
        compress=output.gzip,
    )
    return HttpSender(FORMATS[output.format](output, window_ms), transport)


def build_couriers(
    config: Config, storage: Storage, thread: StoreThread, metrics: Metrics
) -> tuple[Courier, ...]:
    """One courier per output that sends."""
    numbers = {slot.name: slot.output for slot in storage.slots}
    couriers = []
    for output in config.outputs:
        sender = build_sender(output, config.windows.length)
        if sender is None:
            continue
        filed = output.format == "file"
        couriers.append(
            Courier(
                CourierSettings(
                    output.name,
                    numbers[output.name],
                    output.batch.events,
                    output.batch.linger,
                    1 if filed else output.concurrency,  # so that a crash leaves one batch in doubt
                    config.windows.late_horizon,
                ),
                storage.queue,
                thread,
                sender,
                Policy(
                    RetrySettings(
                        output.retry.initial, output.retry.max, FOR_EVER_MS if filed else output.dedup_window
                    ),
                    below=random.SystemRandom().randrange,
                ),
                metrics,
                clock_ms,
            )
        )
    return tuple(couriers)
