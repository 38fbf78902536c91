"""One worked example: two hospitals, a clinic, and a study that every clause allows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from cenacle.attestation import Evidence
from cenacle.crypto import HpkePrivateKey, SecretBytes, SigningKey
from cenacle.documents import (
    Asset,
    Clause,
    Contract,
    Document,
    Party,
    Receipt,
    ReceiptBundle,
    Statement,
    Terms,
    UseFacts,
    Veto,
    match_terms,
)
from cenacle.documents.base import b64
from cenacle.documents.privacy import PrivacyLoss
from cenacle.documents.ticket import Ticket

NAMES = ("hospital-a", "hospital-b", "clinic")


def digest(of: str) -> str:
    """A readable digest that names nothing: ``d1d1...``."""
    return "sha256:" + (of.encode().hex() * 64)[:64]


def signing_key(name: str) -> SigningKey:
    return SigningKey.from_seed(SecretBytes(name.encode().ljust(32, b".")))


def party_fields(name: str) -> dict[str, Any]:
    hpke = HpkePrivateKey(SecretBytes(name.encode().ljust(96, b".")))
    return {
        "name": name,
        "signing_key": b64(signing_key(name).verify_key.raw),
        "hpke_key": b64(hpke.public_key.raw),
        "created": "2027-01-01T08:00:00Z",
    }


PARTIES = {name: Party.from_fields(party_fields(name)) for name in NAMES}

TERMS: dict[str, Any] = {
    "protection": "measured",
    "programs": [digest("package")],
    "recipes": ["logistic", "mlp"],
    "offload": ["enclave"],
    "privacy": "unbounded",
    "recipients": ["clinic"],
    "outputs": ["model", "metrics"],
    "purposes": ["diagnosis of breast cancer"],
    "uses": 2,
    "expires": "2027-12-31",
    "price": {"amount": 1250, "currency": "EUR"},
    "approval": "owner",
}


def asset_fields(owner: str, terms: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": f"{owner}-records",
        "owner": owner,
        "owner_digest": PARTIES[owner].digest,
        "type": "dataset",
        "content": "table",
        "container": {
            "header": digest(f"h{owner}"),
            "digest": digest(f"c{owner}"),
            "size": 70_000,
            "plaintext_bytes": 69_000,
        },
        "layout": {"columns": {"radius": "double", "diagnosis": "string"}, "rows": 212},
        "broker": digest("broker"),
        "terms": copy.deepcopy(TERMS if terms is None else terms),
        "created": "2027-01-02T09:30:00Z",
    }


def program_fields(terms: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        **asset_fields("clinic", terms),
        "name": "trainer",
        "type": "program",
        "content": "package",
        "package": digest("package"),
        "layout": {},
    }


RECIPE_JOB: dict[str, Any] = {
    "type": "recipe",
    "recipe": {
        "task": "classification",
        "data": {
            "form": "table",
            "assets": ["a", "b"],
            "target": "diagnosis",
            "classes": ["benign", "malignant"],
        },
        "model": {"type": "logistic"},
        "optimizer": {"type": "adam", "learning_rate": 0.01},
        "epochs": 20,
    },
}
PROGRAM_JOB: dict[str, Any] = {
    "type": "program",
    "program": "trainer",
    "parameters": {"epochs": 20, "rate": 1e-3},
}

SERVE_JOB: dict[str, Any] = {
    "type": "serve",
    "model": "a",
    "front": digest("front"),
    "outputs": {"form": "top-k", "k": 3, "decimals": 2},
    "tickets": "hospital-a",
}
SERVING: dict[str, Any] = {"outputs": {"form": "top-k", "k": 3, "decimals": 2}, "tickets": True}


def contract_fields(assets: dict[str, Asset], job: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "study-7",
        "purpose": "diagnosis of breast cancer",
        "broker": digest("broker"),
        "parties": {name: party.digest for name, party in PARTIES.items()},
        "assets": {
            alias: {"digest": asset.digest, "owner": asset.owner} for alias, asset in assets.items()
        },
        "job": copy.deepcopy(job),
        "enclave": {
            "reference": {
                "tpm": {"package": [digest("p1"), digest("p2")], "kernel": [digest("k")]},
                "snp": {"package": [digest("p1")]},
            },
            "layers": ["seccomp"],
        },
        "outputs": [
            {"name": "model", "kind": "model", "recipient": "clinic"},
            {"name": "report", "kind": "metrics", "recipient": "clinic"},
        ],
        "approval": {"all_of": ["hospital-a", "hospital-b"]},
        "vetoes": ["clinic"],
        "payments": [
            {"payer": "clinic", "payee": "hospital-a", "amount": 1250, "currency": "EUR"},
            {"payer": "clinic", "payee": "hospital-b", "amount": 1250, "currency": "EUR"},
            {"payer": "hospital-a", "payee": "clinic", "amount": 1250, "currency": "EUR"},
        ],
        "expires": "2027-06-30T12:00:00Z",
    }


def receipt_fields(contract: Contract, assets: dict[str, Asset]) -> dict[str, Any]:
    proof = {"index": 7, "entry": b64(b"entry"), "path": [b64(bytes(32))], "head": "head\n"}
    return {
        "contract": contract.digest,
        "run": "run-1",
        "broker": contract.broker,
        "evidence_kind": "tpm",
        "evidence": digest("evidence"),
        "protection": "measured",
        "measurements": {"package": digest("p1"), "program": digest("r")},
        "layers": ["seccomp"],
        "inputs": {
            alias: {
                "asset": asset.digest,
                "content": asset.container.digest,
                "owner": asset.owner,
            }
            for alias, asset in assets.items()
        },
        "outputs": [
            {
                "name": output.name,
                "kind": output.kind,
                "recipient": output.recipient,
                "header": digest(f"h{output.name}"),
                "content": digest(f"c{output.name}"),
                "size": 4096,
                "wrapped_key": b64(b"wrapped"),
            }
            for output in contract.outputs
        ],
        "privacy": "none: the outputs are not differentially private",
        "offload": {
            "scheme": "enclave",
            "inputs": "hidden",
            "weights": "hidden",
            "activations": "hidden",
            "gradients": "hidden",
            "labels": "hidden",
            "note": "nothing leaves the enclave",
        },
        "resumed": 0,
        "started": "2027-02-01T10:00:00Z",
        "finished": "2027-02-01T10:00:09Z",
        "release": proof,
    }


def _examples() -> dict[str, Document]:
    assets = {
        "a": Asset.from_fields(asset_fields("hospital-a")),
        "b": Asset.from_fields(asset_fields("hospital-b")),
    }
    program = Asset.from_fields(program_fields())
    contract = Contract.from_fields(contract_fields(assets, RECIPE_JOB))
    with_program = Contract.from_fields(
        {
            **contract_fields({**assets, "trainer": program}, PROGRAM_JOB),
            "replaces": contract.digest,
            "approval": {
                "at_least": 2,
                "of": ["hospital-a", {"any_of": ["hospital-b", "clinic"]}, "clinic"],
            },
        }
    )
    statement = Statement.of(Receipt.from_fields(receipt_fields(contract, assets)))
    return {
        "party": PARTIES["hospital-a"],
        "ticket": Ticket.from_fields(
            {
                "issuer": "hospital-a",
                "contract": contract.digest,
                "serial": b64(b"serial of ticket"),
                "client": b64(signing_key("client").verify_key.raw),
                "queries": 1000,
                "not_before": "2027-01-01T00:00:00Z",
                "expires": "2027-12-31",
            }
        ),
        "terms": Terms.from_fields(TERMS),
        "terms-defaults": Terms.from_fields({"expires": "2027-12-31"}),
        "asset": assets["a"],
        "asset-program": program,
        "contract-recipe": contract,
        "contract-program": with_program,
        "contract-serve": Scenario(job=copy.deepcopy(SERVE_JOB)).build()[0],
        "veto": Veto.from_fields(
            {"contract": contract.digest, "party": "clinic", "reason": "wrong recipe — Größe"}
        ),
        "statement": statement,
        "receipt-bundle": ReceiptBundle.from_fields(
            {
                "statement": {"payload": "…"},
                "binding": {
                    "nonce": b64(bytes(32)),
                    "hpke_key": b64(b"hpke"),
                    "signing_key": b64(b"signing"),
                },
                "settlement": receipt_fields(contract, assets)["release"],
                "evidence": {"kind": "tpm"},
                "contract": {},
                "parties": [{}],
                "assets": {"a": {}},
                "broker": {},
            }
        ),
        "evidence": Evidence.from_fields({"kind": "tpm", "body": {"quote": "AAAA", "pcrs": [1]}}),
    }


@pytest.fixture(scope="session")
def signer() -> Callable[[str], SigningKey]:
    return signing_key


@dataclass
class Scenario:
    """The worked example before it is built; tests change a part and look at the clauses.

    ``terms``, ``asset`` and ``contract`` are fields laid over the example's; ``ref`` over the
    contract's reference to asset ``a``.
    """

    job: dict[str, Any] = field(default_factory=lambda: copy.deepcopy(RECIPE_JOB))
    terms: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    asset: dict[str, Any] = field(default_factory=dict)
    program: dict[str, Any] = field(default_factory=dict)
    contract: dict[str, Any] = field(default_factory=dict)
    ref: dict[str, Any] = field(default_factory=dict)
    now: datetime = datetime(2027, 2, 1, 10, tzinfo=UTC)
    signed: frozenset[str] = frozenset({"hospital-a", "hospital-b", "clinic"})
    facts: UseFacts | None = field(default_factory=lambda: UseFacts(protection="measured", uses=0))
    loss: PrivacyLoss | None = None

    def build(self) -> tuple[Contract, dict[str, Asset]]:
        terms = {k: v for k, v in {**TERMS, **self.terms}.items() if k not in self.without}
        if self.job["type"] == "serve":
            return self._build_serving(terms)
        assets = {
            "a": Asset.from_fields({**asset_fields("hospital-a", terms), **self.asset}),
            "b": Asset.from_fields(asset_fields("hospital-b")),
        }
        if self.job["type"] == "program":
            own = {**TERMS, "price": None}
            assets["trainer"] = Asset.from_fields({**program_fields(own), **self.program})
        fields = contract_fields(assets, self.job)
        fields["assets"]["a"].update(self.ref)
        return Contract.from_fields({**fields, **self.contract}), assets

    def _build_serving(self, terms: dict[str, Any]) -> tuple[Contract, dict[str, Asset]]:
        model = {"type": "model", "content": "tensors", "layout": {}}
        own = {"serving": SERVING, **terms}
        own = {k: v for k, v in own.items() if k not in self.without}
        fields = {**asset_fields("hospital-a", own), **model, **self.asset}
        assets = {"a": Asset.from_fields(fields)}
        report = [{"name": "use", "kind": "metrics", "recipient": "clinic"}]
        fields = {**contract_fields(assets, self.job), "outputs": report}
        fields["assets"]["a"].update(self.ref)
        return Contract.from_fields({**fields, **self.contract}), assets

    def clauses(self, alias: str = "a") -> list[Clause]:
        contract, assets = self.build()
        return match_terms(
            alias,
            assets,
            contract,
            now=self.now,
            signed=self.signed,
            facts=self.facts,
            loss=self.loss,
        )


EXAMPLES = _examples()


@pytest.fixture(params=sorted(EXAMPLES))
def example(request: pytest.FixtureRequest) -> tuple[str, Document]:
    """Each worked example in turn, with its name."""
    return request.param, EXAMPLES[request.param]


@pytest.fixture(scope="session")
def examples() -> dict[str, Document]:
    return EXAMPLES


@pytest.fixture(scope="session")
def scenario() -> type[Scenario]:
    return Scenario


@pytest.fixture
def contract_example() -> dict[str, Any]:
    """Fields of a valid contract for a recipe, to be altered."""
    return copy.deepcopy(
        contract_fields(
            {
                "a": Asset.from_fields(asset_fields("hospital-a")),
                "b": Asset.from_fields(asset_fields("hospital-b")),
            },
            RECIPE_JOB,
        )
    )


@pytest.fixture
def program_contract_example() -> dict[str, Any]:
    """Fields of a valid contract for a program, to be altered."""
    return copy.deepcopy(EXAMPLES["contract-program"].to_fields())


@pytest.fixture
def name_digest() -> Callable[[str], str]:
    return digest
