"""A fold of the kind that runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from proxy_usage.decode.choice import CHOICE, Choice
from proxy_usage.decode.compiled import CompiledFold
from proxy_usage.decode.contract import Fold
from proxy_usage.decode.fold import ProtobufFold
from proxy_usage.decode.rows import EnvoySettings, SkipTest
from proxy_usage.model import FoldPlan


def new_fold(
    plan: FoldPlan,
    *,
    accepts: Callable[[int, str], bool],
    envoy: EnvoySettings,
    skip: Sequence[SkipTest] = (),
    identity_limit: int = 50_000,
    plain: Collection[int] = (),
    choice: Choice = CHOICE,
) -> Fold:
    """A fold of the kind that was chosen.

    Args:
        accepts: ``accepts(rule, text)`` says whether a rule's pattern and map take a value. It must depend on
            its arguments alone, for its answers are remembered; bytes that are not UTF-8 are surrogates in
            ``text``.
        identity_limit: how many sums and long rows may be held before ``full``.
        plain: rules that accept any value: nobody is asked about them.
    """
    if choice.native is None:
        return ProtobufFold(plan, accepts=accepts, envoy=envoy, skip=skip, identity_limit=identity_limit)
    return CompiledFold(
        choice.native,
        plan,
        accepts=accepts,
        envoy=envoy,
        skip=skip,
        identity_limit=identity_limit,
        plain=plain,
    )
