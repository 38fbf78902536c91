"""Launching, watching and killing real enclaves."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.channel import Failed, Finished, Message, OutputFile, Progress, Stage
from cenacle.enclave.launcher import (
    Launcher,
    LaunchRequest,
    RunningEnclave,
    launcher,
    launchers,
    register_launcher,
)
from cenacle.enclave.sandbox import SandboxPlan, plan, probe
from cenacle.errors import CenacleError, EnclaveError, InputError, UnavailableError

pytestmark = pytest.mark.processes

PLANS = ("none", "inner", "all")
DIGEST = "sha256:" + "0" * 64
_START = "from cenacle.enclave.sandbox.entry import enclave_main\ndef agent(config, channel):\n"
# Hangs for good, having said that it runs.
HANG = "channel.stage('running')\nimport threading\nthreading.Event().wait()"


def _program(body: str) -> str:
    return _START + textwrap.indent(textwrap.dedent(body), "    ") + "\nenclave_main(agent)"


@pytest.fixture(scope="module")
def plans() -> dict[str, SandboxPlan]:
    works = [row.name for row in probe() if row.missing is None]
    inner = [name for name in works if name != "bubblewrap"]
    return {"none": plan([]), "inner": plan(inner), "all": plan(works)}


Start = Callable[..., RunningEnclave]


@pytest.fixture
def start(plans: dict[str, SandboxPlan]) -> Iterator[Start]:
    """``start(body, plan="all", **request)`` -> a running enclave, killed at the end."""
    with contextlib.ExitStack() as stack:

        def launch(body: str, name: str = "all", **fields: Any) -> RunningEnclave:
            request = LaunchRequest(
                **{
                    "broker": ("127.0.0.1", 1),
                    "plan": plans[name],
                    "argv": ("-c", _program(body)),
                    **fields,
                }
            )
            return stack.enter_context(launcher().launch(request))

        yield launch


def _until_running(enclave: RunningEnclave) -> None:
    for message in enclave.messages():
        if message == Stage("running"):
            return


@contextlib.contextmanager
def _watched(pids: list[int]) -> Iterator[Callable[[], None]]:
    """Handles on processes taken now; the callable waits until all of them are gone."""
    handles = [os.pidfd_open(pid) for pid in pids]

    def wait_gone() -> None:
        for handle in handles:
            assert select.select([handle], [], [], 20)[0], "a process is still alive"

    try:
        yield wait_gone
    finally:
        for handle in handles:
            os.close(handle)


def _tree(pid: int) -> list[int]:
    """The process and all its descendants, from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                text = (entry / "stat").read_text()
                parents[int(entry.name)] = int(text.rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


@pytest.mark.parametrize("name", PLANS)
def test_a_job_from_start_to_end(name: str, start: Start, tmp_path: Path) -> None:
    assets, outputs = tmp_path / "a", tmp_path / "o"
    assets.mkdir()
    outputs.mkdir()
    (assets / "x.sealed").write_bytes(b"ciphertext")
    body = f"""
    from cenacle.enclave.channel import OutputFile
    channel.stage("assets")
    text = (config.paths["assets"] / "x.sealed").read_bytes()
    channel.stage("running")
    channel.progress(1, 2)
    (config.paths["outputs"] / "y.sealed").write_bytes(text + config.job["more"].encode())
    channel.finished([OutputFile("y.sealed", {DIGEST!r})], OutputFile("r.json", {DIGEST!r}))
    """
    config = {"more": "ü" * 1_000_000}  # larger than any pipe
    enclave = start(
        body, name, config=config, read_only={"assets": assets}, writable={"outputs": outputs}
    )
    result = Finished((OutputFile("y.sealed", DIGEST),), OutputFile("r.json", DIGEST))
    expected: list[Message] = [Stage("assets"), Stage("running"), Progress(1, 2), result]
    assert list(enclave.messages()) == expected
    assert list(enclave.messages()) == expected
    assert enclave.wait(20) == enclave.wait() == result
    assert (outputs / "y.sealed").read_bytes() == b"ciphertext" + config["more"].encode()


def test_an_enclave_that_serves_reaches_its_hosts_server_and_the_broker_alone(
    start: Start, plans: dict[str, SandboxPlan], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path(tempfile.mkdtemp(prefix="cenacle-")) / "serving.sock"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, path.parent)
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(1)
        server.settimeout(30)
        enclave = start(
            """
            import socket
            assert set(config.paths) == {"broker_socket", "serving_socket"}
            with socket.socket(socket.AF_UNIX) as s:
                s.connect(str(config.paths["serving_socket"]))
                s.sendmsg([b"an", b"swer"])
                buffer = bytearray(3)
                assert s.recv_into(buffer) == 3 and buffer == b"ask"
            channel.finished()
            """,
            plan=dataclasses.replace(plans["all"], serving=True),
            serving=path,
        )
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            assert connection.recv(6, socket.MSG_WAITALL) == b"answer"
            connection.sendall(b"ask")
            assert enclave.wait(30).outputs == ()


def test_a_single_file_can_be_mounted(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "one.sealed"
    path.write_bytes(b"bytes")
    body = "assert config.paths['one'].read_bytes() == b'bytes'\nchannel.finished()"
    start(body, read_only={"one": path}).wait(20)


def test_the_agent_sees_fixed_paths_inside_bubblewrap(
    start: Start, plans: dict[str, SandboxPlan], tmp_path: Path
) -> None:
    if "bubblewrap" not in plans["all"].layers:
        pytest.skip("needs the Debian package bubblewrap")
    body = """
    assert {n: str(p) for n, p in config.paths.items()} == {
        "assets": "/cenacle/assets", "broker_socket": "/cenacle/broker_socket"
    }
    import os
    assert os.uname().nodename == "enclave" and os.getuid() == 1000
    channel.finished()
    """
    start(body, read_only={"assets": tmp_path}).wait(20)


@pytest.mark.parametrize("name", PLANS)
def test_the_broker_is_reached_through_the_one_socket(name: str, start: Start) -> None:
    body = """
    import socket
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(str(config.paths["broker_socket"]))
        s.sendall(b"hello")
        s.shutdown(socket.SHUT_WR)
        assert s.recv(10) == b"HELLO"
    channel.finished()
    """
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(connection.recv(10).upper())

        thread = threading.Thread(target=answer)
        thread.start()
        start(body, name, broker=server.getsockname()).wait(20)
        thread.join()


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("raise ValueError('patient 17')", "ValueError"),
        ("from cenacle.errors import DataError\nraise DataError('patient 17')", "DataError"),
        ("pass", "agent ended without a result"),
        ("channel.stage('nonsense')", "in order"),
        ("raise MemoryError", "out of memory"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("{}['patient 17']", "KeyError"),
    ],
)
def test_a_failure_inside_arrives_without_data(body: str, found: str, start: Start) -> None:
    enclave = start(body)
    with pytest.raises(EnclaveError, match=found) as caught:
        enclave.wait(20)
    assert "patient" not in str(caught.value)
    (message,) = enclave.messages()
    assert isinstance(message, Failed)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("import os; os._exit(0)", "exit code 0"),
        ("import os; os._exit(9)", "exit code 9"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import os; os.abort()", "SIGABRT"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("import os; os.close(channel._fd); channel._fd = -1; os._exit(0)", "exit code 0"),
    ],
)
@pytest.mark.parametrize("name", ["none", "all"])
def test_a_death_without_a_word_is_one_clear_sentence(
    name: str, body: str, found: str, start: Start
) -> None:
    enclave = start("channel.stage('running')\n" + body, name)
    with pytest.raises(EnclaveError, match=r"enclave (was killed|ended)") as caught:
        list(enclave.messages())
    assert str(caught.value.found) == found
    with pytest.raises(EnclaveError):
        enclave.wait(20)


