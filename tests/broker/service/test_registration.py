"""Who gets in: the owner with a token, the others by invitation, each with a key of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from cenacle.broker.messages import Registration
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64, format_time
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    InputError,
    RefusedError,
    SignatureError,
)


class Newcomer:
    def __init__(self, name: str) -> None:
        self.name = name
        self.signing = SigningKey.generate()
        from cenacle.crypto import HpkePrivateKey  # noqa: PLC0415

        self.party = Party(
            name=name,
            signing_key=b64(self.signing.verify_key.raw),
            hpke_key=b64(HpkePrivateKey.generate().public_key.raw),
            created="2027-01-31T12:00:00Z",
        )

    def registration(self, token: str, signer: SigningKey | None = None) -> Registration:
        envelope = Envelope.sign(self.party, signer or self.signing)
        return Registration(party=envelope.to_fields(), token=token)


def owner_of(world: Any) -> str | None:
    with world.store.read() as tx:
        found: str | None = tx.meta("owner")
        return found


# ------------------------------------------------------------------ the owner's token


def test_the_first_stranger_does_not_own_the_broker(empty_world: Any) -> None:
    world = empty_world
    token = world.broker.owner_token()
    for guess in ("x", token[:-1], token + "x", token.swapcase(), "\0"):
        with pytest.raises(RefusedError, match="unknown token"):
            world.broker.register(Newcomer("mallory").registration(guess))
    assert owner_of(world) is None
    world.broker.register(Newcomer("alice").registration(token))
    assert owner_of(world) == "alice"


def test_no_token_was_ever_made(empty_world: Any) -> None:
    """Not even the hash of nothing: an absent token equals no token."""
    with pytest.raises(RefusedError):
        empty_world.broker.register(Newcomer("mallory").registration("any"))
    assert owner_of(empty_world) is None


def test_the_owners_token_is_for_the_first_alone(empty_world: Any) -> None:
    world = empty_world
    token = world.broker.owner_token()
    world.broker.register(Newcomer("alice").registration(token))
    with pytest.raises(RefusedError):
        world.broker.register(Newcomer("bob").registration(token))
    assert world.broker.owner_token() is None
    assert owner_of(world) == "alice"


def test_a_restart_voids_the_token_before(empty_world: Any) -> None:
    world = empty_world
    first = world.broker.owner_token()
    world.restart()
    second = world.broker.owner_token()
    assert first != second
    with pytest.raises(RefusedError):
        world.broker.register(Newcomer("mallory").registration(first))
    world.broker.register(Newcomer("alice").registration(second))
    world.restart()
    assert world.broker.owner_token() is None
    with pytest.raises(RefusedError):
        world.broker.register(Newcomer("mallory").registration(second))


def test_two_first_strangers_with_the_token_at_once(empty_world: Any) -> None:
    world = empty_world
    token = world.broker.owner_token()
    barrier = threading.Barrier(4)

    def register(number: int) -> str:
        newcomer = Newcomer(f"party-{number}")
        barrier.wait()
        try:
            world.broker.register(newcomer.registration(token))
        except RefusedError:
            return "refused"
        return newcomer.name

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(register, range(4)))
    assert outcomes.count("refused") == 3
    assert owner_of(world) in outcomes


def test_a_failed_registration_spends_no_token(empty_world: Any) -> None:
    world = empty_world
    token = world.broker.owner_token()
    with pytest.raises(SignatureError):
        world.broker.register(Newcomer("alice").registration(token, SigningKey.generate()))
    alice = Newcomer("alice")
    world.broker.register(alice.registration(token))
    world.actors["alice"] = alice
    invited = world.broker.invite(world.request_of(alice, "invite")).token
    with pytest.raises(ConflictError, match="registered already"):
        world.broker.register(Newcomer("alice").registration(invited))
    world.broker.register(Newcomer("bob").registration(invited))


def test_tokens_are_not_stored(empty_world: Any) -> None:
    world = empty_world
    token = world.broker.owner_token()
    alice = Newcomer("alice")
    world.broker.register(alice.registration(token))
    invited = world.broker.invite(world.request_of(alice, "invite")).token
    world.broker.close()
    stored = b"".join(path.read_bytes() for path in world.folder.glob("broker.db*"))
    assert token.encode() not in stored
    assert invited.encode() not in stored


# ------------------------------------------------------------------ invitations


def test_an_invitation_admits_one(world: Any) -> None:
    token = world.broker.invite(world.request_of(world.owner, "invite")).token
    world.broker.register(Newcomer("first").registration(token))
    with pytest.raises(ConflictError, match="used already"):
        world.broker.register(Newcomer("second").registration(token))
    world.restart()
    with pytest.raises(ConflictError, match="used already"):
        world.broker.register(Newcomer("second").registration(token))


def test_an_invitation_admits_one_of_many_at_once(any_world: Any) -> None:
    world = any_world
    token = world.broker.invite(world.request_of(world.owner, "invite")).token
    barrier = threading.Barrier(4)

    def register(number: int) -> bool:
        newcomer = Newcomer(f"party-{number}")
        barrier.wait()
        try:
            world.broker.register(newcomer.registration(token))
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(register, range(4))) == 1


def test_an_invitation_expires(world: Any) -> None:
    invitation = world.broker.invite(world.request_of(world.owner, "invite"))
    world.clock.turn(days=7)
    assert invitation.expires == format_time(world.clock())
    world.clock.turn(seconds=1)
    with pytest.raises(RefusedError, match="expired"):
        world.broker.register(Newcomer("late").registration(invitation.token))
    world.clock.turn(seconds=-1)
    world.broker.register(Newcomer("late").registration(invitation.token))


@pytest.mark.parametrize("name", ["hospital-b", "clinic"])
def test_only_the_owner_invites(world: Any, name: str) -> None:
    with pytest.raises(RefusedError, match="only the broker's owner"):
        world.broker.invite(world.request_of(world.actors[name], "invite"))


# ------------------------------------------------------------------ names and keys


def test_names_are_unique(world: Any) -> None:
    token = world.broker.invite(world.request_of(world.owner, "invite")).token
    impostor = Newcomer("hospital-a")
    with pytest.raises(ConflictError, match="registered already"):
        world.broker.register(impostor.registration(token))
    found = world.broker.party("hospital-a").peek(Party)
    assert found.signing_key == world.actors["hospital-a"].party.signing_key


def test_a_party_proves_that_it_holds_its_key(world: Any) -> None:
    token = world.broker.invite(world.request_of(world.owner, "invite")).token
    newcomer = Newcomer("new")
    with pytest.raises(SignatureError):
        world.broker.register(newcomer.registration(token, SigningKey.generate()))
    unsigned = Envelope(newcomer.party.canonical_bytes(), Party.media_type, {})
    with pytest.raises(SignatureError, match="missing"):
        world.broker.register(Registration(party=unsigned.to_fields(), token=token))
    envelope = Envelope.sign(newcomer.party, newcomer.signing)
    other = newcomer.party.model_copy(update={"name": "other"})
    altered = Envelope(other.canonical_bytes(), Party.media_type, envelope.signatures)
    with pytest.raises(SignatureError):
        world.broker.register(Registration(party=altered.to_fields(), token=token))
    with world.store.read() as tx:
        assert tx.party("new") is tx.party("other") is None


@pytest.mark.parametrize(
    "spoil",
    [
        {"payloadType": "application/json"},
        {"payload": "e30="},
        {"payload": "!"},
        {"signatures": []},
        {"signatures": [{}]},
        {"surplus": 1},
    ],
)
def test_a_party_document_that_is_none(world: Any, spoil: dict[str, Any]) -> None:
    token = world.broker.invite(world.request_of(world.owner, "invite")).token
    fields = Newcomer("new").registration(token).to_fields()
    fields["party"].update(spoil)
    with pytest.raises((InputError, SignatureError)):
        world.broker.register(Registration.from_fields(fields))


def test_a_registration_is_logged(world: Any) -> None:
    assert world.kinds()[:3] == ["party"] * 3
    with pytest.raises(InputError, match="not registered"):
        world.broker.party("nobody")


# ------------------------------------------------------------------ signed requests


def test_a_request_works_once(world: Any) -> None:
    request = world.request_of(world.owner, "invite")
    world.broker.invite(request)
    with pytest.raises(ConflictError, match="carried out already"):
        world.broker.invite(request)
    world.restart()
    with pytest.raises(ConflictError):
        world.broker.invite(request)


def test_a_request_works_once_at_once(any_world: Any) -> None:
    world = any_world
    request = world.request_of(world.owner, "list-contracts")
    barrier = threading.Barrier(4)

    def ask(_: int) -> bool:
        barrier.wait()
        try:
            world.broker.contracts_of(request)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(ask, range(4))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"broker": "sha256:" + "0" * 64}, "something else"),
        ({"action": "abandon"}, "something else"),
        ({"issued": "past"}, "not fresh"),
        ({"issued": "future"}, "not fresh"),
        ({"party": "hospital-b"}, "signature"),
        ({"party": "nobody"}, "not registered"),
    ],
)
def test_a_request_that_is_not_for_this(world: Any, changes: dict[str, str], message: str) -> None:
    far = timedelta(minutes=5, seconds=1)
    moments = {"past": world.clock() - far, "future": world.clock() + far}
    if "issued" in changes:
        changes = {"issued": format_time(moments[changes["issued"]])}
    request = world.request_of(world.owner, **{"action": "invite", **changes})
    with pytest.raises(CenacleError, match=message):
        world.broker.invite(request)


def test_a_request_of_the_last_five_minutes_is_fresh(world: Any) -> None:
    request = world.request_of(world.owner, "invite")
    world.clock.turn(minutes=5)
    world.broker.invite(request)


def test_a_request_without_a_signature(world: Any) -> None:
    signed = world.request_of(world.owner, "invite")
    unsigned = Envelope(signed.payload, signed.payload_type, {})
    with pytest.raises(SignatureError):
        world.broker.invite(unsigned)
    with pytest.raises(DocumentError):
        world.broker.invite(world.owner.envelope)


def test_spent_requests_are_forgotten_only_when_they_are_stale(world: Any) -> None:
    request = world.request_of(world.owner, "invite")
    world.broker.invite(request)
    world.clock.turn(minutes=5)
    assert world.broker.tidy() == 0
    with pytest.raises(ConflictError):
        world.broker.invite(request)
    world.clock.turn(days=2)
    assert world.broker.tidy() >= 1
    with pytest.raises(SignatureError, match="not fresh"):
        world.broker.invite(request)
