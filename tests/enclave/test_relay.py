"""The relay forwards bytes to one address, both ways, and always comes to an end."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cenacle.enclave.relay import Relay
from cenacle.errors import UnavailableError

Handler = Callable[[socket.socket], None]


@contextlib.contextmanager
def _broker(handler: Handler) -> Iterator[tuple[str, int]]:
    """A TCP server on loopback that gives every connection to ``handler`` in a thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            handler(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve, args=(connection,)))
            threads[-1].start()

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for one in threads:
            one.join()


def _connect(relay: Relay) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(str(relay.path))
    return client


def _read_all(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(1 << 16), b""))


def _echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def _answer_after_end(connection: socket.socket) -> None:
    size = len(_read_all(connection))
    connection.sendall(str(size).encode())


def test_bytes_go_both_ways_unchanged() -> None:
    payload = os.urandom(3_000_000)
    with _broker(_echo) as address, Relay(address) as relay, _connect(relay) as client:

        def send() -> None:
            client.sendall(payload)
            client.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        assert _read_all(client) == payload
        sender.join()


def test_the_end_of_one_direction_leaves_the_other_open() -> None:
    with _broker(_answer_after_end) as address, Relay(address) as relay, _connect(relay) as client:
        client.sendall(b"x" * 500_000)
        client.shutdown(socket.SHUT_WR)
        assert _read_all(client) == b"500000"


def test_the_broker_may_end_first() -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"hello")
        connection.shutdown(socket.SHUT_WR)
        assert _read_all(connection) == b"still here"

    with _broker(greet) as address, Relay(address) as relay, _connect(relay) as client:
        assert _read_all(client) == b"hello"
        client.sendall(b"still here")
        client.shutdown(socket.SHUT_WR)


def test_many_connections_at_once() -> None:
    with _broker(_echo) as address, Relay(address) as relay, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_connect(relay)) for _ in range(32)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
            client.shutdown(socket.SHUT_WR)
        assert [_read_all(c) for c in clients] == [b"%d" % n for n in range(32)]


def test_a_flood_of_connections_is_cut_and_the_first_ones_live() -> None:
    with _broker(_echo) as address, Relay(address) as relay, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_connect(relay)) for _ in range(64)]
        for client in clients:
            client.sendall(b"1")
            assert client.recv(1) == b"1"
        late = stack.enter_context(_connect(relay))
        with contextlib.suppress(ConnectionError):
            assert late.recv(1) == b""
        clients[0].sendall(b"2")
        assert clients[0].recv(1) == b"2"


def test_a_reader_that_does_not_read_stops_the_writer() -> None:
    release = threading.Event()

    def stubborn(connection: socket.socket) -> None:
        release.wait(20)
        _answer_after_end(connection)

    with _broker(stubborn) as address, Relay(address) as relay, _connect(relay) as client:
        client.settimeout(0.5)
        sent = 0
        with contextlib.suppress(TimeoutError):
            while sent < 1 << 28:
                sent += client.send(b"x" * (1 << 16))
        # What is in flight is bounded by kernel and relay buffers, not by what is sent.
        assert sent < 1 << 26
        release.set()
        client.settimeout(20)
        client.shutdown(socket.SHUT_WR)
        assert int(_read_all(client)) == sent


def test_a_broker_that_dies_cuts_the_enclaves_connection() -> None:
    def die(connection: socket.socket) -> None:
        connection.recv(1)
        # Linger 0: the peer gets RST, as from a killed process with unread data.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with _broker(die) as address, Relay(address) as relay, _connect(relay) as client:
        client.sendall(b"x")
        with contextlib.suppress(ConnectionError):
            assert client.recv(1) == b""


def test_a_broker_that_is_not_there_is_an_end_and_not_a_hang() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = unused.getsockname()
    with Relay(address) as relay:
        for _ in range(2):
            with _connect(relay) as client, contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert relay.refused is not None
        with socket.create_server(address), _connect(relay) as client:
            client.sendall(b"x")  # and a broker that comes back is reached again


def test_closing_cuts_open_connections_and_removes_the_socket() -> None:
    with _broker(_echo) as address:
        relay = Relay(address).start()
        path = relay.path
        with _connect(relay) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            relay.close()
            with contextlib.suppress(ConnectionError):
                assert client.recv(1) == b""
        assert not path.parent.exists()
        relay.close()
        assert not [t for t in threading.enumerate() if t.name == "cenacle-relay"]


def test_only_this_user_can_enter_the_folder() -> None:
    with Relay(("127.0.0.1", 1)) as relay:
        assert stat.S_IMODE(relay.path.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(relay.path.stat().st_mode) == 0o600


def test_a_deep_temporary_folder_does_not_make_the_path_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with Relay(("127.0.0.1", 1)) as relay:
        assert relay.path.exists()
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize(
    "address",
    [("no-such-host.invalid", 443), ("\udcff", 1), ("127.0.0.1", -1), ("127.0.0.1", 70_000)],
)
def test_an_address_that_cannot_be_is_said_so(address: tuple[str, int]) -> None:
    with pytest.raises(UnavailableError, match="cannot be resolved"):
        Relay(address).start()


def test_the_address_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with _broker(_echo) as (_, port), Relay(("localhost", port)) as relay:
        asked: list[object] = []
        original = socket.getaddrinfo

        def spy(host: object, *arguments: object, **named: object) -> object:
            asked.append(host)
            return original(host, *arguments, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "getaddrinfo", spy)
        with _connect(relay) as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
        assert "localhost" not in asked


def test_a_relay_runs_once() -> None:
    relay = Relay(("127.0.0.1", 1))
    with pytest.raises(RuntimeError):
        _ = relay.path
    with relay, pytest.raises(RuntimeError):
        relay.start()
