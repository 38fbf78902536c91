"""Both ends of the link against each other, without a machine between them, and against liars."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cenacle.enclave.vm import guest
from cenacle.enclave.vm.guest import COMMANDS, Job, Supervisor, agent_command
from cenacle.enclave.vm.guest_files import FolderWatch, Received
from cenacle.enclave.vm.host import GuestJob, HostLink, files_below
from cenacle.enclave.vm.link import (
    CHUNK,
    SERVING,
    Frame,
    FrameReader,
    Kind,
    check_path,
    frame,
    json_frame,
)
from cenacle.errors import EnclaveError, InputError, UnavailableError

ALL = frozenset(Kind)


# ---------------------------------------------------------------------- frames


@given(
    st.lists(
        st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=300), st.integers(0, 2**32 - 1)),
        max_size=20,
    ),
    st.integers(1, 50),
)
def test_frames_arrive_whole_however_they_are_cut(
    sent: list[tuple[Kind, bytes, int]], step: int
) -> None:
    data = b"".join(frame(kind, payload, number) for kind, payload, number in sent)
    reader = FrameReader(ALL)
    found = [f for at in range(0, len(data), step) for f in reader.feed(data[at : at + step])]
    assert found == [Frame(kind, number, payload) for kind, payload, number in sent]


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_bytes_that_are_no_frames_are_refused_in_words(data: bytes) -> None:
    with contextlib.suppress(EnclaveError):
        for found in FrameReader(ALL).feed(data):
            found.fields()


def test_frames_for_the_other_side_and_giants_are_refused() -> None:
    with pytest.raises(EnclaveError, match="protocol") as error:
        list(FrameReader(frozenset({Kind.DATA})).feed(frame(Kind.START)))
    assert "START" in str(error.value)
    giant = b"D" + (0).to_bytes(4, "little") + (CHUNK + 1).to_bytes(4, "little")
    with pytest.raises(EnclaveError, match="protocol"):
        list(FrameReader(ALL).feed(giant))
    with pytest.raises(EnclaveError, match="too long"):
        frame(Kind.DATA, bytes(CHUNK + 1))


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "a/../b",
        "../a",
        ".hidden",
        "a//b",
        "a/",
        "a\0b",
        "a/b" * 9,
        7,
        None,
    ],
)
def test_a_path_that_could_leave_its_mount_is_refused(path: object) -> None:
    with pytest.raises(EnclaveError, match="protocol"):
        check_path(path)


# ---------------------------------------------------------------------- what a host may ask for

_FIELDS: dict[str, Any] = {
    "mode": "run",
    "job": {},
    "sandbox": {},
    "threads": 1,
    "read_only": [],
    "writable": [],
    "platform": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "-c"},
        {"mode": ["-c", "import os"]},
        {"threads": 0},
        {"threads": True},
        {"threads": "1; rm"},
        {"read_only": ["a"], "writable": ["a"]},
        {"platform": 7},
        {"argv": ["-c", "evil"]},
        {"job": 7},
    ],
    ids=str,
)
def test_a_host_cannot_have_anything_else_executed(change: dict[str, Any]) -> None:
    Job.parse(json.dumps(_FIELDS).encode())
    with pytest.raises(EnclaveError, match="does not parse"):
        Job.parse(json.dumps({**_FIELDS, **change}).encode())


@settings(max_examples=30)
@given(st.binary(max_size=100) | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
def test_a_configuration_that_is_none_is_refused_in_words(raw: bytes | str) -> None:
    with pytest.raises(EnclaveError):
        Job.parse(raw.encode() if isinstance(raw, str) else raw)


def test_the_agents_command_line_is_fixed() -> None:
    line = agent_command(COMMANDS["run"], 7)
    assert line[-3:] == ["-m", "cenacle.enclave", "7"]
    assert "pycache_prefix=/nonexistent/cenacle-bytecode" in line


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "frames",
    [
        [Frame(Kind.DATA, 0, b"x")],
        [Frame(Kind.FILE, 0, b'{"mount":"other","path":"","size":1}')],
        [Frame(Kind.FILE, 0, b'{"mount":"asset-0","path":"../x","size":1}')],
        [Frame(Kind.FILE, 0, b'{"mount":"asset-0","path":"","size":-1}')],
        [Frame(Kind.FILE, 0, b'{"mount":"asset-0","path":"","size":true}')],
        [Frame(Kind.FILE, 0, b"[]")],
        [
            Frame(Kind.FILE, 0, b'{"mount":"asset-0","path":"","size":1}'),
            Frame(Kind.DATA, 0, b"xy"),
        ],
        [
            Frame(Kind.FILE, 0, b'{"mount":"asset-0","path":"","size":1}'),
            Frame(Kind.FILE, 0, b'{"mount":"asset-0","path":"","size":1}'),
        ],
    ],
    ids=["data", "mount", "path", "size", "bool", "json", "more", "twice"],
)
def test_files_that_a_host_may_not_send_are_refused(frames: list[Frame], tmp_path: Path) -> None:
    received = Received(tmp_path, ("asset-0",), ("outputs",), None)

    def take() -> None:
        for one in frames:
            received.take(one)

    with contextlib.closing(received), pytest.raises(EnclaveError):
        take()


def test_a_file_that_is_not_there_is_missed(tmp_path: Path) -> None:
    with pytest.raises(EnclaveError, match="not sent all files"):
        Received(tmp_path, ("asset-0",), (), None).finish()
    with pytest.raises(EnclaveError, match="cannot be"):
        Received(tmp_path, ("../x",), (), None)
    with pytest.raises(EnclaveError, match="cannot be"):
        Received(tmp_path, ("broker_socket",), (), None)


def test_only_what_changed_is_sent(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"1")
    watch = FolderWatch({"outputs": tmp_path})
    assert list(watch.changes()) == []
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "new").write_bytes(bytes(CHUNK + 1))
    (tmp_path / ".cenacle-x.partial").write_bytes(b"secret of nobody")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "old").unlink()
    sent = [f for data in watch.changes() for f in FrameReader(ALL).feed(data)]
    assert [one.kind for one in sent] == [Kind.FILE, Kind.DATA, Kind.DATA, Kind.REMOVED]
    assert sent[0].fields() == {"mount": "outputs", "path": "deep/new", "size": CHUNK + 1}
    assert sent[3].fields() == {"mount": "outputs", "path": "old"}
    assert list(watch.changes()) == []


def test_files_whose_names_cannot_travel_are_refused_before_a_machine_starts(
    tmp_path: Path,
) -> None:
    (tmp_path / "a b").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be sent"):
        list(files_below({"asset-0": tmp_path}))


# ---------------------------------------------------------------------- both ends together

_AGENT = """
import json, os, socket, sys, time
fd = int(sys.argv[1])
config = json.load(os.fdopen(0))
paths = config["paths"]
program = open(paths["asset-0"]).read()
exec(program)
"""


@dataclass
class World:
    """A supervisor in a thread, a host's end in the test, a relay that records."""

    folder: Path
    broker: Path
    heard: list[bytes] = field(default_factory=list)
    seen: list[dict[str, bytes]] = field(default_factory=list)
    messages: bytearray = field(default_factory=bytearray)
    error: BaseException | None = None
    server: Path | None = None

    @property
    def outputs(self) -> Path:
        return self.folder / "outputs"

    def files(self) -> dict[str, bytes]:
        return {
            p.relative_to(self.outputs).as_posix(): p.read_bytes()
            for p in self.outputs.rglob("*")
            if p.is_file()
        }

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            self.seen.append(self.files())
            self.heard.append(data)
            writer.write(data.upper())
            await writer.drain()
        writer.close()

    def run(self, program: str, **fields: Any) -> int | None:
        """The agent is ``program``, with ``paths`` and ``fd``; its exit status."""
        source = self.folder / "program"
        source.write_text(program)
        return asyncio.run(self._run(source, fields))

    async def _run(self, source: Path, fields: dict[str, Any]) -> int | None:
        server = await asyncio.start_unix_server(self._serve, self.broker)
        ours, theirs = socket.socketpair()
        work = self.folder / "work"
        work.mkdir()

        def supervise() -> None:
            with theirs:
                try:
                    Supervisor(theirs.fileno(), work, None).run()
                except BaseException as error:
                    self.error = error

        thread = threading.Thread(target=supervise)
        thread.start()
        reader, writer = await asyncio.open_connection(sock=ours)
        job = GuestJob(
            {
                **{k: _FIELDS[k] for k in ("mode", "job", "sandbox", "threads", "platform")},
                **fields,
            },
            {"asset-0": source},
            {"outputs": self.outputs},
            self.broker,
            self.server,
        )
        try:
            return await HostLink(reader, writer, job, self.messages.extend).run()
        finally:
            writer.transport.abort()
            server.close()
            await asyncio.to_thread(thread.join)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(guest, "COMMANDS", {"run": ("-c", _AGENT)})
    (tmp_path / "outputs").mkdir()
    return World(tmp_path, tmp_path / "broker.sock")


