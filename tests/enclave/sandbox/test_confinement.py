"""Attacks from inside: each forbidden thing is attempted and must fail under its layers.

Every attempt is also made without any layer, where it must succeed: a test that could not
fail would prove nothing.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.sandbox import SandboxPlan
from cenacle.errors import EnclaveError

pytestmark = pytest.mark.processes

PLANS = ("none", "bubblewrap", "process", "landlock", "seccomp", "inner", "all")

# What each layer stops. "process" alone changes how others see the enclave, not what it does.
STOPPED_BY = {
    "tcp": {"bubblewrap", "landlock", "seccomp"},
    "udp": {"bubblewrap", "seccomp"},
    "netlink": {"seccomp"},
    "abstract_socket": {"bubblewrap", "landlock"},
    "listen": {"landlock", "seccomp"},
    "other_unix_socket": {"bubblewrap"},
    "read_secret": {"bubblewrap", "landlock"},
    "list_home": {"bubblewrap", "landlock"},
    "read_shadow": {"bubblewrap", "landlock"},
    "write_elsewhere": {"bubblewrap", "landlock"},
    "write_asset": {"bubblewrap", "landlock"},
    "write_package": {"bubblewrap", "landlock"},
    "write_shared_memory": {"bubblewrap", "landlock"},
    "run_program": {"bubblewrap", "landlock", "seccomp"},
    "run_interpreter": {"landlock", "seccomp"},
    "fork": {"seccomp"},
    "memory_file": {"seccomp"},
    "ptrace": {"bubblewrap", "landlock", "seccomp"},
    "read_other_memory": {"bubblewrap", "landlock", "seccomp"},
    "read_other_environ": {"bubblewrap", "landlock"},
    "signal_other": {"bubblewrap", "landlock", "seccomp"},
    "core_dump": {"process"},
    "dumpable_again": {"seccomp"},
    "symlink": {"landlock", "seccomp"},
}

ATTEMPTS = r"""
import ctypes, os, resource, socket, subprocess, sys, tempfile
target = config.job
libc = ctypes.CDLL(None, use_errno=True)
pid = target["other_pid"]
out = config.paths["outputs"]

def tcp():
    with socket.create_connection(tuple(target["tcp"]), timeout=5) as s:
        assert s.recv(2) == b"hi"

def udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(5)
        s.connect(tuple(target["udp"]))
        s.send(b"leak")
        assert s.recv(2) == b"hi"

def netlink():
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0).close()

def abstract_socket():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("\0" + target["abstract"])

def other_unix_socket():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(target["unix"])

def listen():
    with socket.socket(socket.AF_INET) as s:
        s.bind(("127.0.0.1", 0))
        s.listen()

def read_secret():
    assert open(target["secret"]).read()

def list_home():
    assert target["secret_name"] in os.listdir(target["home"])

def read_shadow():
    assert open("/etc/shadow").read()

def write_elsewhere():
    open(target["elsewhere"] + "/leak", "w").close()

def write_asset():
    open(config.paths["assets"] / "new", "w").close()

def write_package():
    import cenacle
    os.close(os.open(cenacle.__file__, os.O_WRONLY))

def write_shared_memory():
    name = "/dev/shm/cenacle-test-%d" % os.getpid()
    open(name, "w").close()
    os.unlink(name)

def run_program():
    subprocess.run(["/bin/true"], check=True)

def run_interpreter():
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

def memory_file():
    os.close(os.memfd_create("x"))

def ptrace():
    PTRACE_SEIZE, PTRACE_DETACH = 0x4206, 17
    if libc.ptrace(PTRACE_SEIZE, pid, None, None) != 0:
        raise OSError(ctypes.get_errno(), "ptrace")
    # Detaching needs a stopped process; ending this one lets the other go on.

def read_other_memory():
    class Vector(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))
    buffer = ctypes.create_string_buffer(16)
    local = Vector(ctypes.addressof(buffer), 16)
    remote = Vector(target["other_address"], 16)
    got = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
    if got != 16:
        raise OSError(ctypes.get_errno(), "process_vm_readv")
    assert buffer.raw == target["other_memory"].encode()

def read_other_environ():
    assert target["other_variable"] in open("/proc/%d/environ" % pid).read()

def signal_other():
    os.kill(pid, 0)

def core_dump():
    assert resource.getrlimit(resource.RLIMIT_CORE)[1] != 0

