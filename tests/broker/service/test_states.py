"""A contract's state at the broker: number by number, across runs, from its current enclave."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cenacle.broker.messages import StateAnswer, StateRecord
from cenacle.broker.states import States
from cenacle.crypto import SigningKey
from cenacle.documents.base import format_time, sha256_digest
from cenacle.documents.dsse import Envelope
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    InputError,
    SignatureError,
    UnavailableError,
)


def _content(number: int) -> str:
    return sha256_digest(f"state {number}".encode())


def _record(contract: str, run: str, number: int, /, **changes: Any) -> StateRecord:
    fields = {"contract": contract, "run": run, "number": number, "content": _content(number)}
    if number > 1:
        fields["previous"] = _content(number - 1)
    fields |= changes
    return StateRecord.from_fields({k: v for k, v in fields.items() if v is not None})


class Held:
    """A run that an enclave holds."""

    def __init__(self, world: Any, contract: str, resume: str | None = None) -> None:
        self.world, self.contract = world, contract
        self.enclave = world.enclave(contract)
        self.answer = self.enclave.release(**({} if resume is None else {"resume": resume}))
        self.run = self.answer.run

    def advance(self, number: int, signer: SigningKey | None = None, **changes: Any) -> StateAnswer:
        record = _record(self.contract, self.run, number, **changes)
        signed = Envelope.sign(record, signer or self.enclave.signing)
        return States(self.world.desk).advance(signed)

    @property
    def told(self) -> tuple[int, str | None]:
        return self.answer.state_number, self.answer.state_digest


@pytest.fixture
def held(world: Any) -> Held:
    return Held(world, world.agree())


def test_a_state_outlives_its_runs(any_world: Any) -> None:
    """Settled, abandoned, taken over, and through a restart of the broker."""
    world = any_world
    held = Held(world, world.agree())
    assert held.told == (0, None)
    now = format_time(world.clock())
    assert held.advance(1) == StateAnswer(number=1, time=now)
    held.advance(2)
    held.enclave.settle(held.run)

    second = Held(world, held.contract)
    assert second.run != held.run
    assert second.told == (2, _content(2))
    second.advance(3)
    taken = Held(world, held.contract, second.run)
    assert taken.told == (3, _content(3))
    taken.advance(4)
    owner = world.actors["hospital-a"]
    world.desk.abandon(world.request_of(owner, "abandon", second.run))
    world.restart()

    third = Held(world, held.contract)
    assert third.told == (4, _content(4))
    third.advance(5)


def test_contracts_have_states_of_their_own(world: Any, held: Held) -> None:
    held.advance(1)
    other = Held(world, world.agree(name="other"))
    assert other.told == (0, None)
    other.advance(1)
    held.advance(2)
    other.advance(2)


def test_the_very_same_record_is_answered_again(any_world: Any) -> None:
    world = any_world
    held = Held(world, world.agree())
    held.advance(1)
    first = held.advance(2)
    world.clock.turn(seconds=7)
    again = held.advance(2)
    assert again.number == 2
    assert again.time > first.time
    with pytest.raises(ConflictError):
        held.advance(1)
    held.advance(3)


WRONG: dict[str, tuple[int, dict[str, Any]]] = {
    "skips one": (3, {"previous": _content(2)}),
    "goes back": (1, {}),
    "another content": (2, {"previous": _content(1), "content": _content(9)}),
    "another past": (3, {"previous": _content(8)}),
    "the same with another past": (2, {"previous": _content(8)}),
    "far ahead": (2**53 - 1, {"previous": _content(2)}),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_follow_is_refused(held: Held, case: str) -> None:
    number, changes = WRONG[case]
    held.advance(1)
    held.advance(2)
    if case == "skips one":
        number = 4
    with pytest.raises(ConflictError, match="does not follow the newest one") as refusal:
        held.advance(number, **changes)
    assert f"number 3 after {_content(2)}" in str(refusal.value)
    held.advance(3)


def test_the_first_state_is_number_one(held: Held) -> None:
    with pytest.raises(ConflictError, match="expected number 1 after nothing"):
        held.advance(2)


@pytest.mark.parametrize(
    ("number", "changes"),
    [(1, {"previous": _content(0)}), (2, {"previous": None}), (0, {}), (2**53, {}), (-1, {})],
)
def test_a_record_that_contradicts_itself(number: int, changes: dict[str, Any]) -> None:
    with pytest.raises(DocumentError):
        _record("sha256:" + "0" * 64, "run", number, **changes)


def test_who_may_advance_a_state(world: Any, held: Held) -> None:
    held.advance(1)
    with pytest.raises(SignatureError):
        held.advance(2, SigningKey.generate())
    with pytest.raises(SignatureError):
        held.advance(2, world.actors["hospital-a"].signing)
    with pytest.raises(InputError, match="a run does not exist"):
        held.advance(2, run="nothing")
    with pytest.raises(InputError, match="names another contract"):
        held.advance(2, contract="sha256:" + "0" * 64)
    taken = Held(world, held.contract, held.run)
    with pytest.raises(SignatureError):
        held.advance(2)
    taken.advance(2)
    taken.enclave.settle(taken.run)
    with pytest.raises(ConflictError, match=r"not open; found .*: settled"):
        taken.advance(3)
    with pytest.raises(ConflictError, match="settled"):
        taken.advance(2)


def test_another_contracts_enclave(world: Any, held: Held) -> None:
    """It holds a run, but not of this contract."""
    held.advance(1)
    other = Held(world, world.agree(name="other"))
    with pytest.raises(SignatureError):
        held.advance(2, other.enclave.signing)
    with pytest.raises(InputError, match="names another contract"):
        other.advance(2, contract=held.contract)


def test_another_kind_of_document(world: Any, held: Held) -> None:
    signed = Envelope.sign(held.enclave.settlement(held.run), held.enclave.signing)
    with pytest.raises(DocumentError, match="another kind of document"):
        States(world.desk).advance(signed)


def test_of_many_at_once_one_goes_on(any_world: Any) -> None:
    """One enclave with two minds: of two states of one number, one is kept."""
    world = any_world
    held = Held(world, world.agree())
    held.advance(1)
    barrier = threading.Barrier(8)

    def go(number: int) -> str | None:
        barrier.wait()
        try:
            held.advance(2, content=_content(100 + number))
        except ConflictError:
            return None
        return _content(100 + number)

    with ThreadPoolExecutor(8) as pool:
        kept = [content for content in pool.map(go, range(8)) if content is not None]
    assert len(kept) == 1
    assert Held(world, held.contract, held.run).told == (2, kept[0])


def test_the_time_that_is_told_never_goes_back(any_world: Any) -> None:
    world = any_world
    held = Held(world, world.agree())
    held.advance(1)
    world.clock.turn(hours=1)
    newest = held.advance(2).time
    world.clock.turn(minutes=-5)
    assert held.advance(2).time == newest
    assert held.advance(3).time == newest
    world.clock.turn(seconds=-1)
    with pytest.raises(UnavailableError, match="clock was set back") as refusal:
        held.advance(4)
    assert newest in str(refusal.value)
    world.restart()
    with pytest.raises(UnavailableError, match="clock was set back"):
        held.advance(4)
    world.clock.turn(minutes=5, seconds=2)
    assert held.advance(4).time > newest


def test_a_state_that_cannot_be_kept(
    world: Any, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the commit: nothing is recorded, nothing is answered."""
    held.advance(1)
    writer = world.store.committer._writer
    with monkeypatch.context() as patch:

        def full() -> None:
            raise UnavailableError("the broker's store cannot be used")

        patch.setattr(writer, "commit", full)
        with pytest.raises(CenacleError):
            held.advance(2)
    assert held.advance(2).number == 2
