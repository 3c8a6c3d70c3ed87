"""One policy of every class, where a class needs options with those that fit small layers."""

from __future__ import annotations

from typing import Any

from nullspace_optim import policies
from nullspace_optim.policies import Policy

NEEDED: dict[str, list[dict[str, Any]]] = {
    "Energy": [{"threshold": 0.9}],
    "FixedRank": [{"k": 3}],
    "RankBudget": [{"share": 0.4}],
    "OSF": [{}, {"share": 0.3, "growth": 0.2}],
}
POLICIES = [
    kind(**options)
    for name, kind in vars(policies).items()
    if isinstance(kind, type) and issubclass(kind, Policy) and kind is not Policy
    for options in NEEDED.get(name, [{}])
]
