"""Workers for the tests of accelerators."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch

from cenacle.accelerators import (
    Accelerator,
    InlineAccelerator,
    ProcessAccelerator,
    RemoteAccelerator,
)
from cenacle.accelerators.child import Child, worker_environment

Start = Callable[..., ProcessAccelerator]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


def remote_worker(name: str = "worker", *, lines: str | None = None) -> RemoteAccelerator:
    """A worker at the end of a stream, on this machine."""
    program = ("-m", "cenacle.accelerators.remote_worker") if lines is None else ("-c", lines)
    child = Child((sys.executable, *program), ["cpu", "1"], worker_environment(1, "cpu"))
    return RemoteAccelerator(name, child.socket.dup(), ended=child.kill)


_KINDS: dict[str, Callable[[str], Accelerator]] = {
    "inline": InlineAccelerator,
    "process": ProcessAccelerator,
    "remote": remote_worker,
}


@pytest.fixture(scope="module", params=sorted(_KINDS))
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    """One of each kind that works here, for a whole module: a process takes seconds to start."""
    made = _KINDS[request.param]("worker")
    yield made
    made.close()


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes process accelerators that are closed in the end."""
    made: list[ProcessAccelerator] = []

    def make(name: str = "worker", **options: object) -> ProcessAccelerator:
        made.append(ProcessAccelerator(name, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for accelerator in made:
        accelerator.close()


_LIAR = '''
import json, os, socket, struct, sys, time

connection = socket.socket(fileno=int(sys.argv[1]))
arena = {}

def send(message):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection.sendall(struct.pack(">I", len(body)) + body)

def requests():
    data, fds = b"", []
    while True:
        while len(data) >= 4 and len(data) >= 4 + int.from_bytes(data[:4], "big"):
            size = int.from_bytes(data[:4], "big")
            body, data = data[4:4 + size], data[4 + size:]
            for request in json.loads(body):
                if request[0] == "map":
                    arena[request[1]] = (fds.pop(0), request[2], request[3])
                yield request
        more, new, _, _ = socket.recv_fds(connection, 65536, 8)
        if not more:
            os._exit(0)
        data += more
        fds += new

def greet():
    send({"hello": 1, "layers": [], "device": "liar"})

def asked():
    """The next get, as (ticket, handle, region, offset, dtype, shape)."""
    return next(request for request in stream if request[0] == "get")[1:]

stream = requests()
'''


@pytest.fixture
def remote_liar() -> Iterator[Callable[[str], RemoteAccelerator]]:
    """As ``liar``, at the end of a stream."""
    made: list[RemoteAccelerator] = []

    def make(lines: str) -> RemoteAccelerator:
        body = _LIAR + "greet()\n" + textwrap.dedent(lines) + "\ntime.sleep(600)\n"
        made.append(remote_worker("liar", lines=body))
        return made[-1]

    yield make
    for accelerator in made:
        accelerator.close()


@pytest.fixture
def liar(tmp_path: Path, start: Start) -> Callable[..., ProcessAccelerator]:
    """Starts a worker that runs the given lines after it learned to speak the protocol."""

    def make(lines: str, *, greets: bool = True, **options: object) -> ProcessAccelerator:
        script = tmp_path / "liar.py"
        body = ("greet()\n" if greets else "") + textwrap.dedent(lines)
        script.write_text(_LIAR + body + "\ntime.sleep(600)\n")
        return start("liar", command=(sys.executable, "-I", str(script)), **options)

    return make
