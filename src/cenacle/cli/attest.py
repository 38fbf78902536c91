"""``cenacle attest``: what this machine can prove, and what evidence of others proves."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cenacle.attestation.claims import Claims, Evidence
from cenacle.cli.home import Home, PartyKeys, write_file
from cenacle.cli.output import (
    JsonOption,
    cell,
    clause_table,
    console,
    errors_in_words,
    finish,
    line,
    say,
)
from cenacle.cli.trust import (
    TrustKind,
    add_trust,
    read_certificates,
    read_requirements,
    read_small,
    read_trust,
)
from cenacle.documents.base import canonical_json, parse_json, parse_time, sha256_digest
from cenacle.documents.clauses import Clause, all_met, failed
from cenacle.documents.contract import EnclaveRequirements
from cenacle.documents.protection import EVIDENCE_KINDS, Protection, protection_of
from cenacle.errors import CenacleError, EvidenceError, InputError, UnavailableError

if TYPE_CHECKING:
    from cenacle.attestation.registry import Attester, Verifier
    from cenacle.attestation.verifiers import Trust

__all__ = ["app", "judge_claims", "show_claims"]

app = typer.Typer(
    no_args_is_help=True,
    help="Show what this machine can attest with; verify evidence offline.",
    epilog="Example: cenacle attest verify quote.bin --kind tdx --collateral collateral.json "
    "--reference enclave.yaml",
)

_STRENGTH = {
    "tee": "keeps the host out",
    "measured": "shows which software runs; the host can read its memory",
    "simulated": "protects from nobody with root",
}


# ------------------------------------------------------------------------------- verify


@app.command(
    epilog="Examples:\n\ncenacle attest verify quote.bin --kind tdx --collateral collateral.json "
    "--reference enclave.yaml\n\ncenacle attest verify report.bin --kind snp --now "
    "2026-05-04T10:00:00Z"
)
def verify(
    file: Annotated[
        Path,
        typer.Argument(help="Evidence: a JSON document, or the vendor's own format with --kind."),
    ],
    kind: Annotated[
        str | None, typer.Option(help=f"Kind of evidence: {', '.join(EVIDENCE_KINDS)}.")
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Reference values and policy: the enclave field of a contract (YAML)."),
    ] = None,
    collateral: Annotated[
        Path | None, typer.Option(help="What the vendor publishes for the verification.")
    ] = None,
    now: Annotated[
        str | None, typer.Option(help="The moment to judge at, RFC 3339; default: the clock.")
    ] = None,
    report_data: Annotated[
        str | None, typer.Option(help="What the evidence must be bound to: 128 hex digits.")
    ] = None,
    root: Annotated[
        list[Path] | None, typer.Option(help="A TPM vendor's root beside the known ones, PEM.")
    ] = None,
    software_root: Annotated[
        list[Path] | None,
        typer.Option(help="Root of TPMs in software, whose evidence is SIMULATED, PEM."),
    ] = None,
    allow_list: Annotated[
        list[Path] | None, typer.Option(help="List of files that ima evidence may show.")
    ] = None,
    broker: Annotated[
        str | None, typer.Option(help="Pinned broker that certified the TPM's key.")
    ] = None,
    token: Annotated[
        Path | None, typer.Option(help="Also write the result as a signed token (EAR) here.")
    ] = None,
    as_: Annotated[str | None, typer.Option("--as", help="Party that signs the token.")] = None,
    json_: JsonOption = False,
) -> None:
    """Verify evidence without any network, and print what it proves.

    With --reference every measurement and policy must match, or the exit code
    is 3. Without, the evidence is only authenticated, and compared with nothing:
    that shows what a contract would have to list.
    """
    from cenacle.attestation.result import attestation_result

    with errors_in_words(json_):
        moment = datetime.now(UTC) if now is None else parse_time(now)
        evidence = _read(file, kind, collateral)
        verifier = _verifier(
            evidence.kind,
            _trust(root or [], software_root or [], allow_list or [], broker),
        )
        if reference is not None and report_data is None and verifier.statement(evidence):
            raise InputError(
                "what the agent states in this evidence cannot be compared by itself",
                found="no report data",
                expected="what the evidence was bound to, which binds the statement too",
                remedy="give --report-data",
            )
        bound = None if report_data is None else _unhex(report_data)
        claims = (
            verifier.inspect(evidence, moment).claims
            if bound is None
            else verifier.authenticate(evidence, bound, moment)
        )
        clauses: list[Clause] | None = None
        policy: str | None = None
        if reference is not None:
            wanted = read_requirements(reference)
            clauses = judge_claims(claims, wanted)
            policy = sha256_digest(canonical_json(wanted.to_fields()))
        fields = {
            "verified": clauses is not None,
            "bound": report_data is not None,
            "claims": claims.to_fields(),
            "clauses": [clause.to_fields() for clause in clauses or ()],
        }
        if clauses is not None and not all_met(clauses):
            if not json_:
                console.print(clause_table(clauses, "compared with the reference values"))
            raise _not_accepted(clauses)
        if token is not None:
            signer = _signer(as_)
            text = attestation_result(
                claims,
                evidence,
                clauses,
                key=signer.signing_key,
                verifier=signer.party.name,
                now=moment,
                policy=policy,
                nonce=bound,
            )
            write_file(token, text.encode())
            fields["token"] = str(token)
        finish(fields, json_, lambda: _show(claims, clauses, report_data is not None))


def _read(file: Path, kind: str | None, collateral: Path | None) -> Evidence:
    raw = read_small(file)
    if raw.lstrip()[:1] == b"{":
        fields = parse_json(raw)
        if isinstance(fields, dict) and {"kind", "body"} <= set(fields):
            evidence = Evidence.from_fields(fields)
            if kind not in {None, evidence.kind}:
                raise EvidenceError(
                    "evidence is of another kind", found=evidence.kind, expected=kind
                )
            if collateral is not None:
                raise InputError("an evidence document has its collateral in it already")
            return evidence
    if kind is None:
        raise InputError(
            "the file is no evidence document",
            found=str(file),
            expected="JSON with kind and body",
            remedy="name the kind of a vendor's own format with --kind",
        )
    extra = None if collateral is None else read_small(collateral)
    return Evidence(kind=kind, body=_verifier(kind, None).body_of(raw, extra))


def _trust(roots: list[Path], software: list[Path], lists: list[Path], broker: str | None) -> Trust:
    home = Home.default()
    issuers = () if broker is None else (home.broker(broker).verify_key,)
    kept = read_trust(home.folder, issuers)
    return replace(
        kept,
        tpm_roots=(*kept.tpm_roots, *read_certificates(roots)),
        software_tpm_roots=(*kept.software_tpm_roots, *read_certificates(software)),
        allow_lists=(*kept.allow_lists, *map(read_small, lists)),
    )


def _verifier(kind: str, trust: Trust | None) -> Verifier:
    from cenacle.attestation.simulated import SimulatedVerifier
    from cenacle.attestation.verifiers import Trust, hardware_verifier

    if kind == "simulated":
        return SimulatedVerifier()
    return hardware_verifier(kind, trust or Trust())


def _unhex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise InputError(
            "report data is not hexadecimal", found=text[:20], expected="128 hex digits"
        ) from None


def judge_claims(claims: Claims, wanted: EnclaveRequirements) -> list[Clause]:
    """Every clause of reference values and policy for claims, as a broker would judge them."""
    from cenacle.attestation.policies import appraise, check_policies

    if claims.kind not in wanted.reference:
        raise EvidenceError(
            "the reference values are for other kinds of evidence",
            found=claims.kind,
            expected=" or ".join(wanted.reference),
        )
    check_policies(wanted.policy or {})
    return appraise(claims, wanted.reference[claims.kind], wanted.policy_for(claims.kind))


def _not_accepted(clauses: list[Clause]) -> EvidenceError:
    wrong = failed(clauses)
    first = wrong[0] if wrong else None
    names = ", ".join(clause.name for clause in wrong) or "nothing was compared"
    return EvidenceError(
        f"the evidence is genuine, but not what was approved ({names})",
        found="; ".join(clause.found for clause in wrong),
        expected="; ".join(clause.demanded for clause in wrong),
        remedy=None if first is None else first.remedy,
    )


def show_claims(claims: Claims, *, compared: bool) -> None:
    """What evidence proves, as a table."""
    title = f"{claims.kind} evidence: authentic" + (", and as approved" if compared else "")
    table = Table(title=title, title_justify="left")
    table.add_column("claim")
    table.add_column("value", overflow="fold")
    table.add_row("protection", f"{claims.protection}: {_STRENGTH[claims.protection]}")
    for name, value in sorted(claims.measurements.items()):
        table.add_row(f"measurement {name}", value)
    for name, found in sorted(claims.properties.items()):
        table.add_row(name, cell(_text(found)))
    console.print(table)
    if not compared:
        say("compared with nothing: give --reference to check it against what was approved")


def _show(claims: Claims, clauses: list[Clause] | None, bound: bool) -> None:
    show_claims(claims, compared=clauses is not None)
    if clauses is not None:
        console.print(clause_table(clauses, "compared with the reference values"))
    if not bound:
        say("not bound to anything: give --report-data to check that it is fresh and whose it is")


def _text(value: Any) -> str:
    match value:
        case list():
            return ", ".join(map(_text, value)) or "none"
        case dict():
            return ", ".join(f"{name} {_text(one)}" for name, one in value.items()) or "none"
        case bool():
            return "yes" if value else "no"
    return str(value)


def _signer(as_: str | None) -> PartyKeys:
    if as_ is None:
        raise InputError("a token needs a party to sign it", remedy="name one of yours with --as")
    return Home.default().party(as_)


# -------------------------------------------------------------------------------- trust


@app.command(
    epilog="Examples:\n\ncenacle attest trust vendor-root.pem --kind tpm\n\n"
    "cenacle attest trust allowed-files.jsonl --kind ima --dir broker"
)
def trust(
    file: Annotated[Path, typer.Argument(help="A root certificate (PEM) or list of files.")],
    kind: Annotated[
        TrustKind,
        typer.Option(
            help="tpm: root of a TPM vendor; software-tpm: root of TPMs in software, whose "
            "evidence is SIMULATED; ima: list of files."
        ),
    ],
    folder: Annotated[
        Path | None, typer.Option("--dir", help="A broker's folder; default: your own.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Trust a root or a list of files, beside the vendors' roots that come with Cenacle.

    A broker reads its folder when it starts. One made for production does not
    start with a root of TPMs in software.
    """
    with errors_in_words(json_):
        kept = add_trust(folder or Home.default().folder, kind, file)
        finish({"kind": kind, "file": str(kept)}, json_, lambda: line(f"trusted: {kept}"))


