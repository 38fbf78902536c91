"""A nonce is for one broker, one contract, a few minutes, and one release."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.broker.nonces import LIFETIME, NonceKey
from cenacle.broker.release import ReleaseDesk
from cenacle.crypto import SecretBytes
from cenacle.documents.base import b64, sha256_digest
from cenacle.errors import CenacleError, ConflictError, EvidenceError, RefusedError

CONTRACT, OTHER = sha256_digest(b"contract"), sha256_digest(b"other")
Refused = Callable[[Callable[[], object]], CenacleError]


@pytest.fixture
def key() -> NonceKey:
    return NonceKey(SecretBytes(b"k" * 32))


def test_a_nonce_is_recognised_until_it_expires(key: NonceKey, world: Any) -> None:
    now = world.clock()
    nonce = key.issue(CONTRACT, now)
    assert len(nonce) == 40
    key.check(nonce, CONTRACT, now)
    key.check(nonce, CONTRACT, now + LIFETIME)
    with pytest.raises(EvidenceError, match="expired"):
        key.check(nonce, CONTRACT, now + LIFETIME + timedelta(seconds=1))


def test_a_nonce_is_for_one_contract_and_one_broker(key: NonceKey, world: Any) -> None:
    nonce = key.issue(CONTRACT, world.clock())
    with pytest.raises(EvidenceError, match="not one that this broker issued"):
        key.check(nonce, OTHER, world.clock())
    with pytest.raises(EvidenceError, match="not one that this broker issued"):
        NonceKey(SecretBytes(b"l" * 32)).check(nonce, CONTRACT, world.clock())


def test_a_restarted_broker_knows_its_nonces(key: NonceKey, world: Any) -> None:
    nonce = key.issue(CONTRACT, world.clock())
    NonceKey(SecretBytes(b"k" * 32)).check(nonce, CONTRACT, world.clock())


def test_nonces_differ(key: NonceKey, world: Any) -> None:
    assert len({key.issue(CONTRACT, world.clock()) for _ in range(1000)}) == 1000


@pytest.mark.parametrize("length", [0, 1, 16, 23, 24, 25, 39])
def test_a_truncated_nonce(key: NonceKey, world: Any, length: int) -> None:
    nonce = key.issue(CONTRACT, world.clock())
    with pytest.raises(EvidenceError):
        key.check(nonce[:length], CONTRACT, world.clock())


def test_a_lengthened_nonce(key: NonceKey, world: Any) -> None:
    with pytest.raises(EvidenceError):
        key.check(key.issue(CONTRACT, world.clock()) + b"\0", CONTRACT, world.clock())


@given(at=st.integers(0, 39), bit=st.integers(0, 7))
def test_a_flipped_bit(at: int, bit: int) -> None:
    from datetime import UTC, datetime  # noqa: PLC0415

    key, now = NonceKey(SecretBytes(b"k" * 32)), datetime(2027, 1, 31, tzinfo=UTC)
    nonce = bytearray(key.issue(CONTRACT, now))
    nonce[at] ^= 1 << bit
    with pytest.raises(EvidenceError):
        key.check(bytes(nonce), CONTRACT, now)


@given(st.binary(max_size=64))
def test_made_up_nonces(nonce: bytes) -> None:
    from datetime import UTC, datetime  # noqa: PLC0415

    with pytest.raises(EvidenceError):
        NonceKey(SecretBytes(b"k" * 32)).check(nonce, CONTRACT, datetime(2027, 1, 31, tzinfo=UTC))


# ------------------------------------------------------------------ through a release


def test_a_replayed_request_is_refused(any_world: Any) -> None:
    world = any_world
    enclave = world.enclave(world.agree())
    request = enclave.request()
    answer = world.desk.release(request)
    before = world.state()
    with pytest.raises(EvidenceError, match="shown before"):
        world.desk.release(request)
    # Not even after the run has ended, and not by a broker that knows it from its store alone.
    enclave.settle(answer.run)
    after = world.state()
    assert after != before
    world.restart()
    with pytest.raises(EvidenceError, match="shown before"):
        world.desk.release(request)
    resumed = request.model_copy(update={"resume": answer.run})
    with pytest.raises(ConflictError):
        world.desk.release(resumed)
    assert world.state() == after


def test_a_nonce_survives_a_restart_unused(any_world: Any) -> None:
    world = any_world
    enclave = world.enclave(world.agree())
    request = enclave.request()
    world.restart()
    assert enclave.open(world.desk.release(request))["hospital-a"]


def test_the_same_request_twice_at_once_succeeds_once(any_world: Any) -> None:
    world = any_world
    enclave = world.enclave(world.agree())
    request = enclave.request()
    barrier = threading.Barrier(8)

    def ask(_: int) -> str:
        barrier.wait()
        try:
            world.desk.release(request)
        except EvidenceError as error:
            return error.what
        return "released"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(ask, range(8)))
    assert sorted(outcomes) == ["evidence was shown before"] * 7 + ["released"]
    assert all(world.uses(asset) == 1 for asset in world.assets.values())
    assert world.kinds().count("release") == 1


def test_a_nonce_used_for_a_run_does_not_resume_it(world: Any) -> None:
    enclave = world.enclave(world.agree())
    request = enclave.request()
    answer = world.desk.release(request)
    with pytest.raises(EvidenceError, match="shown before"):
        world.desk.release(request.model_copy(update={"resume": answer.run}))


def _expired(world: Any, digest: str) -> bytes:
    nonce: bytes = world.desk.nonce(digest)
    world.clock.turn(seconds=LIFETIME.seconds + 1)
    return nonce


def _of_another_contract(world: Any, digest: str) -> bytes:
    nonce: bytes = world.desk.nonce(world.agree(name="another"))
    return nonce


def _truncated(world: Any, digest: str) -> bytes:
    nonce: bytes = world.desk.nonce(digest)
    return nonce[:-1]


def _of_another_broker(world: Any, digest: str) -> bytes:
    return NonceKey(SecretBytes.random(32)).issue(digest, world.clock())


@pytest.mark.parametrize("make", [_expired, _of_another_contract, _truncated, _of_another_broker])
def test_a_nonce_that_is_not_good_refuses(
    world: Any, refused: Refused, make: Callable[[Any, str], bytes]
) -> None:
    digest = world.agree()
    enclave = world.enclave(digest)
    enclave.nonce = make(world, digest)
    error = refused(lambda: enclave.release(nonce=b64(enclave.nonce)))
    assert isinstance(error, RefusedError)
    assert [clause["name"] for clause in error.clauses] == ["evidence"]
    assert "nonce" in error.clauses[0]["found"]


def test_brokers_on_one_database_share_their_nonces(any_world: Any) -> None:
    """A nonce of one desk is good at another of the same keys, and used up at both."""
    world = any_world
    enclave = world.enclave(world.agree())
    request = enclave.request()
    ReleaseDesk(world.broker).release(request)
    with pytest.raises(EvidenceError):
        ReleaseDesk(world.broker).release(request)


def test_spent_nonces_are_forgotten_only_when_they_have_expired(world: Any) -> None:
    enclave = world.enclave(world.agree())
    request = enclave.request()
    enclave.settle(world.desk.release(request).run)
    world.clock.turn(seconds=LIFETIME.seconds)
    world.broker.tidy()
    with pytest.raises(EvidenceError, match="shown before"):
        world.desk.release(request)
    world.clock.turn(days=2)
    assert world.broker.tidy() >= 1
    before = world.state()
    with pytest.raises(RefusedError, match="nonce has expired"):
        world.desk.release(request)
    assert world.state() == before
