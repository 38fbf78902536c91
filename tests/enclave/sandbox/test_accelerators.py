"""Sockets to accelerators: inherited by the agent alone, and only where the plan says so."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.accelerators import require_agreed
from cenacle.enclave.channel import Failed, Stage, read_messages
from cenacle.enclave.host_accelerators import HostAccelerators
from cenacle.enclave.launcher import AgentConfig, LaunchRequest, launcher
from cenacle.enclave.sandbox import SandboxPlan, plan
from cenacle.enclave.sandbox.folders import enclave_environment, interpreter_command
from cenacle.errors import EnclaveError, InputError, UnavailableError
from tests.support.processes import descendants

pytestmark = pytest.mark.processes

_PROGRAM = """
import json, os, socket, struct, threading
from cenacle.enclave.sandbox.entry import enclave_main

def attempt(action):
    try:
        action()
        return "done"
    except BaseException as error:
        return type(error).__name__

def look():
    return {
        "descriptors": sum(attempt(lambda: os.fstat(fd)) == "done" for fd in range(3, 64)),
        "memory_file": attempt(lambda: os.close(os.memfd_create("x"))),
        "network": attempt(lambda: socket.socket(socket.AF_INET)),
        "fork": attempt(lambda: os.fork() or os._exit(0)),
    }

def work(connection, plan, paths):
    connection.sendall(json.dumps(look()).encode())
    connection.recv(1)

def agent(config, channel):
    outputs = config.paths["outputs"]
    greetings = []
    for told, descriptor in config.accelerators:
        with socket.socket(fileno=os.dup(descriptor)) as worker:
            worker.setblocking(True)
            size, = struct.unpack(">I", worker.recv(4, socket.MSG_WAITALL))
            greetings.append([told, json.loads(worker.recv(size, socket.MSG_WAITALL))])
    with socket.socket(fileno=config.worker) as connection:
        program = json.loads(connection.recv(99999))
    found = {"agent": look(), "program": program, "greetings": greetings}
    (outputs / "found.json").write_text(json.dumps(found))
    channel.stage("running")
    if config.job.get("hang"):
        threading.Event().wait()
    channel.finished()

