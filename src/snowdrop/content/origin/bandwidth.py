"""How much this node takes from the origin per second, in all and for each tenant.

Whoever starts reads asks `wait_s` first and starts something else meanwhile: a tenant at its limit holds no thread
that another one could use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from snowdrop.domain.ids import TenantId
from snowdrop.policy.bandwidth import Bucket, piece_bytes, take

TENANTS_MAX = 10_000


class Bandwidth:
    """Token buckets of one node. 0 is no limit. Thread-safe."""

    def __init__(
        self,
        total_bytes_per_s_max: int,
        tenant_bytes_per_s_max: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._tenant_rate = tenant_bytes_per_s_max
        self._total = Bucket(bytes_per_s=total_bytes_per_s_max)
        self._tenants: dict[TenantId, Bucket] = {}
        self.piece_bytes = piece_bytes((total_bytes_per_s_max, tenant_bytes_per_s_max))
        """How much to read at a time, so that nobody waits long behind one read; 0: as much as you like."""

    @property
    def is_limited(self) -> bool:
        return self.piece_bytes > 0

    def wait_s(self, tenant: TenantId) -> float:
        """Seconds until a read for `tenant` may begin; 0 if it may now."""
        with self._lock:
            now_s = self._clock()
            return max(take(bucket, 1, now_s=now_s)[1] for bucket in (self._total, self._of(tenant)))

    def spend(self, tenant: TenantId, size_bytes: int) -> None:
        """A read of so many bytes begins: what comes after it waits until they are paid for."""
        with self._lock:
            now_s = self._clock()
            self._total, _ = take(self._total, size_bytes, now_s=now_s)
            self._tenants[tenant], _ = take(self._of(tenant), size_bytes, now_s=now_s)
            if len(self._tenants) > TENANTS_MAX:
                self._tenants = {name: each for name, each in self._tenants.items() if each.free_s > now_s}

    def _of(self, tenant: TenantId) -> Bucket:
        return self._tenants.get(tenant) or Bucket(bytes_per_s=self._tenant_rate)
