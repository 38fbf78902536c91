"""Programs in real enclaves: what they can do, what they cannot, what leaves when they fail."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import safetensors.numpy

from cenacle.enclave.channel import Message, Progress
from cenacle.enclave.launcher import RunningEnclave
from cenacle.enclave.sandbox import plan
from cenacle.errors import EnclaveError, RefusedError
from tests.support.house import House, Outcome, Sealed, patient_rows

CANARY = "canary-271828"

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("program_layers")]


@dataclass(frozen=True)
class Lab:
    """Runs programs on one hospital's table and on tensors."""

    house: House
    folder: Path

    def job(
        self, source: str, outputs: Mapping[str, str], *, entry: str = "main:run", **extra: Any
    ) -> tuple[str, dict[str, Sealed]]:
        """A signed contract of a new program on freshly sealed data."""
        program = self.house.program(source, data="a file beside the code")
        approved = [program.asset.package]
        assets = {
            "table": self.house.seal("hospital-a", self.folder / "t.csv", programs=approved),
            "tensors": self.house.seal("hospital-b", self.folder / "x.npz", programs=approved),
            "program": program,
        }
        job = {
            "type": "program",
            "program": "program",
            "entry": entry,
            "parameters": {"columns": ["age", "dose"], "threshold": 0.5},
            **extra,
        }
        return self.house.agree(self.house.contract(assets, job, outputs)), assets

    def run(self, source: str, outputs: Mapping[str, str], **options: Any) -> Outcome:
        digest, assets = self.job(source, outputs, **options)
        return self.house.run(digest, assets)


@pytest.fixture(scope="module")
def lab(house: House) -> Lab:
    folder = house.folder / "plain"
    folder.mkdir()
    (folder / "t.csv").write_text(patient_rows(50))
    np.savez(folder / "x.npz", images=np.arange(24.0).reshape(4, 6), labels=np.arange(4))
    return Lab(house, folder)


_GOOD = """
import pkgutil
import numpy as np
import pyarrow as pa

def run(ctx):
    assert set(ctx.assets) == {"table", "tensors"}
    table = ctx.assets["table"].read(ctx.parameters["columns"])
    images = np.asarray(ctx.assets["tensors"].read("images"))
    for step in range(1, 5001):
        ctx.progress(step, 5000)
    age = table.column("age").to_numpy()
    ctx.output("weights", {
        "mean": images.mean(axis=0), "scalar": np.float32(3), "turned": images.T[::2],
        "big": images[:1].astype(">f8"),
    })
    ctx.output("numbers", {"rows": table.num_rows, "mean_age": round(float(age.mean()), 6),
                           "kinds": ctx.outputs})
    ctx.output("rows", pa.table({"over": pa.array(age > ctx.parameters["threshold"])}))
    ctx.output("report", pkgutil.get_data("main", "words.txt"))
"""


def test_a_program_reads_by_name_reports_and_gives_all_four_kinds(lab: Lab) -> None:
    outputs = {"weights": "model", "numbers": "metrics", "rows": "table", "report": "file"}
    outcome = lab.run(_GOOD, outputs)
    found = lab.house.verify(outcome.receipt).receipt
    assert [output.name for output in found.outputs] == list(outputs)
    assert set(found.inputs) == {"table", "tensors", "program"}

    images = np.arange(24.0).reshape(4, 6)
    weights = safetensors.numpy.load(lab.house.open(outcome, "weights"))
    assert np.array_equal(weights["mean"], images.mean(axis=0))
    assert np.array_equal(weights["turned"], images.T[::2])
    assert np.array_equal(weights["big"], images[:1])
    assert weights["scalar"].shape == ()

    ages = [float(line.split(",")[0]) for line in patient_rows(50).splitlines()[1:]]
    numbers = lab.house.metrics(outcome, "numbers")
    assert numbers == {"rows": 50, "mean_age": round(sum(ages) / 50, 6), "kinds": outputs}
    table = pa.ipc.open_file(io.BytesIO(lab.house.open(outcome, "rows"))).read_all()
    assert table.column("over").to_pylist() == [age > 0.5 for age in ages]
    assert lab.house.open(outcome, "report") == b"a file beside the code"
    # 5000 calls of ctx.progress leave as a thousand steps.
    assert outcome.progress[-1] == (1000, 1000)
    assert len(outcome.progress) == 1001


