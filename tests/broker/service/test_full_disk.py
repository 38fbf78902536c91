"""No room for the broker's store: a clear answer, nothing half done, and it works again later."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cenacle.broker.client import BrokerClient
from cenacle.broker.server import serving
from cenacle.broker.tls import ensure_certificate
from cenacle.errors import UnavailableError


@contextlib.contextmanager
def full_disk(world: Any) -> Iterator[None]:
    """The write-ahead log cannot grow: every write fails as on a disk without room.

    RLIMIT_FSIZE gives EFBIG where a full disk gives ENOSPC; SQLite reports both as its disk.
    """
    wal = world.folder / "broker.db-wal"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


Attempt = Callable[[Any, str, str], object]

ATTEMPTS: list[Attempt] = [
    lambda world, digest, _: world.enclave(digest).release(),
    lambda world, digest, _: world.register("newcomer"),
    lambda world, digest, _: world.deposit("clinic"),
    lambda world, digest, _: world.propose(world.contract(name="other")),
    lambda world, _, unsigned: world.sign(unsigned, "hospital-a"),
    lambda world, digest, _: world.veto(digest, "clinic"),
]


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_every_change_is_refused_whole_and_works_again(world: Any, attempt: Attempt) -> None:
    digest, unsigned = world.agree(), world.propose(world.contract(name="unsigned"))
    before = world.state()
    with full_disk(world):
        with pytest.raises(UnavailableError, match="store cannot be used") as caught:
            attempt(world, digest, unsigned)
        assert "othing was changed" in str(caught.value)
        assert world.state() == before  # reading goes on
    attempt(world, digest, unsigned)
    assert world.state() != before


def test_a_run_goes_on_when_there_is_room_again(world: Any) -> None:
    digest = world.agree()
    enclave = world.enclave(digest)
    run = enclave.release().run
    before = world.state()
    with full_disk(world):
        attempts: list[Callable[[], object]] = [
            lambda: enclave.checkpoint(run, 1),
            lambda: enclave.settle(run),
            lambda: world.enclave(digest).release(resume=run),
        ]
        for attempt in attempts:
            with pytest.raises(UnavailableError):
                attempt()
        assert world.state() == before
    enclave.checkpoint(run, 1)
    enclave.settle(run)
    assert all(world.uses(asset) == 1 for asset in world.assets.values())


def test_a_refused_release_keeps_its_nonce(world: Any) -> None:
    enclave = world.enclave(world.agree())
    request = enclave.request()
    with full_disk(world), pytest.raises(UnavailableError):
        world.desk.release(request)
    assert enclave.open(world.desk.release(request))["job"]


def test_over_the_network(live_world: Any) -> None:
    world = live_world
    enclave = world.enclave(world.agree())
    request = enclave.request()
    with (
        serving(world.broker, ensure_certificate(world.folder / "broker")),
        BrokerClient(world.broker.identity, timeout=20) as client,
    ):
        with full_disk(world), pytest.raises(UnavailableError) as caught:
            client.release(request)
        assert "check the disk" in str(caught.value)
        assert enclave.open(client.release(request))["job"]
