"""Probes of the kernel, descriptor passing and accelerators."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from snowdrop.agent.probe.base import PROBE_S_MAX, ProbeFailed

KERNEL_MIN = (5, 10)
_AVX_LEVELS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("asimd", "NEON"))


def kernel() -> str:
    """The kernel's release, and one call that Snowdrop cannot do without."""
    os.close(os.pidfd_open(os.getpid()))
    release = os.uname().release
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < KERNEL_MIN:
        raise ProbeFailed(f"Linux {release}", f"a kernel of {KERNEL_MIN[0]}.{KERNEL_MIN[1]} or newer")
    return f"Linux {release} {os.uname().machine}"


def descriptor_passing() -> str:
    """Sends an open file through a packet socket and reads from what arrives."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sent = os.memfd_create("probe", os.MFD_CLOEXEC)
    received: list[int] = []
    try:
        os.write(sent, b"snowdrop")
        socket.send_fds(ours, [b"fd"], [sent])
        theirs.settimeout(PROBE_S_MAX)
        _, received, _, _ = socket.recv_fds(theirs, 16, 1)
        if os.pread(received[0], 8, 0) != b"snowdrop":
            raise ProbeFailed("the descriptor that arrived is another one")
    finally:
        ours.close()
        theirs.close()
        for fd in (sent, *received):
            os.close(fd)
    return "passed one over a unix packet socket"


def accelerators() -> str:
    """Opens what is there; a machine without any has its CPUs."""
    found = [*_nvidia(), *_amd()]
    if found:
        return "; ".join(found)
    flags = _cpu_flags(Path("/proc/cpuinfo").read_text())
    level = next((name for flag, name in _AVX_LEVELS if flag in flags), "no AVX")
    return f"cpu only: {len(os.sched_getaffinity(0))} cores, {level}"


def _nvidia() -> list[str]:
    control = Path("/dev/nvidiactl")
    if not control.exists():
        return []
    os.close(os.open(control, os.O_RDWR))
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise ProbeFailed("an NVIDIA device without nvidia-smi", "install the driver's utilities (nvidia-utils)")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=PROBE_S_MAX, check=True)
    return [line.partition(" (UUID")[0] for line in listed.stdout.splitlines() if line.strip()]


def _amd() -> list[str]:
    control = Path("/dev/kfd")
    if not control.exists():
        return []
    os.close(os.open(control, os.O_RDWR))
    return ["AMD GPU (/dev/kfd)"]


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