_ATTACKS = """
import ctypes, glob, json, os, signal, socket, subprocess, sys, threading

found = {}

def attempt(name):
    def decorate(call):
        try:
            found[name] = "allowed: " + repr(call())[:200]
        except BaseException as error:
            found[name] = type(error).__name__
        return call
    return decorate

def run(ctx):
    folders = ctx.parameters["folders"]
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number, *arguments):
        result = libc.syscall(number, *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), "refused")
        return result

    for family in ("AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_PACKET", "AF_VSOCK"):
        for kind in ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW"):
            attempt(f"socket {family} {kind}")(
                lambda: socket.socket(getattr(socket, family), getattr(socket, kind)))
    attempt("socketpair")(socket.socketpair)
    attempt("connect on the agent's connection")(
        lambda: [socket.socket(fileno=os.dup(fd)).connect(folders["relay"])
                 for fd in range(3, 20) if os.path.exists(f"/proc/self/fd/{fd}")])

    def in_a_thread():
        box = []
        def body():
            try:
                box.append(socket.socket())
            except BaseException as error:
                box.append(error)
        thread = threading.Thread(target=body); thread.start(); thread.join()
        if isinstance(box[0], BaseException):
            raise box[0]
    attempt("socket in a thread")(in_a_thread)

    for name in ("outputs", "checkpoints"):
        folder = folders[name]
        attempt(f"write into {name}")(lambda: open(folder + "/leak", "w").write("x"))
        attempt(f"make a folder in {name}")(lambda: os.mkdir(folder + "/leak"))
        attempt(f"list {name}")(lambda: os.listdir(folder))
        attempt(f"link into {name}")(lambda: os.symlink("record", folder + "/leak"))
        attempt(f"fifo in {name}")(lambda: os.mkfifo(folder + "/leak"))
    for place in ("/tmp", "/dev/shm", "/var/tmp", "/", "/cenacle", "/run", "/proc/self"):
        attempt(f"write into {place}")(lambda: open(place + "/leak", "w").write("x"))
    attempt("write to the sealed file")(lambda: open(folders["asset"], "r+b").write(b"x"))
    attempt("truncate the sealed file")(lambda: os.truncate(folders["asset"], 0))
    attempt("a file in memory")(lambda: os.memfd_create("x"))

    for path in ("installation", "relay"):
        attempt(f"read the {path}")(lambda: open(folders[path], "rb").read())
    for path in ("/etc/passwd", "/etc/hostname", "/root", "/home", "/var/log",
                 folders["home"], folders["secret"]):
        attempt(f"read {path}")(
            lambda: os.listdir(path) if os.path.isdir(path) else open(path).read())

    others = {os.getppid(), 1, *range(2, 40)} - {os.getpid()}
    attempt("list processes")(lambda: others.update(map(int, filter(str.isdigit,
                                                                    os.listdir("/proc")))))
    others -= {int(thread) for thread in os.listdir("/proc/self/task")}
    for name in ("mem", "maps", "environ", "cmdline", "fd", "auxv", "root", "cwd", "stack",
                 "task", "syscall"):
        def peek():
            got = []
            for pid in others:
                path = f"/proc/{pid}/{name}"
                try:
                    got.append(os.readlink(path) if name in ("root", "cwd")
                               else os.listdir(path) if name in ("fd", "task")
                               else open(path, "rb").read(64))
                except OSError:
                    pass
            if not got:
                raise PermissionError
            return got
        attempt(f"the agent's {name}")(peek)
    attempt("ptrace")(lambda: call(101, 16, os.getppid(), 0, 0))
    attempt("process_vm_readv")(lambda: call(310, os.getppid(), 0, 0, 0, 0, 0))
    attempt("pidfd_open")(lambda: call(434, os.getppid(), 0))
    attempt("kcmp")(lambda: call(312, os.getpid(), os.getppid(), 0, 0, 0))
    attempt("kill the agent")(lambda: os.kill(os.getppid(), signal.SIGKILL))
    attempt("kill the group")(lambda: os.kill(0, signal.SIGKILL))
    attempt("kill everybody")(lambda: os.kill(-1, signal.SIGKILL))
    attempt("become dumpable")(lambda: libc.prctl(4, 1, 0, 0, 0) and 1 / 0)

    attempt("execve")(lambda: os.execv(sys.executable, [sys.executable, "-c", ""]))
    attempt("fork")(os.fork)
    attempt("subprocess")(lambda: subprocess.run(["/bin/true"]))
    attempt("unshare")(lambda: call(272, 0x10000000))
    attempt("mount")(lambda: call(165, b"none", b"/tmp", b"tmpfs", 0, 0))
    attempt("bpf")(lambda: call(321, 0, 0, 0))
    attempt("io_uring")(lambda: call(425, 4, 0))
    attempt("userfaultfd")(lambda: call(323, 0))
    attempt("keyctl")(lambda: call(250, 0, -1, 0, 0, 0))
    attempt("shmget")(lambda: call(29, 1, 4096, 0o1666))
    attempt("syslog")(lambda: call(103, 3, 0, 0))
    attempt("raise the core limit")(lambda: __import__("resource").setrlimit(4, (1 << 20, 1 << 20)))
    attempt("type into the terminal")(lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"))

    environment = dict(os.environ)
    streams = [os.readlink(f"/proc/self/fd/{n}") for n in range(3)]
    print("canary-271828"); sys.stderr.write("canary-271828"); os.write(1, b"canary-271828")
    fds = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            fds[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            pass
    keys = [name for name in sys.modules if name.startswith(("cenacle.broker", "cenacle.enclave"))]
    ctx.output("found", {"attempts": found, "environment": environment, "streams": streams,
                         "fds": fds, "modules": keys})
"""


