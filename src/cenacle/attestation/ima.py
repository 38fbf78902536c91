"""IMA evidence: a TPM quote, and the kernel's list of every file that it ran or read as root.

What it proves: the quoted registers, as ``tpm`` evidence does, and that every file the kernel
measured until the quote had content that an allow-list allows. What it does not: that the
kernel was told to measure at all. That stands on the kernel's command line (PCR 9 or 8), so a
contract that lists the allow-list must list that register too; the required files of the
allow-list are a second line of defence.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from cenacle.attestation.boot_claims import authenticate_log, boot_properties
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.event_log import parse_event_log
from cenacle.attestation.ima_allow import AllowList, Appraisal
from cenacle.attestation.ima_list import (
    IMA_REGISTER,
    MAX_LIST_BYTES,
    ImaEntry,
    boot_aggregates,
    match_prefix,
    pack_entry,
    parse_ima_list,
)
from cenacle.attestation.registry import Shown
from cenacle.attestation.tpm import TpmPolicy, TpmVerifier, judge_tpm
from cenacle.attestation.tpm_attester import BOOT_REGISTERS, TpmAttester
from cenacle.crypto import VerifyKey
from cenacle.documents.base import Digest, b64, short, unb64
from cenacle.documents.clauses import Clause, check
from cenacle.errors import CenacleError, EvidenceError, UnavailableError

__all__ = [
    "ALLOW_LIST",
    "ImaAttester",
    "ImaMonitor",
    "ImaPolicy",
    "ImaVerifier",
    "judge_ima",
    "pack_list",
    "since",
    "unpack_list",
]

ALLOW_LIST: Final = "allow-list"
_SECURITYFS: Final = Path("/sys/kernel/security")
_LIST: Final = _SECURITYFS / "ima/binary_runtime_measurements"
_LOG: Final = _SECURITYFS / "tpm0/binary_bios_measurements"
_FIELDS: Final = frozenset({"quote", "list", "first", "log", ALLOW_LIST, "statement"})


@dataclass(frozen=True, slots=True)
class _Position:
    """Up to where one boot of one machine was judged.

    Attributes:
        fixed: what may not change within a boot: registers, keys, counters.
        register: PCR 10 after the judged entries.
        appraisal: what they showed; ``None`` before the first.
    """

    fixed: Mapping[str, Any] = field(default_factory=dict)
    register: bytes | None = None
    appraisal: Appraisal | None = None

    @property
    def entries(self) -> int:
        return 0 if self.appraisal is None else self.appraisal.entries


class ImaVerifier(TpmVerifier):
    """Checks quotes and IMA lists.

    Measurements are the quoted registers but PCR 10, ``ek``, and ``allow-list``: the digest of
    the list under which every entry passed. Evidence names that list; one that the contract
    does not list is then refused like any other wrong measurement, so an attester gains nothing
    by naming a laxer one.

    Args:
        allow_lists: those that evidence may be judged under.

    The other arguments, and what evidence of a software TPM is worth, are as for
    :class:`~cenacle.attestation.tpm.TpmVerifier`.
    """

    kind = "ima"

    def __init__(
        self,
        issuers: Sequence[VerifyKey],
        roots: Sequence[x509.Certificate] | None = None,
        software_roots: Sequence[x509.Certificate] = (),
        *,
        allow_lists: Iterable[AllowList],
    ) -> None:
        super().__init__(issuers, roots, software_roots)
        self.allow_lists = {listed.digest: listed for listed in allow_lists}

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        return self.judge_from(evidence, now, _Position())[0]

    def judge_from(
        self, evidence: Evidence, now: datetime, position: _Position
    ) -> tuple[Shown, _Position]:
        """:meth:`inspect`, for evidence that continues at ``position``."""
        body = evidence.body
        if unknown := sorted(set(body) - _FIELDS):
            raise EvidenceError(
                "IMA evidence has unknown fields",
                found=", ".join(unknown)[:80],
                expected=", ".join(sorted(_FIELDS)),
            )
        quoted = Evidence(kind=evidence.kind, body={"quote": body.get("quote")})
        shown = super().inspect(quoted, now)
        bank, registers = _registers(shown.claims)
        _check_same_boot(position, _fixed(shown.claims))
        if body.get("first", 0) != position.entries:
            raise EvidenceError(
                "IMA evidence continues at another entry than was judged last",
                found=repr(body.get("first", 0))[:40],
                expected=position.entries,
                remedy="send the entries since the last evidence that was accepted",
            )
        entries = unpack_list(body.get("list"))
        entries = entries[: match_prefix(entries, registers[IMA_REGISTER], bank, position.register)]
        allowed = self._allow_list(body.get(ALLOW_LIST))
        appraisal = allowed.appraise(entries, boot_aggregates(registers, bank), position.appraisal)
        claims = shown.claims.model_copy(
            update={
                "measurements": {
                    **_without_list_register(shown.claims.measurements),
                    ALLOW_LIST: allowed.digest,
                },
                "properties": {
                    **shown.claims.properties,
                    "ima_entries": appraisal.entries,
                    "ima_violations": sorted(set(appraisal.violations)),
                    "ima_replaced": sorted(appraisal.replaced),
                    **_boot(body.get("log"), bank, registers),
                },
            }
        )
        reached = _Position(_fixed(shown.claims), registers[IMA_REGISTER], appraisal)
        return Shown(claims, shown.bound), reached

    def _allow_list(self, name: Any) -> AllowList:
        found = self.allow_lists.get(name) if isinstance(name, str) else None
        if found is None:
            raise EvidenceError(
                "IMA evidence names an allow-list that the verifier does not have",
                found=repr(name)[:80],
                expected=" or ".join(map(short, self.allow_lists)) or "none is registered",
                remedy="give the verifier the allow-list whose digest the contract lists",
            )
        return found


class ImaMonitor:
    """Follows one machine while a job runs: each fresh quote brings only what was measured since.

    The first evidence is judged whole. A restart of the machine, another register, an entry
    that the allow-list does not allow: each is drift, raised as :class:`EvidenceError` that
    names it, and the position stays where it was.
    """

    def __init__(self, verifier: ImaVerifier) -> None:
        self._verifier = verifier
        self._position = _Position()

    @property
    def entries(self) -> int:
        """How many entries were judged: where the attester has to continue."""
        return self._position.entries

    def follow(self, evidence: Evidence, report_data: bytes, now: datetime) -> Claims:
        """Authenticate evidence that continues at :attr:`entries`; then move there.

        Args:
            report_data: 64 bytes from a fresh nonce.

        Raises:
            EvidenceError: naming what drifted.
        """
        step = _Step(self._verifier, self._position)
        claims = step.authenticate(evidence, report_data, now)
        self._position = step.reached
        return claims


class _Step(ImaVerifier):
    """A verifier for one evidence that continues at a position."""

    def __init__(self, verifier: ImaVerifier, position: _Position) -> None:
        super().__init__(
            verifier.issuers,
            verifier.roots,
            verifier.software_roots,
            allow_lists=verifier.allow_lists.values(),
        )
        self.position = position
        self.reached = position

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        shown, self.reached = self.judge_from(evidence, now, self.position)
        return shown


class ImaAttester(TpmAttester):
    """Quotes PCRs 0 to 10 and sends what IMA measured, read after the quote.

    Args:
        allow_list: digest of the list that the contract names.
        first: how many entries the verifier has judged already (:attr:`ImaMonitor.entries`).
        measurements: IMA's binary list.
        log: the boot event log; left out where there is none.

    The other arguments are those of :class:`~cenacle.attestation.tpm_attester.TpmAttester`.
    """

    kind = "ima"

    def __init__(
        self,
        tcti: str,
        registers: Sequence[int] = (*BOOT_REGISTERS, IMA_REGISTER),
        *,
        allow_list: Digest,
        first: int = 0,
        measurements: Path = _LIST,
        log: Path | None = _LOG,
        **named: Any,
    ) -> None:
        super().__init__(tcti, (*registers, *BOOT_REGISTERS, IMA_REGISTER), **named)
        self.allow_list = allow_list
        self.first = first
        self._measurements = measurements
        self._log = log

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        body = super().collect(bound, now)
        entries = parse_ima_list(_read(self._measurements))
        body |= {"list": pack_list(entries[self.first :]), ALLOW_LIST: self.allow_list}
        if self.first:
            body["first"] = self.first
        if self._log is not None and self._log.exists():
            body["log"] = b64(_read(self._log))
        return body


class ImaPolicy(TpmPolicy):
    """What a contract demands beside registers and allow-list.

    Attributes:
        violations: whether files may have been written while they were being measured. Which
            files, is the sender's word: a violation extends ones, whatever its name.
        replaced: whether a file may have been measured with two contents, both allowed.
        secure_boot: demand it on or off, proven by the boot event log; absent: either.
    """

    violations: bool = False
    replaced: bool = False
    secure_boot: bool | None = None


def judge_ima(claims: Claims, policy: ImaPolicy) -> list[Clause]:
    """The policy's clauses: those of the TPM, then violations, replaced files, Secure Boot."""
    found = claims.properties
    known = "ima_violations" in found and "ima_replaced" in found
    violations = list(found.get("ima_violations", ()))
    replaced = list(found.get("ima_replaced", ()))
    clauses = [
        *judge_tpm(claims, policy),
        check(
            "contract",
            "IMA violations",
            known and (policy.violations or not violations),
            _names(violations) if known else "not in the evidence",
            "allowed" if policy.violations else "none",
            "stop what writes to files while they are read or run as root, then restart",
        ),
        check(
            "contract",
            "IMA replaced files",
            known and (policy.replaced or not replaced),
            _names(replaced) if known else "not in the evidence",
            "allowed" if policy.replaced else "none",
            "restart the machine, so that only one version of each file ran since its boot",
        ),
    ]
    if policy.secure_boot is not None:
        state = found.get("boot", {}).get("secure_boot")
        clauses.append(
            check(
                "contract",
                "Secure Boot",
                state is policy.secure_boot,
                {True: "on", False: "off"}.get(state, "not proven by a boot event log"),
                "on" if policy.secure_boot else "off",
                "set Secure Boot in the firmware, and send the boot event log",
            )
        )
    return clauses


