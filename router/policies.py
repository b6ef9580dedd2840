"""All routing policies by name."""

from __future__ import annotations

from collections.abc import Callable

from penstock.common.errors import ConfigError
from penstock.router.cost import CostPolicy
from penstock.router.policy import Policy
from penstock.router.simple_policies import LeastLoadPolicy, LongestPrefixPolicy, RandomPolicy, RoundRobinPolicy

_MAKERS: dict[str, Callable[[int | None, bool], Policy]] = {
    RandomPolicy.name: lambda seed, fetch: RandomPolicy(seed),
    RoundRobinPolicy.name: lambda seed, fetch: RoundRobinPolicy(),
    LeastLoadPolicy.name: lambda seed, fetch: LeastLoadPolicy(),
    LongestPrefixPolicy.name: lambda seed, fetch: LongestPrefixPolicy(),
    CostPolicy.name: lambda seed, fetch: CostPolicy(fetch=fetch),
}
POLICIES = tuple(_MAKERS)


def make_policy(name: str, seed: int | None = None, fetch: bool = False) -> Policy:
    """The policy called `name`; `fetch`: workers can read prefixes from each other, which only `cost` makes use of.

    Raises:
        ConfigError: there is no policy of that name.
    """
    if name not in _MAKERS:
        raise ConfigError(f"unknown routing policy {name!r}; there are {', '.join(POLICIES)}")
    return _MAKERS[name](seed, fetch)
