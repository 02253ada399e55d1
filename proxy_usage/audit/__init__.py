"""Envoys' own counters against what all sinks received: who is asked, when, and what came of it.

``completeness`` decides; here is what awaits: ``asking`` reads both sides, ``Auditor`` takes rounds.
"""

from proxy_usage.audit.asking import Asker, Envoy
from proxy_usage.audit.auditor import Auditor
from proxy_usage.audit.intake import Received, report

__all__ = ["Asker", "Auditor", "Envoy", "Received", "report"]
