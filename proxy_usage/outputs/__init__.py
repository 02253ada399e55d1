"""Wire formats: one file each. An output encodes a batch and reads the answer; it never sends.

To add one: write ``outputs/<format>.py`` with a class that has the methods of ``base.Output``, name it in
``FORMATS`` and in the configuration's list of formats. Everything else (marking, backoff, splitting, fates)
is delivery's and the same for all.
"""

from collections.abc import Callable

from proxy_usage.outputs.base import Output
from proxy_usage.outputs.billing import Billing

FORMATS: dict[str, Callable[[], Output]] = {"billing": Billing}

__all__ = ["FORMATS", "Output"]
