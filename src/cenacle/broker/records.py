"""From stored rows to documents with their signatures checked.

Rows were checked before they were stored; they are checked again whenever a decision rests on
them, so that a store altered behind the broker's back releases nothing. A check is remembered
for the very bytes that passed it and for no others: a row that changed is checked anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Annotated, Any, Final, TypeVar, cast

from pydantic import Field

from cenacle.broker.rules import Lineage
from cenacle.broker.store import AssetRow, ContractRow, ReadTransaction
from cenacle.crypto.signing import VerifyKey
from cenacle.documents.asset import Asset
from cenacle.documents.contract import Contract, ProgramJob, RecipeJob, Veto
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.serving import ServeJob
from cenacle.errors import InputError, SignatureError, VerificationError

__all__ = [
    "MAX_LINEAGE",
    "ContractRecord",
    "load_asset",
    "load_contract",
    "load_document",
    "load_lineage",
    "load_party",
]

MAX_LINEAGE: Final = 100
"""Contracts before and after one in a chain of replacements; more are not proposed."""

_REMEMBERED: Final = 4096
_MAX_REMEMBERED_TEXT: Final = 64 * 1024  # characters: large documents are checked every time

F = TypeVar("F", bound=Callable[..., Any])


def _remember(check: F) -> F:
    """Keep what a check of short texts returned; never that it raised."""
    kept = lru_cache(_REMEMBERED)(check)

    def checked(text: str, *more: Any) -> Any:
        return (kept if len(text) <= _MAX_REMEMBERED_TEXT else check)(text, *more)

    return cast("F", checked)


# A stored document's digest is asked for in every clause, and computing it means writing the
# whole document out in canonical form: these compute it once.


class _StoredParty(Party):
    @cached_property
    def digest(self) -> str:
        return super().digest

    @cached_property
    def verify_key(self) -> VerifyKey:
        return super().verify_key


class _StoredAsset(Asset):
    @cached_property
    def digest(self) -> str:
        return super().digest


class _StoredRecipeJob(RecipeJob):
    @cached_property
    def known_digest(self) -> str:
        return super().program_digest()

    def program_digest(self) -> str:
        return self.known_digest


class _StoredContract(Contract):
    job: Annotated[_StoredRecipeJob | ProgramJob | ServeJob, Field(discriminator="type")]

    @cached_property
    def digest(self) -> str:
        return super().digest


@_remember
def _party(text: str) -> Party:
    envelope = Envelope.from_json(text)
    return envelope.open(_StoredParty, envelope.peek(Party).verify_key)


@_remember
def _asset(text: str, owner: str) -> Asset:
    return Envelope.from_json(text).open(_StoredAsset, _party(owner).verify_key)


@_remember
def _contract(text: str) -> tuple[Contract, Envelope]:
    envelope = Envelope.from_json(text)
    contract = envelope.peek(_StoredContract)
    if isinstance(contract.job, RecipeJob):
        contract.job.program_digest()  # computed now, when it is first read
    return contract, envelope


@_remember
def _check_signature(text: str, signer: str, signature: bytes) -> None:
    key = _party(signer).verify_key
    _contract(text)[1].with_signature(key.keyid, signature).verify_signature(key)


@_remember
def _veto(text: str, signer: str) -> Veto:
    return Envelope.from_json(text).open(Veto, _party(signer).verify_key)


class _genuine:  # noqa: N801 - read as a statement; a generator would cost as much as the checks
    """A row that does not hold is the store's fault, not that of whoever asked."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, InputError | VerificationError):
            raise SignatureError(
                f"the broker's store was altered: a stored {self._what} is not genuine",
                found=error.diagnostics(),
                expected="the row as the broker stored it",
                remedy="the broker's operator restores the store from a backup",
            ) from None


def _same(what: str, found: object, expected: object) -> None:
    if found != expected:
        raise SignatureError(f"another {what}", found=found, expected=expected)


def _party_row(tx: ReadTransaction, name: str) -> tuple[Party, str]:
    row = tx.party(name)
    if row is None:
        raise InputError(
            "a party is not registered at this broker",
            found=name,
            remedy="the broker's owner invites it with `cenacle broker invite`",
        )
    with _genuine("party"):
        party = _party(row.envelope)
        _same("name", party.name, name)
        return party, row.envelope


