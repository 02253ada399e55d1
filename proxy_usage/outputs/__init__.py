"""Wire formats: one file each. An output encodes a batch and reads the answer; it never sends.

To add one: write ``outputs/<format>.py`` with a class that has the methods of ``base.Output``, name it in
``FORMATS`` and in the configuration's list of formats. Everything else (marking, backoff, splitting, fates)
is delivery's and the same for all.
"""

from collections.abc import Callable

from proxy_usage.config.outputs import OutputConfig
from proxy_usage.outputs.base import Output
from proxy_usage.outputs.billing import Billing
from proxy_usage.outputs.ceilometer import Ceilometer
from proxy_usage.outputs.cloudevents import CloudEvents

FORMATS: dict[str, Callable[[OutputConfig, int], Output]] = {
    "billing": lambda _output, _window_ms: Billing(),
    "ceilometer": Ceilometer,
    "cloudevents": CloudEvents,
}
"""Those that are posted. Each is made of its configuration and the length of a window in milliseconds."""

__all__ = ["FORMATS", "Output"]
