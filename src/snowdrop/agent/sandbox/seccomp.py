"""Compiles a system call profile to BPF programs, once per process."""

from __future__ import annotations

import errno
import importlib
import os
from functools import cache
from types import ModuleType
from typing import Protocol

from snowdrop.agent.sandbox.seccomp_profiles import PROFILES, Condition, Profile
from snowdrop.domain.errors import SandboxError

_ARGUMENT_MASK = 0xFFFF_FFFF_FFFF_FFFF


class _Rules(Protocol):
    """The part of pyseccomp.SyscallFilter (untyped) that is used here."""

    def add_rule(self, action: int, syscall: int, *args: object) -> None: ...

    def export_bpf(self, file: object) -> None: ...


@cache
def compile_profile(name: str) -> tuple[bytes, ...]:
    """The programs of the profile `name`, all of which must be installed; the kernel takes the strictest answer.

    Two, because libseccomp keeps either an allowing or a refusing rule of one call in one filter. Raises
    SandboxError where libseccomp is missing.
    """
    profile = PROFILES[name]
    programs = [_allow_list(profile)]
    if profile.refuse_if:
        programs.append(_refuse_list(profile))
    return tuple(programs)


def _allow_list(profile: Profile) -> bytes:
    lib = _library()
    rules = lib.SyscallFilter(lib.ERRNO(errno.EPERM))
    for call in sorted(profile.allow):
        _add(rules, lib.ALLOW, call)
    for call, conditions in profile.allow_if.items():
        for condition in conditions:
            _add(rules, lib.ALLOW, call, condition)
    for call in sorted(profile.no_such_call):
        _add(rules, lib.ERRNO(errno.ENOSYS), call)
    for number in sorted(profile.no_such_numbers):
        rules.add_rule(lib.ERRNO(errno.ENOSYS), number)
    return _export(rules)


def _refuse_list(profile: Profile) -> bytes:
    lib = _library()
    rules = lib.SyscallFilter(lib.ALLOW)
    for call, conditions in profile.refuse_if.items():
        for condition in conditions:
            _add(rules, lib.ERRNO(errno.EPERM), call, condition)
    return _export(rules)


def _add(rules: _Rules, action: int, call: str, condition: Condition | None = None) -> None:
    lib = _library()
    number = lib.resolve_syscall(lib.Arch.NATIVE, call)
    if number < 0:  # a call that this architecture, or this libseccomp, does not have stays refused
        return
    if condition is None:
        rules.add_rule(action, number)
    elif condition.mask == _ARGUMENT_MASK:
        rules.add_rule(action, number, lib.Arg(condition.index, lib.EQ, condition.value))
    else:
        rules.add_rule(action, number, lib.Arg(condition.index, lib.MASKED_EQ, condition.mask, condition.value))


def _export(rules: _Rules) -> bytes:
    fd = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    with open(fd, "w+b", buffering=0) as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


@cache
def _library() -> ModuleType:
    # Imported late: importing it looks libseccomp up, and fails where that is missing.
    try:
        return importlib.import_module("pyseccomp")
    except (ImportError, RuntimeError, AttributeError) as error:
        raise SandboxError(
            f"system calls cannot be filtered: {error}",
            where="libseccomp.so.2",
            next_step="install libseccomp (Debian, Ubuntu: apt-get install libseccomp2)",
        ) from error