@pytest.fixture(scope="module")
def attacked(lab: Lab) -> dict[str, Any]:
    """What a program that tries everything found out."""
    house = lab.house
    secret = house.folder / "secret.txt"
    secret.write_text("another hospital's file")
    house.operator.installation()
    wrapped = "bubblewrap" in house.plan.layers
    out = house.path("results")
    inside = Path("/cenacle") if wrapped else None
    folders = {
        "outputs": str(inside / "outputs" if inside else out),
        "checkpoints": str(inside / "checkpoints" if inside else out / "checkpoints"),
        "installation": str(
            inside / "installation" if inside else house.operator.installation_path
        ),
        "relay": str(inside / "broker_socket" if inside else "/nonexistent"),
        "asset": str(inside / "asset-0" if inside else secret),
        "home": str(Path.home()),
        "secret": str(secret),
    }
    digest, assets = lab.job(_ATTACKS, {"found": "metrics"}, parameters={"folders": folders})
    outcome = house.run(digest, assets, out)
    found = house.metrics(outcome, "found")
    found["left on disk"] = sorted(p.name for p in out.rglob("*"))
    return found


def test_a_program_reaches_nothing_but_its_assets(attacked: dict[str, Any]) -> None:
    allowed = {
        name: what for name, what in attacked["attempts"].items() if what.startswith("allowed")
    }
    assert allowed == {}
    assert len(attacked["attempts"]) > 60


def test_a_program_sees_an_environment_and_descriptors_without_anything_of_the_host(
    attacked: dict[str, Any],
) -> None:
    assert attacked["streams"] == ["/dev/null"] * 3
    kinds = sorted(where.split(":")[0] for where in attacked["fds"].values())
    # Three null streams, the connection to the agent, and the sealed files; nothing else.
    assert "pipe" not in kinds
    assert kinds.count("socket") == 1
    assert not set(attacked["environment"]) & {
        "CENACLE_HOME",
        "USER",
        "SSH_AUTH_SOCK",
        "PYTEST_CURRENT_TEST",
    }
    # The agent's code (client of the broker, session) never ran in this process.
    assert "cenacle.enclave.session" not in attacked["modules"]
    assert "cenacle.broker.client" not in attacked["modules"]


def test_a_program_leaves_nothing_on_disk_but_the_sealed_output(attacked: dict[str, Any]) -> None:
    assert attacked["left on disk"] == ["checkpoints", "found.sealed", "receipt.json"]


_TALKATIVE = """
import ctypes, logging, os, sys, warnings
WORDS = "canary-271828"
class {name}(Exception):
    pass
def run(ctx):
    print(WORDS, flush=True); print(WORDS, file=sys.stderr, flush=True)
    os.write(1, WORDS.encode()); os.write(2, WORDS.encode())
    ctypes.CDLL(None).puts(WORDS.encode()); ctypes.CDLL(None).fflush(None)
    logging.getLogger().error(WORDS); warnings.warn(WORDS)
    raise {name}(WORDS)
"""


