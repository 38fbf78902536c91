"""Process workers: hostile, dying, hanging, and what they can reach."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cenacle.accelerators import (
    InlineAccelerator,
    Operation,
    ProcessAccelerator,
    SharedStaging,
    process,
)
from cenacle.accelerators.wire import Frames, clean, frame
from cenacle.errors import AcceleratorError, InputError

pytestmark = pytest.mark.processes

Start = Callable[..., ProcessAccelerator]
_PRODUCT = Operation("matmul")


def _ask(accelerator: ProcessAccelerator, timeout: float = 60) -> torch.Tensor:
    accelerator.put(1, torch.eye(2))
    accelerator.call(_PRODUCT, 2, [1, 1])
    return accelerator.get(2).wait(timeout)


@pytest.fixture(scope="module")
def worker() -> Iterator[ProcessAccelerator]:
    """An honest one for all tests that leave it alive: each takes seconds to start."""
    made = ProcessAccelerator("worker", SharedStaging(region_bytes=2 << 20), threads=1)
    yield made
    made.close()


def _gone(pidfd: int, within: float = 20.0) -> bool:
    return bool(select.select([pidfd], [], [], within)[0])


def _descriptors() -> dict[str, str]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[entry.name] = str(entry.readlink())
        except FileNotFoundError:  # the listing's own
            continue
    return found


# ---------------------------------------------------------------------- hostile workers

_GREETINGS = [
    pytest.param("send(b'no json')", "no JSON", id="garbage"),
    pytest.param("send([1, 2])", "no object", id="array"),
    pytest.param("send({'hello': 2, 'layers': [], 'device': 'x'})", "no greeting", id="version"),
    pytest.param("send({'hello': 1, 'layers': ['x'], 'device': 'x'})", "no greeting", id="layers"),
    pytest.param("send({'hello': 1, 'layers': [], 'device': 5})", "no greeting", id="device"),
    pytest.param(
        "send({'hello': 1, 'layers': [], 'device': 'x', 'more': 1})", "no greeting", id="more"
    ),
    pytest.param("send({'error': 'no' + chr(27) + '[2J'})", r"could not start: no\?\[2J", id="err"),
    pytest.param("send(b'{\"hello\": ' + b'[' * 4000)", "no JSON", id="nested"),
    pytest.param("os._exit(7)", "status 7", id="exit"),
]


@pytest.mark.parametrize(("lines", "reason"), _GREETINGS)
def test_a_wrong_greeting_ends_the_worker(
    liar: Callable[..., ProcessAccelerator], lines: str, reason: str
) -> None:
    accelerator = liar(lines, greets=False)
    with pytest.raises(AcceleratorError, match=reason) as caught:
        _ask(accelerator)
    assert caught.value.found is not None
    assert caught.value.found.isprintable()


_ANSWERS = [
    pytest.param("send(b'\\xff\\x00')", "no JSON", id="garbage"),
    pytest.param("send(b'')", "no JSON", id="empty"),
    pytest.param("connection.sendall(b'\\xff' * 4)", "4294967295 bytes", id="giant-length"),
    pytest.param("connection.sendall(struct.pack('>I', 4097))", "4097 bytes", id="too-long"),
    pytest.param("connection.sendall(b'\\0\\0\\0\\x20{'); os._exit(0)", "middle", id="truncated"),
    pytest.param("send(b'[' * 4000)", "no JSON", id="nested"),
    pytest.param("send(b'9' * 4090)", "no object", id="number"),
    pytest.param("send({'ticket': 2, 'seconds': 0})", "out of order", id="later-ticket"),
    pytest.param("send({'ticket': True, 'seconds': 0})", "out of order", id="bool-ticket"),
    pytest.param("send({'ticket': '1', 'seconds': 0})", "out of order", id="text-ticket"),
    pytest.param("send({'seconds': 0})", "out of order", id="no-ticket"),
    pytest.param("send({'ticket': 1})", "unknown fields", id="no-seconds"),
    pytest.param("send({'ticket': 1, 'seconds': -1})", "unknown fields", id="negative"),
    pytest.param("send({'ticket': 1, 'seconds': 1e300})", "unknown fields", id="huge"),
    pytest.param("send({'ticket': 1, 'seconds': True})", "unknown fields", id="bool-seconds"),
    pytest.param('send(b\'{"ticket": 1, "seconds": NaN}\')', "no JSON", id="nan-seconds"),
    pytest.param("send({'ticket': 1, 'error': 5})", "unknown fields", id="error-number"),
    pytest.param(
        "send({'ticket': 1, 'seconds': 0, 'shape': [9, 9]})", "unknown fields", id="a-shape"
    ),
    pytest.param(
        "send({'ticket': 1, 'seconds': 0, 'offset': 1 << 40})", "unknown fields", id="an-offset"
    ),
    pytest.param("os.kill(os.getpid(), 9)", "SIGKILL", id="killed"),
    pytest.param("os.kill(os.getpid(), 11)", "SIGSEGV", id="crashed"),
    pytest.param("os._exit(3)", "status 3", id="exit"),
    pytest.param("connection.close()", "closed its connection", id="closed"),
]


@pytest.mark.parametrize(("lines", "reason"), _ANSWERS)
def test_a_wrong_answer_ends_the_worker(
    liar: Callable[..., ProcessAccelerator], lines: str, reason: str
) -> None:
    accelerator = liar("asked()\n" + lines)
    pidfd = os.pidfd_open(accelerator.pid)
    try:
        with pytest.raises(AcceleratorError, match=reason):
            _ask(accelerator)
        assert _gone(pidfd), "it is not left running"
    finally:
        os.close(pidfd)
    for again in (lambda: accelerator.put(5, torch.ones(1)), lambda: accelerator.get(2)):
        with pytest.raises(AcceleratorError, match="liar is gone"):
            again()
    accelerator.drop([1, 2])


def test_an_answer_too_many_ends_the_worker(liar: Callable[..., ProcessAccelerator]) -> None:
    accelerator = liar("""
        ticket = asked()[0]
        answer = json.dumps({"ticket": ticket, "seconds": 0}).encode()
        framed = struct.pack(">I", len(answer)) + answer
        connection.sendall(framed + framed)
    """)
    with pytest.raises(AcceleratorError, match="nobody asked for"):
        _ask(accelerator)


def test_an_error_is_cleaned_and_cut(liar: Callable[..., ProcessAccelerator]) -> None:
    accelerator = liar(r"""
        send({"ticket": asked()[0], "error": "\x1b]0;owned\x07\n" + "a" * 3000})
    """)
    with pytest.raises(AcceleratorError) as caught:
        _ask(accelerator)
    assert caught.value.found is not None
    assert caught.value.found.startswith("?]0;owned??aaa")
    assert len(caught.value.found) == 300


def test_descriptors_that_a_worker_sends_are_not_taken(
    liar: Callable[..., ProcessAccelerator],
) -> None:
    accelerator = liar("""
        ticket = asked()[0]
        body = json.dumps({"ticket": ticket, "seconds": 0}).encode()
        socket.send_fds(connection, [struct.pack(">I", len(body)) + body], [0, 1, 2])
    """)
    accelerator.describe()
    before = len(_descriptors())
    accelerator.put(1, torch.ones(2))
    accelerator.get(1).wait(60)
    assert len(_descriptors()) <= before + 2  # the two regions


def test_a_worker_cannot_alter_what_it_was_sent(
    liar: Callable[..., ProcessAccelerator], tmp_path: Path
) -> None:
    """Every way to write that a process with the descriptor has, and all of them fail."""
    accelerator = liar(f"""
        import ctypes, mmap
        ticket, _, _, _, _, _ = asked()
        fd, size, writable = next(entry for entry in arena.values() if not entry[2])
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
        address = libc.mmap(None, size, 1, 1, fd, 0)
        done = []

        def attempt(name, action):
            try:
                if action() not in (-1, ctypes.c_void_p(-1).value):
                    done.append(name)
            except (OSError, ValueError):
                pass

        def through_proc():
            with open("/proc/self/mem", "r+b", buffering=0) as file:
                file.seek(address)
                return file.write(b"x")

        attempt("map", lambda: libc.mmap(None, size, 3, 1, fd, 0))
        attempt("reopen", lambda: libc.mmap(
            None, size, 3, 1, os.open("/proc/self/fd/%d" % fd, os.O_RDWR), 0))
        attempt("mprotect", lambda: libc.mprotect(address, size, 3))
        attempt("write", lambda: os.pwrite(fd, b"x", 0))
        attempt("mem", through_proc)
        attempt("remove", lambda: libc.madvise(address, size, 9))
        attempt("punch", lambda: libc.fallocate(fd, 3, 0, size))
        attempt("shrink", lambda: os.ftruncate(fd, 0) or 0)
        attempt("grow", lambda: os.ftruncate(fd, 2 * size) or 0)
        results = next(entry for entry in arena.values() if entry[2])
        attempt("shrink results", lambda: os.ftruncate(results[0], 0) or 0)
        attempt("control", lambda: libc.mmap(None, size, 3, 2, fd, 0))  # private: a copy
        open({str(tmp_path / "done")!r}, "w").write(",".join(done))
        send({{"ticket": ticket, "seconds": 0}})
    """)
    value = accelerator.staging.empty((3,), torch.float64).fill_(1.5)
    accelerator.put(1, value)
    accelerator.get(1).wait(60)
    assert (tmp_path / "done").read_text() == "control"
    assert torch.equal(value, torch.full((3,), 1.5, dtype=torch.float64))


# ---------------------------------------------------------------------- death and silence


def test_killed_in_the_middle(start: Start) -> None:
    accelerator = start()
    assert torch.equal(_ask(accelerator), torch.eye(2))
    accelerator.put(1, torch.randn(2000, 2000, dtype=torch.float64))
    accelerator.call(_PRODUCT, 2, [1, 1])
    pending = accelerator.get(2)
    os.kill(accelerator.pid, signal.SIGKILL)
    with pytest.raises(AcceleratorError, match=r"worker is gone.*SIGKILL"):
        pending.wait(60)
    with pytest.raises(AcceleratorError, match="SIGKILL"):
        pending.wait(60)


def test_stopped_it_does_not_answer_and_blocks_nobody(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = start()
    _ask(accelerator)
    os.kill(accelerator.pid, signal.SIGSTOP)
    with pytest.raises(AcceleratorError, match="does not answer"):
        _ask(accelerator, timeout=0.3)
    monkeypatch.setattr(process, "_MAX_WAITING_BYTES", 100_000)

    def flood() -> None:
        for handle in range(100_000):
            accelerator.put(handle, torch.ones(1))
            accelerator.get(handle)

    with pytest.raises(AcceleratorError, match="takes no more requests"):
        flood()


def test_what_a_stopped_worker_may_read_is_not_used_again(worker: ProcessAccelerator) -> None:
    accelerator = worker
    _ask(accelerator)
    accelerator.drop([1, 2])
    os.kill(accelerator.pid, signal.SIGSTOP)
    pending = []
    for k in range(5):
        accelerator.put(10, torch.full((4, 4), float(k)))
        accelerator.call(_PRODUCT, 11, [10, 10])
        pending.append(accelerator.get(11))
        accelerator.drop([10, 11])
    os.kill(accelerator.pid, signal.SIGCONT)
    for k, one in enumerate(pending):
        assert torch.equal(one.wait(60), torch.full((4, 4), 4.0 * k * k))


def test_silence_at_the_start(liar: Callable[..., ProcessAccelerator]) -> None:
    accelerator = liar("", greets=False, start_timeout=0.3)
    with pytest.raises(AcceleratorError, match="does not answer"):
        _ask(accelerator)


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(AcceleratorError, match="cannot be started"):
        ProcessAccelerator("worker", command=("/nonexistent/program",))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there(start: Start) -> None:
    with pytest.raises(AcceleratorError, match="could not start"):
        _ask(start(device="cuda"))


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"device": "cuda:x"}, {"threads": 0}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        ProcessAccelerator("worker", **options)


def test_tensors_that_cannot_be_sent(worker: ProcessAccelerator) -> None:
    with pytest.raises(InputError, match="cannot be sent"):
        worker.put(1, torch.zeros(2, dtype=torch.complex64))


# ---------------------------------------------------------------------- nothing is left


def test_closing_leaves_nothing(start: Start) -> None:
    gc.collect()
    before, threads = _descriptors(), threading.active_count()
    accelerator = start()
    pidfd = os.pidfd_open(accelerator.pid)
    result = _ask(accelerator)
    accelerator.put(7, torch.ones(10))
    pending = accelerator.get(7)
    accelerator.close()
    accelerator.close()
    assert _gone(pidfd)
    os.close(pidfd)
    with pytest.raises(ProcessLookupError):  # reaped: no zombie either
        os.kill(accelerator.pid, 0)
    with pytest.raises(AcceleratorError, match="closed"):
        pending.wait(1)
    with pytest.raises(AcceleratorError, match="closed"):
        accelerator.put(1, torch.ones(1))
    assert torch.equal(result, torch.eye(2)), "results live as long as they are referred to"
    del result, pending
    assert _descriptors() == before
    assert threading.active_count() == threads


def test_a_lost_worker_leaves_nothing(liar: Callable[..., ProcessAccelerator]) -> None:
    gc.collect()
    before = _descriptors()
    accelerator = liar("asked(); os._exit(1)")
    with pytest.raises(AcceleratorError):
        _ask(accelerator)
    accelerator.close()
    assert _descriptors() == before


def test_forgotten_without_being_closed() -> None:
    gc.collect()  # what other tests left
    before = _descriptors()
    sleeps = (sys.executable, "-c", "import time; time.sleep(600)")
    accelerator = ProcessAccelerator("worker", command=sleeps)
    pidfd = os.pidfd_open(accelerator.pid)
    gone = weakref.ref(accelerator)
    del accelerator
    gc.collect()
    assert gone() is None
    assert _gone(pidfd)
    os.close(pidfd)
    assert _descriptors() == before


def test_the_worker_dies_with_the_enclave() -> None:
    program = """