@pytest.mark.parametrize("name", PLANS)
def test_kill_9_of_the_enclave_is_one_clear_sentence(name: str, start: Start) -> None:
    enclave = start(HANG, name)
    _until_running(enclave)
    tree = _tree(enclave.pid)
    with _watched(tree) as wait_gone:
        os.kill(tree[-1], signal.SIGKILL)
        with pytest.raises(EnclaveError, match="killed by a signal; found SIGKILL"):
            enclave.wait(20)
        wait_gone()


@pytest.mark.parametrize("name", PLANS)
def test_kill_9_of_the_launcher_kills_the_enclave(name: str, tmp_path: Path) -> None:
    layers = {"none": "[]", "all": "None"}.get(
        name, "[r.name for r in probe() if not r.missing and r.name != 'bubblewrap']"
    )
    program = f"""
import sys, threading
from cenacle.enclave.launcher import *
from cenacle.enclave.channel import Stage
from cenacle.enclave.sandbox import plan, probe
request = LaunchRequest(("127.0.0.1", 1), plan({layers}), argv=("-c", sys.argv[1]))
enclaves = []
# From a thread that ends at once: the enclave must live on.
starter = threading.Thread(target=lambda: enclaves.append(launcher().launch(request)))
starter.start(); starter.join()
for message in enclaves[0].messages():
    if message == Stage("running"):
        print(enclaves[0].pid, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, _program(HANG)], stdout=subprocess.PIPE, text=True
    ) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        with _watched(_tree(pid)) as wait_gone:
            host.kill()
            wait_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_ends_the_enclave(number: signal.Signals) -> None:
    # A shell that runs the tests in the background has SIGINT ignored.
    program = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from cenacle.enclave.launcher import *
from cenacle.enclave.sandbox import plan
request = LaunchRequest(("127.0.0.1", 1), plan(), argv=("-c", sys.argv[1]))
with launcher().launch(request) as enclave:
    for message in enclave.messages():
        print(enclave.pid, flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program, _program(HANG)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as host:
        assert host.stdout is not None
        pid = int(host.stdout.readline())
        with _watched(_tree(pid)) as wait_gone:
            host.send_signal(number)
            wait_gone()
        assert host.wait(20) != 0


@pytest.mark.parametrize("name", PLANS)
def test_killing_ends_the_whole_tree_and_says_so(name: str, start: Start) -> None:
    enclave = start(HANG, name)
    _until_running(enclave)
    with _watched(_tree(enclave.pid)) as wait_gone:
        enclave.kill()
        wait_gone()
    enclave.kill()
    with pytest.raises(EnclaveError, match="was stopped"):
        enclave.wait()
    assert not [t for t in threading.enumerate() if t.name.startswith("cenacle")]


_FORK = "import os, threading\nif os.fork() == 0: threading.Event().wait()\n"


def test_children_of_an_unconfined_enclave_end_with_it(start: Start) -> None:
    enclave = start(_FORK + HANG, "none")
    _until_running(enclave)
    with _watched(_tree(enclave.pid)[1:]) as wait_gone:
        os.kill(enclave.pid, signal.SIGKILL)
        with pytest.raises(EnclaveError, match="SIGKILL"):
            enclave.wait(20)
        wait_gone()


def test_waiting_has_a_limit_and_the_enclave_goes_on(start: Start) -> None:
    enclave = start(HANG)
    _until_running(enclave)
    with pytest.raises(EnclaveError, match="not finished in time"):
        enclave.wait(0.01)
    os.kill(enclave.pid, 0)


def test_an_enclave_that_breaks_the_protocol_is_killed(start: Start) -> None:
    body = "import os\nos.write(channel._fd, b'patient 17 is ill\\n')\n" + HANG
    enclave = start(body)
    with pytest.raises(EnclaveError, match="broke the protocol") as caught:
        enclave.wait(20)
    assert "patient" not in str(caught.value)


def test_an_interpreter_that_does_not_start_says_why(start: Start) -> None:
    enclave = start("", argv=("-m", "cenacle.no_such_module"))
    with pytest.raises(EnclaveError, match=r"exit code 1: .*no_such_module"):
        enclave.wait(20)


def test_out_of_memory_is_told_from_a_kill(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([4, 5])
    monkeypatch.setattr("cenacle.enclave.sandbox.watch._oom_kills", lambda: next(counts))
    enclave = start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EnclaveError, match="ran out of memory"):
        enclave.wait(20)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"read_only": {"assets": Path("/no/such")}}, "existing file or folder"),
        ({"writable": {"outputs": Path("/no/such")}}, "existing folder"),
        ({"writable": {"outputs": Path(__file__)}}, "existing folder"),
        ({"read_only": {"Assets": Path("/usr")}}, "unusable name"),
        ({"read_only": {"../up": Path("/usr")}}, "unusable name"),
        ({"read_only": {"broker_socket": Path("/usr")}}, "unusable name"),
        ({"read_only": {"x": Path("/usr")}, "writable": {"x": Path("/usr")}}, "same name"),
        ({"read_only": {"serving_socket": Path("/usr")}}, "unusable name"),
        ({"serving": Path("/usr")}, "differ in whether the enclave serves"),
        ({"plan": SandboxPlan({}, serving=True)}, "differ in whether the enclave serves"),
        ({"plan": SandboxPlan({}, serving=True), "serving": Path("/usr")}, "does not exist"),
        ({"config": {"x": object()}}, "must be JSON"),
        ({"config": {"x": float("nan")}}, "must be JSON"),
    ],
)
def test_a_request_that_cannot_be_is_refused_and_leaves_nothing(
    fields: dict[str, Any], found: str, start: Start
) -> None:
    with pytest.raises(InputError, match=found):
        start("pass", **fields)
    assert not [t for t in threading.enumerate() if t.name.startswith("cenacle")]


def test_a_broker_without_an_address_is_refused(start: Start) -> None:
    with pytest.raises(UnavailableError, match="cannot be resolved"):
        start("pass", broker=("no-such-host.invalid", 1))


def test_a_process_that_cannot_be_started_is_one_clear_sentence(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(UnavailableError, match="cannot be started; found No such file"):
        start("pass", "none")


def test_two_enclaves_run_side_by_side(start: Start) -> None:
    one, two = start(HANG), start("channel.finished()")
    _until_running(one)
    two.wait(20)
    one.kill()
    with pytest.raises(EnclaveError, match="stopped"):
        one.wait()


def test_launchers_are_registered_by_name() -> None:
    assert "process" in launchers()
    with pytest.raises(InputError, match="no such launcher"):
        launcher("cloud")
    with pytest.raises(InputError, match="registered already"):
        register_launcher(launcher("process"))
    assert isinstance(launcher(), Launcher)


def _readable(pid: int, file: str) -> str:
    """What a process of the same user, without capabilities, finds in /proc/PID/file."""
    program = f"""