enclave_main(agent, worker="__main__:work")
"""


def _request(chosen: SandboxPlan, folder: Path, **config: Any) -> LaunchRequest:
    (folder / "outputs").mkdir()
    return LaunchRequest(
        ("127.0.0.1", 1),
        chosen,
        config=config,
        writable={"outputs": folder / "outputs"},
        argv=("-c", _PROGRAM),
        threads=1,
        accelerators=("process", "process") if chosen.accelerators else (),
    )


def _opened(chosen: SandboxPlan) -> SandboxPlan:
    return plan(chosen.layers, accelerators=True)


@pytest.mark.parametrize("name", ["none", "all"])
def test_the_agent_talks_to_workers_and_the_program_cannot(
    name: str, choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    chosen = _opened(choose(name))
    with launcher().launch(_request(chosen, tmp_path)) as enclave:
        enclave.wait(120)
    found = json.loads((tmp_path / "outputs" / "found.json").read_text())
    assert [told for told, _ in found["greetings"]] == [
        {"name": f"process-{number}", "kind": "process", "threads": 1} for number in (1, 2)
    ]
    assert all(greeting["hello"] == 1 for _, greeting in found["greetings"])
    confined = "seccomp" in chosen.layers
    assert found["agent"]["memory_file"] == "done"
    assert found["program"]["descriptors"] == 1
    for who in ("agent", "program"):
        assert (found[who]["fork"] != "done") == confined
        assert (found[who]["network"] != "done") == confined
    assert (found["program"]["memory_file"] != "done") == confined


def test_without_accelerators_there_is_no_memory_to_share(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    with launcher().launch(_request(choose("seccomp"), tmp_path)) as enclave:
        enclave.wait(60)
    found = json.loads((tmp_path / "outputs" / "found.json").read_text())
    assert found["agent"]["memory_file"] == "PermissionError"
    assert found["greetings"] == []


def test_workers_end_with_their_enclave(tmp_path: Path) -> None:
    chosen = plan([], accelerators=True)
    with launcher().launch(_request(chosen, tmp_path, hang=True)) as enclave:
        assert Stage("running") in iter(enclave.messages())
        workers = [
            pid
            for pid in descendants(os.getpid())
            if b"cenacle.accelerators.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(workers) == 2
        handles = [os.pidfd_open(pid) for pid in workers]
        try:
            enclave.kill()
            for handle in handles:
                assert select.select([handle], [], [], 20)[0]
        finally:
            for handle in handles:
                os.close(handle)


# ------------------------------------------------------------------ what does not fit together


@pytest.mark.parametrize(("opened", "kinds"), [(True, ()), (False, ("process",))])
def test_a_request_must_fit_its_plan(opened: bool, kinds: tuple[str, ...], tmp_path: Path) -> None:
    request = replace(
        _request(plan([]), tmp_path), plan=plan([], accelerators=opened), accelerators=kinds
    )
    with pytest.raises(InputError, match="whether there are accelerators"):
        launcher().launch(request)


def test_sockets_that_the_plan_does_not_have_end_the_enclave() -> None:
    """A launcher that measures one sandbox and runs another."""
    reader, writer = os.pipe()
    config = {
        "accelerators": [{"name": "spy", "kind": "process", "threads": 1}],
        "job": {},
        "parent": os.getpid(),
        "paths": {},
        "read_only": [],
        "sandbox": plan([]).to_dict(),
        "sockets": [],
        "writable": [],
    }
    stdin = os.memfd_create("config")
    os.write(stdin, json.dumps(config).encode())
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [*interpreter_command(), "-c", _PROGRAM, f"{writer},{theirs.fileno()}"],
            env=enclave_environment(1),
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer, theirs.fileno()),
        )
        os.close(writer)
        (message,) = read_messages(reader)
        process.wait(20)
    os.close(stdin)
    os.close(reader)
    assert isinstance(message, Failed)
    assert "plan has no accelerators" in str(message.to_error())


@pytest.mark.parametrize("descriptors", ["{pipe},{pipe}", "{pipe},0", "{pipe},x", "0", ",", "77"])
def test_descriptors_that_are_no_sockets_are_not_taken(descriptors: str) -> None:
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [*interpreter_command(), "-c", _PROGRAM, descriptors.format(pipe=writer)],
            env=enclave_environment(1),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=(writer,),
            timeout=60,
            check=False,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert done.returncode == 1
    assert b"this program is an enclave's inside" in done.stderr


@pytest.mark.parametrize("kind", ["ray", "inline"])
def test_a_kind_that_an_enclave_cannot_reach_is_refused(kind: str) -> None:
    with pytest.raises(UnavailableError, match="cannot reach accelerators of this kind"):
        HostAccelerators(["process", kind], 2)


# ------------------------------------------------------------------ the agent's own check


class _Contract:
    """A contract, to :func:`require_agreed`."""

    def __init__(self, offload: Any) -> None:
        self.offload = offload


def _config(told: list[dict[str, Any]], opened: bool) -> AgentConfig:
    return AgentConfig(
        job={},
        paths={},
        plan=plan([], accelerators=opened),
        layers=(),
        accelerators=tuple((one, 99) for one in told),
    )


ONE = {"name": "process-1", "kind": "process", "threads": 1}
TWO = [ONE, {**ONE, "name": "process-2"}]


@pytest.mark.parametrize(
    ("scheme", "told", "opened", "agreed"),
    [
        ("enclave", [], False, True),
        ("enclave", [], True, False),
        ("enclave", [ONE], True, False),
        ("measured", TWO, True, True),
        ("measured", [ONE], True, False),
        ("measured", [], True, False),
        ("measured", [*TWO, {**ONE, "name": "process-3"}], True, False),
        ("measured", [ONE, {**ONE, "kind": "cuda", "name": "cuda-2"}], True, False),
        ("measured", [ONE, ONE], True, False),
        ("measured", [ONE, {"name": "process-2"}], True, False),
        ("measured", [ONE, {**TWO[1], "threads": "1"}], True, False),
        ("measured", [ONE, {**TWO[1], "threads": 0}], True, False),
    ],
)
def test_the_agent_takes_exactly_the_contracts_accelerators(
    scheme: str, told: list[dict[str, Any]], opened: bool, agreed: bool
) -> None:
    from cenacle.documents.offload import Accelerators, EnclavePlan, MeasuredPlan  # noqa: PLC0415

    offload = (
        EnclavePlan()
        if scheme == "enclave"
        else MeasuredPlan(scheme="measured", accelerators=Accelerators(count=2))
    )
    contract: Any = _Contract(offload)
    if agreed:
        require_agreed(contract, _config(told, opened))
        return
    with pytest.raises(EnclaveError, match="accelerators are not those of the contract"):
        require_agreed(contract, _config(told, opened))