import sys, torch
from cenacle.accelerators import ProcessAccelerator
accelerator = ProcessAccelerator("worker")
accelerator.put(1, torch.ones(1))
accelerator.get(1).wait(60)
sys.stdout.write(f"{accelerator.pid}\\n")
sys.stdout.flush()
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as enclave:
        assert enclave.stdout is not None
        pidfd = os.pidfd_open(int(enclave.stdout.readline()))
        enclave.kill()
        assert _gone(pidfd)
        os.close(pidfd)


def test_it_survives_the_thread_that_made_it(start: Start) -> None:
    made: list[ProcessAccelerator] = []
    thread = threading.Thread(target=lambda: made.append(start()))
    thread.start()
    thread.join()
    assert torch.equal(_ask(made[0]), torch.eye(2))


def test_memory_does_not_grow(worker: ProcessAccelerator) -> None:
    accelerator = worker

    def step() -> None:
        for size in (10, 500):
            accelerator.put(1, torch.ones(size, size))
            accelerator.call(_PRODUCT, 2, [1, 1])
            pending = accelerator.get(2)
            accelerator.drop([1, 2])
            pending.wait(60)

    for _ in range(3):
        step()
    used = accelerator.staging.arena.bytes, accelerator._results.bytes
    for _ in range(50):
        step()
    assert (accelerator.staging.arena.bytes, accelerator._results.bytes) == used


