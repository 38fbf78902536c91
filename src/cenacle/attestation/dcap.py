"""Verification of SGX and TDX quotes (Intel DCAP), offline: the quote, its collateral, a clock.

Two implementations judge every quote and must agree. One is here, in Python on ``cryptography``:
it walks from Intel's root to the report link by link and checks the role of every certificate.
The other is ``dcap-qvl`` (Rust). Agreement is demanded of the fields of the report, of the
platform, of the TCB status and of the advisories, so that a slip of one parser is a refusal.
What ``dcap-qvl`` 0.7 does not check and this module does: that TCB information is signed by
Intel's TCB signing certificate and not by any other below the root, the PCE's identity, bytes
after the quote, and the chains and lists that it does not use. It does not judge SGX quotes of
versions 4 and 5, nor trust domains with some attributes or a service domain (a policy decides about
those); they are judged here alone, and the claims say so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final, NoReturn

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cenacle.attestation.dcap_chain import (
    Chain,
    PckExtension,
    check_ca_chain,
    check_crl,
    check_pck_chain,
    check_signature,
    check_signer_chain,
    parse_chain,
    parse_pck_extension,
)
from cenacle.attestation.dcap_collateral import Collateral
from cenacle.attestation.dcap_quote import EnclaveReport, Quote, TdReport
from cenacle.attestation.dcap_tcb import (
    QeIdentity,
    TcbInfo,
    TcbVerdict,
    check_quoting_enclave,
    judge_tcb,
)
from cenacle.errors import EvidenceError, UnavailableError

__all__ = ["VerifiedQuote", "verify_quote"]

_CHAIN_OF_PEM: Final = 5

# What dcap-qvl refuses about a genuine trust domain, without a switch, and a policy decides here.
_MATTERS_OF_POLICY: Final = frozenset(
    {
        "SEPT_VE_DISABLE is not enabled",
        "TD migration is enabled",
        "SERVTD_EXT is enabled",
        "Invalid MR service TD",
        "Reserved bits in TD attributes are set",
    }
)


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A genuine quote, and what Intel says about the platform that made it.

    Attributes:
        issued: when the older of TCB info and quoting enclave identity was issued.
        next_update: when the first of them is due for renewal.
        evaluation_number: the lower of their TCB evaluation data numbers.
        confirmed: whether ``dcap-qvl`` judged it too.
    """

    quote: Quote
    pck: PckExtension
    verdict: TcbVerdict
    issued: str
    next_update: str
    evaluation_number: int
    confirmed: bool

    def properties(self) -> dict[str, Any]:
        """What a policy of ``sgx`` or ``tdx`` may judge, as plain JSON values; the known ones."""
        found = {
            "quote_version": self.quote.header.version,
            "tcb_status": self.verdict.status,
            "current_tcb_status": self.verdict.current_status,
            "qe_tcb_status": self.verdict.qe_status,
            "qe_isv_svn": self.quote.qe_report.isv_svn,
            "advisories": list(self.verdict.advisories),
            "current_advisories": list(self.verdict.current_advisories),
            "tcb_date": self.verdict.tcb_date,
            "tcb_evaluation_data_number": self.evaluation_number,
            "collateral_issued": self.issued,
            "collateral_next_update": self.next_update,
            "fmspc": self.pck.fmspc.hex(),
            "ppid": self.pck.ppid.hex(),
            "platform_instance": self.pck.instance.hex(),
            "sgx_type": self.pck.sgx_type,
            "pce_svn": self.pck.pce_svn,
            "dynamic_platform": self.pck.flags.get("dynamic"),
            "cached_keys": self.pck.flags.get("cached_keys"),
            "smt": self.pck.flags.get("smt"),
            "confirmed_by": "dcap-qvl" if self.confirmed else None,
        }
        return {name: value for name, value in found.items() if value not in (None, "")}


def _refuse(
    what: str, found: object = None, expected: object = None, remedy: str | None = None
) -> NoReturn:
    raise EvidenceError(what, found=found, expected=expected, remedy=remedy)