def test_nothing_of_a_program_that_fails_leaves_but_that_it_failed(
    lab: Lab, capfd: pytest.CaptureFixture[str]
) -> None:
    digest, assets = lab.job(_TALKATIVE.format(name="Canary271828"), {"report": "file"})
    outcome = lab.house.run(digest, assets)
    assert isinstance(outcome.error, EnclaveError)
    assert outcome.error.what == "the program failed while it ran"
    assert outcome.error.found == "an error of its own"
    assert "271828" not in str(outcome.error.to_dict())
    captured = capfd.readouterr()
    assert "271828" not in captured.out + captured.err
    assert sorted(p.name for p in outcome.out.rglob("*")) == ["checkpoints"]
    # The use stays charged: the program had read the data.
    assert lab.house.uses(assets["table"]) == 1
    assert lab.house.open_run(digest) is not None


_GARBAGE = """
import os
def run(ctx):
    for fd in range(3, 30):
        try:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                os.write(fd, b"canary-271828" * 10)
        except OSError:
            continue
    os._exit(0)
"""


@pytest.mark.slow
def test_a_program_that_writes_over_its_connection_ends_the_job(lab: Lab) -> None:
    outcome = lab.run(_GARBAGE, {"report": "file"})
    assert isinstance(outcome.error, EnclaveError)
    assert "broke the protocol" in outcome.error.what
    assert "271828" not in str(outcome.error.to_dict())


_WAITS = """
import time
def run(ctx):
    for step in range(1, 11):
        ctx.progress(step, 10)
        time.sleep(0.02)
    ctx.output("report", b"done")
"""


@pytest.mark.slow
def test_a_program_that_was_killed_runs_again_under_the_same_use(lab: Lab) -> None:
    digest, assets = lab.job(_WAITS, {"report": "file"})
    out = lab.house.path("results")

    def kill(enclave: RunningEnclave, message: Message) -> None:
        if message == Progress(3, 10):
            enclave.kill()

    first = lab.house.run(digest, assets, out, watch=kill)
    assert isinstance(first.error, EnclaveError)
    assert lab.house.uses(assets["table"]) == 1
    second = lab.house.run(digest, assets, out, resume=lab.house.open_run(digest))
    assert lab.house.open(second, "report") == b"done"
    assert lab.house.verify(second.receipt).receipt.resumed == 1
    assert lab.house.uses(assets["table"]) == 1
    assert lab.house.open_run(digest) is None


def test_a_program_that_an_owner_did_not_approve_gets_no_key(lab: Lab) -> None:
    house = lab.house
    approved, other = (house.program(f"def run(ctx): {n}") for n in range(2))
    assets = {
        "table": house.seal("hospital-a", lab.folder / "t.csv", programs=[approved.asset.package]),
        "program": other,
    }
    job = {"type": "program", "program": "program"}
    digest = house.agree(house.contract(assets, job, {"report": "file"}))
    outcome = house.run(digest, assets)
    assert isinstance(outcome.error, RefusedError)
    (clause,) = outcome.error.clauses
    assert (clause["subject"], clause["name"]) == ("asset table of hospital-a", "program")
    assert house.uses(assets["table"]) == 0
    assert outcome.stages == ["attesting", "keys"]


@pytest.mark.parametrize("missing", ["landlock", pytest.param("seccomp", marks=pytest.mark.slow)])
def test_a_program_does_not_run_where_the_sandbox_cannot_confine_it(lab: Lab, missing: str) -> None:
    chosen = plan([name for name in lab.house.plan.layers if name != missing])
    program = lab.house.program("def run(ctx): ctx.output('report', b'')")
    assets = {
        "table": lab.house.seal(
            "hospital-a", lab.folder / "t.csv", programs=[program.asset.package]
        ),
        "program": program,
    }
    contract = lab.house.contract(
        assets,
        {"type": "program", "program": "program"},
        {"report": "file"},
        enclave=lab.house.enclave(chosen),
    )
    outcome = lab.house.run(lab.house.agree(contract), assets, chosen=chosen)
    assert isinstance(outcome.error, EnclaveError)
    assert outcome.error.found == f"no layer {missing}"
    assert outcome.stages == []
    assert lab.house.uses(assets["table"]) == 0
