"""``draft``, ``propose``, ``review``, ``sign``, ``veto``, ``contracts``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cenacle.attestation.policies import check_policies
from cenacle.broker.receipts import OpenedContract
from cenacle.cli.enclave import measure_here
from cenacle.cli.evidence import CollateralOption, TctiOption, hardware_reference
from cenacle.cli.home import Home, write_file
from cenacle.cli.machine import EnclaveOption, ImageOption, machine_reference
from cenacle.cli.offload import plan_in_words
from cenacle.cli.options import AsOption, BrokerOption, ContractArgument, OutOption
from cenacle.cli.output import (
    JsonOption,
    clause_table,
    console,
    errors_in_words,
    finish,
    line,
)
from cenacle.cli.privacy import completed_plan, privacy_in_words
from cenacle.documents.approval import describe_rule
from cenacle.documents.asset import Asset
from cenacle.documents.base import Digest, Frozen, Name, parse_yaml, short
from cenacle.documents.contract import Contract, ProgramJob, RecipeJob
from cenacle.documents.dsse import Envelope
from cenacle.documents.party import Party
from cenacle.documents.serving import ServeJob
from cenacle.errors import InputError

__all__ = [
    "Draft",
    "contract_in_words",
    "contracts",
    "draft",
    "propose",
    "review",
    "sign",
    "veto",
]


class Draft(Frozen):
    """What a person writes; `cenacle draft` fills in the digests.

    ``parties`` are names at the broker, ``assets`` are manifest files by alias,
    ``enclave`` says ``this-machine`` (measured now) or gives reference values in full. A
    ``privacy`` plan without a noise multiplier gets the smallest that keeps its epsilon. All
    other fields are the contract's own.
    """

    name: Name
    purpose: str
    parties: tuple[Name, ...]
    assets: dict[Name, str]
    job: dict[str, Any]
    enclave: dict[str, Any] | str = "this-machine"
    offload: dict[str, Any] | None = None
    privacy: dict[str, Any] | None = None
    outputs: tuple[dict[str, Any], ...]
    approval: Any
    vetoes: tuple[Name, ...] = ()
    payments: tuple[dict[str, Any], ...] = ()
    replaces: Digest | None = None
    expires: str


def _asset_ref(alias: str, where: str, base: Path, owners: Mapping[str, Party]) -> dict[str, str]:
    path = Path(where) if Path(where).is_absolute() else base / where
    if not path.is_file():
        raise InputError(
            f"the manifest of asset {alias} is not there",
            found=str(path),
            expected="the .asset.json file that `cenacle seal` wrote",
        )
    envelope = Envelope.from_json(path.read_bytes())
    asset = envelope.peek(Asset)
    owner = owners.get(asset.owner)
    if owner is None:
        raise InputError(
            f"the owner of asset {alias} is not among the job's parties",
            found=asset.owner,
            expected=", ".join(owners),
            remedy=f"list {asset.owner} under parties",
        )
    envelope.verify_signature(owner.verify_key)
    return {"digest": asset.digest, "owner": asset.owner}


def draft(
    job: Annotated[Path, typer.Argument(help="The job as YAML, with names instead of digests.")],
    out: OutOption = None,
    layers: Annotated[
        str, typer.Option(help="Sandbox layers to demand: all that work here, or a,b,c.")
    ] = "all",
    where: EnclaveOption = "process",
    image: ImageOption = None,
    evidence: Annotated[
        str,
        typer.Option(help="Kind of evidence of this-machine: simulated, or of its hardware."),
    ] = "simulated",
    tcti: TctiOption = None,
    collateral: CollateralOption = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Turn a job into a contract: look up parties, pin assets, measure this machine's enclave."""
    with errors_in_words(json_):
        home = Home.default()
        wanted = Draft.from_fields(parse_yaml(job.read_bytes()))
        with home.client(broker) as client:
            parties = {name: client.party(name) for name in wanted.parties}
            identity = client.identity
            hardware = None
            if evidence != "simulated":
                hardware = hardware_reference(
                    evidence, home.folder, client, tcti=tcti, collateral=collateral
                )
        enclave: Any = wanted.enclave
        if isinstance(enclave, str):
            if enclave != "this-machine":
                raise InputError(
                    "the job's enclave cannot be used",
                    found=repr(enclave),
                    expected="this-machine, or reference values",
                )
            outside = (wanted.offload or {}).get("scheme", "enclave") != "enclave"
            chosen = None if layers == "all" else layers.split(",")
            serves = wanted.job.get("type") == "serve"
            if where == "vm":
                enclave = machine_reference(image, chosen, serving=serves)
            else:
                enclave = measure_here(
                    home, chosen, accelerators=outside, hardware=hardware, serving=serves
                )
        fields = {
            "name": wanted.name,
            "purpose": wanted.purpose,
            "broker": identity.digest,
            "parties": {name: party.digest for name, party in parties.items()},
            "assets": {
                a: _asset_ref(a, where, job.parent, parties) for a, where in wanted.assets.items()
            },
            "job": wanted.job,
            "enclave": enclave,
            "outputs": list(wanted.outputs),
            "approval": wanted.approval,
            "vetoes": list(wanted.vetoes),
            "payments": list(wanted.payments),
            "expires": wanted.expires,
        }
        optional: dict[str, Any] = {"offload": wanted.offload, "replaces": wanted.replaces}
        if wanted.privacy is not None:
            optional["privacy"] = completed_plan(wanted.privacy, wanted.job)
        fields |= {name: value for name, value in optional.items() if value is not None}
        contract = Contract.from_fields(fields)
        fields["enclave"] = contract.enclave.completed().to_fields()
        contract = Contract.from_fields(fields)
        check_policies(contract.enclave.policy or {})
        text = contract.to_yaml()
        if out is not None:
            write_file(out, text.encode())

        def show() -> None:
            if out is None:
                sys.stdout.write(text)
                return
            line(f"wrote {out}: contract {contract.digest}")
            for sentence in (*plan_in_words(contract), *privacy_in_words(contract)):
                line(f"  {sentence}")

        finish({"contract": contract.digest, "path": out and str(out)}, json_, show)


