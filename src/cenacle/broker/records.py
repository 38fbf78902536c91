"""From stored rows to documents with their signatures checked.

Rows were checked before they were stored; they are checked again whenever a decision rests on
them, so that a store altered behind the broker's back releases nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cenacle.broker.rules import Lineage
from cenacle.broker.store import ReadTransaction
from cenacle.crypto.signing import VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.contract import Contract, Veto
from cenacle.documents.dsse import Envelope, pae
from cenacle.documents.party import Party
from cenacle.errors import InputError, SignatureError

__all__ = ["ContractRecord", "load_asset", "load_contract", "load_lineage", "load_party"]

_MAX_LINEAGE = 100


@lru_cache(maxsize=4096)
def _party(text: str) -> Party:
    envelope = Envelope.from_json(text)
    return envelope.open(Party, envelope.peek(Party).verify_key)


@lru_cache(maxsize=4096)
def _asset(text: str, key: VerifyKey) -> Asset:
    return Envelope.from_json(text).open(Asset, key)


@lru_cache(maxsize=4096)
def _contract(text: str) -> tuple[Contract, bytes]:
    envelope = Envelope.from_json(text)
    return envelope.peek(Contract), pae(envelope.payload_type, envelope.payload)


@lru_cache(maxsize=65536)
def _check_signature(key: VerifyKey, signature: bytes, message: bytes) -> None:
    # Only successes are remembered: a failure raises, and lru_cache keeps no exceptions.
    key.verify(signature, message)


def load_party(tx: ReadTransaction, name: str) -> Party:
    """A registered party; :class:`InputError` if there is none."""
    row = tx.party(name)
    if row is None:
        raise InputError(
            "a party is not registered at this broker",
            found=name,
            remedy="the broker's owner invites it with `cenacle broker invite`",
        )
    return _party(row.envelope)


def load_asset(tx: ReadTransaction, digest: str) -> tuple[Asset, bytes, str | None]:
    """Manifest (its owner's signature checked), wrapped key, and the newer manifest's digest."""
    row = tx.asset(digest)
    if row is None:
        raise InputError(
            "an asset is not deposited at this broker",
            found=digest,
            remedy="its owner deposits it with `cenacle seal`",
        )
    asset = _asset(row.envelope, load_party(tx, row.owner).verify_key)
    _same("asset", asset.digest, digest)
    return asset, row.wrapped_key, row.replaced_by


def _same(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise SignatureError(
            f"the store returned another {what} than asked for",
            found=found,
            expected=expected,
            remedy="restore the broker's store from a backup",
        )


@dataclass(frozen=True)
class ContractRecord:
    """A contract as stored: verified document, verified signatures, current vetoes."""

    contract: Contract
    envelope: Envelope
    signed: frozenset[str]
    vetoes: dict[str, str]
    replaces: str | None
    replaced_by: str | None


def load_contract(tx: ReadTransaction, digest: str) -> ContractRecord:
    """A contract; :class:`InputError` if it was never proposed here."""
    row = tx.contract(digest)
    if row is None:
        raise InputError(
            "a contract is not known to this broker",
            found=digest,
            remedy="propose it with `cenacle propose`",
        )
    contract, message = _contract(row.envelope)
    _same("contract", contract.digest, digest)
    envelope = Envelope.from_json(row.envelope)
    signed = set()
    for signature in tx.signatures(digest):
        party = load_party(tx, signature.party)
        _same(f"party {party.name}", party.digest, contract.parties.get(party.name, "none"))
        _check_signature(party.verify_key, signature.signature, message)
        envelope = envelope.with_signature(party.verify_key.keyid, signature.signature)
        signed.add(party.name)
    vetoes = {}
    for stored in tx.vetoes(digest):
        party = load_party(tx, stored.party)
        veto = Envelope.from_json(stored.envelope).open(Veto, party.verify_key)
        vetoes[party.name] = veto.reason
    return ContractRecord(
        contract, envelope, frozenset(signed), vetoes, row.replaces, row.replaced_by
    )


def load_lineage(tx: ReadTransaction, record: ContractRecord) -> Lineage:
    """Predecessors and successors along ``replaces``, nearest first."""

    def chain(first: str | None, *, back: bool) -> tuple[tuple[Contract, frozenset[str]], ...]:
        found: list[tuple[Contract, frozenset[str]]] = []
        step = first
        while step is not None:
            if len(found) == _MAX_LINEAGE:
                raise InputError(
                    "a contract was replaced too often",
                    found=f"more than {_MAX_LINEAGE} contracts in one chain",
                    remedy="draft a contract that replaces none",
                )
            other = load_contract(tx, step)
            found.append((other.contract, other.signed))
            step = other.replaces if back else other.replaced_by
        return tuple(found)

    return Lineage(chain(record.replaces, back=True), chain(record.replaced_by, back=False))
