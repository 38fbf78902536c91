"""The system calls of an enclave: an allow-list for one process with threads and no children.

Reviewed for CPython, numpy, pyarrow, torch and OpenSSL on glibc and musl. Whatever is in no
table does not exist for the process (``ENOSYS``, which lets libc fall back to older calls);
what is known to break out of a sandbox or to be of use only for that is refused with ``EPERM``.
"""

from __future__ import annotations

__all__ = ["ALLOWED", "IOCTLS", "PRCTLS", "REFUSED"]

_FILES = """
access chdir chmod close close_range copy_file_range dup dup2 dup3 faccessat faccessat2
fadvise64 fallocate fchdir fchmod fchmodat fcntl fdatasync flock fstat fstatfs fsync ftruncate
getcwd getdents getdents64 link linkat lseek lstat mkdir mkdirat newfstatat open openat pread64
preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv rename
renameat renameat2 rmdir sendfile stat statfs statx sync_file_range truncate umask unlink
unlinkat utimensat write writev
"""
_MEMORY = """
brk get_mempolicy madvise mbind membarrier memfd_secret mincore mlock mlock2 mlockall mmap
mprotect mremap msync munlock munlockall munmap set_mempolicy
"""
_THREADS = """
arch_prctl capget exit exit_group futex futex_waitv get_robust_list getcpu getegid geteuid
getgid getgroups getpgid getpgrp getpid getppid getpriority getresgid getresuid getrlimit
getrusage getsid gettid getuid restart_syscall riscv_flush_icache riscv_hwprobe rseq
sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam
sched_getscheduler sched_setaffinity sched_yield set_robust_list set_tid_address sysinfo times
uname wait4 waitid
"""
_SIGNALS = """
pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait
sigaltstack
"""
_TIME = """
alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer
time timer_create timer_delete timer_getoverrun timer_gettime timer_settime timerfd_create
timerfd_gettime timerfd_settime
"""
_POLL = """
epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2
getrandom pipe pipe2 poll ppoll pselect6 select
"""
_UNIX_SOCKETS = """
getpeername getsockname getsockopt recvfrom recvmmsg recvmsg sendmmsg sendmsg sendto
setsockopt shutdown
"""

ALLOWED: frozenset[str] = frozenset(
    " ".join((_FILES, _MEMORY, _THREADS, _SIGNALS, _TIME, _POLL, _UNIX_SOCKETS)).split()
)

_REFUSED = """
accept accept4 acct add_key adjtimex bind bpf capset chown chroot clock_adjtime
clock_settime delete_module execve execveat fanotify_init
fanotify_mark fchown fchownat finit_module fork fsconfig fsmount fsopen fspick
get_kernel_syms init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl
ioprio_set kcmp kexec_file_load kexec_load keyctl landlock_add_rule
landlock_create_ruleset landlock_restrict_self lchown listen lookup_dcookie
migrate_pages mknod mknodat mount mount_setattr move_mount move_pages name_to_handle_at
nfsservctl open_by_handle_at open_tree perf_event_open personality pidfd_getfd pidfd_open
pidfd_send_signal pivot_root pkey_alloc process_madvise process_mrelease process_vm_readv
process_vm_writev ptrace quotactl quotactl_fd reboot request_key rt_sigqueueinfo
rt_tgsigqueueinfo seccomp setdomainname setfsgid setfsuid setgid setgroups sethostname
setns setregid setresgid setresuid setreuid setrlimit setsid setpgid settimeofday setuid
shmat shmctl shmdt shmget splice swapoff swapon symlink symlinkat sync syncfs syslog tee
tkill umount umount2 unshare uselib userfaultfd vfork vhangup vmsplice
"""
REFUSED: frozenset[str] = frozenset(_REFUSED.split())

# What isatty, terminal-size questions and non-blocking files ask. TIOCSTI and TIOCLINUX,
# which type into the terminal of whoever started the enclave, are not among them.
IOCTLS: dict[str, int] = {
    "FIOCLEX": 0x5451,
    "FIONBIO": 0x5421,
    "FIONCLEX": 0x5450,
    "FIONREAD": 0x541B,
    "TCGETS": 0x5401,
    "TIOCGWINSZ": 0x5413,
}

# Nothing here can make the process dumpable, change its capabilities or open it to ptrace.
PRCTLS: dict[str, int] = {
    "PR_CAPBSET_READ": 23,
    "PR_GET_DUMPABLE": 3,
    "PR_GET_NAME": 16,
    "PR_GET_NO_NEW_PRIVS": 39,
    "PR_GET_PDEATHSIG": 2,
    "PR_GET_SECCOMP": 21,
    "PR_SET_NAME": 15,
    "PR_SET_VMA": 0x53564D41,
}
