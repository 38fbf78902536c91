"""The inside of a launch believes nothing: every planned layer is proved before the agent runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cenacle.enclave.channel import Failed, Message, read_messages
from cenacle.enclave.sandbox import SandboxPlan
from cenacle.enclave.sandbox.folders import enclave_environment, interpreter_command
from cenacle.errors import EnclaveError

pytestmark = pytest.mark.processes

_AGENT = """
from cenacle.enclave.sandbox.entry import enclave_main
{before}
def agent(config, channel):
    open(config.job["witness"], "w").close()
    channel.finished()
enclave_main(agent)
"""


def _dishonest_launch(
    config: object, before: str = "", environment: Mapping[str, str] | None = None
) -> list[Message]:
    """Start the agent as a launcher that skips whatever it likes; returns its messages."""
    reader, writer = os.pipe()
    document = config if isinstance(config, bytes) else json.dumps(config).encode()
    stdin = os.memfd_create("config")
    os.write(stdin, document)
    try:
        process = subprocess.Popen(
            [*interpreter_command(), "-c", _AGENT.format(before=before), str(writer)],
            env=dict(environment or enclave_environment(1)),
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writer,),
        )
        os.close(writer)
        messages = list(read_messages(reader))
        process.wait(20)
    finally:
        os.close(stdin)
        os.close(reader)
    return messages


def _config(chosen: SandboxPlan, witness: Path) -> dict[str, Any]:
    return {
        "accelerators": [],
        "job": {"witness": str(witness)},
        "parent": os.getpid(),
        "paths": {},
        "read_only": [],
        "sandbox": chosen.to_dict(),
        "sockets": [],
        "writable": [],
    }


def _failure(messages: list[Message]) -> EnclaveError:
    (message,) = messages
    assert isinstance(message, Failed)
    error = message.to_error()
    assert isinstance(error, EnclaveError)
    return error


def test_an_outer_layer_that_the_launcher_only_claims_is_found_out(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = _config(choose("bubblewrap"), tmp_path / "witness")
    error = _failure(_dishonest_launch(config))
    assert "bubblewrap is planned but not active" in error.what
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("process", "ProcessLayer"), ("landlock", "LandlockLayer"), ("seccomp", "SeccompLayer")],
)
def test_an_inner_layer_that_did_nothing_is_found_out(
    name: str, kind: str, choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = _config(choose(name), tmp_path / "witness")
    before = (
        f"from cenacle.enclave.sandbox.{name} import {kind}\n"
        f"{kind}.apply = lambda self, view: None\n"
    )
    error = _failure(_dishonest_launch(config, before))
    assert f"{name} is planned but not active" in error.what
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"LD_PRELOAD_X": "1", "AWS_KEY": "canary"}, "AWS_KEY, LD_PRELOAD_X"),
        ({"PYTHONHASHSEED": "7"}, "changed"),
    ],
)
def test_an_environment_of_the_host_is_refused_by_name_without_its_values(
    extra: dict[str, str], found: str, choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = _config(choose("process"), tmp_path / "witness")
    error = _failure(_dishonest_launch(config, environment={**enclave_environment(1), **extra}))
    assert found in str(error.found)
    assert "canary" not in str(error)


@pytest.mark.parametrize("what", ["platform", "serving"])
@pytest.mark.parametrize("planned", [False, True], ids=["unplanned", "planned"])
def test_a_socket_that_the_plan_does_not_tell_of_is_refused_and_so_is_its_absence(
    what: str, planned: bool, tmp_path: Path
) -> None:
    name = f"{what}_socket"
    config = _config(SandboxPlan({}, **{what: planned}), tmp_path / "witness")
    if not planned:
        config |= {"paths": {name: "/tmp/x.sock"}, "sockets": [name]}
    error = _failure(_dishonest_launch(config))
    assert "the sandbox plan and the sockets differ" in error.what
    assert not (tmp_path / "witness").exists()


def test_bytecode_that_nobody_measured_is_refused(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = _config(choose("process"), tmp_path / "witness")
    error = _failure(_dishonest_launch(config, "import sys; sys.pycache_prefix = None"))
    assert "byte code" in str(error.found)


@pytest.mark.parametrize("name", ["landlock"])
def test_threads_that_would_stay_free_are_refused(
    name: str, choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = _config(choose(name), tmp_path / "witness")
    before = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
"""
    error = _failure(_dishonest_launch(config, before))
    assert "before any thread starts" in error.what


