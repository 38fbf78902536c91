"""What Intel says about platforms: TCB info, the quoting enclave's identity, and a verdict.

Formats: Intel PCS API version 4, *TCB Info V3* and *Enclave Identity V2*. The verdict follows
*Intel SGX ECDSA Quote Verification Library*, section 4.1.2.5 (the algorithm of its source):
TCB levels from the highest, the first that the platform reaches counts, then the levels of the
TDX module and of the quoting enclave are merged in.

Everything here has been signed by Intel; :mod:`cenacle.attestation.dcap` checks that first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cenacle.attestation.dcap_chain import PckExtension
from cenacle.attestation.dcap_quote import EnclaveReport, Quote, TdReport
from cenacle.documents.base import parse_time
from cenacle.errors import DocumentError, EvidenceError

__all__ = ["QeIdentity", "TcbInfo", "TcbStatus", "TcbVerdict", "check_quoting_enclave", "judge_tcb"]

TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "Revoked",
]
"""Statuses by Intel's names; the two of relaunch are a verdict about a TD 1.5, never a level's."""

_Level = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "Revoked",
]
Svn = Annotated[int, Field(ge=0, le=255)]
Svn16 = Annotated[int, Field(ge=0, le=0xFFFF)]


def _hex(size: int) -> Any:
    return StringConstraints(pattern=rf"^[0-9A-Fa-f]{{{2 * size}}}$")


class _Signed(BaseModel):
    """Part of what Intel signs. Intel adds fields without a new version, so others may be there."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, populate_by_name=False)

    @classmethod
    def read(cls, text: str, what: str) -> Self:
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise EvidenceError(
                f"{what} is not what Intel publishes",
                found=f"{'.'.join(str(p) for p in first['loc'])}: {first['msg']}",
                expected="PCS API version 4",
            ) from None


class _Component(_Signed):
    svn: Svn


Components = Annotated[tuple[_Component, ...], Field(min_length=16, max_length=16)]


class _Tcb(_Signed):
    sgx: Components = Field(alias="sgxtcbcomponents")
    tdx: Components | None = Field(None, alias="tdxtcbcomponents")
    pce_svn: Svn16 = Field(alias="pcesvn")

    @property
    def order(self) -> tuple[bytes, int, bytes]:
        """Levels are looked at from the highest (``TcbLevel`` comparison of Intel's library)."""
        return _svns(self.sgx), self.pce_svn, _svns(self.tdx or ())


class _TcbLevel(_Signed):
    tcb: _Tcb
    date: str = Field(alias="tcbDate")
    status: _Level = Field(alias="tcbStatus")
    advisories: tuple[str, ...] = Field((), alias="advisoryIDs")


class _Isv(_Signed):
    svn: Svn16 = Field(alias="isvsvn")


class _IsvLevel(_Signed):
    tcb: _Isv
    date: str = Field(alias="tcbDate")
    status: _Level = Field(alias="tcbStatus")
    advisories: tuple[str, ...] = Field((), alias="advisoryIDs")


class _Module(_Signed):
    mr_signer: Annotated[str, _hex(48)] = Field(alias="mrsigner")
    attributes: Annotated[str, _hex(8)]
    mask: Annotated[str, _hex(8)] = Field(alias="attributesMask")


class _ModuleIdentity(_Module):
    id: str
    levels: tuple[_IsvLevel, ...] = Field(alias="tcbLevels")


class _Dated(_Signed):
    version: int
    issue_date: str = Field(alias="issueDate")
    next_update: str = Field(alias="nextUpdate")
    number: int = Field(alias="tcbEvaluationDataNumber", ge=0)

    def check_dates(self, now: datetime, what: str) -> None:
        """Raises unless it has been issued and the next one is not due."""
        try:
            start, end = parse_time(self.issue_date), parse_time(self.next_update)
        except DocumentError as error:
            raise EvidenceError(f"{what} has no dates", found=error.diagnostics()) from None
        if not start <= now <= end:
            raise EvidenceError(
                f"{what} is {'expired' if now > end else 'of the future'}",
                found=f"{self.issue_date} to {self.next_update}",
                expected=f"valid at {now:%Y-%m-%dT%H:%M:%SZ}",
                remedy="fetch the collateral again, and check the clock",
            )


class TcbInfo(_Dated):
    """Security versions of a family of platforms, and what they are worth (PCS: TCB Info V3)."""

    id: Literal["SGX", "TDX"]
    version: Literal[3]
    fmspc: Annotated[str, _hex(6)]
    pce_id: Annotated[str, _hex(2)] = Field(alias="pceId")
    tcb_type: Literal[0] = Field(alias="tcbType")
    levels: tuple[_TcbLevel, ...] = Field(alias="tcbLevels", min_length=1)
    module: _Module | None = Field(None, alias="tdxModule")
    modules: tuple[_ModuleIdentity, ...] = Field((), alias="tdxModuleIdentities")


