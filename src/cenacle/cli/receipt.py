"""``cenacle open`` and ``cenacle verify``: what a finished job leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cenacle.broker.receipts import VerifiedReceipt, read_bundle, verify_receipt
from cenacle.cli.home import Home
from cenacle.cli.options import AsOption, BrokerOption
from cenacle.cli.output import JsonOption, cell, console, errors_in_words, finish, line
from cenacle.cli.privacy import record_in_words
from cenacle.cli.trust import user_verifiers
from cenacle.documents.base import unb64
from cenacle.documents.protection import at_least
from cenacle.documents.receipt import OffloadRecord, OutputRecord
from cenacle.errors import EvidenceError, InputError

__all__ = ["accelerators_in_words", "open_", "verify"]

ReceiptArgument = Annotated[Path, typer.Argument(help="The receipt file (receipt.json).")]


def _verified(receipt: Path, broker: str) -> VerifiedReceipt:
    bundle = read_bundle(receipt.read_bytes())
    home = Home.default()
    identity = home.broker(broker)
    verifiers = user_verifiers(home.folder, identity.verify_key)
    return verify_receipt(bundle, broker_digest=identity.digest, verifiers=verifiers)


def verify(
    receipt: ReceiptArgument,
    require: Annotated[
        str, typer.Option(help="Weakest protection to accept: simulated, measured or tee.")
    ] = "simulated",
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Verify a receipt offline, against the pinned broker's keys and nothing else.

    Checks the contract and its signatures, all manifests, the log entries and
    their inclusion, the evidence as of the release, every clause, and the
    enclave's signature.
    """
    with errors_in_words(json_):
        found = _verified(receipt, broker)
        r = found.receipt
        if require not in {"simulated", "measured", "tee"}:
            raise InputError(
                "no such protection", found=require, expected="simulated, measured or tee"
            )
        if not at_least(r.protection, require):  # type: ignore[arg-type]
            raise EvidenceError(
                "the receipt is genuine, but the job was protected less than required",
                found=r.protection,
                expected=f"{require} or stronger",
            )
        fields: dict[str, Any] = {
            "verified": True,
            "contract": r.contract,
            "run": r.run,
            "protection": r.protection,
            "evidence": r.evidence_kind,
            "layers": list(r.layers),
            "inputs": {a: i.asset for a, i in r.inputs.items()},
            "outputs": [{"name": o.name, "recipient": o.recipient} for o in r.outputs],
            "privacy": r.privacy if isinstance(r.privacy, str) else r.privacy.to_fields(),
            "offload": r.offload.scheme,
            "leakage": r.offload.to_fields(),
            "accelerators": r.accelerators and r.accelerators.to_fields(),
            "serving": r.serving and r.serving.to_fields(),
            "signed": sorted(found.opened.signed),
            "log_size": found.head.size,
        }
        finish(fields, json_, lambda: _show(found))


def _show(found: VerifiedReceipt) -> None:
    r, c = found.receipt, found.opened.contract
    table = Table(title="receipt verified", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("contract", f"{c.name}\n{r.contract}")
    table.add_row("purpose", cell(c.purpose))
    table.add_row("signed by", ", ".join(sorted(found.opened.signed)))
    table.add_row("inputs", "\n".join(f"{a} of {i.owner}" for a, i in r.inputs.items()))
    table.add_row("outputs", "\n".join(f"{o.name} ({o.kind}) to {o.recipient}" for o in r.outputs))
    kind = r.evidence_kind
    warning = "  [yellow]protects from nobody with root[/]" if r.protection == "simulated" else ""
    table.add_row("evidence", f"{kind}: protection {r.protection}{warning}")
    table.add_row("sandbox", ", ".join(r.layers) or "none")
    table.add_row("privacy", cell(record_in_words(r.privacy)))
    table.add_row("offload", cell(f"{r.offload.scheme}: {r.offload.note}"))
    if r.accelerators is not None:
        table.add_row("accelerators", cell(accelerators_in_words(r.accelerators)))
    if r.serving is not None:
        s = r.serving
        told = f"{s.queries:,} queries answered ({s.sealed:,} sealed), {s.rows:,} rows in them"
        table.add_row("served", f"{told}; {s.refused:,} refused")
    table.add_row("released", f"{found.released:%Y-%m-%d %H:%M:%S} UTC, resumed {r.resumed} times")
    table.add_row(
        "log", f"entry {r.release.index} under a signed head of {found.head.size} entries"
    )
    console.print(table)


def accelerators_in_words(record: OffloadRecord) -> str:
    """Who they were, what crossed, and what was wrong with them, one fact a line."""
    lines = [f"{one.name}: {one.description}" for one in record.accelerators]
    lines += [
        f"sent {record.bytes_sent:,} bytes, took {record.bytes_received:,} back",
        f"{record.products:,} results, {record.checked:,} of them checked",
        *(f"dropped {one.name} at {one.layer}: {one.reason}" for one in record.dropped),
    ]
    if record.kept_inside:
        lines.append(f"ran in the enclave all the same: {', '.join(record.kept_inside)}")
    return "\n".join(lines)


def open_(
    receipt: ReceiptArgument,
    output: Annotated[str, typer.Argument(help="The output's name.")],
    as_: AsOption,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the plaintext.")],
    sealed: Annotated[
        Path | None, typer.Option(help="The sealed output; default: beside the receipt.")
    ] = None,
    broker: BrokerOption = "default",
    json_: JsonOption = False,
) -> None:
    """Open an output that was sealed to you, after verifying the receipt it came with."""
    from cenacle.sealing import unseal_path

    with errors_in_words(json_):
        keys = Home.default().party(as_)
        found = _verified(receipt, broker).receipt
        record = next((o for o in found.outputs if o.name == output), None)
        if record is None or record.recipient != as_:
            mine = [o.name for o in found.outputs if o.recipient == as_]
            raise InputError(
                "the receipt has no such output for this party",
                found=f"{output} for {record.recipient}" if record else output,
                expected=", ".join(mine) or f"nothing in it is for {as_}",
            )
        context = OutputRecord.wrapping_context(found.contract, record.name, record.header)
        with keys.hpke_key.open(unb64(record.wrapped_key), *context) as key:
            info = unseal_path(
                sealed or receipt.with_name(f"{output}.sealed"),
                out,
                key,
                expected_header=record.header,
                expected_digest=record.content,
            )
        finish(
            {"output": output, "path": str(out), "bytes": info.plaintext_bytes},
            json_,
            lambda: line(f"opened {output} into {out} ({info.plaintext_bytes:,} bytes)"),
        )
