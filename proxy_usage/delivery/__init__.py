"""Delivery: batches leave the queue, answers become fates.

``policy`` decides (pure), a ``sender`` takes batches to where they go (over HTTP: by ``transport``), and
``courier`` is the loop between the queue and the two.
"""

from proxy_usage.delivery.courier import Courier, CourierSettings
from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.delivery.sender import HttpSender, Sender
from proxy_usage.delivery.transport import Transport

__all__ = ["Courier", "CourierSettings", "HttpSender", "Policy", "RetrySettings", "Sender", "Transport"]
