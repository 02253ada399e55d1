"""From the configuration's outputs to couriers: the one place where a format meets what takes it away."""

from __future__ import annotations

import random

from proxy_usage.config import Config
from proxy_usage.config.nats import NatsConfig
from proxy_usage.config.outputs import OutputConfig
from proxy_usage.delivery import (
    Courier,
    CourierSettings,
    HttpSender,
    Policy,
    RetrySettings,
    Sender,
    StoredBacklog,
    Transport,
)
from proxy_usage.delivery.filing import FileSender
from proxy_usage.delivery.jetstream import Link, Peer
from proxy_usage.delivery.nats_sender import NatsSender
from proxy_usage.delivery.transport import TokenFile, credentials
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.outputs import FORMATS
from proxy_usage.service.build import Storage, clock_ms
from proxy_usage.store.thread import StoreThread


def build_sender(output: OutputConfig, window_ms: int, policy: Policy) -> Sender | None:
    """What sends an output's batches; None where nothing is sent.

    Args:
        window_ms: length of a window, for events of which only the end is known.
        policy: of this output: what a peer says of its memory goes there.
    """
    if output.format == "file" and output.file is not None:
        return FileSender(output.file, clock_ms)
    if output.format == "none" or output.url is None:  # a shadow run may keep the url for later
        return None
    if output.nats is not None:
        return _nats_sender(output, output.url, output.nats, policy)
    transport = Transport(
        output.url,
        timeout_ms=output.timeout,
        concurrency=output.concurrency,
        token=credentials(output),
        trust=Trust.of(output),
        compress=output.gzip,
    )
    return HttpSender(FORMATS[output.format](output, window_ms), transport)


def _nats_sender(output: OutputConfig, url: str, nats: NatsConfig, policy: Policy) -> NatsSender:
    token = TokenFile(output.token_file) if output.token_file else None
    return NatsSender(
        Link(Peer(url, output.timeout, nats.creds_file), token, Trust.of(output)),
        stream=nats.stream,
        subject=nats.subject,
        window=nats.window,
        dedup_window_ms=output.dedup_window,
        remembers=policy.remembers,
    )


def build_policy(output: OutputConfig) -> Policy:
    """The output's state: backoff, pause, and what it learns."""
    return Policy(
        RetrySettings(output.retry.initial, output.retry.max, output.dedup_window),
        below=random.SystemRandom().randrange,
    )


def build_couriers(
    config: Config, storage: Storage, thread: StoreThread, metrics: Metrics
) -> tuple[Courier, ...]:
    """One courier per output that sends."""
    numbers = {slot.name: slot.output for slot in storage.slots}
    couriers = []
    for output in config.outputs:
        policy = build_policy(output)
        sender = build_sender(output, config.windows.length, policy)
        if sender is None:
            continue
        couriers.append(
            Courier(
                CourierSettings(
                    output.name,
                    numbers[output.name],
                    output.batch.events,
                    output.batch.linger,
                    # An archive takes one batch at a time, so that a crash leaves one in doubt.
                    1 if output.format == "file" else output.concurrency,
                    config.windows.late_horizon,
                ),
                StoredBacklog(storage.queue, thread),
                sender,
                policy,
                metrics,
                clock_ms,
            )
        )
    return tuple(couriers)
