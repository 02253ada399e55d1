"""A new configuration under the running service: all of it is made ready before any of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from proxy_usage.admission import Admission
from proxy_usage.attribution import Attributor
from proxy_usage.config import Config, changed, needs_restart
from proxy_usage.decode import Fold
from proxy_usage.delivery.transport import TokenFile, credentials
from proxy_usage.delivery.trust import Trust
from proxy_usage.errors import ConfigError
from proxy_usage.pipeline import Port
from proxy_usage.receiver import TlsFiles
from proxy_usage.receiver.credentials import check
from proxy_usage.service.build import build_admission, build_attributor, build_folds, build_tls


@dataclass(frozen=True, slots=True)
class Change:
    """What ``config.RELOADABLE`` promises, ready to be put in place of what runs."""

    config: Config
    keys: tuple[str, ...]
    """The keys that differ from the former configuration."""
    attributor: Attributor
    folds: Mapping[Port, Fold]
    admission: Admission
    tls: TlsFiles | None
    http_token: TokenFile | None
    trust: Mapping[str, tuple[TokenFile | None, Trust]]
    """Token, roots and certificate of each output, by its name."""


def prepare(old: Config, new: Config) -> Change:
    """Makes everything that a reload needs. Files behind unchanged keys are read again, too.

    Raises:
        ConfigError: something of it cannot be used, or needs a restart; nothing was changed.
    """
    keys = changed(old, new)
    if fixed := needs_restart(keys):
        raise ConfigError(
            f"{', '.join(fixed)} cannot change while it runs; nothing was taken over",
            hint="restart proxy-usage, or undo the change of these keys",
        )
    attributor = build_attributor(new)
    tls = build_tls(new)
    return Change(
        config=new,
        keys=keys,
        attributor=attributor,
        folds=build_folds(new, attributor),
        admission=build_admission(new),
        tls=None if tls is None else check(tls),
        http_token=TokenFile(new.listen.http_token_file) if new.listen.http_token_file else None,
        trust={
            output.name: (
                credentials(output),
                Trust.of(output),
            )
            for output in new.outputs
        },
    )
