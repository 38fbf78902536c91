"""Evidence of kind ``tdx``: a quote of an Intel TDX trust domain, its collateral and event log.

Body: ``quote`` (base64), ``collateral`` (:class:`~cenacle.attestation.dcap_collateral.Collateral`),
``event_log`` (base64 of the CC event log; optional) and the agent's ``statement``. The quote's
64 bytes of report data bind it.

Measurements are MRTD (the initial memory: firmware), RTMR 0 to 3 (what was measured since, zeros
before anything was), and those of MRCONFIGID, MROWNER, MROWNERCONFIG and MRSERVICETD that the host
set, which are not shown when they are zero. Domains that the host may debug or profile are refused.

An event log that is there must replay to all four RTMRs exactly. Then a policy may judge RTMRs
by their events instead of their values (:func:`tdx_identity`).
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cryptography import x509
from pydantic import Field, StringConstraints

from cenacle.attestation.cc_event_log import EventRules, compact_log, events_of, judge_events
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.configfs_tsm import TsmReporter
from cenacle.attestation.dcap import verify_quote
from cenacle.attestation.dcap_body import attested_body, quote_of, raw_body, read_body
from cenacle.attestation.dcap_policy import DcapPolicy, judge_dcap
from cenacle.attestation.dcap_quote import TdReport
from cenacle.attestation.intel_roots import intel_roots
from cenacle.attestation.registry import Attester, Shown, Verifier
from cenacle.documents.base import b64, unb64
from cenacle.documents.clauses import Clause, check
from cenacle.errors import EvidenceError, UnavailableError

__all__ = ["CCEL_TABLE", "TdxAttester", "TdxPolicy", "TdxVerifier", "judge_tdx", "tdx_identity"]

CCEL_TABLE: Final = Path("/sys/firmware/acpi/tables/data/CCEL")

# Intel TDX Module ABI specification, TD_ATTRIBUTES. Any of bits 0 to 7 (TUD, "TD under debug")
# makes a domain untrusted.
_FLAGS: Final = {
    0: "DEBUG",
    4: "HGS_PLUS_PROF",
    5: "PERF_PROF",
    6: "PMT_PROF",
    16: "ICSSD",
    17: "SERVTD_EXT",
    27: "LASS",
    28: "SEPT_VE_DISABLE",
    29: "MIGRATABLE",
    30: "PKS",
    31: "KL",
    62: "TPA",
    63: "PERFMON",
}
_UNDER_DEBUG: Final = range(8)

Hex16 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
Hex96 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]
Flag = Literal[
    "ICSSD",
    "SERVTD_EXT",
    "LASS",
    "SEPT_VE_DISABLE",
    "MIGRATABLE",
    "PKS",
    "KL",
    "TPA",
    "PERFMON",
]


class TdxAttester(Attester):
    """Makes quotes inside a TDX guest through configfs-tsm.

    Args:
        collateral: the file with Intel's collateral for this machine, fetched before.
        reporter: the kernel's reports; a test may give others.
        event_log: the CC event log; sent where it exists. ``None`` for a guest that extends
            RTMRs after boot, whose log the firmware's table no longer is.
    """

    kind = "tdx"

    def __init__(
        self,
        collateral: Path,
        reporter: TsmReporter | None = None,
        event_log: Path | None = CCEL_TABLE,
    ) -> None:
        self._collateral = collateral
        self._reporter = TsmReporter() if reporter is None else reporter
        self._event_log = event_log

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        del now  # a quote has no time
        report = self._reporter.report(bound, provider="tdx_guest")
        body = attested_body(report.outblob, "tdx", bound, self._collateral)
        if self._event_log is None or not self._event_log.exists():
            return body
        try:
            body["event_log"] = b64(compact_log(self._event_log.read_bytes()))
        except (OSError, EvidenceError) as error:
            found = error.diagnostics() if isinstance(error, EvidenceError) else error.strerror
            raise UnavailableError("the CC event log cannot be read", found=found) from None
        return body


class TdxVerifier(Verifier):
    """Checks a quote of a TDX trust domain, offline.

    Args:
        roots: trusted roots; Intel's unless a test gives others.
    """

    kind = "tdx"

    def __init__(self, roots: Iterable[x509.Certificate] | None = None) -> None:
        self._roots = intel_roots() if roots is None else tuple(roots)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        body = read_body(evidence, self.kind)
        quote = quote_of(body, "tdx")
        report = quote.report
        assert isinstance(report, TdReport)
        _check_debug(report)
        verified = verify_quote(quote, body.collateral, self._roots, now)
        properties = {
            **verified.properties(),
            "td_report": report.version,
            "td_attributes": _flags(report.td_attributes),
            "xfam": report.xfam[::-1].hex(),
            "tee_tcb_svn": report.tee_tcb_svn.hex(),
            "mr_seam": report.mr_seam.hex(),
            "mr_signer_seam": report.mr_signer_seam.hex(),
        }
        if report.tee_tcb_svn2:
            properties["tee_tcb_svn2"] = report.tee_tcb_svn2.hex()
        if body.event_log is not None:
            properties |= events_of(unb64(body.event_log), _rtmrs(report))
        claims = Claims(
            kind=self.kind,
            protection=self.protection,
            measurements=_measurements(report),
            properties=properties,
            layers=(),
            issued=now,
        )
        return Shown(claims, report.report_data)

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        return raw_body(cls.kind, raw, collateral)


def _rtmrs(report: TdReport) -> tuple[bytes, bytes, bytes, bytes]:
    return report.rtmr0, report.rtmr1, report.rtmr2, report.rtmr3


def _flags(attributes: bytes) -> list[str]:
    number = int.from_bytes(attributes, "little")
    return [_FLAGS.get(bit, f"bit {bit}") for bit in range(64) if number >> bit & 1]


def _check_debug(report: TdReport) -> None:
    number = int.from_bytes(report.td_attributes, "little")
    if wrong := [_FLAGS.get(bit, f"bit {bit}") for bit in _UNDER_DEBUG if number >> bit & 1]:
        raise EvidenceError(
            "the trust domain runs under debug, so the host can read or profile it",
            found=", ".join(wrong),
            expected="TD attributes without any of bits 0 to 7",
            remedy="launch the trust domain without debugging and profiling",
        )


def _measurements(report: TdReport) -> dict[str, str]:
    chosen = {
        "mrconfigid": report.mr_config_id,
        "mrowner": report.mr_owner,
        "mrownerconfig": report.mr_owner_config,
        "mrservicetd": report.mr_service_td,
    }
    return {
        "mrtd": "sha384:" + report.mr_td.hex(),
        **{f"rtmr{i}": "sha384:" + value.hex() for i, value in enumerate(_rtmrs(report))},
        **{name: "hex:" + value.hex() for name, value in chosen.items() if any(value)},
    }


class TdxPolicy(DcapPolicy):
    """Demands on a trust domain beside its measurements.

    Attributes:
        td_attributes: attributes that the domain may have; none but these. ``MIGRATABLE`` means
            that a service domain may move it to a platform that the evidence does not know.
        required_td_attributes: attributes that it must have. Without ``SEPT_VE_DISABLE`` the host
            may inject exceptions into Linux by taking pages away; domains that run under a
            paravisor (Azure) handle that themselves.
        xfam: accepted sets of processor extended features (16 hexadecimal digits); any by default.
        mr_seam: accepted measurements of the TDX module (96 hexadecimal digits); by default any
            that Intel signed and whose TCB status is accepted.
        secure_boot: whether the event log must prove that Secure Boot was on.
        events: which events of the log may have been measured, instead of exact RTMR values.
    """

    td_attributes: tuple[Flag, ...] = ("SEPT_VE_DISABLE", "LASS", "PKS", "KL", "TPA", "PERFMON")
    required_td_attributes: tuple[Flag, ...] = ("SEPT_VE_DISABLE",)
    xfam: Annotated[tuple[Hex16, ...], Field(min_length=1)] | None = None
    mr_seam: Annotated[tuple[Hex96, ...], Field(min_length=1)] | None = None
    secure_boot: bool = False
    events: EventRules | None = None


def tdx_identity(claims: Claims, policy: TdxPolicy) -> Claims:
    """The claims without the RTMRs that the policy judges by their events.

    Their values are kept among the properties.
    """
    if policy.events is None or "events" not in claims.properties:
        return claims
    moved = {f"rtmr{register}" for register in policy.events.registers}
    aside = {name: value for name, value in claims.measurements.items() if name in moved}
    return claims.model_copy(
        update={
            "measurements": {n: v for n, v in claims.measurements.items() if n not in aside},
            "properties": {**claims.properties, **aside},
        }
    )


def judge_tdx(claims: Claims, policy: TdxPolicy) -> list[Clause]:
    """One clause for each demand of the policy."""
    shown = claims.properties
    clauses = judge_dcap(claims, policy)
    attributes = shown.get("td_attributes", ["not shown"])
    more = [flag for flag in attributes if flag not in policy.td_attributes]
    missing = [flag for flag in policy.required_td_attributes if flag not in attributes]
    clauses += [
        check(
            "contract",
            "tdx TD attributes",
            not more,
            " ".join(more or attributes) or "none",
            " ".join(policy.td_attributes) or "none",
            "launch the trust domain without them, or accept them in enclave.policy.tdx",
        ),
        check(
            "contract",
            "tdx required TD attributes",
            not missing,
            f"without {' '.join(missing)}" if missing else " ".join(attributes) or "none",
            " ".join(policy.required_td_attributes) or "none",
            "launch the trust domain with them, or do without in enclave.policy.tdx",
        ),
    ]
    for field, name, accepted in (
        ("xfam", "tdx XFAM", policy.xfam),
        ("mr_seam", "tdx MRSEAM", policy.mr_seam),
    ):
        if accepted is not None:
            value = shown.get(field, "not shown")
            clauses.append(
                check("contract", name, value in accepted, value, " or ".join(accepted),
                      "use a host that the contract accepts")
            )  # fmt: skip
    if policy.secure_boot:
        state = shown.get("secure_boot")
        clauses.append(
            check("contract", "tdx Secure Boot", state is True, state, True,
                  "turn Secure Boot on, and send the event log with the quote")
        )  # fmt: skip
    if policy.events is not None:
        clauses += judge_events(shown.get("events"), policy.events)
    return clauses
