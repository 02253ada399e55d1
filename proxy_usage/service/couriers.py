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
from proxy_usage.delivery.jetstream import Link, Peer
from proxy_usage.delivery.nats_sender import NatsSender
from proxy_usage.delivery.transport import TokenFile
from proxy_usage.delivery.trust import Trust
from proxy_usage.metrics import Metrics
from proxy_usage.outputs import FORMATS
from proxy_usage.service.build import Storage, clock_ms
from proxy_usage.store.thread import StoreThread


def build_sender(output: OutputConfig, policy: Policy) -> Sender | None:
    """What sends an output's batches; None where nothing is sent."""
    if output.format == "none" or output.url is None:  # a shadow run may keep the url for later
        return None
    if output.nats is not None:
        return _nats_sender(output, output.url, output.nats, policy)
    transport = Transport(
        output.url,
        timeout_ms=output.timeout,
        concurrency=output.concurrency,
        token=TokenFile(output.token_file) if output.token_file else None,
        trust=Trust.of(output),
        compress=output.gzip,
    )
    return HttpSender(FORMATS[output.format](), transport)


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
        sender = build_sender(output, policy)
        if sender is None:
            continue
        couriers.append(
            Courier(
                CourierSettings(
                    output.name,
                    numbers[output.name],
                    output.batch.events,
                    output.batch.linger,
                    output.concurrency,
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