def dumpable_again():
    if libc.prctl(4, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")

def symlink():
    (out / "link").symlink_to("/etc/shadow")
    (out / "link").unlink()

found = {}
for name in target["attempts"]:
    try:
        locals()[name]()
        found[name] = "done"
    except BaseException as error:
        found[name] = type(error).__name__
found["environment"] = dict(os.environ)
found["layers"] = list(config.layers)
return found
"""

_OTHER = """
import ctypes, os, sys
memory = ctypes.create_string_buffer(sys.argv[1].encode(), 16)
print(ctypes.addressof(memory), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def targets(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What an attacker would like: servers, files and another process of the same user."""
    home = tmp_path / "home"
    elsewhere = tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    (home / "records.csv").write_text("patient 17")
    with contextlib.ExitStack() as stack:
        tcp = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", 0))
        named = stack.enter_context(socket.socket(socket.AF_UNIX))
        named.bind(str(tmp_path / "host.sock"))
        named.listen()
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0cenacle-test-{os.getpid()}")
        abstract.listen()
        stack.enter_context(_greeter(tcp, udp))
        memory = "sixteen bytes!!!"
        other = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-S", "-c", _OTHER, memory],
                env={"CANARY": "host-variable"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        )
        stack.callback(other.kill)
        assert other.stdout is not None
        address = int(other.stdout.readline())
        yield {
            "tcp": tcp.getsockname(),
            "udp": udp.getsockname(),
            "unix": named.getsockname(),
            "abstract": f"cenacle-test-{os.getpid()}",
            "secret": str(home / "records.csv"),
            "secret_name": "records.csv",
            "home": str(home),
            "elsewhere": str(elsewhere),
            "other_pid": other.pid,
            "other_address": address,
            "other_memory": memory,
            "other_variable": "host-variable",
        }


_GREETER = """
import socket, sys, threading
tcp, udp = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
def answer():
    while True:
        udp.sendto(b"hi", udp.recvfrom(9)[1])
threading.Thread(target=answer, daemon=True).start()
while True:
    connection, _ = tcp.accept()
    connection.sendall(b"hi")
    connection.close()
"""


@contextlib.contextmanager
def _greeter(*sockets: socket.socket) -> Iterator[None]:
    """A process that greets whoever connects: the test itself waits for the enclave."""
    numbers = [one.fileno() for one in sockets]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _GREETER, *map(str, numbers)], pass_fds=numbers
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _possible_here() -> list[str]:
    """The attempts that this user could make without a sandbox."""
    impossible: set[str] = set()
    if os.geteuid() != 0:
        impossible |= {"read_shadow"}
        with contextlib.suppress(OSError):
            if Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() != "0":
                impossible |= {"ptrace", "read_other_memory"}
    return [name for name in STOPPED_BY if name not in impossible]


@pytest.mark.parametrize("name", PLANS)
def test_what_is_forbidden_fails_and_what_is_not_works(
    name: str,
    choose: Callable[[str], SandboxPlan],
    run_probe: Callable[..., dict[str, Any]],
    targets: dict[str, Any],
) -> None:
    chosen = choose(name)
    attempts = _possible_here()
    attempts.sort(key=lambda attempt: attempt == "ptrace")  # last, because it stays attached
    found = run_probe(chosen, ATTEMPTS, config={**targets, "attempts": attempts})
    active = set(chosen.layers)
    expected = {a: "stopped" if STOPPED_BY[a] & active else "done" for a in attempts}
    if "process" in active and os.geteuid() == 0:
        # Without capabilities, root's process may not look into one that has them.
        others = ("ptrace", "read_other_memory", "read_other_environ")
        expected.update(dict.fromkeys(others, "stopped"))
    seen = {a: "done" if found[a] == "done" else "stopped" for a in expected}
    assert seen == expected
    assert found["layers"] == list(chosen.layers)


@pytest.mark.parametrize("name", PLANS)
def test_the_environment_is_fixed(
    name: str,
    choose: Callable[[str], SandboxPlan],
    run_probe: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("LD_PRELOAD_CANARY", "canary")
    found = run_probe(choose(name), "import os\nreturn dict(os.environ)")
    allowed = {"HOME", "LC_ALL", "LOGNAME", "PWD", "TORCHINDUCTOR_CACHE_DIR"}
    allowed |= {"ORT_DISABLE_TELEMETRY"}
    allowed |= {"PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED", "PYTHONNOUSERSITE", "PYTHONPATH"}
    allowed |= {"MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"}
    assert set(found) <= allowed
    assert "canary" not in str(found)


SYSCALLS_X86_64 = {
    "ptrace": 101,
    "personality": 135,
    "pivot_root": 155,
    "mount": 165,
    "umount2": 166,
    "reboot": 169,
    "init_module": 175,
    "add_key": 248,
    "keyctl": 250,
    "unshare": 272,
    "vmsplice": 278,
    "perf_event_open": 298,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "setns": 308,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "finit_module": 313,
    "seccomp": 317,
    "memfd_create": 319,
    "kexec_file_load": 320,
    "bpf": 321,
    "execveat": 322,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "landlock_create_ruleset": 444,
    "setuid": 105,
    "capset": 126,
    "chroot": 161,
    "mknod": 133,
    "shmget": 29,
    "setrlimit": 160,
    "prlimit_setting": 302,
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86-64")
def test_every_refused_system_call_says_eperm(
    choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    body = """
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    found = {}
    for name, number in config.job.items():
        ctypes.set_errno(0)
        # -1 and bad pointers: none of these could succeed, but without a filter they say so
        # with another error than EPERM.
        result = libc.syscall(number, *(ctypes.c_long(-1),) * 6)
        found[name] = errno.errorcode.get(ctypes.get_errno(), str(result))
    return found
    """
    found = run_probe(choose("seccomp"), body, config=SYSCALLS_X86_64)
    assert found == dict.fromkeys(SYSCALLS_X86_64, "EPERM")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86-64")
def test_what_is_in_no_table_does_not_exist(
    choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    body = """
    import ctypes, errno
    libc = ctypes.CDLL(None, use_errno=True)
    found = {}
    calls = {
        "clone3": (435, 0, 0), "openat2": (437, -1, 0), "future": (4000, 0, 0),
        "ioctl TIOCSTI": (16, 0, 0x5412), "ioctl TIOCLINUX": (16, 0, 0x541C),
        # The kernel reads 32 bits of an ioctl's number: a filter on 64 could be fooled.
        "ioctl TIOCSTI with high bits": (16, 0, (1 << 32) | 0x5412),
        "prctl PR_SET_DUMPABLE": (157, 4, 1), "prctl PR_SET_PTRACER": (157, 0x59616D61, -1),
        "prctl PR_SET_DUMPABLE with high bits": (157, (1 << 32) | 4, 1),
        "clone with CLONE_NEWUSER and CLONE_THREAD": (56, 0x10010000, 0),
    }
    for name, (number, *arguments) in calls.items():
        ctypes.set_errno(0)
        result = libc.syscall(number, *[ctypes.c_long(a) for a in arguments], 0, 0, 0)
        found[name] = errno.errorcode.get(ctypes.get_errno(), str(result))
    return found
    """
    found = run_probe(choose("seccomp"), body)
    assert found == dict.fromkeys(found, "ENOSYS")
    assert len(found) == 10


def test_only_the_x86_64_way_of_calling_is_left(
    choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("x32 numbers are an x86-64 matter")
    body = """
    import ctypes
    ctypes.CDLL(None).syscall(0x40000000 | 39)
    return {}
    """
    with pytest.raises(EnclaveError, match="foreign architecture"):
        run_probe(choose("seccomp"), body)


@pytest.mark.parametrize("name", ["none", "inner", "all"])
def test_numerical_libraries_run_with_threads(
    name: str, choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    body = """
    import threading, concurrent.futures, asyncio
    import numpy, pyarrow, pyarrow.compute
    a = numpy.random.default_rng(0).normal(size=(300, 300))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        traces = list(pool.map(lambda _: float(numpy.trace(a @ a)), range(8)))
    table = pyarrow.table({"x": list(range(1000))})
    async def nap():
        await asyncio.sleep(0.001)
        return 1
    return {
        "same": len(set(traces)) == 1,
        "sum": pyarrow.compute.sum(table["x"]).as_py(),
        "async": asyncio.run(nap()),
    }
    """
    assert run_probe(choose(name), body) == {"same": True, "sum": 499500, "async": 1}


def test_torch_trains_in_the_whole_sandbox(
    choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    pytest.importorskip("torch", reason="needs the PyPI package torch")
    body = """
    import torch
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(144, 2)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters())
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 2, (64,))
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    path = config.paths["outputs"] / "model.pt"
    torch.save(model.state_dict(), path)
    torch.load(path, weights_only=True)
    return {"fell": losses[-1] < losses[0], "threads": torch.get_num_threads()}
    """
    found = run_probe(choose("all"), body)
    assert found["fell"]


def test_keys_find_secret_memory_in_the_whole_sandbox(
    choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    body = """
    from cenacle.crypto.memory import SecretBytes
    with SecretBytes.random() as key:
        return {"protection": key.protection, "length": len(key.view())}
    """
    outside = run_probe(choose("none"), body)
    assert run_probe(choose("all"), body) == outside