# --------------------------------------------------------------------------------- show


@app.command(epilog="Example: cenacle attest show")
def show(
    tcti: Annotated[
        str | None, typer.Option(help="Where the TPM is, e.g. device:/dev/tpmrm0.")
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Show what this machine can attest with and how strong that is, found out by trying each."""
    from cenacle.attestation.platforms import DEFAULT_TCTI

    with errors_in_words(json_):
        rows = [_tried(kind, make) for kind, make in _trials(tcti or DEFAULT_TCTI).items()]
        fields = {"kinds": rows, "strongest": _strongest(rows)}
        finish(fields, json_, lambda: _show_kinds(rows))


def _tried(kind: str, make: Callable[[], Protection]) -> dict[str, Any]:
    try:
        return {"kind": kind, "protection": make(), "missing": None}
    except CenacleError as error:
        found = "" if error.found is None else f" ({error.found})"
        missing = f"{error.what}{found}"
        return {"kind": kind, "protection": protection_of(kind), "missing": missing}


def _trials(tcti: str) -> dict[str, Callable[[], Protection]]:
    """How each kind is tried; gives the protection that evidence made here has."""
    from cenacle.attestation.platforms import Platform, platform_attester, platform_kinds
    from cenacle.attestation.simulated import SimulatedAttester

    def made(attester: Attester) -> Protection:
        attester.collect(secrets.token_bytes(64), datetime.now(UTC))
        return protection_of(attester.kind)

    # Nothing is verified here, so no collateral is needed.
    machine = Platform(collateral=Path(os.devnull))

    def real(kind: str) -> Callable[[], Protection]:
        return lambda: made(platform_attester(kind, machine))

    return {
        **{kind: real(kind) for kind in platform_kinds()},
        "tpm": lambda: _tpm(tcti),
        "ima": lambda: _ima(tcti),
        "simulated": lambda: made(SimulatedAttester(Home.default().installation())),
    }


def _tpm(tcti: str) -> Protection:
    """Make the attestation key; a TPM that no vendor vouches for is one in software."""
    os.environ.setdefault("TSS2_LOG", "all+none")  # the library's own words on the error stream
    from cenacle.attestation.tpm_device import TpmDevice
    from cenacle.attestation.tpm_endorsement import verify_endorsement
    from cenacle.attestation.tpm_roots import vendor_roots

    with TpmDevice(tcti) as device, device.attestation_key():
        chain = device.endorsement_key().certificates
    try:
        roots = (*vendor_roots(), *read_trust(Home.default().folder).tpm_roots)
        verify_endorsement(chain, roots, datetime.now(UTC))
    except EvidenceError:
        return "simulated"
    return "measured"


def _ima(tcti: str) -> Protection:
    from cenacle.attestation.ima_list import parse_ima_list

    path = Path("/sys/kernel/security/ima/binary_runtime_measurements")
    try:
        parse_ima_list(path.read_bytes())
    except OSError as error:
        raise UnavailableError(
            "the kernel measures no files, or does not show them",
            found=f"{error.strerror}: {path}",
            remedy="boot with ima_policy=tcb, and let this user read securityfs",
        ) from None
    return _tpm(tcti)


def _strongest(rows: list[dict[str, Any]]) -> str:
    working = [row["protection"] for row in rows if row["missing"] is None]
    return next((level for level in _STRENGTH if level in working), "none")


def _show_kinds(rows: list[dict[str, Any]]) -> None:
    table = Table("kind", "works here", "protection")
    for row in rows:
        works = (
            "[green]yes[/]" if row["missing"] is None else f"[yellow]no[/]: {cell(row['missing'])}"
        )
        table.add_row(row["kind"], works, f"{row['protection']}: {_STRENGTH[row['protection']]}")
    console.print(table)
    line(f"strongest: {_strongest(rows)}")
