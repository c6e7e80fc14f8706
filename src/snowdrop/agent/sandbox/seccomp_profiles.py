"""System call filters as data: names, conditions on arguments, and what the rest gets.

An allow-list: what is not named is refused with EPERM, and what C libraries and runtimes probe for and know how
to do without is refused with ENOSYS.
"""

from __future__ import annotations

import socket

import msgspec

LOW_32_BITS = 0xFFFF_FFFF


class Condition(msgspec.Struct, frozen=True):
    """True where argument `index` ANDed with `mask` equals `value`."""

    index: int
    value: int
    mask: int = 0xFFFF_FFFF_FFFF_FFFF


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One named filter. `allow_if`: the call passes if any condition holds. `refuse_if`: the call, allowed
    otherwise, is refused with EPERM if any holds."""

    name: str
    allow: frozenset[str]
    allow_if: dict[str, tuple[Condition, ...]] = msgspec.field(default_factory=dict)
    refuse_if: dict[str, tuple[Condition, ...]] = msgspec.field(default_factory=dict)
    no_such_call: frozenset[str] = frozenset()
    no_such_numbers: frozenset[int] = frozenset()


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FILES = _names("""
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2
    fadvise64 fallocate fchdir fchmod fchmodat fchown fchownat fcntl fdatasync fgetxattr flistxattr flock
    fremovexattr fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr
    inotify_add_watch inotify_init inotify_init1 inotify_rm_watch lchown lgetxattr link linkat listxattr
    llistxattr lremovexattr lseek lsetxattr lstat mkdir mkdirat mknod mknodat newfstatat open openat openat2
    pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr
    rename renameat renameat2 rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync
    sync_file_range syncfs tee truncate umask unlink unlinkat utime utimensat utimes vmsplice write writev
""")
MEMORY = _names("""
    brk get_mempolicy madvise mbind membarrier memfd_create mincore mlock mlock2 mlockall mmap mprotect mremap
    msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages set_mempolicy shmat
    shmctl shmdt shmget
""")
PROCESSES = _names("""
    arch_prctl capget capset execve execveat exit exit_group fork getcpu getegid geteuid getgid getgroups
    getitimer getpgid getpgrp getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid
    getuid ioprio_get ioprio_set kill pause pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall rseq
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr
    sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield set_robust_list get_robust_list set_tid_address setfsgid setfsuid setgid
    setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid setuid
    sigaltstack sysinfo tgkill times tkill uname vfork wait4 waitid
""")
WAITING = _names("""
    alarm clock_getres clock_gettime clock_nanosleep epoll_create epoll_create1 epoll_ctl epoll_ctl_old
    epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 futex getrandom gettimeofday
    mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink msgctl msgget msgrcv msgsnd
    nanosleep pipe pipe2 poll ppoll pselect6 select semctl semget semop semtimedop signalfd signalfd4 time
    timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime
    timerfd_settime
""")
SOCKETS = _names("""
    accept accept4 bind connect getpeername getsockname getsockopt listen recvfrom recvmmsg recvmsg sendmmsg
    sendmsg sendto setsockopt shutdown socketpair
""")
HARDENING = _names("landlock_create_ruleset landlock_add_rule landlock_restrict_self")

_NEW_NAMESPACES = 0x7E02_0000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET; clone(2) cannot make a time namespace."""
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, LOW_32_BITS)
"""PER_LINUX, PER_LINUX32, UNAME26 with each, and asking for the present one: none weakens the address layout."""

REPLICA = Profile(
    name="replica",
    allow=FILES | MEMORY | PROCESSES | WAITING | SOCKETS | HARDENING | {"ioctl"},
    allow_if={
        "clone": (Condition(0, 0, _NEW_NAMESPACES),),
        # AF_VSOCK would leave the network namespace; AF_NETLINK and the rest are attack surface without a use.
        "socket": tuple(Condition(0, family) for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)),
        "personality": tuple(Condition(0, persona) for persona in _PERSONALITIES),
    },
    # The kernel looks at the low half of a request only, so the filter must as well.
    refuse_if={
        "ioctl": (Condition(1, _TIOCSTI, LOW_32_BITS), Condition(1, _TIOCLINUX, LOW_32_BITS)),
    },
    # clone3 hides its flags behind a pointer; glibc then uses clone.
    no_such_call=_names("""
        clone3 io_uring_setup io_uring_enter io_uring_register io_setup io_submit io_getevents io_destroy io_cancel
        io_pgetevents futex_waitv set_mempolicy_home_node memfd_secret process_madvise process_mrelease
    """),
    # Calls newer than this list; their numbers are the same on every architecture.
    no_such_numbers=frozenset(range(451, 512)),
)

_WARM_NAMESPACES = _NEW_NAMESPACES
"""All at once and no other choice: what a fork makes of them is known."""
_WARM_MOUNT_FLAGS = (0x6, 0xE, 0xA, 0x1027)
"""nosuid and nodev; with noexec; nosuid and noexec; read-only again (MS_REMOUNT | MS_BIND | MS_RDONLY)."""

WARM = msgspec.structs.replace(
    REPLICA,
    name="warm",
    allow=REPLICA.allow | {"move_mount"},
    allow_if=REPLICA.allow_if
    | {
        "unshare": (Condition(0, _WARM_NAMESPACES),),
        "mount": tuple(Condition(3, flags) for flags in _WARM_MOUNT_FLAGS),
    },
)
"""Of a parent that forks replicas: exactly what a fork needs for its namespaces; it then takes REPLICA, too."""

PROFILES = {profile.name: profile for profile in (REPLICA, WARM)}
