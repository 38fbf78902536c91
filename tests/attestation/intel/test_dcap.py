"""Synthetic evidence under test roots, through the code that judges Intel's.

Every case changes one part of a world that is accepted; the refusal names the link that broke.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import dcap_qvl
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cenacle.attestation.claims import Evidence
from cenacle.attestation.dcap import VerifiedQuote, verify_quote
from cenacle.attestation.dcap_body import quote_of, read_body
from cenacle.documents.base import b64, unb64
from cenacle.errors import EvidenceError, UnavailableError

World = Any  # of conftest, which tests cannot import
Level = Callable[..., dict[str, Any]]


@pytest.fixture
def verify(now: Any) -> Callable[..., VerifiedQuote]:
    def run(world: World, fields: dict[str, Any], at: Any = None) -> VerifiedQuote:
        body = read_body(Evidence(kind=world.tee, body=fields), world.tee)
        return verify_quote(quote_of(body, world.tee), body.collateral, [world.root], at or now)

    return run


def made(world: World, tee: str) -> dict[str, Any]:
    fields: dict[str, Any] = world.sgx() if tee == "sgx" else world.tdx()
    return fields


Verify = Callable[..., VerifiedQuote]


@pytest.mark.parametrize(
    ("tee", "version", "td", "confirmed"),
    [
        ("sgx", 3, "", True),
        ("sgx", 4, "", False),
        ("sgx", 5, "", False),
        ("tdx", 4, "1.0", True),
        ("tdx", 5, "1.0", True),
        ("tdx", 5, "1.5", True),
    ],
)
def test_every_form_of_quote_is_verified(
    world: World, verify: Verify, tee: str, version: int, td: str, confirmed: bool
) -> None:
    fields = world.sgx(version) if tee == "sgx" else world.tdx(version, td)
    verified = verify(world, fields)
    assert verified.verdict.status == "UpToDate"
    assert verified.verdict.advisories == ()
    assert verified.confirmed is confirmed
    properties = verified.properties()
    assert properties["quote_version"] == version
    assert properties["tcb_evaluation_data_number"] == 18
    assert properties["fmspc"] == "00906ed50000"
    assert properties["ppid"] == (b"p" * 16).hex()
    assert (properties["smt"], properties["dynamic_platform"]) == (True, True)


def test_a_processor_without_platform_says_nothing_of_its_configuration(
    world: World, verify: Verify
) -> None:
    world.platform.sgx_type = 0
    world.pki.ca_name = "Intel SGX PCK Processor CA"
    properties = verify(world, world.sgx()).properties()
    assert not {"smt", "dynamic_platform", "platform_instance"} & set(properties)


def _pki(**names: Any) -> Callable[[World], None]:
    def change(world: World) -> None:
        for name, value in names.items():
            setattr(world.pki, name, value)

    return change


def _set(**names: Any) -> Callable[[World], None]:
    def change(world: World) -> None:
        for name, value in names.items():
            setattr(world, name, value)

    return change


def _pck_signs_everything(world: World) -> None:
    """The key of one machine leaked, and declares all machines up to date."""
    world.pki.signer_key = world.pki.pck_key
    world.attached = {
        "tcb_info_issuer_chain": world.pck_chain(),
        "qe_identity_issuer_chain": world.pck_chain(),
    }


def _pck_below_the_root(world: World) -> None:
    """A TCB signing key that leaked makes itself a platform."""
    signer, root = world.pki.signer(), world.root
    world.chain = "".join(pem_text(c) for c in (signer, root))


def pem_text(certificate: Any) -> str:
    text: str = certificate.public_bytes(Encoding.PEM).decode()
    return text


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(_pki(signer_name="Intel SGX PCK Certificate"), "another role", id="signer"),
        pytest.param(_pki(pck_name="Intel SGX TCB Signing"), "another role", id="pck"),
        pytest.param(_pki(ca_name="Intel SGX TCB Signing"), "another role", id="ca"),
        pytest.param(_pki(root_name="Intel SGX Root"), "another role", id="root"),
        pytest.param(_pck_signs_everything, "another length", id="pck-signs-tcb-info"),
        pytest.param(_pck_below_the_root, "another length", id="signer-as-platform"),
        pytest.param(_pki(ca_is_ca=False), "may not sign certificates", id="no-ca"),
        pytest.param(_set(revoked_by_ca=(3,)), "Certificate is revoked", id="revoked-pck"),
        pytest.param(_set(revoked_by_root=(2,)), "CA is revoked", id="revoked-ca"),
        pytest.param(_set(revoked_by_root=(4,)), "Signing is revoked", id="revoked-signer"),
        pytest.param(_set(revoked_by_root=(1,)), "Root CA is revoked", id="revoked-root"),
        pytest.param(_set(qe_auth_data=b"z" * 16), "refused by dcap-qvl", id="qe-auth-data"),
        pytest.param(
            _set(qe={"attributes": bytes.fromhex("1700000000000000e700000000000000")}),
            "debug enclave",
            id="qe-debug",
        ),
        pytest.param(_set(qe={"mr_signer": b"x" * 32}), "another MRSIGNER", id="qe-signer"),
        pytest.param(_set(qe={"isv_prod_id": 2}), "another ISVPRODID", id="qe-product"),
        pytest.param(_set(qe={"misc_select": 1}), "another MISCSELECT", id="qe-misc"),
        pytest.param(
            _set(qe={"attributes": bytes.fromhex("0500000000000000e700000000000000")}),
            "another attributes",
            id="qe-attributes",
        ),
        pytest.param(_set(qe={"isv_svn": 5}), "matches the quoting enclave", id="qe-too-old"),
        pytest.param(
            _set(qe={"report_data": bytes(64)}), "attestation key is not", id="qe-other-key"
        ),
        pytest.param(_set(tcb_info={"pceId": "0001"}), "another kind of platform", id="pce"),
        pytest.param(
            _set(tcb_info={"fmspc": "00906ED50001"}), "another kind of platform", id="fmspc"
        ),
        pytest.param(_set(tcb_info={"tcbType": 1}), "not what Intel publishes", id="tcb-type"),
        pytest.param(_set(tcb_info={"version": 2}), "not what Intel publishes", id="tcb-version"),
        pytest.param(_set(qe_identity={"version": 1}), "not what Intel publishes", id="qe-version"),
        pytest.param(_set(tcb_info={"tcbLevels": []}), "not what Intel publishes", id="no-levels"),
        pytest.param(_set(certification_type=4), "does not hold the platform", id="no-chain"),
        pytest.param(_set(chain="x"), "not a chain of certificates", id="no-pem"),
        pytest.param(_set(padding=b"\0x"), "something follows the quote", id="trailing"),
        pytest.param(
            _set(attached={"pck_certificate_chain": "x"}), "a second chain", id="second-chain"
        ),
        pytest.param(
            _set(attached={"pck_crl_issuer_chain": "x"}), "not a chain of", id="crl-chain"
        ),
        pytest.param(_set(attached={"pck_crl": "00"}), "cannot be read", id="crl-noise"),
        pytest.param(_set(attached={"pck_crl": ""}), "malformed", id="crl-empty"),
        pytest.param(
            _set(attached={"tcb_info_signature": "00" * 64}),
            "TCB info is not genuine",
            id="tcb-signature",
        ),
        pytest.param(
            _set(attached={"qe_identity_signature": "11" * 64}),
            "identity is not genuine",
            id="qe-signature",
        ),
        pytest.param(_set(attached={"extra": "x"}), "malformed", id="unknown-field"),
    ],
)
def test_one_broken_link_is_a_refusal(
    world: World, verify: Verify, tee: str, change: Callable[[World], None], reason: str
) -> None:
    world.tee = tee
    change(world)
    with pytest.raises(EvidenceError, match=reason):
        verify(world, made(world, tee))


@pytest.mark.parametrize("tee", ["sgx", "tdx"])
def test_the_other_kinds_collateral_is_refused(world: World, verify: Verify, tee: str) -> None:
    fields = made(world, tee)
    world.tee = "tdx" if tee == "sgx" else "sgx"
    fields["collateral"] = world.collateral()
    world.tee = tee
    with pytest.raises(EvidenceError, match="another kind of enclave"):
        verify(world, fields)


def test_another_root_is_not_trusted(world: World, verify: Verify, now: Any) -> None:
    fields = world.sgx()
    body = read_body(Evidence(kind="sgx", body=fields), "sgx")
    other = type(world.pki)().root()  # of the same name, with another key
    with pytest.raises(EvidenceError, match="does not end in a root that is trusted"):
        verify_quote(quote_of(body, "sgx"), body.collateral, [other], now)
    with pytest.raises(EvidenceError, match="does not end in a root that is trusted"):
        verify_quote(quote_of(body, "sgx"), body.collateral, [], now)


def test_the_revocation_lists_chain_may_hold_a_renewed_certificate_of_the_same_ca(
    world: World, verify: Verify
) -> None:
    fields = world.sgx()
    world.pki.ca_not_after += timedelta(days=1)
    renewed = pem_text(world.pki.ca()) + pem_text(world.root)
    assert renewed != fields["collateral"]["pck_crl_issuer_chain"]
    fields["collateral"]["pck_crl_issuer_chain"] = renewed
    verify(world, fields)
    world.pki.ca_key = world.pki.pck_key
    other = pem_text(world.pki.ca()) + pem_text(world.root)
    fields["collateral"]["pck_crl_issuer_chain"] = other
    with pytest.raises(EvidenceError, match="not that of the platform's CA"):
        verify(world, fields)


@pytest.mark.parametrize("field", ["pck", "tcb_info_issuer_chain", "qe_identity_issuer_chain"])
def test_a_chain_of_the_right_names_and_other_keys_is_refused(
    world: World, verify: Verify, field: str
) -> None:
    other = type(world.pki)()
    other.root_key = world.pki.root_key  # so that its root is byte for byte another of that name
    if field == "pck":
        other.ca_key = world.pki.pck_key
        world.chain = "".join(
            pem_text(c) for c in (other.pck(world.platform), world.pki.ca(), world.root)
        )
        reason = "quoting enclave's report is not genuine|not signed by the next"
    else:
        world.attached = {field: pem_text(other.signer()) + pem_text(world.root)}
        reason = "is not genuine"
    with pytest.raises(EvidenceError, match=reason):
        verify(world, world.sgx())


def test_a_signature_by_another_attestation_key_is_refused(world: World, verify: Verify) -> None:
    world.signed_by = world.pki.pck_key
    with pytest.raises(EvidenceError, match="the quote is not genuine"):
        verify(world, world.sgx())


def test_a_key_that_is_no_point_is_refused(world: World, verify: Verify) -> None:
    fields = world.sgx()
    quote = bytearray(unb64(fields["quote"]))
    quote[48 + 384 + 4 + 64 :][:64] = bytes(64)
    start = 48 + 384 + 4 + 64
    quote[start : start + 64] = bytes(64)
    with pytest.raises(EvidenceError, match="not a point of P-256"):
        verify(world, {**fields, "quote": b64(bytes(quote))})


SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("attribute", "what"),
    [
        ("next_update", "TCB info is"),
        ("pki.pck_not_after", "Intel SGX PCK Certificate is"),
        ("pki.ca_not_after", "Intel SGX PCK Platform CA is"),
        ("pki.signer_not_after", "Intel SGX TCB Signing is"),
    ],
)
def test_what_is_valid_until_now_is_expired_a_second_later(
    world: World, verify: Verify, now: Any, attribute: str, what: str
) -> None:
    holder = world.pki if attribute.startswith("pki.") else world
    setattr(holder, attribute.removeprefix("pki."), now)
    fields = world.sgx()
    assert verify(world, fields, now).verdict.status == "UpToDate"
    with pytest.raises(EvidenceError, match=f"{what} expired"):
        verify(world, fields, now + SECOND)


def test_a_revocation_list_is_expired_when_the_next_one_is_due(
    world: World, verify: Verify, now: Any
) -> None:
    world.crl_next_update = now + SECOND
    fields = world.sgx()
    verify(world, fields, now)
    with pytest.raises(EvidenceError, match="revocation list of Intel SGX Root CA is expired"):
        verify(world, fields, now + SECOND)


def test_collateral_of_the_future_is_refused(world: World, verify: Verify, now: Any) -> None:
    world.issued = now
    fields = world.tdx()
    verify(world, fields, now)
    with pytest.raises(EvidenceError, match="TCB info is of the future"):
        verify(world, fields, now - SECOND)
    with pytest.raises(EvidenceError, match="of the future"):
        verify(world, fields, now - timedelta(days=5000))


STATUSES = [
    ("UpToDate", "UpToDate", "UpToDate"),
    ("UpToDate", "OutOfDate", "OutOfDate"),
    ("SWHardeningNeeded", "UpToDate", "SWHardeningNeeded"),
    ("SWHardeningNeeded", "OutOfDate", "OutOfDate"),
    ("ConfigurationNeeded", "UpToDate", "ConfigurationNeeded"),
    ("ConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
    (
        "ConfigurationAndSWHardeningNeeded",
        "UpToDate",
        "ConfigurationAndSWHardeningNeeded",
    ),
    ("ConfigurationAndSWHardeningNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
    ("OutOfDate", "UpToDate", "OutOfDate"),
    ("OutOfDate", "OutOfDate", "OutOfDate"),
    ("OutOfDateConfigurationNeeded", "OutOfDate", "OutOfDateConfigurationNeeded"),
]


@pytest.mark.parametrize(("platform", "enclave", "whole"), STATUSES)
def test_statuses_are_merged_as_intel_does(
    world: World,
    verify: Verify,
    tcb_level: Level,
    svn_level: Level,
    platform: str,
    enclave: str,
    whole: str,
) -> None:
    """Both implementations judge: agreement is part of acceptance."""
    world.levels = [tcb_level(world.platform.cpu_svn, 13, platform, ("INTEL-SA-00001",))]
    world.qe_levels = [svn_level(8, enclave, ("INTEL-SA-00002", "INTEL-SA-00001"))]
    verdict = verify(world, world.sgx()).verdict
    assert verdict.status == whole
    assert verdict.qe_status == enclave
    assert verdict.advisories == ("INTEL-SA-00001", "INTEL-SA-00002")


@pytest.mark.parametrize("part", ["platform", "quoting enclave", "module"])
def test_a_revoked_part_is_refused(
    world: World, verify: Verify, tcb_level: Level, svn_level: Level, part: str
) -> None:
    world.tee = "tdx"
    if part == "platform":
        world.levels = [tcb_level(world.platform.cpu_svn, 13, "Revoked", (), bytes(16))]
    elif part == "module":
        world.modules = [_module(svn_level, "Revoked")]
    else:
        world.qe_levels = [svn_level(8, "Revoked")]
    with pytest.raises(EvidenceError, match="revoked"):
        verify(world, world.tdx())


def _module(svn_level: Level, status: str, **changed: Any) -> dict[str, Any]:
    zeros = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
    return {"id": "TDX_01", **zeros, "tcbLevels": [svn_level(4, status)], **changed}


def _lower(svn: bytes, place: int) -> bytes:
    return svn[:place] + bytes([svn[place] - 1]) + svn[place + 1 :]


@pytest.mark.parametrize("place", range(8))
def test_each_component_below_its_level_makes_the_platform_outdated(
    world: World, verify: Verify, place: int
) -> None:
    svn = world.platform.cpu_svn
    fields = world.sgx()
    world.platform.cpu_svn = _lower(svn, place)
    world.chain = None
    older = world.sgx()
    older["collateral"] = fields["collateral"]
    verdict = verify(world, older).verdict
    assert verdict.status == "OutOfDate"
    assert verdict.advisories == ("INTEL-SA-01036",)


def test_an_older_pce_makes_the_platform_outdated_and_the_oldest_is_refused(
    world: World, verify: Verify
) -> None:
    world.platform.pce_svn = 12
    assert verify(world, world.sgx()).verdict.status == "OutOfDate"
    world.platform.pce_svn = 10
    with pytest.raises(EvidenceError, match="no TCB level of Intel's matches this platform"):
        verify(world, world.sgx())


def test_the_order_of_levels_in_the_collateral_does_not_matter(
    world: World, verify: Verify, tcb_level: Level
) -> None:
    svn = world.platform.cpu_svn
    world.levels = [
        tcb_level(bytes(16), 0, "OutOfDate", ("INTEL-SA-00009",)),
        tcb_level(svn, 13, "UpToDate"),
    ]
    assert verify(world, world.sgx()).verdict.status == "UpToDate"


@pytest.mark.parametrize(
    ("launched", "now_runs", "status", "current"),
    [
        ([7, 1, 3], [7, 1, 3], "UpToDate", "UpToDate"),
        ([3, 1, 3], [7, 1, 3], "TDRelaunchAdvised", "UpToDate"),
        ([7, 1, 3], [3, 1, 3], "UpToDate", "OutOfDate"),
        ([3, 1, 3], [3, 1, 3], "OutOfDate", "OutOfDate"),
        ([7, 1, 2], [7, 1, 3], "TDRelaunchAdvised", "UpToDate"),
    ],
)
def test_a_domain_is_judged_by_the_module_that_launched_it_and_by_the_one_that_runs(
    world: World,
    verify: Verify,
    launched: list[int],
    now_runs: list[int],
    status: str,
    current: str,
) -> None:
    svns = [bytes(svn + [0] * 13) for svn in (launched, now_runs)]
    fields = world.tdx(5, "1.5", tee_tcb_svn=svns[0], tee_tcb_svn2=svns[1])
    verdict = verify(world, fields).verdict
    assert (verdict.status, verdict.current_status) == (status, current)


def test_a_module_of_version_zero_is_judged_by_the_platforms_levels(
    world: World, verify: Verify
) -> None:
    verdict = verify(world, world.tdx(4, tee_tcb_svn=bytes([5, 0, 3] + [0] * 13))).verdict
    assert verdict.status == "UpToDate"
    verdict = verify(world, world.tdx(4, tee_tcb_svn=bytes([4, 0, 3] + [0] * 13))).verdict
    assert verdict.status == "OutOfDate"


@pytest.mark.parametrize(
    ("report", "modules", "reason"),
    [
        ({"tee_tcb_svn": bytes([7, 3, 3] + [0] * 13)}, None, "does not know the TDX module"),
        ({"tee_tcb_svn": bytes([1, 1, 3] + [0] * 13)}, None, "matches TDX module TDX_01"),
        ({}, [], "does not know the TDX module"),
        ({}, [{"mrsigner": "11" * 48}], "TDX module is not Intel's"),
        ({"mr_signer_seam": b"\x01" * 48}, None, "TDX module is not Intel's"),
        ({"seam_attributes": b"\x01" + bytes(7)}, None, "attributes that Intel does not vouch"),
        ({}, [{"attributes": "01" + "00" * 7}], "attributes that Intel does not vouch"),
        ({}, [{}, {}], "does not know the TDX module"),
    ],
)
def test_a_module_that_intel_does_not_know_is_refused(
    world: World,
    verify: Verify,
    svn_level: Level,
    report: dict[str, bytes],
    modules: list[dict[str, Any]] | None,
    reason: str,
) -> None:
    if modules is not None:
        world.modules = [_module(svn_level, "UpToDate", **changed) for changed in modules]
    with pytest.raises(EvidenceError, match=reason):
        verify(world, world.tdx(4, **report))


def test_a_platform_certificate_may_come_with_the_collateral(world: World, verify: Verify) -> None:
    world.certification_type = 3
    chain = world.pck_chain()
    world.attached = {"pck_certificate_chain": chain}
    world.chain = "encrypted PPID"
    assert verify(world, world.sgx()).verdict.status == "UpToDate"


_SVNS = st.lists(st.integers(4, 6), min_size=3, max_size=3)
_STATUS = st.sampled_from(sorted({platform for platform, _, _ in STATUSES}))
_PART_STATUS = st.sampled_from(["UpToDate", "OutOfDate"])


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_two_implementations_agree_on_any_platform(
    world: World, verify: Verify, tcb_level: Level, svn_level: Level, data: st.DataObject
) -> None:
    """Whatever Intel says and whatever the machine has: one verdict, or a refusal by both."""

    def svns(rest: int) -> bytes:
        return bytes(data.draw(_SVNS) + [0] * rest)

    def some(svn: int) -> tuple[str, ...]:
        return tuple(f"INTEL-SA-{number:05}" for number in range(svn))

    world.tee = "tdx"
    world.platform.cpu_svn = svns(13)
    world.platform.pce_svn = data.draw(st.integers(10, 12))
    world.levels = [
        tcb_level(svns(13), data.draw(st.integers(10, 12)), data.draw(_STATUS), some(i), svns(13))
        for i in range(data.draw(st.integers(1, 4)))
    ]
    if data.draw(st.booleans()):  # so that more than a few platforms reach a level
        lowest = bytes([4, 0, 4] + [0] * 13)
        world.levels.append(tcb_level(lowest, 10, data.draw(_STATUS), some(5), lowest))

    def levels(low: int, high: int) -> list[dict[str, Any]]:
        found = data.draw(st.lists(st.integers(low, high), max_size=2, unique=True))
        return [
            svn_level(svn, data.draw(_PART_STATUS), some(svn))
            for svn in sorted({low, *found}, reverse=True)
        ]

    world.modules = [_module(svn_level, "UpToDate", tcbLevels=levels(4, 7))]
    world.qe_levels = levels(7, 9)
    report = {
        name: bytes([data.draw(st.integers(3, 7)), data.draw(st.integers(0, 1)), *svns(11)])
        for name in ("tee_tcb_svn", "tee_tcb_svn2")
    }
    fields = world.tdx(5, "1.5", **report)
    refusal = None
    try:
        assert verify(world, fields).confirmed
    except EvidenceError as error:
        refusal = error.what
    if refusal is not None:
        assert refusal.startswith("no TCB level of Intel's matches")
        with pytest.raises(ValueError, match="Verification failed"):
            _dcap_qvl_alone(world, fields)


def test_levels_out_of_order_are_a_disagreement(
    world: World, verify: Verify, svn_level: Level
) -> None:
    """Intel's library sorts a quoting enclave's levels, ``dcap-qvl`` takes them as they come."""
    world.qe_levels = [svn_level(6, "OutOfDate"), svn_level(8, "UpToDate")]
    with pytest.raises(EvidenceError, match="do not agree"):
        verify(world, world.sgx())


def _dcap_qvl_alone(world: World, fields: dict[str, Any]) -> None:
    dcap_qvl.verify_with_root_ca(
        unb64(fields["quote"]),
        dcap_qvl.QuoteCollateralV3.from_json(json.dumps(fields["collateral"])),
        world.root.public_bytes(Encoding.DER),
        int(world.issued.timestamp()) + 86400,
    )


class _Verifier:
    """Stands where ``dcap_qvl.QuoteVerifier`` does, and changes its answer."""

    def __init__(self, real: Any, alter: Callable[[str], str]) -> None:
        self.real = real
        self.alter = alter

    def __call__(self, root: bytes) -> _Verifier:
        self.made = self.real(root)
        return self

    def verify_with_policy(self, *args: Any) -> _Verifier:
        self.claims = self.made.verify_with_policy(*args)
        return self

    def to_json(self) -> str:
        return self.alter(self.claims.to_json())


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"status":"UpToDate"', '"status":"OutOfDate"', "do not agree"),
        ('"advisory_ids":[]', '"advisory_ids":["INTEL-SA-00001"]', "do not agree"),
        ('"mr_enclave":"e1', '"mr_enclave":"e2', "do not agree"),
        ('"report_data":"00', '"report_data":"01', "do not agree"),
        ('"isv_svn":9', '"isv_svn":8', "do not agree"),
        ('"tcb":{', '"other":{', "unknown form"),
        ('"SgxEnclave"', '"TD20"', "unknown form"),
    ],
)
def test_two_opinions_that_differ_are_a_refusal(
    world: World,
    verify: Verify,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    reason: str,
) -> None:
    def alter(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    monkeypatch.setattr(dcap_qvl, "QuoteVerifier", _Verifier(dcap_qvl.QuoteVerifier, alter))
    with pytest.raises(EvidenceError, match=reason):
        verify(world, world.sgx())


def test_without_the_second_opinion_nothing_is_accepted(
    world: World, verify: Verify, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dcap_qvl", None)
    with pytest.raises(UnavailableError, match="dcap-qvl is not installed"):
        verify(world, world.sgx())