def pack_list(entries: Iterable[ImaEntry]) -> str:
    """Entries as they stand in evidence: the binary list, compressed (zlib), in base64."""
    return b64(zlib.compress(b"".join(map(pack_entry, entries)), 6))


def since(evidence: Evidence, entries: int) -> Evidence:
    """The same evidence, without as many entries at the start of its list, which were judged.

    What the quote signs is the end of the list, so that leaving out its start changes no binding.
    """
    if evidence.kind != ImaAttester.kind or not entries or "first" in evidence.body:
        return evidence
    rest = unpack_list(evidence.body.get("list"))[entries:]
    body = {**evidence.body, "list": pack_list(rest), "first": entries}
    return Evidence(kind=evidence.kind, body=body)


def unpack_list(packed: Any) -> list[ImaEntry]:
    """The inverse of :func:`pack_list`, for hostile input.

    Raises:
        EvidenceError: it is malformed, or more than :data:`MAX_LIST_BYTES` unpacked.
    """
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(unb64(packed), MAX_LIST_BYTES + 1)
        whole = unpacker.eof and not unpacker.unused_data
    except (CenacleError, zlib.error, TypeError, AttributeError):
        raise EvidenceError(
            "the IMA list does not unpack", expected="a binary list, zlib, base64"
        ) from None
    if len(raw) > MAX_LIST_BYTES or not whole:
        raise EvidenceError(
            "the IMA list is too large or cut off",
            found=f"{len(raw)} bytes unpacked",
            expected=f"<= {MAX_LIST_BYTES} bytes, whole",
        )
    return parse_ima_list(raw)