def verify_quote(
    quote: Quote, collateral: Collateral, roots: Iterable[x509.Certificate], now: datetime
) -> VerifiedQuote:
    """Check a quote from Intel's root to the report.

    Says nothing about what is measured, and not whether the status is good enough.

    Args:
        roots: trusted roots; the evidence's chains must end in one of them, byte for byte.
        now: aware; certificates, revocation lists and collateral must be valid then.

    Raises:
        EvidenceError: saying which link does not hold.
        UnavailableError: ``dcap-qvl`` is not installed.
    """
    roots = tuple(roots)
    check_signature(_attestation_key(quote), quote.signature, quote.signed, "the quote")
    bound = hashlib.sha256(quote.attestation_key + quote.qe_auth_data).digest()
    if quote.qe_report.report_data != bound + bytes(32):
        _refuse(
            "the attestation key is not the quoting enclave's",
            quote.qe_report.report_data[:12].hex(),
            bound[:12].hex(),
        )
    chain = _platform_chain(quote, collateral, roots, now)
    check_signature(
        chain.key, quote.qe_report_signature, quote.qe_report_bytes, "the quoting enclave's report"
    )

    signer = _signer("the TCB info's chain", collateral.tcb_info_issuer_chain, roots, now)
    qe_signer = signer
    if collateral.qe_identity_issuer_chain != collateral.tcb_info_issuer_chain:
        what = "the quoting enclave identity's chain"
        qe_signer = _signer(what, collateral.qe_identity_issuer_chain, roots, now)
    _check_revocation(collateral, chain, (signer, qe_signer), roots, now)
    what, text = "the TCB info", collateral.tcb_info
    check_signature(signer.key, bytes.fromhex(collateral.tcb_info_signature), text.encode(), what)
    info = TcbInfo.read(text, what)
    info.check_dates(now, what)
    what, text = "the quoting enclave's identity", collateral.qe_identity
    check_signature(
        qe_signer.key, bytes.fromhex(collateral.qe_identity_signature), text.encode(), what
    )
    identity = QeIdentity.read(text, what)
    identity.check_dates(now, what)
    check_quoting_enclave(quote.qe_report, identity)

    pck = parse_pck_extension(chain.leaf)
    verdict = judge_tcb(quote, pck, info, identity)
    confirmed = _second_opinion(quote, collateral, chain.root, now, pck, verdict)
    return VerifiedQuote(
        quote=quote,
        pck=pck,
        verdict=verdict,
        issued=min(info.issue_date, identity.issue_date),
        next_update=min(info.next_update, identity.next_update),
        evaluation_number=min(info.number, identity.number),
        confirmed=confirmed,
    )


def _platform_chain(
    quote: Quote, collateral: Collateral, roots: tuple[x509.Certificate, ...], now: datetime
) -> Chain:
    given = collateral.pck_certificate_chain
    if quote.certification_type == _CHAIN_OF_PEM:
        text = _ascii(quote.certification_data)
        if given is not None:
            _refuse(
                "the collateral holds a second chain of the platform",
                "pck_certificate_chain",
                "none: the quote has its own",
            )
    elif given is None:
        _refuse(
            "the quote does not hold the platform's certificate",
            f"certification data of type {quote.certification_type}",
            "type 5, or pck_certificate_chain in the collateral",
            "fetch the PCK certificate with the collateral",
        )
    else:
        text = given
    certificates = parse_chain(text, "the platform's chain")
    return check_pck_chain(certificates, roots, now)


def _ascii(data: bytes) -> str:
    try:
        return data.decode("ascii")
    except UnicodeDecodeError:
        _refuse("the platform's chain is not text", f"{len(data)} bytes", "PEM certificates")


def _signer(what: str, text: str, roots: tuple[x509.Certificate, ...], now: datetime) -> Chain:
    return check_signer_chain(parse_chain(text, what), what, roots, now)


def _check_revocation(
    collateral: Collateral,
    chain: Chain,
    signers: Iterable[Chain],
    roots: tuple[x509.Certificate, ...],
    now: datetime,
) -> None:
    leaf, ca, root = chain.certificates
    issuers = parse_chain(collateral.pck_crl_issuer_chain, "the revocation list's chain")
    if issuers != (ca, root):
        check_ca_chain(issuers, chain, roots, now)
    below_root = [root, ca, issuers[0], *(signer.leaf for signer in signers)]
    check_crl(bytes.fromhex(collateral.root_ca_crl), root, below_root, now)
    check_crl(bytes.fromhex(collateral.pck_crl), ca, [leaf], now)


