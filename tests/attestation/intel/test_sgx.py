from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cenacle.attestation.claims import Claims, Evidence, compare
from cenacle.attestation.registry import Shown
from cenacle.attestation.sgx import SgxPolicy, SgxVerifier, judge_sgx, sgx_identity
from cenacle.documents.clauses import all_met, failed
from cenacle.errors import DocumentError, EvidenceError, InputError

World = Any  # of conftest, which tests cannot import

Inspect = Callable[..., Shown]


@pytest.fixture
def inspect(world: World, now: Any) -> Inspect:
    def run(fields: dict[str, Any]) -> Shown:
        return SgxVerifier([world.root]).inspect(Evidence(kind="sgx", body=fields), now)

    return run


def flags(value: int, xfrm: int = 0xE7) -> bytes:
    return value.to_bytes(8, "little") + xfrm.to_bytes(8, "little")


def test_what_identifies_an_enclave_is_measured(world: World, inspect: Inspect, now: Any) -> None:
    claims, bound = inspect(world.sgx())
    assert claims.kind == "sgx"
    assert claims.protection == "tee"
    assert claims.measurements == {
        "mrenclave": "sha256:" + "e1" * 32,
        "mrsigner": "sha256:" + "51" * 32,
        "isv-prod-id": "hex:0003",
    }
    assert claims.issued == now
    assert claims.properties["isv_svn"] == 9
    assert claims.properties["attributes"] == ["INIT", "MODE64BIT"]
    assert bound == bytes(range(64))


def test_what_the_host_configured_is_measured_where_it_is_not_zero(
    world: World, inspect: Inspect
) -> None:
    fields = world.sgx(
        config_id=b"\x01" * 64, isv_family_id=b"\x02" * 16, isv_ext_prod_id=b"\x03" * 16
    )
    shown = inspect(fields).claims.measurements
    assert shown["config-id"] == "hex:" + "01" * 64
    assert shown["isv-family-id"] == "hex:" + "02" * 16
    assert shown["isv-ext-prod-id"] == "hex:" + "03" * 16


@pytest.mark.parametrize("value", [0x7, 0x2, 0x3, 0x87])
@pytest.mark.parametrize("version", [3, 4, 5])
def test_debug_enclaves_are_refused(
    world: World, inspect: Inspect, value: int, version: int
) -> None:
    with pytest.raises(EvidenceError, match="debug mode"):
        inspect(world.sgx(version, attributes=flags(value)))


def test_an_enclave_that_was_not_initialized_is_refused(world: World, inspect: Inspect) -> None:
    with pytest.raises(EvidenceError, match="not initialized"):
        inspect(world.sgx(attributes=flags(4)))


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (lambda f: f.update(quote=""), "impossible size"),
        (lambda f: f.update(quote="no base64!"), "malformed"),
        (lambda f: f.pop("quote"), "malformed"),
        (lambda f: f.pop("collateral"), "malformed"),
        (lambda f: f.update(collateral={}), "malformed"),
        (lambda f: f.update(collateral="x"), "malformed"),
        (lambda f: f.update(event_log="AA=="), "no event log"),
        (lambda f: f.update(more=1), "malformed"),
        (lambda f: f["collateral"].update(tcb_info="{}"), "not genuine"),
        (lambda f: f["collateral"].update(tcb_info="x" * 300_000), "malformed"),
    ],
)
def test_a_malformed_body_is_refused(
    world: World, inspect: Inspect, alter: Callable[[dict[str, Any]], object], reason: str
) -> None:
    fields = world.sgx()
    alter(fields)
    with pytest.raises(EvidenceError, match=reason):
        inspect(fields)


def test_evidence_of_another_kind_is_refused(world: World, now: Any) -> None:
    with pytest.raises(EvidenceError, match="of another kind"):
        SgxVerifier([world.root]).inspect(Evidence(kind="tdx", body=world.sgx()), now)
    with pytest.raises(EvidenceError, match="the quote is of another kind of enclave"):
        SgxVerifier([world.root]).inspect(Evidence(kind="sgx", body=world.tdx()), now)


def test_test_roots_are_not_trusted_by_default(world: World, now: Any) -> None:
    with pytest.raises(EvidenceError, match="does not end in a root that is trusted"):
        SgxVerifier().inspect(Evidence(kind="sgx", body=world.sgx()), now)


