"""How many replicas a deployment should have, from its load; why; and what would change it. Pure."""

from snowdrop.policy.autoscale.decide import (
    AutoscaleDecision,
    AutoscaleInput,
    AutoscaleState,
    Bounds,
    Signals,
    after,
    decide,
    idle_at_s,
    judge,
    observe,
)

__all__ = [
    "AutoscaleDecision",
    "AutoscaleInput",
    "AutoscaleState",
    "Bounds",
    "Signals",
    "after",
    "decide",
    "idle_at_s",
    "judge",
    "observe",
]
