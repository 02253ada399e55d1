"""Delivery: batches leave the queue, answers become fates.

``policy`` decides (pure), ``transport`` speaks HTTP, ``courier`` is the loop between the queue and the two.
"""

from proxy_usage.delivery.courier import Courier, CourierSettings
from proxy_usage.delivery.policy import Policy, RetrySettings
from proxy_usage.delivery.transport import Transport

__all__ = ["Courier", "CourierSettings", "Policy", "RetrySettings", "Transport"]