@pytest.fixture
def claims(world: World, inspect: Inspect) -> Claims:
    return inspect(world.sgx()).claims


def of(claims: Claims, **properties: Any) -> Claims:
    return claims.model_copy(update={"properties": {**claims.properties, **properties}})


def test_the_default_policy_accepts_what_is_up_to_date(claims: Claims) -> None:
    assert all_met(judge_sgx(claims, SgxPolicy()))


@pytest.mark.parametrize(
    ("policy", "properties", "clause"),
    [
        ({}, {"tcb_status": "SWHardeningNeeded"}, "sgx TCB status"),
        ({}, {"current_tcb_status": "OutOfDate"}, "sgx TCB status of what runs now"),
        ({}, {"qe_tcb_status": "OutOfDate"}, "sgx TCB status of the quoting enclave"),
        ({}, {"advisories": ["INTEL-SA-00615"]}, "sgx advisories"),
        ({}, {"current_advisories": ["INTEL-SA-00615"]}, "sgx advisories"),
        ({"advisories": ["INTEL-SA-00615"]}, {"advisories": ["INTEL-SA-1"]}, "sgx advisories"),
        ({"min_tcb_evaluation_data_number": 19}, {}, "sgx TCB evaluation data number"),
        ({}, {"collateral_issued": "2027-01-01T10:00:00Z"}, "sgx collateral age"),
        ({"max_collateral_age_days": 1}, {"collateral_issued": "2027-01-31T09:59:59Z"},
         "sgx collateral age"),
        ({"platforms": ["00" * 16]}, {}, "sgx platform"),
        ({"allow_smt": False}, {}, "sgx hyperthreading"),
        ({"allow_smt": False}, {"smt": None}, "sgx hyperthreading"),
        ({"allow_dynamic_platform": False}, {}, "sgx dynamic platform"),
        ({"min_isv_svn": 10}, {}, "sgx ISVSVN"),
        ({"min_config_svn": 1}, {}, "sgx CONFIGSVN"),
        ({}, {"attributes": ["INIT", "PROVISIONKEY"]}, "sgx attributes"),
        ({}, {"attributes": ["INIT", "bit 11"]}, "sgx attributes"),
        ({"xfrm": ["0000000000000003"]}, {}, "sgx XFRM"),
    ],
)  # fmt: skip
def test_each_demand_has_a_clause_of_its_own(
    claims: Claims, policy: dict[str, Any], properties: dict[str, Any], clause: str
) -> None:
    clauses = judge_sgx(of(claims, **properties), SgxPolicy.from_fields(policy))
    assert [c.name for c in failed(clauses)] == [clause]
    assert failed(clauses)[0].remedy


@pytest.mark.parametrize(
    ("policy", "properties"),
    [
        ({"tcb_status": ["OutOfDate"]},
         {"tcb_status": "OutOfDate", "current_tcb_status": "OutOfDate"}),
        ({"advisories": ["INTEL-SA-00615"]}, {"advisories": ["INTEL-SA-00615"]}),
        ({"platforms": [(b"p" * 16).hex()]}, {}),
        ({"allow_smt": False, "allow_dynamic_platform": False},
         {"smt": False, "dynamic_platform": False}),
        ({"min_isv_svn": 9, "xfrm": ["00000000000000e7"]}, {}),
    ],
)  # fmt: skip
def test_what_a_policy_names_is_accepted(
    claims: Claims, policy: dict[str, Any], properties: dict[str, Any]
) -> None:
    assert all_met(judge_sgx(of(claims, **properties), SgxPolicy.from_fields(policy)))


def test_claims_without_properties_fail_every_demand(claims: Claims) -> None:
    empty = claims.model_copy(update={"properties": {}})
    policy = SgxPolicy.from_fields({"platforms": ["00" * 16], "min_isv_svn": 0, "xfrm": ["0" * 16]})
    assert not any(clause.verdict == "met" for clause in judge_sgx(empty, policy))


@pytest.mark.parametrize(
    "fields",
    [
        {"identity": "mrsigner"},
        {"identity": "any"},
        {"tcb_status": []},
        {"tcb_status": ["Revoked"]},
        {"advisories": ["CVE-1"]},
        {"platforms": []},
        {"unknown": 1},
        {"attributes": ["DEBUG"]},
        {"max_collateral_age_days": 0},
    ],
)
def test_a_policy_that_means_nothing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(DocumentError):
        SgxPolicy.from_fields(fields)