def test_seccomp_covers_threads_that_are_there_already(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    before = """
import os, threading
go, out = threading.Event(), []
def late():
    go.wait()
    try:
        os.fork()
    except OSError as error:
        out.append(error)
thread = threading.Thread(target=late)
thread.start()
import cenacle.enclave.sandbox.entry as entry
old = entry._confine
def confine(*arguments):
    config = old(*arguments)
    go.set()
    thread.join()
    assert len(out) == 1
    return config
entry._confine = confine
"""
    _dishonest_launch(_config(choose("seccomp"), witness), before)
    assert witness.exists()


def test_a_launcher_that_died_already_is_noticed(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = {**_config(choose("none"), tmp_path / "witness"), "parent": 1}
    assert "launcher of this enclave is gone" in _failure(_dishonest_launch(config)).what
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    "document",
    [b"", b"{", b"[]", b"null", b'{"sandbox": 1}', b"[" * 100_000, b"\xff"],
    ids=["empty", "truncated", "list", "null", "partial", "deep", "binary"],
)
def test_a_configuration_that_does_not_parse_is_refused(document: bytes) -> None:
    error = _failure(_dishonest_launch(document))
    assert "does not parse" in error.what


def test_paths_of_unknown_mounts_are_refused(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    config = {**_config(choose("none"), tmp_path / "witness"), "writable": ["nowhere"]}
    assert "does not parse" in _failure(_dishonest_launch(config)).what


@pytest.mark.parametrize("arguments", [[], ["x"], ["0"], ["2"], ["999"]])
def test_starting_the_inside_by_hand_says_how_to_start_it(arguments: list[str]) -> None:
    program = "from cenacle.enclave.sandbox.entry import enclave_main\nenclave_main('a:b')"
    run = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert run.returncode == 1
    assert "cenacle run" in run.stderr


def test_every_inherited_descriptor_is_closed(
    choose: Callable[[str], SandboxPlan], run_probe: Callable[..., dict[str, Any]]
) -> None:
    body = """
    import os
    open_now = {}
    for fd in range(4096):
        try:
            open_now[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
    return open_now
    """
    found = run_probe(choose("none"), body)
    assert [found.pop(n) for n in ("0", "1", "2")] == ["/dev/null"] * 3
    assert len(found) == 1
    assert next(iter(found.values())).startswith("pipe:")


def test_prints_of_a_program_go_nowhere(
    choose: Callable[[str], SandboxPlan],
    run_probe: Callable[..., dict[str, Any]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    body = """
    import os, sys, warnings, logging
    print("canary record", flush=True)
    sys.stderr.write("canary record")
    os.write(1, b"canary record"); os.write(2, b"canary record")
    warnings.warn("canary record"); logging.error("canary record")
    return {}
    """
    run_probe(choose("none"), body)
    captured = capfd.readouterr()
    assert "canary" not in captured.out + captured.err


def test_an_agent_can_be_named_and_is_imported_in_the_confined_process(
    choose: Callable[[str], SandboxPlan], tmp_path: Path
) -> None:
    program = """
import sys, types
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "late":
            from cenacle.enclave.sandbox import linux
            confined = linux.process_status()["NoNewPrivs"] == "1"
            module = types.ModuleType("late")
            def agent(config, channel):
                assert confined
                open(config.job["witness"], "w").close()
                channel.finished()
            module.agent = agent
            sys.modules["late"] = module
            from importlib.machinery import ModuleSpec
            class Loader:
                def create_module(self, spec): return module
                def exec_module(self, module): pass
            return ModuleSpec("late", Loader())
sys.meta_path.insert(0, Finder)
agent = "late:agent"
enclave_main(agent)
"""
    _dishonest_launch(_config(choose("process"), tmp_path / "witness"), program)
    assert (tmp_path / "witness").exists()
