"""What a contract may demand of an Intel platform, for ``sgx`` and ``tdx`` alike."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from cenacle.attestation.claims import Claims
from cenacle.documents.base import Frozen, Natural, PositiveInt, parse_time
from cenacle.documents.clauses import Clause, check

__all__ = ["Advisory", "DcapPolicy", "judge_dcap"]

AcceptedStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
]
Advisory = Annotated[str, StringConstraints(pattern=r"^INTEL-SA-[0-9]{5}$")]
Ppid = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class DcapPolicy(Frozen):
    """Demands on the platform; the defaults accept only what Intel calls up to date.

    Attributes:
        tcb_status: accepted statuses of the platform, also of the TDX module that runs now. A
            revoked platform is refused whatever stands here.
        qe_tcb_status: accepted statuses of the quoting enclave.
        advisories: Intel advisories that the parties know and accept; any other is refused.
        min_tcb_evaluation_data_number: collateral of an earlier TCB recovery is refused.
        max_collateral_age_days: how old Intel's statements may be when the evidence is made.
        platforms: PPIDs of the machines that may be used; all where it is left out.
        allow_smt: whether hyperthreading may be on. Where it may not, the platform's certificate
            must say that it is off; those of older processors say nothing and are refused.
        allow_dynamic_platform: whether processors may be added to the platform later; likewise.
    """

    tcb_status: Annotated[tuple[AcceptedStatus, ...], Field(min_length=1)] = ("UpToDate",)
    qe_tcb_status: Annotated[tuple[AcceptedStatus, ...], Field(min_length=1)] = ("UpToDate",)
    advisories: tuple[Advisory, ...] = ()
    min_tcb_evaluation_data_number: Natural = 0
    max_collateral_age_days: PositiveInt = 30
    platforms: Annotated[tuple[Ppid, ...], Field(min_length=1)] | None = None
    allow_smt: bool = True
    allow_dynamic_platform: bool = True


def judge_dcap(claims: Claims, policy: DcapPolicy) -> list[Clause]:
    """One clause for each demand. A property that is missing fails."""
    shown = claims.properties
    kind = claims.kind

    def demand(name: str, met: bool, found: object, demanded: object, remedy: str) -> Clause:
        return check("contract", f"{kind} {name}", met, found, demanded, remedy)

    update = "update firmware, microcode and SGX/TDX software of the host, or use another"
    clauses = []
    for field, name, accepted in (
        ("tcb_status", "TCB status", policy.tcb_status),
        ("current_tcb_status", "TCB status of what runs now", policy.tcb_status),
        ("qe_tcb_status", "TCB status of the quoting enclave", policy.qe_tcb_status),
    ):
        status = shown.get(field, "not shown")
        clauses.append(demand(name, status in accepted, status, " or ".join(accepted), update))
    advisories: set[str] | None = None
    if "advisories" in shown and "current_advisories" in shown:
        advisories = {*shown["advisories"], *shown["current_advisories"]}
    open_ones = sorted((advisories or set()) - set(policy.advisories))
    clauses.append(
        demand(
            "advisories",
            advisories is not None and not open_ones,
            " ".join(open_ones) or ("not shown" if advisories is None else "none that is open"),
            " ".join(policy.advisories) or "none",
            f"{update}; or accept them in enclave.policy.{kind}.advisories",
        )
    )
    number = shown.get("tcb_evaluation_data_number", -1)
    floor = policy.min_tcb_evaluation_data_number
    fetch = "fetch the collateral again"
    clauses.append(
        demand("TCB evaluation data number", number >= floor, number, f">= {floor}", fetch)
    )
    age = claims.issued - parse_time(shown.get("collateral_issued", "1970-01-01T00:00:00Z"))
    limit = timedelta(days=policy.max_collateral_age_days)
    clauses.append(
        demand("collateral age", age <= limit, f"{age.days} days", f"<= {limit.days} days", fetch)
    )
    if policy.platforms is not None:
        ppid = shown.get("ppid", "not shown")
        clauses.append(
            demand(
                "platform",
                ppid in policy.platforms,
                ppid,
                " or ".join(policy.platforms),
                "use a machine that the contract names",
            )
        )
    for field, name, allowed in (
        ("smt", "hyperthreading", policy.allow_smt),
        ("dynamic_platform", "dynamic platform", policy.allow_dynamic_platform),
    ):
        if not allowed:
            clauses.append(
                demand(name, shown.get(field) is False, shown.get(field), False, "use another host")
            )
    return clauses
