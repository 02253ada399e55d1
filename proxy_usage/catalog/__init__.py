"""The service catalog that usage is billed by: read, and held against its rules and the configuration.

What can be known from the documents alone is checked before a meter that nobody declared turns every event
into a quarantined one.
"""

from proxy_usage.catalog.documents import Catalog, Service, ServiceConfiguration, load_catalog
from proxy_usage.catalog.match import WARNING, check_config
from proxy_usage.catalog.rules import check_rules

__all__ = [
    "WARNING",
    "Catalog",
    "Service",
    "ServiceConfiguration",
    "check_config",
    "check_rules",
    "load_catalog",
]
