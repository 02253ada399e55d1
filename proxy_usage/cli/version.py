"""``proxy-usage version``: what runs here, for a report of a fault."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

from proxy_usage import __version__
from proxy_usage.cli.options import JsonOption
from proxy_usage.cli.show import emit, facts

PACKAGES = ("protobuf", "grpcio", "aiohttp", "msgspec", "pydantic", "cloudevents", "envoy-data-plane")


def version(as_json: JsonOption = False) -> None:
    """Show the version and those of what it stands on."""
    from proxy_usage.decode import CHOICE
    from proxy_usage.store.reader import SQLITE_VERSION

    versions: dict[str, str] = {
        "version": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "sqlite": SQLITE_VERSION,
        **{name: _installed(name) for name in PACKAGES},
        "fold": CHOICE.reason,
    }
    if as_json:
        emit(versions)
    else:
        facts([("proxy-usage" if name == "version" else name, text) for name, text in versions.items()])


def _installed(name: str) -> str:
    try:
        return installed(name)
    except PackageNotFoundError:
        return "not installed"
