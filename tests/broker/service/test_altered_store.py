"""A database edited behind the broker's back releases nothing: loading fails closed.

What is edited here is what signatures and digests cover. That rows as a whole are missing or
old (a store rolled back) only the log's readers can notice: see ``docs/broker.md``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from cenacle.broker.service import Broker
from cenacle.crypto import SigningKey
from cenacle.documents.base import b64
from cenacle.documents.contract import Contract, Veto
from cenacle.documents.dsse import Envelope
from cenacle.errors import CenacleError, SealError, SignatureError


def edit(world: Any, statement: str, *values: Any) -> None:
    """Change rows from outside, with the broker running."""
    connection = sqlite3.connect(world.folder / "broker.db", isolation_level=None)
    try:
        changed = connection.execute(statement, values).rowcount
    finally:
        connection.close()
    assert changed >= 1


def fetch(world: Any, statement: str, *values: Any) -> Any:
    connection = sqlite3.connect(world.folder / "broker.db")
    try:
        return connection.execute(statement, values).fetchone()[0]
    finally:
        connection.close()


def _other_contract_text(world: Any, digest: str) -> None:
    other = world.propose(world.contract(name="other", approval="clinic"))
    text = fetch(world, "SELECT envelope FROM contracts WHERE digest = ?", other)
    edit(world, "UPDATE contracts SET envelope = ? WHERE digest = ?", text, digest)


def _laxer_contract(world: Any, digest: str) -> None:
    """The same contract without its approval rule, put in place of what was signed."""
    text = json.loads(fetch(world, "SELECT envelope FROM contracts WHERE digest = ?", digest))
    fields = Envelope.from_fields(text).peek(Contract).to_fields()
    laxer = Contract.from_fields({**fields, "approval": "hospital-a"})
    envelope = Envelope(laxer.canonical_bytes(), Contract.media_type, {})
    edit(world, "UPDATE contracts SET envelope = ? WHERE digest = ?", envelope.to_json(), digest)


def _garbled_contract(world: Any, digest: str) -> None:
    edit(world, "UPDATE contracts SET envelope = '{}' WHERE digest = ?", digest)


def _forged_signature(world: Any, digest: str) -> None:
    edit(world, "UPDATE signatures SET signature = zeroblob(64) WHERE party = 'hospital-a'")


def _signature_of_another(world: Any, digest: str) -> None:
    edit(world, "UPDATE signatures SET party = 'clinic' WHERE party = 'hospital-a'")


def _another_party(world: Any, digest: str) -> None:
    """A self-made party in the place of the hospital, with its own valid signature."""
    impostor = type(world.actors["clinic"])("hospital-a")
    edit(
        world,
        "UPDATE parties SET envelope = ?, digest = ? WHERE name = 'hospital-a'",
        impostor.envelope.to_json(),
        impostor.party.digest,
    )
    text = json.loads(fetch(world, "SELECT envelope FROM contracts WHERE digest = ?", digest))
    signed = Envelope.from_fields(text).signed_by(impostor.signing)
    edit(
        world,
        "UPDATE signatures SET keyid = ?, signature = ? WHERE party = 'hospital-a'",
        impostor.signing.verify_key.keyid,
        signed.signatures[impostor.signing.verify_key.keyid],
    )


def _swapped_parties(world: Any, digest: str) -> None:
    text = fetch(world, "SELECT envelope FROM parties WHERE name = 'clinic'")
    edit(world, "UPDATE parties SET envelope = ? WHERE name = 'hospital-a'", text)


def _party_not_signed(world: Any, digest: str) -> None:
    fields = json.loads(fetch(world, "SELECT envelope FROM parties WHERE name = 'hospital-a'"))
    fields["signatures"] = []
    edit(world, "UPDATE parties SET envelope = ? WHERE name = 'hospital-a'", json.dumps(fields))


def _laxer_terms(world: Any, digest: str) -> None:
    """A manifest with other terms, which only its owner could sign."""
    asset = world.manifest("hospital-a", terms={"expires": "2099-12-31", "uses": 99})
    thief = SigningKey.generate()
    edit(
        world,
        "UPDATE assets SET envelope = ? WHERE digest = ?",
        Envelope.sign(asset, thief).to_json(),
        world.assets["hospital-a-records"].digest,
    )


def _another_manifest(world: Any, digest: str) -> None:
    """Genuine, by the same owner, but not the one that the contract names."""
    other = world.deposit("hospital-a", "other")
    text = fetch(world, "SELECT envelope FROM assets WHERE digest = ?", other.digest)
    edit(
        world,
        "UPDATE assets SET envelope = ? WHERE digest = ?",
        text,
        world.assets["hospital-a-records"].digest,
    )


def _another_owner(world: Any, digest: str) -> None:
    edit(world, "UPDATE assets SET owner = 'clinic' WHERE name = 'records'")


def _hidden_predecessor(world: Any, digest: str) -> None:
    edit(world, "UPDATE contracts SET replaces = NULL WHERE digest = ?", digest)


def _agreed_with_predecessor(world: Any) -> str:
    old = world.agree(name="old")
    digest: str = world.agree(replaces=old)
    return digest


@pytest.mark.parametrize(
    "alter",
    [
        _other_contract_text,
        _laxer_contract,
        _garbled_contract,
        _forged_signature,
        _signature_of_another,
        _another_party,
        _swapped_parties,
        _party_not_signed,
        _laxer_terms,
        _another_manifest,
        _another_owner,
        _hidden_predecessor,
    ],
)
@pytest.mark.parametrize("restarted", [False, True])
def test_altered_rows_release_nothing(
    world: Any, alter: Callable[[Any, str], None], restarted: bool
) -> None:
    digest = _agreed_with_predecessor(world)
    enclave = world.enclave(digest)
    request = enclave.request()
    world.broker.contract(digest)  # what was remembered before the change does not help either
    alter(world, digest)
    if restarted:
        world.restart()
    before = world.state()
    with pytest.raises(SignatureError, match="store was altered") as caught:
        world.desk.release(request)
    assert "restores the store from a backup" in str(caught.value)
    assert world.state() == before


def test_a_successor_that_was_unlinked_is_noticed_from_its_own_side(world: Any) -> None:
    old = world.agree(name="old")
    new = world.agree(replaces=old)
    edit(world, "UPDATE contracts SET replaced_by = NULL WHERE digest = ?", old)
    with pytest.raises(SignatureError, match="store was altered"):
        world.enclave(new).release()


def test_a_link_to_a_contract_that_is_not_there(world: Any) -> None:
    digest = world.agree()
    edit(
        world,
        "UPDATE contracts SET replaced_by = ? WHERE digest = ?",
        "sha256:" + "0" * 64,
        digest,
    )
    with pytest.raises(SignatureError, match="store was altered"):
        world.enclave(digest).release()


def test_a_veto_that_was_forged_is_no_veto(world: Any) -> None:
    digest = world.agree()
    world.veto(digest, "clinic")
    forged = Envelope.sign(
        Veto(contract=digest, party="clinic", reason="other"), SigningKey.generate()
    )
    edit(world, "UPDATE vetoes SET envelope = ?", forged.to_json())
    with pytest.raises(SignatureError, match="store was altered"):
        world.broker.review(digest)


def test_a_veto_of_another_contract_does_not_count_here(world: Any) -> None:
    ours, theirs = world.agree(), world.agree(name="theirs")
    world.veto(theirs, "clinic")
    edit(world, "UPDATE vetoes SET contract = ?", ours)
    with pytest.raises(SignatureError, match="store was altered"):
        world.broker.review(ours)


def test_a_wrapped_key_that_was_exchanged_does_not_open(world: Any) -> None:
    """The charge stands, since it was durable first; no key leaves."""
    digest = world.agree()
    one, two = (world.assets[f"{owner}-records"].digest for owner in ("hospital-a", "hospital-b"))
    wrapped = fetch(world, "SELECT wrapped_key FROM assets WHERE digest = ?", two)
    edit(world, "UPDATE assets SET wrapped_key = ? WHERE digest = ?", wrapped, one)
    with pytest.raises(SealError):
        world.enclave(digest).release()
    assert world.kinds()[-1] == "release"
    assert all(world.uses(asset) == 1 for asset in world.assets.values())


def test_a_job_secret_that_was_exchanged_does_not_open(world: Any) -> None:
    digest = world.agree()
    run = world.enclave(digest).release().run
    edit(world, "UPDATE runs SET job_secret_wrapped = ?", b"x" * 1200)
    with pytest.raises(SealError):
        world.enclave(digest).release(resume=run)
    edit(world, "UPDATE runs SET job_secret_wrapped = NULL")
    with pytest.raises(SealError):
        world.enclave(digest).release(resume=run)


def test_another_enclaves_key_in_the_runs_row_signs_no_valid_receipt(world: Any) -> None:
    """Who edits the row may settle, but the log says whose the evidence was."""
    from cenacle.broker.receipts import verify_receipt  # noqa: PLC0415

    digest = world.agree()
    enclave = world.enclave(digest)
    answer = enclave.release()
    thief = SigningKey.generate()
    edit(world, "UPDATE runs SET enclave_key = ?", thief.verify_key.raw)
    enclave.signing = thief
    bundle = enclave.finish(answer)
    with pytest.raises(CenacleError):
        verify_receipt(
            bundle,
            broker_digest=world.broker.identity.digest,
            verifiers=world.broker.verifiers,
        )


def test_a_settlement_that_is_not_in_the_log(world: Any) -> None:
    enclave = world.enclave(world.agree())
    run = enclave.release().run
    enclave.settle(run)
    edit(world, "DELETE FROM meta WHERE key LIKE 'settlement/%'")
    with pytest.raises(CenacleError, match="store was altered"):
        enclave.settle(run)


def test_an_honest_store_is_believed_again(world: Any) -> None:
    """The refusal is of the altered row, not of everything for ever."""
    digest = world.agree()
    text = fetch(world, "SELECT envelope FROM contracts WHERE digest = ?", digest)
    _garbled_contract(world, digest)
    with pytest.raises(SignatureError):
        world.broker.review(digest)
    edit(world, "UPDATE contracts SET envelope = ? WHERE digest = ?", text, digest)
    world.enclave(digest).release()


def test_stored_documents_are_shown_as_they_were_signed(world: Any) -> None:
    """What is kept for speed changes no byte of a document."""
    broker: Broker = world.broker
    digest = world.agree()
    for _ in range(2):
        broker.review(digest)  # computes what is remembered
        view = broker.contract(digest)
        envelope = Envelope.from_fields(view.contract)
        assert envelope.peek(Contract).digest == envelope.digest == digest
        assert len(envelope.signatures) == 2
        assert b64(envelope.payload) == view.contract["payload"]