def _registers(claims: Claims) -> tuple[str, dict[int, bytes]]:
    """Bank and registers of an authenticated quote; 0 to 10 must be there."""
    registers: dict[int, bytes] = {}
    banks = set()
    for name, value in claims.measurements.items():
        if name.startswith("pcr"):
            bank, _, digits = value.partition(":")
            registers[int(name.removeprefix("pcr"))] = bytes.fromhex(digits)
            banks.add(bank)
    if missing := [n for n in (*BOOT_REGISTERS, IMA_REGISTER) if n not in registers]:
        raise EvidenceError(
            "the quote of IMA evidence lacks registers",
            found=f"without {', '.join(map(str, missing))}",
            expected="0 to 10",
        )
    return banks.pop(), registers


def _without_list_register(measurements: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in measurements.items() if name != f"pcr{IMA_REGISTER}"}


def _fixed(claims: Claims) -> dict[str, Any]:
    names = ("key_name", "reset_count", "restart_count", "firmware")
    return {
        **_without_list_register(claims.measurements),
        **{name: claims.properties.get(name) for name in names},
    }


def _check_same_boot(position: _Position, shown: Mapping[str, Any]) -> None:
    if position.appraisal is None:
        return
    counters = [n for n in ("reset_count", "restart_count") if shown[n] != position.fixed[n]]
    if counters:
        raise EvidenceError(
            "the machine was restarted since its last evidence",
            found=", ".join(f"{name} {shown[name]}" for name in counters),
            expected=", ".join(f"{name} {position.fixed[name]}" for name in counters),
            remedy="start the job again, with evidence of this boot",
        )
    changed = [
        n for n in sorted({*position.fixed, *shown}) if shown.get(n) != position.fixed.get(n)
    ]
    if changed:
        raise EvidenceError(
            f"the machine changed since its last evidence ({', '.join(changed)})",
            found=", ".join(str(shown.get(name))[:24] for name in changed),
            expected=", ".join(str(position.fixed.get(name))[:24] for name in changed),
            remedy="start the job again, with evidence of this boot",
        )


def _boot(log: Any, bank: str, registers: Mapping[int, bytes]) -> dict[str, Any]:
    if log is None:
        return {}
    try:
        raw = unb64(log)
    except (CenacleError, TypeError, AttributeError):
        raise EvidenceError("the boot event log does not decode", expected="base64") from None
    genuine = authenticate_log(parse_event_log(raw), bank, registers)
    return {"boot": boot_properties(genuine, bank)}


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20]) or "none"
    return shown if len(names) <= 20 else f"{shown} and {len(names) - 20} more"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnavailableError(
            "the kernel's measurements cannot be read",
            found=f"{error.strerror}: {path}",
            remedy="mount securityfs, and let the agent read it",
        ) from None