import os, sys
from cenacle.enclave.sandbox import linux
linux.drop_capabilities()
try:
    fd = os.open("/proc/{pid}/{file}", os.O_RDONLY)
    maps = open("/proc/{pid}/maps").readline() if "{file}" == "mem" else ""
    os.pread(fd, 1, int(maps.split("-")[0], 16) if maps else 0)
    print("readable")
except OSError as error:
    print(type(error).__name__)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.parametrize("file", ["mem", "environ", "maps", "auxv"])
def test_no_other_process_of_the_user_looks_into_an_enclave(file: str, start: Start) -> None:
    enclave = start(HANG, "inner")
    _until_running(enclave)
    assert _readable(enclave.pid, file) == "PermissionError"


@pytest.mark.parametrize("name", PLANS)
def test_not_even_root_reads_a_key_in_secret_memory(
    name: str, start: Start, tmp_path: Path
) -> None:
    body = """
    import ctypes, json
    from cenacle.crypto.memory import SecretBytes
    key, other = SecretBytes(b"k" * 32), ctypes.create_string_buffer(b"visible", 7)
    address = ctypes.addressof(ctypes.c_char.from_buffer(key._page))
    found = {"kind": key.protection, "key": address, "other": ctypes.addressof(other)}
    (config.paths["outputs"] / "found.json").write_text(json.dumps(found))
    """
    enclave = start(textwrap.dedent(body) + HANG, name, writable={"outputs": tmp_path})
    _until_running(enclave)
    found = json.loads((tmp_path / "found.json").read_text())
    if found["kind"] != "memfd_secret":
        pytest.skip("this kernel has no memfd_secret")
    try:
        memory = os.open(f"/proc/{_tree(enclave.pid)[-1]}/mem", os.O_RDONLY)
    except PermissionError:
        return  # an ordinary user gets no further
    try:
        assert os.pread(memory, 7, found["other"]) == b"visible"
        with pytest.raises(OSError, match="Input/output error"):
            os.pread(memory, 1, found["key"])
    finally:
        os.close(memory)