def propose(
    file: Annotated[Path, typer.Argument(help="The contract as YAML.")],
    as_: AsOption,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Send a contract to the broker for its parties to review. Proposing is not signing."""
    with errors_in_words(json_):
        contract = Contract.from_yaml(file.read_bytes())
        with Home.default().client_as(as_, broker) as (keys, client):
            digest = client.propose(contract, keys.signing_key)
        finish(
            {"contract": digest, "name": contract.name},
            json_,
            lambda: line(f"proposed {contract.name}: {digest}"),
        )


def _reattestation_in_words(contract: Contract) -> list[str]:
    seconds = contract.enclave.reattest_seconds
    if not seconds:
        return []
    return [
        f"While it runs, the enclave proves itself again every {seconds} s; a change of its "
        f"machine or software, or {2 * seconds} s without a proof, ends the run for good."
    ]


def contract_in_words(opened: OpenedContract) -> list[str]:
    """What a contract permits, one sentence a line."""
    c = opened.contract
    match c.job:
        case RecipeJob(recipe=recipe):
            what = (
                f"trains a {recipe.model.type} model ({recipe.task}) for {recipe.epochs} epochs; "
                "no custom code"
            )
        case ServeJob():
            what = f"serves {c.job.model} to whoever reaches it: {_serving_in_words(c.job)}"
        case ProgramJob():
            package = opened.assets[c.job.program].package
            what = f"runs program {c.job.program} (package {package}) at {c.job.entry}"
    lines = [
        f"Contract {c.name}, for the purpose {c.purpose!r}, {what}.",
        *(
            f"It reads {alias} of {asset.owner}: {asset.content}"
            + (f", {asset.layout['rows']} rows" if "rows" in asset.layout else "")
            + "."
            for alias, asset in opened.assets.items()
        ),
        *(f"It gives {o.name} ({o.kind}) to {o.recipient}." for o in c.outputs),
        f"It runs in: {', '.join(c.enclave.reference)}"
        + (
            " (SIMULATED: protects from nobody with root)"
            if c.enclave.weakest == "simulated"
            else ""
        )
        + f"; sandbox layers demanded: {', '.join(c.enclave.layers) or 'none'}.",
        *_reattestation_in_words(c),
        *plan_in_words(c),
        *privacy_in_words(c),
        f"Approval: {describe_rule(c.approval)}; signed so far: "
        f"{', '.join(sorted(opened.signed)) or 'nobody'}; "
        f"may veto: {', '.join(c.vetoes) or 'nobody'}.",
        *(f"{p.payer} owes {p.payee} {p.amount / 100:.2f} {p.currency}." for p in c.payments),
        f"It ends at {c.expires}.",
    ]
    if c.replaces:
        lines.append(f"It replaces contract {short(c.replaces)}.")
    return lines


def _serving_in_words(job: ServeJob) -> str:
    parts = [
        "any number of queries"
        if job.tickets is None
        else f"queries with tickets of {job.tickets}",
        "sealed, so that the operator cannot read them"
        if job.sealed_only
        else "which the operator reads unless they are sealed",
        f"each told {job.outputs.in_words()}",
    ]
    if job.front is not None:
        parts.append(f"what comes before it, {short(job.front)}, runs outside")
    return "; ".join(parts)


def review(
    contract: ContractArgument,
    as_: Annotated[
        str | None, typer.Option("--as", metavar="PARTY", help="Mark what is yours.")
    ] = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Say in plain words what a contract permits, and check every clause of all terms.

    The contract, its signatures and manifests are verified here; the broker is not trusted.
    """
    with errors_in_words(json_):
        with Home.default().client(broker) as client:
            opened = client.contract(contract)
            clauses = list(client.review(contract).clauses)
        words = contract_in_words(opened)

        def show() -> None:
            for sentence in words:
                line(f"  {sentence}")
            mine = [c for c in clauses if as_ is None or c.subject.endswith(f" of {as_}")]
            console.print(clause_table(mine, "clauses" if as_ is None else f"your clauses ({as_})"))
            rest = [c for c in clauses if c not in mine and c.verdict == "failed"]
            if rest:
                console.print(clause_table(rest, "clauses of others that fail"))

        fields = {
            "contract": contract,
            "words": words,
            "signed": sorted(opened.signed),
            "clauses": [c.to_fields() for c in clauses],
        }
        finish(fields, json_, show)


def sign(
    contract: ContractArgument,
    as_: AsOption,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Sign a contract, after checking that it is the one with this digest."""
    with errors_in_words(json_):
        with Home.default().client_as(as_, broker) as (keys, client):
            client.sign(contract, keys.signing_key)
            opened = client.contract(contract)
        finish(
            {"contract": contract, "signed": sorted(opened.signed)},
            json_,
            lambda: line(f"{as_} signed {opened.contract.name} ({short(contract)})"),
        )


def veto(
    contract: ContractArgument,
    as_: AsOption,
    reason: Annotated[str, typer.Option(help="Why; everyone in the contract sees it.")],
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Stop a contract that gives your party a veto. Only a new contract undoes it."""
    with errors_in_words(json_):
        with Home.default().client_as(as_, broker) as (keys, client):
            client.veto(contract, as_, reason, keys.signing_key)
        finish(
            {"contract": contract, "vetoed_by": as_},
            json_,
            lambda: line(f"{as_} vetoed {short(contract)}"),
        )


def contracts(as_: AsOption, broker: BrokerOption = "default", json_: JsonOption = False) -> None:
    """List the contracts that your party is in."""
    with errors_in_words(json_):
        with Home.default().client_as(as_, broker) as (keys, client):
            found = client.contracts_of(keys.signing_key, as_)
        finish(
            {"contracts": [{"digest": d, "name": n} for d, n in found]},
            json_,
            lambda: line("\n".join(f"{d}  {n}" for d, n in found) or "none"),
        )