ENCLAVE = ("sha256:" + "e1" * 32,)
SIGNER = ("sha256:" + "51" * 32,)
PRODUCT = ("hex:0003",)


@pytest.mark.parametrize(
    ("identity", "reference", "accepted"),
    [
        ("both", {"mrenclave": ENCLAVE, "mrsigner": SIGNER, "isv-prod-id": PRODUCT}, True),
        ("both", {"mrenclave": ENCLAVE}, False),
        ("mrenclave", {"mrenclave": ENCLAVE}, True),
        ("mrenclave", {"mrenclave": SIGNER}, False),
        ("mrenclave", {"mrsigner": SIGNER, "isv-prod-id": PRODUCT}, False),
        ("mrenclave", {"mrenclave": ENCLAVE, "mrsigner": SIGNER}, False),
        ("mrsigner", {"mrsigner": SIGNER, "isv-prod-id": PRODUCT}, True),
        ("mrsigner", {"mrsigner": SIGNER}, False),
        ("mrsigner", {"mrsigner": ENCLAVE, "isv-prod-id": PRODUCT}, False),
        ("mrsigner", {"mrenclave": ENCLAVE}, False),
    ],
)
def test_the_policy_says_what_identifies_the_enclave(
    claims: Claims, identity: str, reference: dict[str, Any], accepted: bool
) -> None:
    policy = SgxPolicy.from_fields({"identity": identity, "min_isv_svn": 9})
    seen = sgx_identity(claims, policy)
    assert all_met(compare(seen, reference)) is accepted
    everything = {**seen.measurements, **seen.properties}
    assert everything.items() >= claims.measurements.items()


def test_a_host_chosen_configuration_is_never_left_out(world: World, inspect: Inspect) -> None:
    claims = inspect(world.sgx(config_id=b"\x01" * 64)).claims
    for identity in ("both", "mrenclave", "mrsigner"):
        policy = SgxPolicy.from_fields({"identity": identity, "min_isv_svn": 0})
        assert "config-id" in sgx_identity(claims, policy).measurements


def test_a_quote_in_a_file_becomes_a_body(world: World, now: Any) -> None:
    import json  # noqa: PLC0415

    from cenacle.documents.base import unb64  # noqa: PLC0415

    fields = world.sgx()
    raw = unb64(fields["quote"])
    collateral = json.dumps(fields["collateral"]).encode()
    body = SgxVerifier.body_of(raw + bytes(8), collateral)
    assert body == fields
    with pytest.raises(InputError, match="--collateral"):
        SgxVerifier.body_of(raw)
    with pytest.raises(InputError, match="holds no quote"):
        SgxVerifier.body_of(raw[:-1], collateral)
    with pytest.raises(InputError):
        SgxVerifier.body_of(raw, b"{}")
    with pytest.raises(InputError):
        SgxVerifier.body_of(raw, b"\xff" * 10)
    with pytest.raises(InputError, match="too large"):
        SgxVerifier.body_of(raw, b" " * (1024 * 1024 + 1))


def test_report_data_binds_the_whole_statement(
    world: World, gramine: Callable[..., Any], now: Any, tmp_path: Path
) -> None:
    attester, _ = gramine(world)
    report_data = bytes(range(64))
    program = {"program": "sha256:" + "ab" * 32}
    evidence = attester.attest(report_data, program, ("gramine",), now)
    verifier = SgxVerifier([world.root])
    claims = verifier.authenticate(evidence, report_data, now)
    assert claims.measurements["program"] == program["program"]
    assert claims.layers == ("gramine",)
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        verifier.authenticate(evidence, bytes(64), now)
    statement = {**evidence.body["statement"], "layers": ["more"]}
    altered = Evidence(kind="sgx", body={**evidence.body, "statement": statement})
    with pytest.raises(EvidenceError, match="bound to another nonce"):
        verifier.authenticate(altered, report_data, now)
    lying = attester.attest(report_data, {"mrenclave": "sha256:" + "00" * 32}, (), now)
    with pytest.raises(EvidenceError, match="only sgx hardware can take"):
        verifier.authenticate(lying, report_data, now)