def test_messages_files_and_connections_cross_the_link(world: World) -> None:
    (world.outputs / "before").write_bytes(b"resumed")
    status = world.run(
        """
assert open(paths["outputs"] + "/before").read() == "resumed"
os.write(fd, b"first\\n")
big = os.urandom(300_000).hex().encode()
with socket.socket(socket.AF_UNIX) as s:
    s.connect(paths["broker_socket"])
    s.sendall(big)
    s.shutdown(socket.SHUT_WR)
    got = b""
    while chunk := s.recv(65536):
        got += chunk
assert got == big.upper()
os.makedirs(paths["outputs"] + "/deep")
open(paths["outputs"] + "/deep/result", "wb").write(big)
os.remove(paths["outputs"] + "/before")
os.write(fd, b"last\\n")
sys.exit(7)
"""
    )
    assert world.error is None
    assert status == 7
    assert bytes(world.messages) == b"first\nlast\n"
    assert list(world.files()) == ["deep/result"]
    assert world.files()["deep/result"] == b"".join(world.heard)


def test_an_enclave_that_serves_reaches_the_hosts_server_and_no_other_does(
    world: World,
) -> None:
    world.server = world.folder / "server.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(world.server))
    listener.listen(1)
    heard: list[bytes] = []

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as file:
            connection.sendall(b"ask" * 100_000)
            connection.shutdown(socket.SHUT_WR)
            heard.append(file.read())

    thread = threading.Thread(target=serve)
    thread.start()
    status = world.run(
        """
assert set(paths) == {"asset-0", "outputs", "broker_socket", "serving_socket"}
assert config["sockets"] == ["broker_socket", "serving_socket"]
with socket.socket(socket.AF_UNIX) as s, socket.socket(socket.AF_UNIX) as broker:
    broker.connect(paths["broker_socket"])
    s.connect(paths["serving_socket"])
    broker.sendall(b"to the broker")
    assert broker.recv(100) == b"TO THE BROKER"
    s.sendall(b"answer" * 50_000)
    s.shutdown(socket.SHUT_WR)
    got = s.makefile("rb").read()
assert got == b"ask" * 100_000
""",
        sandbox={"serving": True},
    )
    thread.join(30)
    listener.close()
    assert (status, world.error) == (0, None)
    assert heard == [b"answer" * 50_000]
    assert world.heard == [b"to the broker"]


