"""All probes, in the order in which `snowdrop doctor` shows them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from snowdrop.agent.probe import isolation, machine, storage
from snowdrop.agent.probe.base import Action, Probe, perform
from snowdrop.agent.sandbox.limits import Resource


def run_all(state: Path, bwrap: str = "") -> Iterator[Probe]:
    """Performs one probe after the other, each bounded in time, none raising. `state` need not exist yet.

    Blocking; call it from a thread without a running event loop.
    """
    for name, action, turn_on in _probes(state, bwrap):
        yield perform(name, action, turn_on)


def _probes(state: Path, bwrap: str) -> list[tuple[str, Action, str]]:
    user_namespaces = "sysctl -w user.max_user_namespaces=65536 (needed only without root)"
    state_folder = "choose a writable folder on a local disk with --state"
    return [
        ("kernel", machine.kernel, "a kernel of 5.10 or newer"),
        ("sandbox", partial(isolation.sandbox, bwrap), isolation.SANDBOX_ADVICE),
        ("seccomp", partial(isolation.seccomp, bwrap), isolation.SANDBOX_ADVICE),
        ("user namespaces", isolation.user_namespace, user_namespaces),
        *((f"{which} limit", partial(isolation.cgroup, which), "") for which in Resource),
        ("descriptor passing", machine.descriptor_passing, ""),
        ("sealed memory", storage.sealed_memory, "a kernel of 5.1 or newer"),
        ("direct i/o", partial(storage.direct_io, state), state_folder),
        ("disk", partial(storage.disk_space, state), state_folder),
        ("memory", storage.memory, ""),
        ("fuse", storage.fuse, ""),
        ("erofs", storage.erofs, ""),
        ("accelerators", machine.accelerators, "give this user access to the device files"),
    ]


def probe_sandbox(bwrap: str = "") -> Probe:
    """Only whether replicas can be isolated here: `snowdrop up` refuses without it."""
    return perform("sandbox", partial(isolation.sandbox, bwrap), isolation.SANDBOX_ADVICE)