class QeIdentity(_Dated):
    """Which quoting enclaves Intel vouches for (PCS: Enclave Identity V2)."""

    id: Literal["QE", "TD_QE"]
    version: Literal[2]
    misc_select: Annotated[str, _hex(4)] = Field(alias="miscselect")
    misc_mask: Annotated[str, _hex(4)] = Field(alias="miscselectMask")
    attributes: Annotated[str, _hex(16)]
    attributes_mask: Annotated[str, _hex(16)] = Field(alias="attributesMask")
    mr_signer: Annotated[str, _hex(32)] = Field(alias="mrsigner")
    prod_id: Svn16 = Field(alias="isvprodid")
    levels: tuple[_IsvLevel, ...] = Field(alias="tcbLevels", min_length=1)


@dataclass(frozen=True, slots=True)
class TcbVerdict:
    """What Intel's collateral says of the platform behind a quote.

    Attributes:
        status: of the whole: platform, TDX module and quoting enclave (of a TD 1.5: with the
            module that launched it).
        advisories: Intel advisories (``INTEL-SA-...``) that apply, sorted.
        tcb_date: date of the oldest level that counts; advisories published after it may apply.
        current_status: of a TD 1.5 with the module that runs now; else as ``status``.
        current_advisories: likewise.
        qe_status: of the quoting enclave alone.
    """

    status: TcbStatus
    advisories: tuple[str, ...]
    tcb_date: str
    current_status: TcbStatus
    current_advisories: tuple[str, ...]
    qe_status: TcbStatus


def _refuse(
    what: str, found: object = None, expected: object = None, remedy: str | None = None
) -> NoReturn:
    raise EvidenceError(what, found=found, expected=expected, remedy=remedy)


def check_quoting_enclave(report: EnclaveReport, identity: QeIdentity) -> None:
    """The quoting enclave is one that Intel names (section 4.1.2.9).

    Raises:
        EvidenceError: it is another enclave, or a debug one.
    """
    mask, expected = bytes.fromhex(identity.attributes_mask), bytes.fromhex(identity.attributes)
    shown = report.attributes.to_bytes(8, "little") + report.xfrm.to_bytes(8, "little")
    misc_mask = int.from_bytes(bytes.fromhex(identity.misc_mask), "little")
    misc = int.from_bytes(bytes.fromhex(identity.misc_select), "little")
    if report.attributes & 2:
        _refuse("the quoting enclave is a debug enclave", f"attributes 0x{report.attributes:x}")
    for name, found, demanded in (
        ("MRSIGNER", report.mr_signer.hex(), identity.mr_signer.lower()),
        ("ISVPRODID", report.isv_prod_id, identity.prod_id),
        ("MISCSELECT", report.misc_select & misc_mask, misc & misc_mask),
        ("attributes", _masked(shown, mask).hex(), _masked(expected, mask).hex()),
    ):
        if found != demanded:
            _refuse(f"the quoting enclave is not Intel's: another {name}", found, demanded)


def judge_tcb(quote: Quote, pck: PckExtension, info: TcbInfo, identity: QeIdentity) -> TcbVerdict:
    """The status of the platform, its TDX module and its quoting enclave.

    Raises:
        EvidenceError: the collateral is about others, or no level is reached.
    """
    expected = quote.header.tee.upper()
    if info.id != expected or identity.id != ("QE" if expected == "SGX" else "TD_QE"):
        _refuse(
            "the collateral is about another kind of enclave", f"{info.id} and {identity.id}",
            f"that of {expected}",
        )  # fmt: skip
    if info.fmspc.lower() != pck.fmspc.hex() or info.pce_id.lower() != pck.pce_id.hex():
        _refuse(
            "the TCB info is about another kind of platform",
            f"FMSPC {info.fmspc}, PCE {info.pce_id}",
            f"FMSPC {pck.fmspc.hex().upper()}, PCE {pck.pce_id.hex()}",
            "fetch the TCB info for the FMSPC of this quote",
        )
    qe = _isv_level(identity.levels, quote.qe_report.isv_svn, "the quoting enclave")
    if isinstance(quote.report, EnclaveReport):
        status, advisories, date = _platform(pck, None, info, qe)
        return TcbVerdict(status, advisories, date, status, advisories, qe.status)
    launched, svn2 = quote.report.tee_tcb_svn, quote.report.tee_tcb_svn2
    status, advisories, date = _with_module(quote.report, launched, pck, info, qe)
    if not svn2:
        return TcbVerdict(status, advisories, date, status, advisories, qe.status)
    current, more, _ = _with_module(quote.report, svn2, pck, info, qe)
    return TcbVerdict(_relaunch(status, current), advisories, date, current, more, qe.status)


