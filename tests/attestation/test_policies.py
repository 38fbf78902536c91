"""Policies by kind: found by name, read strictly, judged with the measurements."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from cenacle.attestation import Claims
from cenacle.attestation.policies import appraise, check_policies, judge, policy_kinds, policy_of
from cenacle.attestation.verifiers import (
    Trust,
    hardware_kinds,
    hardware_verifier,
    hardware_verifiers,
    missing_for,
)
from cenacle.documents.base import Frozen
from cenacle.documents.clauses import all_met, failed
from cenacle.documents.protection import EVIDENCE_KINDS, protection_of
from cenacle.errors import DocumentError, InputError

NOW = datetime(2027, 2, 1, 10, tzinfo=UTC)
MRENCLAVE, MRSIGNER = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def claims(kind: str = "sgx", **properties: Any) -> Claims:
    return Claims(
        kind=kind,
        protection=protection_of(kind),
        measurements={"mrenclave": MRENCLAVE, "mrsigner": MRSIGNER, "isv-prod-id": "hex:0100"},
        properties=properties,
        layers=(),
        issued=NOW,
    )


def test_every_real_kind_has_a_policy_and_a_verifier() -> None:
    real = set(EVIDENCE_KINDS) - {"simulated"}
    assert set(policy_kinds()) == set(hardware_kinds()) == real
    for kind in real:
        assert isinstance(policy_of(kind, _least(kind)), Frozen)
        assert missing_for(kind) is None


def _least(kind: str) -> dict[str, Any]:
    return {"kinds": ["tdx", "nvidia"]} if kind == "composite" else {}


@pytest.mark.parametrize("kind", sorted(set(EVIDENCE_KINDS) - {"simulated"}))
def test_unknown_fields_are_refused(kind: str) -> None:
    with pytest.raises(DocumentError, match="allow_everything"):
        check_policies({kind: {**_least(kind), "allow_everything": True}})


def test_simulated_evidence_has_no_policy() -> None:
    assert policy_of("simulated", {}) is None
    with pytest.raises(DocumentError, match="no policy"):
        policy_of("simulated", {"tcb_status": ["UpToDate"]})
    assert judge(claims("simulated"), {}) == []


def test_parts_of_composite_evidence_are_read_too() -> None:
    with pytest.raises(DocumentError, match="allow_everything"):
        check_policies(
            {"composite": {"kinds": ["tdx"], "members": {"tdx": {"allow_everything": 1}}}}
        )


@pytest.mark.parametrize("kind", sorted(set(EVIDENCE_KINDS) - {"simulated", "composite"}))
def test_a_policy_that_cannot_be_read_is_a_clause_that_fails(kind: str) -> None:
    (clause,) = failed(judge(claims(kind), {"allow_everything": True}))
    assert clause.name == f"policy {kind}"


def test_a_policy_may_say_which_measurements_identify() -> None:
    shown = claims(
        tcb_status="UpToDate", advisories=[], isv_svn=3, config_svn=0, attributes=["INIT"]
    )
    signer = {"mrsigner": (MRSIGNER,), "isv-prod-id": ("hex:0100",)}
    by_signer = {"identity": "mrsigner", "min_isv_svn": 3}

    def wrong(reference: Any, fields: Any) -> set[str]:
        return {c.name for c in failed(appraise(shown, reference, fields)) if "measure" in c.name}

    assert wrong(signer, by_signer) == set()
    assert wrong(signer, {}) == {"measurement mrenclave"}
    assert wrong({"mrenclave": (MRENCLAVE,)}, {"identity": "mrenclave"}) == set()
    # A policy that cannot be read moves nothing aside.
    assert wrong(signer, {**by_signer, "x": 1}) == {"measurement mrenclave"}
    assert not all_met(appraise(shown, signer, {"identity": "mrsigner"}))  # needs min_isv_svn


def test_no_verifier_of_simulated_evidence_is_made_for_hardware() -> None:
    with pytest.raises(InputError, match="no verifier"):
        hardware_verifier("simulated")
    assert all(verifier.protection != "simulated" for verifier in hardware_verifiers(Trust()))
