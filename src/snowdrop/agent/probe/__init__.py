"""What this machine can do, found out by doing it: the lines of `snowdrop doctor`."""

from snowdrop.agent.probe.base import Probe, ProbeFailed
from snowdrop.agent.probe.run import probe_sandbox, run_all

__all__ = ["Probe", "ProbeFailed", "probe_sandbox", "run_all"]
