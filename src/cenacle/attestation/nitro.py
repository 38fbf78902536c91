"""AWS Nitro enclaves: an attestation document signed by the Nitro hypervisor.

The body holds ``document``, the COSE_Sign1 structure as the Nitro Security Module gives it. The
64 bytes of report data are its ``user_data``. Registers 0 to 2 measure the image, its kernel and
its application, 8 the certificate that signed the image, 16 and up what the enclave extends by
itself: these are measurements wherever they are not zero. Registers 3 and 4 name the role and
the instance that started the enclave, which is not what runs in it: they are properties.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from cenacle.attestation.aws_root import AWS_NITRO_ROOT
from cenacle.attestation.claims import Claims, Evidence
from cenacle.attestation.nitro_document import NitroDocument, decode, unwrap
from cenacle.attestation.p384_path import P384Path, check_signature
from cenacle.attestation.registry import MAX_AGE, Shown, Verifier
from cenacle.documents.base import Base64, Frozen, JsonObject, NonEmpty, b64, unb64
from cenacle.documents.clauses import Clause, check
from cenacle.documents.protection import Measured
from cenacle.errors import CenacleError, EvidenceError, InputError

__all__ = ["NitroPolicy", "NitroVerifier", "judge_nitro"]

_KIND: Final = "nitro"
_ALGORITHMS: Final = {32: "sha256", 48: "sha384", 64: "sha512"}
_CODE: Final = (0, 1, 2)
_PARENT: Final = {3: "parent_role", 4: "parent_instance"}


class _Body(Frozen):
    document: Base64
    statement: JsonObject | None = None


class NitroPolicy(Frozen):
    """What a contract demands beside the measurements.

    Attributes:
        parent_roles: accepted ARNs of the IAM role of the instance that started the enclave
            (PCR 3); ``None`` accepts any, also none.
        parent_instances: accepted IDs of that instance (PCR 4); ``None`` accepts any.
    """

    parent_roles: tuple[NonEmpty, ...] | None = None
    parent_instances: tuple[NonEmpty, ...] | None = None


class NitroVerifier(Verifier):
    """Checks signature, certificate path and dates; refuses enclaves in debug mode.

    Args:
        roots: DER of each trusted root; AWS's own unless a test says otherwise.
    """

    kind = _KIND

    def __init__(self, roots: Sequence[bytes] = (AWS_NITRO_ROOT,)) -> None:
        self._roots = tuple(roots)

    def inspect(self, evidence: Evidence, now: datetime) -> Shown:
        if evidence.kind != _KIND:
            raise EvidenceError("evidence is of another kind", found=evidence.kind, expected=_KIND)
        try:
            data = unb64(_Body.from_fields(evidence.body).document)
        except CenacleError as error:
            raise EvidenceError("nitro evidence is malformed", found=error.diagnostics()) from None
        document = decode(data)
        path = P384Path(document.chain, f"{_KIND} evidence")
        check_signature(path.leaf, document.signature, document.signed, f"{_KIND} evidence")
        path.check(self._roots)
        # The enclave's certificate is made seconds before its first document and lasts hours.
        path.check_dates(document.issued)
        path.check_dates(now, MAX_AGE)
        _refuse_debug(document)
        claims = Claims(
            kind=_KIND,
            protection=self.protection,
            measurements={
                f"pcr{index}": _measured(pcr)
                for index, pcr in sorted(document.pcrs.items())
                if any(pcr) and index not in _PARENT
            },
            properties={
                "module_id": document.module_id,
                **{
                    name: _measured(document.pcrs[index])
                    for index, name in _PARENT.items()
                    if any(document.pcrs.get(index, b""))
                },
            },
            layers=(),
            issued=document.issued,
        )
        return Shown(claims, document.user_data or b"")

    @classmethod
    def body_of(cls, raw: bytes, collateral: bytes | None = None) -> dict[str, Any]:
        """From a file with the document in it; a short header and padding are cut off."""
        if collateral is not None:
            raise InputError("nitro evidence carries its certificates", found="a collateral file")
        try:
            return {"document": b64(unwrap(raw))}
        except EvidenceError as error:
            raise InputError(error.what, expected=error.expected) from None


def _measured(pcr: bytes) -> Measured:
    return f"{_ALGORITHMS[len(pcr)]}:{pcr.hex()}"


def _refuse_debug(document: NitroDocument) -> None:
    for index in _CODE:
        pcr = document.pcrs.get(index)
        if pcr is None or not any(pcr):
            raise EvidenceError(
                "the Nitro enclave runs in debug mode, where its console is open to the host",
                found=f"PCR {index} is {'absent' if pcr is None else 'all zero'}",
                expected="a measured image",
                remedy="start the enclave without --debug-mode",
            )


def _register(identity: str) -> Measured:
    """What the hypervisor extends an empty register with: an ARN or an instance ID."""
    return f"sha384:{hashlib.sha384(bytes(48) + identity.encode()).hexdigest()}"


def judge_nitro(claims: Claims, policy: NitroPolicy) -> list[Clause]:
    """One clause for each demand that the policy makes."""
    clauses = []
    for name, accepted in (
        ("parent_role", policy.parent_roles),
        ("parent_instance", policy.parent_instances),
    ):
        if accepted is None:
            continue
        found = claims.properties.get(name)
        named = [identity for identity in accepted if _register(identity) == found]
        clauses.append(
            check(
                "contract",
                f"nitro {name.replace('_', ' ')}",
                bool(named),
                named[0] if named else found or "none",
                " or ".join(accepted) or "nothing is accepted",
                "start the enclave from an accepted instance and role",
            )
        )
    return clauses