def test_workers_share_staging_and_copy_nothing(start: Start) -> None:
    staging = SharedStaging()
    workers = [start(f"worker-{i}", staging=staging) for i in range(2)]
    value = staging.empty((6, 5), torch.float32).normal_()
    used = staging.arena.bytes
    for i, worker in enumerate(workers):
        worker.put(1, value[3 * i : 3 * i + 3])
        worker.put(2, value)
        worker.call(Operation("matmul", {"transpose_b": True}), 3, [1, 2])
    found = [worker.get(3) for worker in workers]
    plain = torch.cat([one.wait(60) for one in found])
    torch.testing.assert_close(plain, value @ value.T)
    assert staging.arena.bytes == used
    workers[0].close()
    assert staging.empty((2,), torch.float32).numel() == 2
    workers[1].put(4, staging.empty((2,), torch.float32).fill_(1))
    assert torch.equal(workers[1].get(4).wait(60), torch.ones(2))
    staging.close()


def test_many_regions_cross(worker: ProcessAccelerator) -> None:
    accelerator = worker
    values = [accelerator.staging.empty((2 << 20,), torch.uint8).fill_(k) for k in range(20)]
    for handle, value in enumerate(values):
        accelerator.put(handle, value)
    for handle, value in enumerate(values):
        assert torch.equal(accelerator.get(handle).wait(60), value)
    accelerator.drop(range(20))


