"""Which warm parents a node keeps: those used last that fit into the memory given to them.

A parent is worth what it saves the next replica. It is started once a replica could have used it, evicted when it
has not been used for long or when one used later needs its memory, and tried again later and later if it dies.
"""

from __future__ import annotations

import msgspec

IDLE_S_MAX = 1_800.0
"""A parent that nobody has forked for so long goes."""
RETRY_S, RETRY_S_MAX = 5.0, 600.0
STARTING_MAX = 1
"""Parents that import at a time: they must not slow the replicas down that they are for."""

Key = tuple[str, str, tuple[str, ...]]
"""Tenant, environment and imports. A parent serves one of them and never another."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A parent that there is or could be. `memory_bytes` is what it has, or is expected to have.

    `failures` counts deaths one after another, the last `failed_s` ago.
    """

    key: Key
    unused_s: float
    memory_bytes: int
    is_running: bool = False
    is_starting: bool = False
    failures: int = 0
    failed_s: float = 0.0


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """What to do now. `reasons` says why by key."""

    start: tuple[Key, ...] = ()
    stop: tuple[Key, ...] = ()
    reasons: dict[Key, str] = msgspec.field(default_factory=dict)


def retry_after_s(failures: int) -> float:
    """How long after its last death a parent is started again."""
    return 0.0 if failures == 0 else min(RETRY_S_MAX, RETRY_S * 2.0 ** min(failures - 1, 30))


def keep_warm(candidates: tuple[Candidate, ...], *, memory_bytes_max: int) -> Keep:
    """Fills the memory with parents, the one used last first."""
    start: list[Key] = []
    stop: list[Key] = []
    reasons: dict[Key, str] = {}
    left_bytes = memory_bytes_max
    starting = sum(each.is_starting for each in candidates)
    for each in sorted(candidates, key=lambda c: (c.unused_s, c.key)):
        alive = each.is_running or each.is_starting
        refused = _refused(each, left_bytes)
        if refused:
            reasons[each.key] = refused
            if alive:
                stop.append(each.key)
            continue
        waits_s = retry_after_s(each.failures) - each.failed_s
        if alive or each.failures == 0 or waits_s <= 0:
            left_bytes -= each.memory_bytes
        if alive:
            continue
        if each.failures and waits_s > 0:
            reasons[each.key] = f"died {each.failures} times; tried again in {waits_s:.0f} s"
        elif starting >= STARTING_MAX:
            reasons[each.key] = "another one is starting"
        else:
            starting += 1
            start.append(each.key)
            reasons[each.key] = "a replica could have used it"
    return Keep(start=tuple(start), stop=tuple(stop), reasons=reasons)


def _refused(each: Candidate, left_bytes: int) -> str:
    if each.unused_s > IDLE_S_MAX:
        return f"not used for {each.unused_s:.0f} s"
    if each.memory_bytes > left_bytes:
        return "others that were used later fill the memory for parents"
    return ""


IMPORTS_ALLOWED = frozenset(
    {
        *("accelerate", "datasets", "diffusers", "einops", "faiss", "fastapi", "huggingface_hub", "jax", "numpy"),
        *("onnxruntime", "pandas", "peft", "PIL", "pyarrow", "pydantic", "safetensors", "scipy", "sentencepiece"),
        *("sentence_transformers", "sklearn", "tokenizers", "torch", "torchaudio", "torchvision", "transformers"),
    }
)
"""Packages that a parent may import, with their submodules: well known, and without a tenant's code."""


def allowed_imports(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `wanted` that a parent may import, in one order for all who want the same."""
    return tuple(sorted({name for name in wanted if name.partition(".")[0] in IMPORTS_ALLOWED}))
