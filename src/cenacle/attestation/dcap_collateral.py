"""Collateral: what Intel publishes about platforms, as it travels with a quote.

The JSON shape is that of Intel's quote collateral version 3 (``sgx_ql_qve_collateral_t``) as the
verifiers of the field write it: nine fields, hexadecimal where they are bytes. Where each comes
from (PCS API version 4, or the same paths of a PCCS):

=============================  ===========================================================
field                          origin
=============================  ===========================================================
``pck_crl``                    ``/sgx/certification/v4/pckcrl?ca=platform&encoding=der``
``pck_crl_issuer_chain``       that answer's header ``SGX-PCK-CRL-Issuer-Chain``, URL-decoded
``root_ca_crl``                ``IntelSGXRootCA.der`` of certificates.trustedservices.intel.com, or
                               ``/sgx/certification/v4/rootcacrl`` of a PCCS
``tcb_info``                   ``/tdx/certification/v4/tcb?fmspc=...`` (or ``/sgx/...``): the
                               value of ``tcbInfo``, byte for byte, since it is signed
``tcb_info_signature``         ``signature`` of the same answer
``tcb_info_issuer_chain``      its header ``TCB-Info-Issuer-Chain``, URL-decoded
``qe_identity``                ``/tdx/certification/v4/qe/identity`` (or ``/sgx/...``): the value
                               of ``enclaveIdentity``, byte for byte
``qe_identity_signature``      ``signature`` of the same answer
``qe_identity_issuer_chain``   its header ``SGX-Enclave-Identity-Issuer-Chain``, URL-decoded
=============================  ===========================================================

``pck_certificate_chain`` may be there too, for quotes that do not hold it themselves.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Self

from pydantic import StringConstraints

from cenacle.documents.base import Frozen, parse_json
from cenacle.errors import DocumentError, EvidenceError, InputError

__all__ = ["MAX_COLLATERAL_BYTES", "Collateral"]

MAX_COLLATERAL_BYTES: Final = 1024 * 1024

Pem = Annotated[str, StringConstraints(min_length=1, max_length=32 * 1024)]
Text = Annotated[str, StringConstraints(min_length=2, max_length=256 * 1024)]
HexSignature = Annotated[str, StringConstraints(pattern=r"^[0-9a-fA-F]{128}$")]
HexBytes = Annotated[
    str, StringConstraints(pattern=r"^(?:[0-9a-fA-F]{2})+$", max_length=MAX_COLLATERAL_BYTES)
]


class Collateral(Frozen):
    """Signed statements of Intel's, and the certificates to check them with; unchecked."""

    pck_crl_issuer_chain: Pem
    root_ca_crl: HexBytes
    pck_crl: HexBytes
    tcb_info_issuer_chain: Pem
    tcb_info: Text
    tcb_info_signature: HexSignature
    qe_identity_issuer_chain: Pem
    qe_identity: Text
    qe_identity_signature: HexSignature
    pck_certificate_chain: Pem | None = None

    @classmethod
    def of(cls, fields: Any) -> Self:
        """From evidence.

        Raises:
            EvidenceError: a field is missing, unknown or malformed.
        """
        try:
            return cls.from_fields(fields)
        except DocumentError as error:
            raise EvidenceError(
                "the collateral is malformed",
                found=error.diagnostics()[:300],
                expected="the nine fields of Intel's quote collateral",
            ) from None

    @classmethod
    def from_file(cls, raw: bytes) -> Self:
        """From a file that was fetched before.

        Raises:
            InputError: it is not the JSON that is described above.
        """
        if len(raw) > MAX_COLLATERAL_BYTES:
            raise InputError(
                "collateral is too large",
                found=f"{len(raw)} bytes",
                expected=f"<= {MAX_COLLATERAL_BYTES} bytes",
            )
        return cls.from_fields(parse_json(raw))
