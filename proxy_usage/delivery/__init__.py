"""Delivery: batches leave the queue, answers become fates.

``policy`` decides (pure), a ``sender`` takes batches to where they go (over HTTP by ``transport``, to NATS by
``nats_sender``), and ``courier`` is the loop between a ``backlog`` and the two: the store's queue, or the
``stream`` of a forwarder.
"""

from proxy_usage.delivery.backlog import Backlog, StoredBacklog
from proxy_usage.delivery.courier import Courier, CourierSettings
from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.delivery.sender import HttpSender, Sender
from proxy_usage.delivery.transport import Transport

__all__ = [
    "Backlog",
    "Courier",
    "CourierSettings",
    "HttpSender",
    "Policy",
    "RetrySettings",
    "Sender",
    "StoredBacklog",
    "Transport",
]
