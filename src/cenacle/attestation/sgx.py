"""Evidence of kind ``sgx``: a quote of an Intel SGX enclave with its collateral.

Body: ``quote`` (base64), ``collateral`` (:class:`~cenacle.attestation.dcap_collateral.Collateral`)
and the agent's ``statement``. The quote's 64 bytes of report data bind it.

What identifies an enclave is a measurement: MRENCLAVE (what was loaded), MRSIGNER with the
product's number (who signed it as what), and whatever of key separation and sharing (KSS) is in
use: the signer's family and extended product, and the configuration that the *host* chose at
launch. Fields of KSS that are all zero are not shown. Enclaves that debuggers may read are refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from cryptography import x509
from pydantic import Field, StringConstraints, model_validator

from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.dcap import verify_quote
from cenacle.attestation.dcap_body import attested_body, quote_of, raw_body, read_body
from cenacle.attestation.dcap_policy import DcapPolicy, judge_dcap
from cenacle.attestation.dcap_quote import EnclaveReport
from cenacle.attestation.gramine import GramineQuoter
from cenacle.attestation.intel_roots import intel_roots
from cenacle.attestation.registry import Attester, Shown, Verifier
from cenacle.documents.clauses import Clause, check
from cenacle.errors import EvidenceError

__all__ = ["SgxAttester", "SgxPolicy", "SgxVerifier", "judge_sgx", "sgx_identity"]

# Intel SDM volume 3D, table 35-4 (ATTRIBUTES).
_FLAGS: Final = {
    0: "INIT",
    1: "DEBUG",
    2: "MODE64BIT",
    4: "PROVISIONKEY",
    5: "EINITTOKEN_KEY",
    6: "CET",
    7: "KSS",
    10: "AEXNOTIFY",
}
_DEBUG: Final = 1 << 1
_INIT: Final = 1 << 0

Flag = Literal["INIT", "MODE64BIT", "PROVISIONKEY", "EINITTOKEN_KEY", "CET", "KSS", "AEXNOTIFY"]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class SgxAttester(Attester):
    """Makes quotes inside an SGX enclave under Gramine.

    Args:
        collateral: the file with Intel's collateral for this machine, fetched before.
        quoter: Gramine's files; a test may give others.
    """

    kind = "sgx"

    def __init__(self, collateral: Path, quoter: GramineQuoter | None = None) -> None:
        self._collateral = collateral
        self._quoter = GramineQuoter() if quoter is None else quoter

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del now  # a quote has no time
        return attested_body(self._quoter.quote(bound), "sgx", bound, self._collateral)


class SgxVerifier(Verifier):
    """Checks a quote of an SGX enclave, offline.

    Args:
        roots: trusted roots; Intel's unless a test gives others.
    """

    kind = "sgx"

    def __init__(self, roots: Iterable[x509.Certificate] | None = None) -> None:
        self._roots = intel_roots() if roots is None else tuple(roots)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        body = read_body(evidence, self.kind)
        quote = quote_of(body, "sgx")
        report = quote.report
        assert isinstance(report, EnclaveReport)
        flags = _flags(report.attributes)
        if report.attributes & _DEBUG or not report.attributes & _INIT:
            raise EvidenceError(
                "the enclave runs in debug mode, so the host can read it"
                if report.attributes & _DEBUG
                else "the enclave was not initialized",
                found=f"attributes {' '.join(flags) or 'none'}",
                expected="a production enclave (INIT without DEBUG)",
                remedy="build and sign the enclave without debug",
            )
        verified = verify_quote(quote, body.collateral, self._roots, now)
        claims = Claims(
            kind=self.kind,
            protection=self.protection,
            measurements=_measurements(report),
            properties={
                **verified.properties(),
                "isv_svn": report.isv_svn,
                "config_svn": report.config_svn,
                "attributes": flags,
                "xfrm": f"{report.xfrm:016x}",
                "misc_select": report.misc_select,
                "cpu_svn": report.cpu_svn.hex(),
            },
            layers=(),
            issued=now,
        )
        return Shown(claims, report.report_data)

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        return raw_body(cls.kind, raw, collateral)


def _flags(attributes: int) -> list[str]:
    return [_FLAGS.get(bit, f"bit {bit}") for bit in range(64) if attributes >> bit & 1]


def _measurements(report: EnclaveReport) -> dict[str, str]:
    chosen = {
        "config-id": report.config_id,
        "isv-ext-prod-id": report.isv_ext_prod_id,
        "isv-family-id": report.isv_family_id,
    }
    return {
        "mrenclave": "sha256:" + report.mr_enclave.hex(),
        "mrsigner": "sha256:" + report.mr_signer.hex(),
        "isv-prod-id": f"hex:{report.isv_prod_id:04x}",
        **{name: "hex:" + value.hex() for name, value in chosen.items() if any(value)},
    }


class SgxPolicy(DcapPolicy):
    """Demands on an SGX enclave beside its measurements.

    Attributes:
        identity: which measurements identify the enclave: ``both`` (all that are shown),
            ``mrenclave`` (this very build, whoever signed it), or ``mrsigner`` (any build that
            the signer calls this product, from ``min_isv_svn`` on, which must then be stated).
        min_isv_svn: the signer's security version of the enclave, at least.
        min_config_svn: the security version of the host's configuration, at least.
        attributes: attributes that the enclave may have; others are refused, like those that
            give it access to Intel's provisioning keys.
        xfrm: accepted sets of processor extended features (16 hexadecimal digits); any by default.
    """

    identity: Literal["both", "mrenclave", "mrsigner"] = "both"
    min_isv_svn: Annotated[int, Field(ge=0, le=0xFFFF)] | None = None
    min_config_svn: Annotated[int, Field(ge=0, le=0xFFFF)] = 0
    attributes: tuple[Flag, ...] = ("INIT", "MODE64BIT", "CET", "KSS", "AEXNOTIFY")
    xfrm: Annotated[tuple[Hex64, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _a_signer_needs_a_floor(self) -> Self:
        if self.identity == "mrsigner" and self.min_isv_svn is None:
            raise ValueError("identity mrsigner needs min_isv_svn: old builds have known flaws")
        return self


def sgx_identity(claims: Claims, policy: SgxPolicy) -> Claims:
    """The claims with only those measurements that identify the enclave under the policy.

    What does not is kept among the properties.
    """
    moved = {
        "both": (),
        "mrenclave": ("mrsigner", "isv-prod-id", "isv-family-id", "isv-ext-prod-id"),
        "mrsigner": ("mrenclave",),
    }[policy.identity]
    aside = {name: value for name, value in claims.measurements.items() if name in moved}
    return claims.model_copy(
        update={
            "measurements": {n: v for n, v in claims.measurements.items() if n not in aside},
            "properties": {**claims.properties, **aside},
        }
    )


def judge_sgx(claims: Claims, policy: SgxPolicy) -> list[Clause]:
    """One clause for each demand of the policy."""
    shown = claims.properties
    clauses = judge_dcap(claims, policy)
    for field, name, floor in (
        ("isv_svn", "sgx ISVSVN", policy.min_isv_svn or 0),
        ("config_svn", "sgx CONFIGSVN", policy.min_config_svn),
    ):
        svn = shown.get(field, -1)
        clauses.append(
            check("contract", name, svn >= floor, svn, f">= {floor}", "run a newer enclave")
        )
    attributes = shown.get("attributes", ["not shown"])
    more = [flag for flag in attributes if flag not in policy.attributes]
    clauses.append(
        check(
            "contract",
            "sgx attributes",
            not more,
            " ".join(more) or " ".join(attributes),
            " ".join(policy.attributes),
            "sign the enclave without them",
        )
    )
    if policy.xfrm is not None:
        xfrm = shown.get("xfrm", "not shown")
        clauses.append(
            check("contract", "sgx XFRM", xfrm in policy.xfrm, xfrm, " or ".join(policy.xfrm),
                  "launch the enclave with these processor features")
        )  # fmt: skip
    return clauses