def load_party(tx: ReadTransaction, name: str) -> Party:
    """A registered party; :class:`InputError` if there is none."""
    return _party_row(tx, name)[0]


def load_asset(tx: ReadTransaction, digest: str) -> tuple[Asset, AssetRow]:
    """A manifest, its owner's signature checked, with its row.

    Raises:
        InputError: no such asset was deposited here.
        SignatureError: the store was altered.
    """
    row = tx.asset(digest)
    if row is None:
        raise InputError(
            "an asset is not deposited at this broker",
            found=digest,
            remedy="its owner deposits it with `cenacle seal`",
        )
    with _genuine("asset"):
        owner, text = _party_row(tx, row.owner)
        asset = _asset(row.envelope, text)
        _same("manifest", asset.digest, digest)
        _same("owner", (asset.owner, asset.owner_digest), (owner.name, owner.digest))
    return asset, row


@dataclass(frozen=True)
class ContractRecord:
    """A contract as stored: verified document, verified signatures, current vetoes."""

    contract: Contract
    unsigned: Envelope
    signatures: dict[str, bytes]
    signed: frozenset[str]
    vetoes: dict[str, str]
    replaces: str | None
    replaced_by: str | None

    @property
    def envelope(self) -> Envelope:
        """The contract with every signature that was checked."""
        return replace(self.unsigned, signatures=self.signatures)


def load_contract(tx: ReadTransaction, digest: str) -> ContractRecord:
    """A contract with what its parties signed.

    Raises:
        InputError: it was never proposed here.
        SignatureError: the store was altered.
    """
    found = tx.dossier(digest)
    if found is None:
        raise InputError(
            "a contract is not known to this broker",
            found=digest,
            remedy="propose it with `cenacle propose`",
        )
    row, stored_signatures, stored_vetoes = found
    contract = load_document(row)
    with _genuine("contract"):
        _same("contract", contract.digest, digest)
        signatures, signed = {}, set()
        for stored in stored_signatures:
            party, text = _party_row(tx, stored.party)
            _same(f"party {party.name}", party.digest, contract.parties.get(party.name))
            _check_signature(row.envelope, text, stored.signature)
            signatures[party.verify_key.keyid] = stored.signature
            signed.add(party.name)
    vetoes = {}
    for stored_veto in stored_vetoes:
        with _genuine("veto"):
            veto = _veto(stored_veto.envelope, _party_row(tx, stored_veto.party)[1])
            _same("contract", (veto.contract, veto.party), (digest, stored_veto.party))
        vetoes[veto.party] = veto.reason
    return ContractRecord(
        contract=contract,
        unsigned=_contract(row.envelope)[1],
        signatures=signatures,
        signed=frozenset(signed),
        vetoes=vetoes,
        replaces=row.replaces,
        replaced_by=row.replaced_by,
    )


def load_document(row: ContractRow) -> Contract:
    """A contract's document alone, without what was signed; :class:`SignatureError` if altered."""
    with _genuine("contract"):
        contract, _ = _contract(row.envelope)
        _same("contract", (contract.digest, contract.replaces), (row.digest, row.replaces))
    return contract


def load_lineage(tx: ReadTransaction, record: ContractRecord) -> Lineage:
    """Predecessors and successors along ``replaces``, nearest first.

    Raises:
        SignatureError: the store's links contradict what was signed.
    """

    def chain(
        before: ContractRecord, step: str | None, *, back: bool
    ) -> tuple[tuple[Contract, frozenset[str]], ...]:
        found: list[tuple[Contract, frozenset[str]]] = []
        while step is not None:
            with _genuine("chain of replacements"):
                other = load_contract(tx, step)
                older, newer = (other, before) if back else (before, other)
                linked = (newer.contract.replaces, older.replaced_by)
                _same("link", linked, (older.contract.digest, newer.contract.digest))
                _same("length", len(found) < MAX_LINEAGE, True)
            found.append((other.contract, other.signed))
            before, step = other, other.replaces if back else other.replaced_by
        return tuple(found)

    return Lineage(
        chain(record, record.replaces, back=True), chain(record, record.replaced_by, back=False)
    )
