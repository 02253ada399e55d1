"""A fold of the kind that runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from proxy_usage.decode.choice import CHOICE, Choice
from proxy_usage.decode.compiled import CompiledFold
from proxy_usage.decode.contract import Fold
from proxy_usage.decode.fold import ProtobufFold
from proxy_usage.decode.rows import EnvoySettings, SkipTest
from proxy_usage.model import FoldPlan

SUMS_HELD, KEYS = 20_000, 200_000
"""Sums that are held in Python's dictionaries before they are set aside and booked along with what follows;
and, by default, as many rows of the compiled table. The more tenants take turns, the more of their entries a
row spares the booking."""


def new_fold(
    plan: FoldPlan,
    *,
    accepts: Callable[[int, str], bool],
    envoy: EnvoySettings,
    skip: Sequence[SkipTest] = (),
    identity_limit: int | None = None,
    plain: Collection[int] = (),
    keys: int = KEYS,
    choice: Choice = CHOICE,
) -> Fold:
    """A fold of the kind that was chosen.

    Args:
        accepts: ``accepts(rule, text)`` says whether a rule's pattern and map take a value. It must depend on
            its arguments alone, for its answers are remembered; bytes that are not UTF-8 are surrogates in
            ``text``.
        identity_limit: how many sums and long rows may be held before ``full``. Where it is not given:
            ``SUMS_HELD``, and as many rows of the compiled table as ``keys``.
        plain: rules that accept any value: nobody is asked about them.
        keys: how many keys may be open.
    """
    if choice.native is None:
        limit = SUMS_HELD if identity_limit is None else identity_limit
        return ProtobufFold(plan, accepts=accepts, envoy=envoy, skip=skip, identity_limit=limit)
    return CompiledFold(
        choice.native,
        plan,
        accepts=accepts,
        envoy=envoy,
        skip=skip,
        identity_limit=keys if identity_limit is None else identity_limit,
        plain=plain,
    )
