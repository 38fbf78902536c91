"""The second process of an enclave, for a program: it sees less than the agent, and no more."""

from __future__ import annotations

import contextlib
import json
import os
import select
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.channel import Stage
from cenacle.enclave.launcher import LaunchRequest, launcher
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.errors import EnclaveError

pytestmark = pytest.mark.processes

_PROGRAM = """
import json, os, socket, sys, threading
from cenacle.enclave.sandbox.entry import enclave_main

def attempt(action):
    try:
        action()
        return "done"
    except BaseException as error:
        return type(error).__name__

def work(connection, plan, paths):
    agent = os.getppid()
    writable = json.loads(connection.recv(9999))  # from an agent that is confined by now
    found = {
        "descriptors": sum(attempt(lambda: os.fstat(fd)) == "done" for fd in range(3, 64)),
        "paths": sorted(paths),
        "read_asset": attempt(lambda: os.listdir(paths["assets"])),
        "write_asset": attempt(lambda: open(paths["assets"] / "x", "w")),
        "socket": attempt(lambda: socket.socket(socket.AF_UNIX)),
        "socketpair": attempt(socket.socketpair),
        "agents_memory": attempt(lambda: os.open(f"/proc/{agent}/mem", os.O_RDONLY)),
        "agents_environ": attempt(lambda: os.open(f"/proc/{agent}/environ", os.O_RDONLY)),
        "signal_agent": attempt(lambda: os.kill(agent, 0)),
        "fork": attempt(lambda: os.fork() or os._exit(0)),
    }
    found["write_output"] = attempt(lambda: open(writable + "/leak", "w"))
    connection.sendall(json.dumps(found).encode())
    connection.recv(1)

def agent(config, channel):
    outputs = config.paths["outputs"]
    with socket.socket(fileno=config.worker) as connection:
        connection.sendall(json.dumps(str(outputs)).encode())
        found = json.loads(connection.recv(99999))
        (outputs / "found.json").write_text(json.dumps(found))
        channel.stage("running")
        if config.job.get("hang"):
            threading.Event().wait()
    channel.finished()

enclave_main(agent, worker="__main__:work")
"""


def _request(chosen: SandboxPlan, folder: Path, program: str, **config: Any) -> LaunchRequest:
    for name in ("assets", "outputs"):
        (folder / name).mkdir()
    return LaunchRequest(
        ("127.0.0.1", 1),
        chosen,
        config=config,
        read_only={"assets": folder / "assets"},
        writable={"outputs": folder / "outputs"},
        argv=("-c", program),
    )


@pytest.mark.parametrize("name", ["none", "process", "landlock", "seccomp", "inner", "all"])
def test_it_is_confined_more_tightly_than_the_agent(
    name: str, choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    chosen = choose(name)
    with launcher().launch(_request(chosen, tmp_path, _PROGRAM)) as enclave:
        enclave.wait(30)
    found = json.loads((tmp_path / "outputs" / "found.json").read_text())
    active = set(chosen.layers)
    stopped_by = {
        "write_asset": {"bubblewrap", "landlock"},
        "write_output": {"landlock"},
        "socket": {"seccomp"},
        "socketpair": {"seccomp"},
        "fork": {"seccomp"},
        "agents_memory": {"process", "landlock"},
        "agents_environ": {"process", "landlock"},
        "signal_agent": {"landlock", "seccomp"},
    }
    assert found["read_asset"] == "done"
    assert found["paths"] == ["assets"]
    assert found["descriptors"] == 1
    for what, layers in stopped_by.items():
        assert (found[what] != "done") == bool(layers & active), what


@pytest.mark.parametrize("name", ["none", "all"])
def test_it_dies_with_the_agent(
    name: str, choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    chosen = choose(name)
    with launcher().launch(_request(chosen, tmp_path, _PROGRAM, hang=True)) as enclave:
        assert Stage("running") in iter(enclave.messages())
        handles = [os.pidfd_open(pid) for pid in _descendants(enclave.pid)]
        try:
            assert len(handles) >= 1
            enclave.kill()
            for handle in handles:
                assert select.select([handle], [], [], 20)[0]
        finally:
            for handle in handles:
                os.close(handle)


def test_a_second_process_that_cannot_be_confined_runs_nothing(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    program = """
import os
agent_process = os.getpid()
from cenacle.enclave.sandbox.process import ProcessLayer
apply = ProcessLayer.apply
ProcessLayer.apply = lambda self, view: apply(self, view) if os.getpid() == agent_process else None
"""
    request = _request(choose("process"), tmp_path, program + _PROGRAM)
    with launcher().launch(request) as enclave, pytest.raises(EnclaveError):
        enclave.wait(30)
    assert not (tmp_path / "outputs" / "found.json").exists()


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                found += [int(child), *_descendants(int(child))]
    return found