def test_without_serving_in_the_plan_there_is_no_way_to_a_server(world: World) -> None:
    world.server = world.folder / "server.sock"
    assert world.run("assert 'serving_socket' not in paths") == 0
    received = [frame(Kind.OPEN, SERVING, 1)]
    world.server = None
    with pytest.raises(EnclaveError, match="nobody that this job has"):
        _lying_guest(*received)(world)


def test_a_file_is_on_the_hosts_disk_before_the_broker_hears_of_it(world: World) -> None:
    status = world.run(
        """
with socket.socket(socket.AF_UNIX) as s:
    s.connect(paths["broker_socket"])
    for number in range(20):
        open(paths["outputs"] + f"/checkpoint-{number}", "wb").write(b"x" * 70_000)
        s.sendall(b"%d;" % number)
        s.recv(100)
"""
    )
    assert world.error is None
    assert status == 0
    for number, files in enumerate(world.seen):
        assert files[f"checkpoint-{number}"] == b"x" * 70_000
    assert len(world.seen) == 20


def test_an_agent_that_is_killed_tells_by_its_status(world: World) -> None:
    assert world.run("os.kill(os.getpid(), 9)") == 137


def test_a_broker_that_is_away_breaks_the_connection_and_not_the_link(world: World) -> None:
    world.broker = world.folder / "nowhere"

    async def nobody(*_: Any, **__: Any) -> Any:
        raise ConnectionRefusedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "open_unix_connection", nobody)
        status = world.run(
            """
with socket.socket(socket.AF_UNIX) as s:
    s.connect(paths["broker_socket"])
    try:
        s.sendall(b"x")
        ended = s.recv(1) == b""
    except OSError:
        ended = True
sys.exit(0 if ended else 1)
"""
        )
    assert status == 0