def test_without_the_layer_process_another_process_can_look(start: Start) -> None:
    with contextlib.suppress(OSError):
        if Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip() != "0":
            pytest.skip("this kernel protects processes from one another by itself (Yama)")
    enclave = start(HANG, "none")
    _until_running(enclave)
    if os.geteuid() == 0:
        pytest.skip("an unconfined enclave of root keeps root's capabilities")
    assert _readable(enclave.pid, "mem") == "readable"


@pytest.mark.parametrize("name", PLANS)
def test_the_configuration_is_in_no_command_line_environment_or_file(
    name: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CENACLE_CANARY", "canary-environment")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    enclave = start(HANG, name, config={"canary": "canary-config"})
    _until_running(enclave)
    for pid in _tree(enclave.pid):
        for file in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/{file}").read_bytes()
                assert b"canary" not in text
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"canary" not in path.read_bytes()


def test_a_core_dump_is_not_written(start: Start, tmp_path: Path) -> None:
    body = """
    channel.stage("running")
    import os
    os.chdir(config.paths["outputs"])
    os.abort()
    """
    with pytest.raises(EnclaveError, match="SIGABRT"):
        start(body, "inner", writable={"outputs": tmp_path}).wait(20)
    assert list(tmp_path.iterdir()) == []


def test_reports_are_json_and_survive_the_trip(start: Start) -> None:
    with pytest.raises(CenacleError) as caught:
        start("raise ValueError").wait(20)
    assert json.loads(json.dumps(caught.value.to_dict()))["found"] == "ValueError"
