"""The system call profile as data, and its programs."""

from __future__ import annotations

import pytest

from snowdrop.agent.sandbox import seccomp
from snowdrop.agent.sandbox.seccomp import compile_profile
from snowdrop.agent.sandbox.seccomp_profiles import PROFILES, REPLICA
from snowdrop.domain.errors import SandboxError

NEVER = frozenset(
    """
    mount umount2 pivot_root chroot unshare setns ptrace process_vm_readv process_vm_writev bpf
    perf_event_open userfaultfd keyctl add_key request_key kexec_load kexec_file_load init_module
    finit_module delete_module open_by_handle_at name_to_handle_at swapon swapoff reboot settimeofday
    clock_settime adjtimex sethostname iopl ioperm syslog acct quotactl fsopen fsmount move_mount
    open_tree pidfd_getfd kcmp io_uring_setup clone3
    """.split()  # noqa: SIM905
)


def test_no_call_of_the_kernel_s_own_business_is_allowed() -> None:
    assert [name for name in sorted(NEVER) if name in REPLICA.allow or name in REPLICA.allow_if] == []


def test_calls_with_conditions_are_not_allowed_without() -> None:
    for profile in PROFILES.values():
        assert not profile.allow & profile.allow_if.keys()
        assert not profile.allow & profile.no_such_call


def test_programs_are_whole_instructions_within_the_kernel_s_bound() -> None:
    for name in PROFILES:
        for program in compile_profile(name):
            assert len(program) % 8 == 0
            assert 0 < len(program) // 8 <= 4096


def test_a_missing_library_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise RuntimeError("Unable to find libseccomp")

    seccomp._library.cache_clear()
    compile_profile.cache_clear()
    monkeypatch.setattr(seccomp.importlib, "import_module", missing)
    with pytest.raises(SandboxError, match="libseccomp2"):
        compile_profile("replica")