def _lying_guest(*frames: bytes) -> Callable[[World], None]:
    def run(world: World) -> None:
        async def talk() -> None:
            ours, theirs = socket.socketpair()
            reader, writer = await asyncio.open_connection(sock=ours)
            job = GuestJob({}, {}, {"outputs": world.outputs}, world.broker)
            for data in (json_frame(Kind.HELLO, {"version": 1}), *frames):
                theirs.sendall(data)
            theirs.shutdown(socket.SHUT_WR)
            try:
                status = await HostLink(reader, writer, job, world.messages.extend).run()
                assert status is None
            finally:
                writer.transport.abort()
                theirs.close()

        asyncio.run(talk())

    return run


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        ([json_frame(Kind.FILE, {"mount": "etc", "path": "x", "size": 0})], "may not write"),
        ([json_frame(Kind.FILE, {"mount": "outputs", "path": "../x", "size": 0})], "protocol"),
        ([json_frame(Kind.REMOVED, {"mount": "outputs", "path": "../x"})], "protocol"),
        ([json_frame(Kind.FILE, {"mount": "outputs", "path": "x", "size": -1})], "impossible"),
        ([frame(Kind.DATA, b"x")], "wrong time"),
        ([frame(Kind.OPEN, number=1)] * 2, "twice"),
        ([frame(Kind.OPEN, b"shell", 1)], "nobody that this job has"),
        (
            [
                json_frame(Kind.FILE, {"mount": "outputs", "path": "x", "size": 1}),
                frame(Kind.DATA, b"xy"),
            ],
            "more of a file",
        ),
        ([frame(Kind.START)], "protocol"),
        ([json_frame(Kind.HELLO, {"version": 1})], "wrong time"),
    ],
    ids=[
        *("mount", "path", "remove", "size", "data", "twice", "nobody", "more", "kind"),
        "hello",
    ],
)
def test_a_guest_that_lies_harms_nothing(world: World, frames: list[bytes], said: str) -> None:
    before = sorted(world.folder.iterdir())
    with pytest.raises(EnclaveError, match=said):
        _lying_guest(*frames)(world)
    assert sorted(world.folder.iterdir()) == before
    assert world.files() == {}


def test_a_half_sent_file_leaves_nothing(world: World) -> None:
    begin = json_frame(Kind.FILE, {"mount": "outputs", "path": "x", "size": 10})
    _lying_guest(begin, frame(Kind.DATA, b"half"))(world)
    assert list(world.outputs.iterdir()) == []


def test_a_full_disk_is_told_in_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("cenacle.enclave.vm.host.pwrite_all", full)
    begin = json_frame(Kind.FILE, {"mount": "outputs", "path": "x", "size": 4})
    with pytest.raises(UnavailableError, match="no room"):
        _lying_guest(begin, frame(Kind.DATA, b"data"))(world)
    assert world.files() == {}


def test_a_guest_of_another_version_is_refused(world: World) -> None:
    async def talk() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            theirs.sendall(json_frame(Kind.HELLO, {"version": 2}))
            job = GuestJob({}, {}, {}, world.broker)
            try:
                await HostLink(reader, writer, job, world.messages.extend).run()
            finally:
                writer.transport.abort()

    with pytest.raises(EnclaveError, match="another version"):
        asyncio.run(talk())


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [frame(Kind.START)],
        [frame(Kind.CONFIG, b"{}"), frame(Kind.CONFIG)],
        [frame(Kind.CONFIG, json.dumps(_FIELDS).encode()), frame(Kind.CONFIG), frame(Kind.BYTES)],
        [b"?" * 20],
    ],
    ids=["gone", "early", "empty", "order", "noise"],
)
def test_a_host_that_lies_ends_the_guest(frames: list[bytes], tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"".join(frames))
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EnclaveError):
            Supervisor(theirs.fileno(), tmp_path, None).run()
