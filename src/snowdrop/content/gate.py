"""How much is asked of the origin now: as many reads as pay, as large as suits, within everybody's bandwidth."""

from __future__ import annotations

from collections.abc import Iterable

from snowdrop.content.origin.bandwidth import Bandwidth
from snowdrop.content.origin.steer import Steer
from snowdrop.content.placement import READ_BYTES_MAX
from snowdrop.content.settings import DataPlaneSettings
from snowdrop.domain.ids import TenantId

LOOK_S_MIN = 0.005


class OriginGate:
    """Asked by the fetch engine before each run from the origin. `steer` is told by the origin's reader."""

    def __init__(self, settings: DataPlaneSettings) -> None:
        self.steer = Steer(settings.fetch_threads)
        self._bandwidth = Bandwidth(settings.origin_bytes_per_s_max, settings.tenant_bytes_per_s_max)

    @property
    def run_bytes_max(self) -> int:
        """How much one run from the origin may bring; a run is one chunk at least."""
        size = min(self.steer.range_bytes, READ_BYTES_MAX)
        return min(size, self._bandwidth.piece_bytes) if self._bandwidth.is_limited else size

    def may_read(self, tenant: TenantId, active: int) -> bool:
        """Whether one more run may begin, `active` being under way."""
        return active < self.steer.connections and self._bandwidth.wait_s(tenant) == 0

    def spend(self, tenant: TenantId, size_bytes: int) -> None:
        """A run of so many bytes begins."""
        self._bandwidth.spend(tenant, size_bytes)

    def look_again_s(self, tenants: Iterable[TenantId]) -> float | None:
        """When to ask again for these if nothing else happens; None if time alone changes nothing."""
        if not self._bandwidth.is_limited:
            return None
        waits_s = [wait_s for tenant in tenants if (wait_s := self._bandwidth.wait_s(tenant)) > 0]
        return max(min(waits_s), LOOK_S_MIN) if waits_s else None