Judged = tuple[TcbStatus, tuple[str, ...], str]


def _with_module(
    report: TdReport, svn: bytes, pck: PckExtension, info: TcbInfo, qe: _IsvLevel
) -> Judged:
    """Of a TDX module with security versions ``svn``: byte 0 minor, byte 1 major version."""
    module: _Module | None = info.module
    parts = [qe]
    if svn[1]:
        wanted = f"TDX_{svn[1]:02X}"
        found = [m for m in info.modules if m.id.upper() == wanted]
        if len(found) != 1:
            _refuse(
                "Intel's TCB info does not know the TDX module's version",
                wanted,
                " or ".join(m.id for m in info.modules) or "no version at all",
            )
        module = found[0]
        parts.append(_isv_level(found[0].levels, svn[0], f"TDX module {wanted}"))
    if module is None:
        _refuse("the TCB info says nothing about TDX modules", "no tdxModule")
    if report.mr_signer_seam.hex() != module.mr_signer.lower():
        _refuse(
            "the TDX module is not Intel's", report.mr_signer_seam.hex()[:24], module.mr_signer[:24]
        )
    mask = bytes.fromhex(module.mask)
    attributes = bytes.fromhex(module.attributes)
    seam = report.seam_attributes
    if _masked(seam, mask) != _masked(attributes, mask) or any(seam):
        _refuse(
            "the TDX module runs with attributes that Intel does not vouch for",
            seam.hex(),
            module.attributes.lower(),
        )
    return _platform(pck, svn, info, *parts)


def _platform(pck: PckExtension, svn: bytes | None, info: TcbInfo, *parts: _IsvLevel) -> Judged:
    first = 0 if svn is None or svn[1] == 0 else 2  # a module with a version has its own levels
    for level in sorted(info.levels, key=lambda level: level.tcb.order, reverse=True):
        if svn is not None and level.tcb.tdx is None:
            _refuse("a TCB level of Intel's says nothing about TDX", level.date)
        if (
            _reaches(pck.components, _svns(level.tcb.sgx))
            and pck.pce_svn >= level.tcb.pce_svn
            and (svn is None or _reaches(svn[first:], _svns(level.tcb.tdx or ())[first:]))
        ):
            status = _merge(level.status, [part.status for part in parts])
            if status == "Revoked":
                _refuse("the platform's TCB level is revoked", level.status, "not Revoked")
            advisories = _union(level.advisories, *(part.advisories for part in parts))
            return status, advisories, min([level.date, *(part.date for part in parts)])
    _refuse(
        "no TCB level of Intel's matches this platform",
        f"SVNs {pck.components.hex()}, PCE {pck.pce_svn}"
        + ("" if svn is None else f", TDX {svn.hex()}"),
        "security versions at least of the lowest level",
        "update the platform's firmware",
    )


def _isv_level(levels: Iterable[_IsvLevel], svn: int, what: str) -> _IsvLevel:
    for level in sorted(levels, key=lambda level: level.tcb.svn, reverse=True):
        if svn >= level.tcb.svn:
            return level
    _refuse(f"no TCB level of Intel's matches {what}", f"ISVSVN {svn}")


def _merge(platform: TcbStatus, parts: Iterable[TcbStatus]) -> TcbStatus:
    """Section 4.1.2.5.1.6. Statuses that a part cannot have are taken as the worse ones."""
    known = set(parts)
    if platform == "Revoked" or "Revoked" in known:
        return "Revoked"
    configuration: Final = {
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDateConfigurationNeeded",
    }
    if known - {"UpToDate"}:
        needed = platform in configuration or known & configuration
        return "OutOfDateConfigurationNeeded" if needed else "OutOfDate"
    return platform


def _relaunch(launched: TcbStatus, current: TcbStatus) -> TcbStatus:
    """Section 4.1.2.5.20: an outdated module launched the domain, and was updated since."""
    if not launched.startswith("OutOfDate") or current.startswith("OutOfDate"):
        return launched
    if "Configuration" in launched + current:
        return "TDRelaunchAdvisedConfigurationNeeded"
    return "TDRelaunchAdvised"


def _svns(components: Iterable[_Component]) -> bytes:
    return bytes(component.svn for component in components)


def _reaches(shown: bytes, demanded: bytes) -> bool:
    return all(have >= want for have, want in zip(shown, demanded, strict=True))


def _masked(data: bytes, mask: bytes) -> bytes:
    return bytes(byte & keep for byte, keep in zip(data, mask, strict=True))


def _union(*groups: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({advisory for group in groups for advisory in group}))
