"""The body of ``sgx`` and ``tdx`` evidence, read from documents and from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cenacle.attestation.claims import Evidence
from cenacle.attestation.dcap_collateral import Collateral
from cenacle.attestation.dcap_quote import Quote, Tee, parse_quote
from cenacle.documents.base import Base64, Frozen, b64, unb64
from cenacle.errors import (
    CenacleError,
    DocumentError,
    EvidenceError,
    InputError,
    UnavailableError,
)

__all__ = ["DcapBody", "attested_body", "quote_of", "raw_body", "read_body"]


class DcapBody(Frozen):
    """A quote, Intel's statements about its platform and, of a TD, its event log."""

    quote: Base64
    collateral: Collateral
    event_log: Base64 | None = None


def read_body(evidence: Evidence, kind: str) -> DcapBody:
    """The body without the agent's statement.

    Raises:
        EvidenceError: the evidence is of another kind, or its body is malformed.
    """
    if evidence.kind != kind:
        raise EvidenceError("evidence is of another kind", found=evidence.kind, expected=kind)
    fields = {name: value for name, value in evidence.body.items() if name != "statement"}
    if kind == "sgx" and "event_log" in fields:
        raise EvidenceError("an SGX enclave has no event log", found="event_log")
    try:
        return DcapBody.from_fields(fields)
    except DocumentError as error:
        raise EvidenceError(
            f"{kind} evidence is malformed", found=error.diagnostics()[:400]
        ) from None


def quote_of(body: DcapBody, tee: Tee) -> Quote:
    """The parsed quote, of the kind that the evidence claims to be.

    Raises:
        EvidenceError: it is not exactly understood, or of the other kind.
    """
    quote = parse_quote(unb64(body.quote))
    if quote.header.tee != tee:
        raise EvidenceError(
            "the quote is of another kind of enclave",
            found=quote.header.tee,
            expected=tee,
            remedy=f"verify it as {quote.header.tee}",
        )
    return quote


def raw_body(kind: str, raw: bytes, collateral: bytes | None) -> dict[str, Any]:
    """The body for a quote in a file and its collateral in another.

    Raises:
        InputError: there is no collateral, or a file is not what it should be.
    """
    if collateral is None:
        raise InputError(
            f"a quote of kind {kind} is verified with Intel's collateral",
            expected="a JSON file with nine fields",
            remedy="give it with --collateral",
        )
    try:
        quote = parse_quote(raw)
    except EvidenceError as error:
        raise InputError("the file holds no quote", found=error.diagnostics()) from None
    return {"quote": b64(quote.raw), "collateral": Collateral.from_file(collateral).to_fields()}


def attested_body(raw: bytes, tee: Tee, bound: bytes, collateral: Path) -> dict[str, Any]:
    """The body for a quote that was just made.

    Args:
        bound: the 64 bytes that the quote must carry.
        collateral: a file that was fetched from Intel or a cache before.

    Raises:
        UnavailableError: the quote carries other bytes, or the collateral cannot be read.
    """
    try:
        quote = parse_quote(raw)
    except EvidenceError as error:
        raise UnavailableError(
            "this machine makes quotes that are not understood", found=error.diagnostics()
        ) from None
    if quote.header.tee != tee or quote.report.report_data != bound:
        raise UnavailableError(
            "this machine made a quote of something else",
            found=f"{quote.header.tee}, {quote.report.report_data[:12].hex()}",
            expected=f"{tee}, {bound[:12].hex()}",
            remedy="nobody else in the enclave may ask for quotes at the same time",
        )
    try:
        fields = Collateral.from_file(collateral.read_bytes()).to_fields()
    except (OSError, CenacleError) as error:
        found = error.diagnostics() if isinstance(error, CenacleError) else error.strerror
        raise UnavailableError(
            "there is no collateral to send with the quote",
            found=found,
            remedy="fetch Intel's collateral for this machine, and mount it for the enclave",
        ) from None
    return {"quote": b64(quote.raw), "collateral": fields}
