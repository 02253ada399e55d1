"""proxy-usage turns what Envoy proxies served into what a platform may bill."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("proxy-usage")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