def _attestation_key(quote: Quote) -> ec.EllipticCurvePublicKey:
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(
            ec.SECP256R1(), b"\x04" + quote.attestation_key
        )
    except ValueError:
        _refuse("the attestation key is not a point of P-256", quote.attestation_key[:12].hex())


def _second_opinion(
    quote: Quote,
    collateral: Collateral,
    root: x509.Certificate,
    now: datetime,
    pck: PckExtension,
    verdict: TcbVerdict,
) -> bool:
    """Whether ``dcap-qvl`` judged the quote too; raises unless it came to the same."""
    try:
        import dcap_qvl  # noqa: PLC0415 - optional
    except ImportError:
        raise UnavailableError(
            "SGX and TDX evidence cannot be verified here",
            found="the package dcap-qvl is not installed",
            remedy="install it with `pip install dcap-qvl`",
        ) from None
    if quote.header.tee == "sgx" and quote.header.version > 3:
        return False
    seconds = int(now.timestamp())
    try:
        theirs = json.loads(
            dcap_qvl.QuoteVerifier(root.public_bytes(Encoding.DER))
            .verify_with_policy(
                quote.raw,
                dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral.to_fields())),
                seconds,
                dcap_qvl.QuotePolicy.claims_only(seconds),
            )
            .to_json()
        )
    except ValueError as error:
        reason = str(error).removeprefix("Verification failed: ").splitlines()[0]
        if reason in _MATTERS_OF_POLICY:
            return False
        _refuse("the quote is refused by dcap-qvl, the second opinion", reason[:200], "acceptance")
    ours = {
        "status": verdict.status,
        "advisories": list(verdict.advisories),
        "fmspc": pck.fmspc.hex(),
        "pce_svn": pck.pce_svn,
        "ppid": pck.ppid.hex(),
        **_report_fields(quote.report),
    }
    try:
        found = {
            "status": theirs["tcb"]["status"],
            "advisories": sorted(set(theirs["tcb"]["advisory_ids"])),
            "fmspc": bytes(theirs["platform"]["pck"]["fmspc"]).hex(),
            "pce_svn": theirs["platform"]["pck"]["pce_svn"],
            "ppid": bytes(theirs["platform"]["pck"]["ppid"]).hex(),
            **_their_report(theirs["report"]),
        }
    except (KeyError, TypeError, ValueError):
        _refuse("dcap-qvl answered in an unknown form", "other fields", "those of version 0.7")
    if wrong := sorted(name for name in ours if ours[name] != found.get(name)):
        _refuse(
            "two implementations do not agree on what the quote says",
            f"{wrong[0]}: {found.get(wrong[0])}",
            f"{ours[wrong[0]]}",
        )
    return True


def _report_fields(report: EnclaveReport | TdReport) -> dict[str, object]:
    """The report's fields as ``dcap-qvl`` names and writes them."""
    if isinstance(report, TdReport):
        shown = {f.name: getattr(report, f.name) for f in fields(report)}
        return {name.replace("rtmr", "rt_mr"): value.hex() for name, value in shown.items()}
    attributes = report.attributes.to_bytes(8, "little") + report.xfrm.to_bytes(8, "little")
    return {
        "cpu_svn": report.cpu_svn.hex(),
        "misc_select": report.misc_select,
        "attributes": attributes.hex(),
        "mr_enclave": report.mr_enclave.hex(),
        "mr_signer": report.mr_signer.hex(),
        "isv_prod_id": report.isv_prod_id,
        "isv_svn": report.isv_svn,
        "report_data": report.report_data.hex(),
    }


def _their_report(report: dict[str, Any]) -> dict[str, Any]:
    ((kind, shown),) = report.items()
    shown = dict(shown)
    if kind == "TD15":
        shown |= shown.pop("base")
    elif kind == "TD10":
        shown |= {"tee_tcb_svn2": "", "mr_service_td": ""}
    elif kind != "SgxEnclave":
        raise ValueError(kind)
    return shown
