"""Assets, proposals, signatures, vetoes, and contracts that replace one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cenacle.broker.messages import AssetUpload, SignatureUpload
from cenacle.broker.records import MAX_LINEAGE
from cenacle.crypto import HpkePrivateKey
from cenacle.documents.asset import Asset
from cenacle.documents.base import b64
from cenacle.documents.contract import Contract, Veto
from cenacle.documents.dsse import Envelope
from cenacle.errors import (
    CenacleError,
    ConflictError,
    DocumentError,
    InputError,
    RefusedError,
    SealError,
    SignatureError,
)

OTHER = "sha256:" + "0" * 64
Refused = Callable[[Callable[[], object]], CenacleError]


# ------------------------------------------------------------------ assets


def test_a_deposit_is_logged_and_kept_wrapped(world: Any) -> None:
    key = b"K" * 32
    asset = world.manifest("clinic")
    world.broker.deposit(world.upload(asset, key))
    with world.store.read() as tx:
        row = tx.asset(asset.digest)
    assert row.owner == "clinic"
    assert key not in row.wrapped_key
    assert world.kinds()[-1] == "asset"
    world.broker.close()
    assert all(key not in path.read_bytes() for path in world.folder.glob("broker.db*"))


def test_a_key_wrapped_for_another_manifest(world: Any, refused: Refused) -> None:
    ours, theirs = world.manifest("clinic"), world.manifest("clinic", "other")
    wrapped = b64(world.broker.identity.hpke_public.seal(bytes(32), *theirs.wrapping_context()))
    error = refused(lambda: world.broker.deposit(world.upload(ours, wrapped_key=wrapped)))
    assert isinstance(error, SealError)


def test_a_key_wrapped_for_another_broker(world: Any, refused: Refused) -> None:
    asset = world.manifest("clinic")
    other = HpkePrivateKey.generate().public_key
    wrapped = b64(other.seal(bytes(32), *asset.wrapping_context()))
    error = refused(lambda: world.broker.deposit(world.upload(asset, wrapped_key=wrapped)))
    assert isinstance(error, SealError)


@pytest.mark.parametrize("garbage", [b"", b"x", bytes(1200), bytes(100_000)])
def test_a_wrapped_key_that_is_none(world: Any, refused: Refused, garbage: bytes) -> None:
    upload = world.upload(world.manifest("clinic"), wrapped_key=b64(garbage))
    assert isinstance(refused(lambda: world.broker.deposit(upload)), SealError)


@pytest.mark.parametrize("length", [1, 16, 31, 33, 64])
def test_a_key_of_another_length(world: Any, refused: Refused, length: int) -> None:
    upload = world.upload(world.manifest("clinic"), bytes(length))
    error = refused(lambda: world.broker.deposit(upload))
    assert isinstance(error, InputError)
    assert str(length) in str(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"owner_digest": OTHER}, "another owner's document"),
        ({"broker": OTHER}, "another broker"),
        ({"owner": "nobody"}, "not registered"),
    ],
)
def test_a_manifest_for_somebody_else(
    world: Any, refused: Refused, changes: dict[str, str], message: str
) -> None:
    asset = world.manifest("clinic", **changes)
    upload = world.upload(asset, signer=world.actors["clinic"])
    assert message in str(refused(lambda: world.broker.deposit(upload)))


@pytest.mark.parametrize(
    ("deposit", "message"),
    [({"broker": OTHER}, "another broker"), ({"asset": OTHER}, "another manifest")],
)
def test_a_deposit_for_something_else(
    world: Any, refused: Refused, deposit: dict[str, str], message: str
) -> None:
    upload = world.upload(world.manifest("clinic"), **deposit)
    assert message in str(refused(lambda: world.broker.deposit(upload)))


@pytest.mark.parametrize("part", ["manifest", "deposit"])
def test_what_the_owner_did_not_sign(world: Any, refused: Refused, part: str) -> None:
    asset = world.manifest("clinic")
    ours = world.upload(asset)
    theirs = world.upload(asset, signer=world.actors["hospital-a"])
    mixed = ours.model_copy(update={part: getattr(theirs, part)})
    assert isinstance(refused(lambda: world.broker.deposit(mixed)), SignatureError)
    swapped = AssetUpload(manifest=ours.deposit, deposit=ours.manifest)
    assert isinstance(refused(lambda: world.broker.deposit(swapped)), DocumentError)


def test_an_asset_is_deposited_once(world: Any, refused: Refused) -> None:
    asset = world.assets["hospital-a-records"]
    upload = world.upload(asset)
    assert isinstance(refused(lambda: world.broker.deposit(upload)), ConflictError)


def test_who_replaces_an_asset(world: Any, refused: Refused) -> None:
    old = world.assets["hospital-a-records"]
    theft = world.upload(world.manifest("clinic", replaces=old.digest))
    assert isinstance(refused(lambda: world.broker.deposit(theft)), ConflictError)
    unknown = world.upload(world.manifest("clinic", replaces=OTHER))
    assert isinstance(refused(lambda: world.broker.deposit(unknown)), ConflictError)
    world.deposit("hospital-a", "newer", replaces=old.digest)
    second = world.upload(world.manifest("hospital-a", "newest", replaces=old.digest))
    assert isinstance(refused(lambda: world.broker.deposit(second)), ConflictError)


# ------------------------------------------------------------------ proposals


def test_a_proposal_is_not_a_signature(world: Any) -> None:
    digest = world.propose(world.contract(), by="hospital-a")
    view = world.broker.contract(digest)
    assert Envelope.from_fields(view.contract).signatures == {}
    clauses = {(c.subject, c.name): c.verdict for c in world.broker.review(digest).clauses}
    assert clauses["contract", "approval"] == "failed"
    assert clauses["contract", "evidence"] == "pending"
    assert world.kinds()[-1] == "contract"


def _by_nobody(world: Any, contract: Contract) -> Envelope:
    return Envelope(contract.canonical_bytes(), contract.media_type, {})


def _by_two(world: Any, contract: Contract) -> Envelope:
    keys = [world.actors[name].signing for name in ("clinic", "hospital-a")]
    return Envelope.sign(contract, *keys)


def _by_a_stranger(world: Any, contract: Contract) -> Envelope:
    return Envelope.sign(contract, world.register("stranger").signing)


def _forged(world: Any, contract: Contract) -> Envelope:
    signed = Envelope.sign(contract, world.actors["clinic"].signing)
    keyid = world.actors["hospital-a"].signing.verify_key.keyid
    return Envelope(
        signed.payload, signed.payload_type, {keyid: next(iter(signed.signatures.values()))}
    )


@pytest.mark.parametrize("sign", [_by_nobody, _by_two, _by_a_stranger, _forged])
def test_a_proposal_is_signed_by_one_party_of_it(
    world: Any, sign: Callable[[Any, Contract], Envelope]
) -> None:
    envelope = sign(world, world.contract())
    before = world.state()
    with pytest.raises(SignatureError):
        world.broker.propose(envelope)
    assert world.state() == before


def _another_broker(world: Any) -> dict[str, Any]:
    return {"broker": OTHER}


def _another_party(world: Any) -> dict[str, Any]:
    parties = {name: actor.party.digest for name, actor in world.actors.items()}
    return {"parties": {**parties, "hospital-b": OTHER}}


def _an_unknown_party(world: Any) -> dict[str, Any]:
    parties = {name: actor.party.digest for name, actor in world.actors.items()}
    return {"parties": {**parties, "nobody": OTHER}}


def _an_unknown_asset(world: Any) -> dict[str, Any]:
    refs = {
        owner: {"digest": world.assets[f"{owner}-records"].digest, "owner": owner}
        for owner in ("hospital-a", "hospital-b")
    }
    return {"assets": {**refs, "hospital-b": {"digest": OTHER, "owner": "hospital-b"}}}


def _an_unknown_predecessor(world: Any) -> dict[str, Any]:
    return {"replaces": OTHER}


@pytest.mark.parametrize(
    "changes",
    [
        _another_broker,
        _another_party,
        _an_unknown_party,
        _an_unknown_asset,
        _an_unknown_predecessor,
    ],
)
def test_a_proposal_that_names_what_is_not_here(
    world: Any, refused: Refused, changes: Callable[[Any], dict[str, Any]]
) -> None:
    contract = world.contract(**changes(world))
    assert isinstance(refused(lambda: world.propose(contract)), InputError)


def test_a_policy_that_no_enclave_could_meet_is_refused_at_once(
    world: Any, refused: Refused
) -> None:
    reference = {**world.reference(), "tpm": {"pcr4": ["sha256:" + "1" * 64]}}
    enclave = {"reference": reference, "policy": {"tpm": {"allow_everything": True}}}
    error = refused(lambda: world.propose(world.contract(enclave=enclave)))
    assert isinstance(error, DocumentError)
    assert "allow_everything" in str(error)


def test_a_contract_is_proposed_once(world: Any, refused: Refused) -> None:
    contract = world.contract()
    world.propose(contract)
    assert isinstance(refused(lambda: world.propose(contract, "hospital-a")), ConflictError)


def test_two_parties_with_one_key_cannot_be_told_apart(world: Any, refused: Refused) -> None:
    """One person under two names would count twice in a rule."""
    double = world.register("double")
    twin = type(double)("twin", double.signing)
    token = world.broker.invite(world.request_of(world.owner, "invite")).token
    from cenacle.broker.messages import Registration  # noqa: PLC0415

    world.broker.register(Registration(party=twin.envelope.to_fields(), token=token))
    world.actors["twin"] = twin
    contract = world.contract(approval={"at_least": 2, "of": ["double", "twin", "hospital-a"]})
    error = refused(lambda: world.propose(contract))
    assert isinstance(error, InputError)
    assert "the same key" in str(error)


# ------------------------------------------------------------------ signatures


def _upload(world: Any, digest: str, name: str, **changes: Any) -> SignatureUpload:
    key = world.actors[name].signing
    envelope = Envelope.from_fields(world.broker.contract(digest).contract).signed_by(key)
    keyid = key.verify_key.keyid
    fields = {"keyid": keyid, "signature": b64(envelope.signatures[keyid]), **changes}
    return SignatureUpload.from_fields(fields)


def test_signatures_by_parties_are_kept(world: Any) -> None:
    digest = world.propose(world.contract())
    assert world.broker.add_signature(digest, _upload(world, digest, "hospital-b")) == "hospital-b"
    keyid = world.actors["hospital-b"].signing.verify_key.keyid
    assert set(Envelope.from_fields(world.broker.contract(digest).contract).signatures) == {keyid}
    assert world.kinds()[-1] == "signature"


def test_a_signature_of_another_contract(world: Any, refused: Refused) -> None:
    ours, theirs = world.propose(world.contract()), world.propose(world.contract(name="theirs"))
    upload = _upload(world, theirs, "hospital-a")
    assert isinstance(refused(lambda: world.broker.add_signature(ours, upload)), SignatureError)


@pytest.mark.parametrize("signature", [b"", b"x", bytes(64), bytes(63), bytes(65)])
def test_a_signature_that_is_none(world: Any, refused: Refused, signature: bytes) -> None:
    digest = world.propose(world.contract())
    upload = _upload(world, digest, "hospital-a", signature=b64(signature))
    assert isinstance(refused(lambda: world.broker.add_signature(digest, upload)), SignatureError)


def test_a_signature_under_another_partys_key(world: Any, refused: Refused) -> None:
    digest = world.propose(world.contract())
    keyid = world.actors["hospital-b"].signing.verify_key.keyid
    upload = _upload(world, digest, "hospital-a", keyid=keyid)
    assert isinstance(refused(lambda: world.broker.add_signature(digest, upload)), SignatureError)


def test_a_signature_for_another_payload_type(world: Any, refused: Refused) -> None:
    digest = world.propose(world.contract())
    signed = Envelope.from_fields(world.broker.contract(digest).contract)
    key = world.actors["hospital-a"].signing
    relabelled = Envelope(signed.payload, Asset.media_type, {}).signed_by(key)
    upload = SignatureUpload(
        keyid=key.verify_key.keyid, signature=b64(relabelled.signatures[key.verify_key.keyid])
    )
    assert isinstance(refused(lambda: world.broker.add_signature(digest, upload)), SignatureError)


def test_a_strangers_signature(world: Any) -> None:
    digest = world.propose(world.contract())
    world.register("stranger")
    before = world.state()
    with pytest.raises(SignatureError, match="a stranger"):
        world.broker.add_signature(digest, _upload(world, digest, "stranger"))
    assert world.state() == before


def test_a_second_signature_by_the_same_party(world: Any, refused: Refused) -> None:
    digest = world.propose(world.contract())
    world.sign(digest, "hospital-a")
    upload = _upload(world, digest, "hospital-a")
    assert isinstance(refused(lambda: world.broker.add_signature(digest, upload)), ConflictError)


def test_a_signature_of_an_unknown_contract(world: Any, refused: Refused) -> None:
    digest = world.propose(world.contract())
    upload = _upload(world, digest, "hospital-a")
    assert isinstance(refused(lambda: world.broker.add_signature(OTHER, upload)), InputError)


# ------------------------------------------------------------------ vetoes


def test_a_veto_stops_and_cannot_be_repeated(world: Any, refused: Refused) -> None:
    digest = world.agree()
    world.veto(digest, "clinic", "not like this")
    view = world.broker.contract(digest)
    assert [Envelope.from_fields(v).peek(Veto).reason for v in view.vetoes] == ["not like this"]
    assert isinstance(refused(lambda: world.veto(digest, "clinic")), ConflictError)
    error = refused(world.enclave(digest).release)
    assert "clinic: not like this" in str(error)


def test_a_veto_that_the_contract_does_not_give(world: Any, refused: Refused) -> None:
    digest = world.agree()
    assert isinstance(refused(lambda: world.veto(digest, "hospital-a")), RefusedError)


def test_a_veto_in_anothers_name(world: Any, refused: Refused) -> None:
    digest = world.agree()
    veto = Veto(contract=digest, party="clinic", reason="forged")
    forged = Envelope.sign(veto, world.actors["hospital-a"].signing)
    assert isinstance(refused(lambda: world.broker.veto(forged)), SignatureError)
    assert isinstance(
        refused(lambda: world.broker.veto(Envelope(forged.payload, forged.payload_type, {}))),
        SignatureError,
    )


# ------------------------------------------------------------------ replacement


def test_a_junk_successor_does_not_stop_a_running_agreement(world: Any) -> None:
    digest = world.agree()
    enclave = world.enclave(digest)
    run = enclave.release().run
    junk = world.propose(
        world.contract(name="junk", replaces=digest, approval="clinic"), by="clinic"
    )
    world.sign(junk, "clinic")
    world.enclave(digest).release(resume=run)
    # Nor can the junk run itself: it must satisfy the rule of what it replaces.
    with pytest.raises(RefusedError) as caught:
        world.enclave(junk).release()
    assert {c["name"] for c in caught.value.clauses} == {"replaces", "approval"}


def test_a_junk_successor_does_not_stop_an_agreement_in_the_making(world: Any) -> None:
    digest = world.propose(world.contract())
    world.sign(digest, "hospital-a")
    junk = world.propose(
        world.contract(name="junk", replaces=digest, approval="clinic"), by="clinic"
    )
    world.sign(junk, "clinic")
    world.sign(digest, "hospital-b")
    world.enclave(digest).release()


def test_an_approved_successor_stops_what_it_replaces(world: Any) -> None:
    old = world.agree()
    run = world.enclave(old).release().run
    new = world.agree(name="new", replaces=old)
    for resume in (None, run):
        with pytest.raises(RefusedError) as caught:
            world.enclave(old).release(resume=resume)
        assert [c["name"] for c in caught.value.clauses] == ["current"]
    assert world.broker.contract(old).replaced_by == new
    world.enclave(new).release()


def test_the_rule_of_the_approved_predecessor_must_be_met(world: Any) -> None:
    old = world.agree()
    lax = world.propose(world.contract(name="lax", replaces=old, approval="hospital-a"))
    world.sign(lax, "hospital-a")
    with pytest.raises(RefusedError) as caught:
        world.enclave(lax).release()
    assert "replaces" in {c["name"] for c in caught.value.clauses}
    world.enclave(old).release()
    world.sign(lax, "hospital-b")
    world.enclave(lax).release()


def test_an_unapproved_predecessor_governs_nothing(world: Any) -> None:
    draft = world.propose(world.contract(name="draft"))
    final = world.agree(name="final", replaces=draft)
    world.enclave(final).release()


def test_a_stale_signature(world: Any, refused: Refused) -> None:
    old = world.propose(world.contract())
    world.sign(old, "hospital-a")
    world.agree(name="new", replaces=old)
    upload = _upload(world, old, "hospital-b")
    error = refused(lambda: world.broker.add_signature(old, upload))
    assert isinstance(error, ConflictError)
    assert "took effect" in str(error)


def test_no_update_is_lost(world: Any, refused: Refused) -> None:
    old = world.agree()
    world.propose(world.contract(name="mine", replaces=old), by="hospital-a")
    theirs = world.contract(name="theirs", replaces=old)
    error = refused(lambda: world.propose(theirs, by="hospital-b"))
    assert isinstance(error, ConflictError)
    assert "replace that one" in str(error)


def test_strangers_cannot_squat_the_place_of_a_successor(world: Any) -> None:
    parties = {n: world.actors[n].party.digest for n in ("hospital-a", "hospital-b", "clinic")}
    digest = world.agree(parties=parties)
    world.register("squatter")
    squat = world.contract(name="squat", replaces=digest)
    before = world.state()
    with pytest.raises(RefusedError, match="only a party"):
        world.propose(squat, by="squatter")
    assert world.state() == before


def test_a_squatted_place_can_be_replaced_in_turn(world: Any) -> None:
    old = world.agree()
    junk = world.propose(world.contract(name="junk", replaces=old, approval="clinic"))
    world.sign(junk, "clinic")
    new = world.agree(name="new", replaces=junk)
    with pytest.raises(RefusedError, match="current"):
        world.enclave(old).release()
    world.enclave(new).release()


def test_a_party_that_proposes_endlessly_stops_nobody(world: Any) -> None:
    """A long chain is refused, not the agreement at its start; and deciding stays quick."""
    digest = last = world.agree()
    for number in range(MAX_LINEAGE):
        last = world.propose(world.contract(name=f"junk-{number}", replaces=last))
    with pytest.raises(InputError, match="too often"):
        world.propose(world.contract(name="one-more", replaces=last))
    world.enclave(digest).release()


def test_the_contracts_of_a_party(world: Any) -> None:
    parties = {n: world.actors[n].party.digest for n in ("hospital-a", "clinic")}
    first = world.propose(
        world.contract(world.assets["hospital-a-records"], name="first", parties=parties)
    )
    second = world.propose(world.contract(name="second"))

    def listed(name: str) -> set[tuple[str, str]]:
        request = world.request_of(world.actors[name], "list-contracts")
        return set(world.broker.contracts_of(request))

    assert listed("hospital-a") == {(first, "first"), (second, "second")}
    assert listed("hospital-b") == {(second, "second")}
