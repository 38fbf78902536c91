"""Which hardware makes an enclave's evidence on this machine, and what it would show."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cenacle.broker.client import BrokerClient
from cenacle.cli.trust import read_trust
from cenacle.documents.contract import EnclaveRequirements
from cenacle.documents.protection import EVIDENCE_KINDS, protection_of
from cenacle.errors import CenacleError, InputError

if TYPE_CHECKING:
    from cenacle.attestation.registry import Attester

__all__ = [
    "CollateralOption",
    "EvidenceOption",
    "Hardware",
    "TctiOption",
    "choose_hardware",
    "hardware_reference",
]

EvidenceOption = Annotated[
    str,
    typer.Option(
        "--evidence",
        help="Kind of evidence to make: contract (the strongest that it accepts and this "
        "machine can make), or one of its kinds.",
    ),
]
TctiOption = Annotated[
    str | None,
    typer.Option(
        "--tcti", help="Where the TPM is, e.g. device:/dev/tpmrm0 (default) or swtpm:path=SOCKET."
    ),
]
CollateralOption = Annotated[
    Path | None,
    typer.Option("--collateral", help="Intel's collateral of this platform, for sgx and tdx."),
]

_BOUND: Final = bytes(64)


@dataclass(frozen=True)
class Hardware:
    """What makes evidence on this machine; ``attester`` is ``None`` where it is simulated."""

    kind: str
    attester: Attester | None


def _make(kind: str, client: BrokerClient, tcti: str | None, collateral: Path | None) -> Hardware:
    from cenacle.attestation.platforms import DEFAULT_TCTI, Platform, platform_attester

    if kind == "simulated":
        return Hardware(kind, None)
    # The TPM library would write its own words on the error stream.
    os.environ.setdefault("TSS2_LOG", "all+none")
    platform = Platform(tcti=tcti or DEFAULT_TCTI, issuer=client, collateral=collateral)
    return Hardware(kind, platform_attester(kind, platform))


def choose_hardware(
    accepted: tuple[str, ...],
    wanted: str,
    client: BrokerClient,
    *,
    tcti: str | None = None,
    collateral: Path | None = None,
) -> Hardware:
    """The kind of evidence to make: the one that is named, or the strongest that works here.

    Args:
        accepted: kinds that the contract has reference values for.
        wanted: one of them, or ``contract``.

    Raises:
        InputError: the contract does not accept the kind.
        UnavailableError: none of them can be made on this machine.
    """
    if wanted != "contract":
        if wanted not in accepted:
            raise InputError(
                "the contract does not accept this kind of evidence",
                found=wanted,
                expected=" or ".join(accepted),
            )
        return _make(wanted, client, tcti, collateral)
    if len(accepted) == 1:
        return _make(accepted[0], client, tcti, collateral)
    strength = {"tee": 0, "measured": 1, "simulated": 2}
    last: CenacleError | None = None
    for kind in sorted(accepted, key=lambda one: strength[protection_of(one)]):
        try:
            found = _make(kind, client, tcti, collateral)
            if found.attester is not None:
                found.attester.collect(_BOUND, datetime.now(UTC))
        except CenacleError as error:
            last = error
            continue
        return found
    assert last is not None
    raise last


def hardware_reference(
    kind: str,
    home: Path,
    client: BrokerClient,
    *,
    tcti: str | None = None,
    collateral: Path | None = None,
) -> dict[str, Any]:
    """Reference values and policy that evidence of this machine's hardware would meet now.

    Raises:
        InputError: the kind is unknown.
        UnavailableError: the hardware is not here.
        EvidenceError: its evidence is not accepted with what is trusted here.
    """
    from cenacle.attestation.claims import Evidence
    from cenacle.attestation.verifiers import hardware_verifier

    if kind not in EVIDENCE_KINDS:
        raise InputError("no such kind of evidence", found=kind, expected=", ".join(EVIDENCE_KINDS))
    attester = _make(kind, client, tcti, collateral).attester
    assert attester is not None
    now = datetime.now(UTC)
    verifier = hardware_verifier(kind, read_trust(home, (client.identity.verify_key,)))
    evidence = Evidence(kind=kind, body=attester.collect(_BOUND, now))
    claims = verifier.inspect(evidence, now).claims
    fields: dict[str, Any] = {
        "reference": {kind: {name: [value] for name, value in claims.measurements.items()}}
    }
    root = claims.properties.get("ek_root")
    if claims.protection == "simulated" and isinstance(root, str):
        fields["policy"] = {kind: {"roots": [root]}}
    EnclaveRequirements.from_fields(fields)
    return fields