# ---------------------------------------------------------------------- what it can reach


def test_it_is_told_nothing_of_the_host(
    liar: Callable[..., ProcessAccelerator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CENACLE_SECRET", "hunter2")
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    accelerator = liar(f"""
        seen = {{
            "environment": dict(os.environ),
            "descriptors": [
                os.readlink("/proc/self/fd/" + fd)
                for fd in os.listdir("/proc/self/fd")
                if os.path.exists("/proc/self/fd/" + fd)
            ],
            "group": os.getpgrp() == os.getpid() == os.getsid(0),
            "folder": os.getcwd(),
        }}
        json.dump(seen, open({str(tmp_path / "seen")!r}, "w"))
        send({{"ticket": asked()[0], "seconds": 0}})
    """)
    try:
        accelerator.put(1, torch.ones(1))
        accelerator.get(1).wait(60)
    finally:
        os.close(reader)
        os.close(writer)
    seen = json.loads((tmp_path / "seen").read_text())
    assert "hunter2" not in str(seen)
    assert set(seen["environment"]) <= {
        *("HOME", "LC_ALL", "LOGNAME", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONHASHSEED"),
        *("PYTHONNOUSERSITE", "TORCHINDUCTOR_CACHE_DIR", "PYTHONPATH", "LC_CTYPE"),
    }
    others = [one for one in seen["descriptors"] if one != "/dev/null"]
    assert [one.split(":")[0] for one in others if not one.startswith("/")] == ["socket"]
    assert not [one for one in others if one.startswith("/") and not one.startswith("/proc/")]
    assert seen["group"]
    assert seen["folder"] == "/"


def test_the_worker_imports_neither_keys_nor_brokers() -> None:
    program = """
import sys
from cenacle.accelerators import worker
worker._Server("cpu")
sys.stdout.write(" ".join(m for m in sys.modules if m.partition(".")[0] == "cenacle"))
sys.stdout.write(" " + " ".join(sorted({m.partition(".")[0] for m in sys.modules})))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    names = set(run.stdout.split())
    ours = {name for name in names if name.startswith("cenacle")}
    assert {name.split(".")[1] for name in ours if "." in name} <= {"accelerators", "errors"} | {
        "_lazy"
    }
    assert not names & {"cryptography", "httpx", "fastapi", "sqlalchemy", "pydantic"}


_REACH = """
import ctypes, os, signal, socket, sys
from cenacle.accelerators.confine import confine

layers = confine(os.getppid(), cuda=False)
refused = []


def attempt(name, action):
    try:
        action()
    except OSError:
        refused.append(name)


attempt("tcp", lambda: socket.socket(socket.AF_INET))
attempt("udp", lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("fork", os.fork)
attempt("exec", lambda: os.execv("/bin/true", ["true"]))
attempt("kill", lambda: os.kill(os.getppid(), 0))
attempt("read", lambda: open("/etc/hostname").read())
attempt("list", lambda: os.listdir("/"))
attempt("parent", lambda: open(f"/proc/{os.getppid()}/maps").read())
attempt("write", lambda: open(sys.argv[1], "w").write("x"))
import torch
torch.set_num_threads(2)
a = torch.randn(300, 300)
assert (a @ a).isfinite().all()
sys.stdout.write(",".join(layers) + " " + ",".join(refused))
"""


def test_confinement(tmp_path: Path, program_layers: None) -> None:
    """It computes with threads; it reaches neither network, nor programs, nor files."""
    run = subprocess.run(
        [sys.executable, "-c", _REACH, str(tmp_path / "written")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    layers, refused = run.stdout.split()
    assert layers == "process,landlock,seccomp"
    assert refused == "tcp,udp,unix,fork,exec,kill,read,list,parent,write"


def test_the_layers_that_hold_are_reported(
    worker: ProcessAccelerator, program_layers: None
) -> None:
    assert worker.describe() == "process, cpu, confined by process, landlock, seccomp, 1 thread"


# ---------------------------------------------------------------------- frames


def test_frames_come_in_pieces() -> None:
    frames = Frames(100)
    data = frame([1]) + frame({"a": "b"})
    assert [m for i in range(len(data)) for m in frames.feed(data[i : i + 1])] == [[1], {"a": "b"}]
    assert not frames.partial


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_frames_of_anything_are_read_or_refused(pieces: list[bytes]) -> None:
    frames = Frames(16)
    with contextlib.suppress(ValueError):  # and nothing else
        for piece in pieces:
            for message in frames.feed(piece):
                assert json.dumps(message) is not None


def test_text_of_others_is_cleaned() -> None:
    assert clean("ok\x1b[31m\u202e\n\x00é") == "ok?[31m????"
    assert len(clean("x" * 10_000)) == 300


def test_the_same_result_in_another_process_and_here(worker: ProcessAccelerator) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 3, 17, 13), torch.randn(8, 3, 3, 3)
    geometry = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}
    found = []
    for accelerator in (worker, InlineAccelerator()):
        accelerator.put(1, x[1:])
        accelerator.put(2, w)
        accelerator.call(Operation("conv", geometry), 3, [1, 2])
        found.append(accelerator.get(3).wait(60).clone())
    assert torch.equal(*found)
