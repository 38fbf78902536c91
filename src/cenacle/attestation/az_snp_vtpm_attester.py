"""Evidence made inside an Azure confidential VM on SEV-SNP, through its vTPM."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Final, TypeVar

from cenacle.attestation.az_hcl_report import HCL_REPORT_INDEX, split_hcl_report
from cenacle.attestation.registry import Attester
from cenacle.attestation.snp import collateral_of
from cenacle.attestation.snp_report import SnpReport
from cenacle.attestation.tpm import qualifying_data
from cenacle.attestation.tpm_attester import BOOT_REGISTERS
from cenacle.attestation.tpm_device import LoadedKey, TpmDevice
from cenacle.attestation.tpm_keys import Public, Signature
from cenacle.attestation.tpm_structures import Attest, PcrSelection, QuoteInfo, pcr_composite
from cenacle.documents.base import b64
from cenacle.errors import EvidenceError, InputError, UnavailableError

__all__ = ["AZURE_ATTESTATION_KEY", "AzSnpVtpmAttester"]

T = TypeVar("T")

AZURE_ATTESTATION_KEY: Final = 0x81000003
"""Where the paravisor keeps the vTPM's attestation key."""

_SHA256: Final = 0x000B
_ATTEMPTS: Final = 16


class AzSnpVtpmAttester(Attester):
    """Reads the paravisor's report from the vTPM, and quotes registers of the SHA-256 bank.

    Args:
        tcti: where the vTPM is, see :class:`~cenacle.attestation.tpm_device.TpmDevice`.
        collateral: the VCEK and its authorities (see
            :func:`~cenacle.attestation.snp.collateral_of`), fetched beforehand: from Azure's
            metadata service (``/metadata/THIM/amd/certification``) or from AMD.
        registers: those that the contract has reference values for.
    """

    kind = "az-snp-vtpm"

    def __init__(
        self,
        tcti: str = "device:/dev/tpmrm0",
        collateral: bytes | None = None,
        registers: Sequence[int] = BOOT_REGISTERS,
    ) -> None:
        chosen = tuple(sorted(set(registers)))
        if not chosen or not set(chosen) <= set(range(24)):
            raise InputError(
                "a vTPM cannot vouch with these registers",
                found=", ".join(map(str, chosen)) or "none",
                expected="some of 0 to 23",
            )
        self.tcti = tcti
        self.selection = PcrSelection(_SHA256, chosen)
        self._collateral = collateral

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        """See :meth:`~cenacle.attestation.registry.Attester.collect`; the clock is not needed.

        Raises:
            UnavailableError: no vTPM of an SNP VM, or no certificate of the chip (the remedy
                says where AMD keeps it).
        """
        del now
        with TpmDevice(self.tcti) as device:
            raw = _read_report(device)
            quote = self._quote(device, qualifying_data(bound))
        try:
            report, runtime_data = split_hcl_report(raw)
            parsed = SnpReport.parse(report)
        except EvidenceError as error:
            raise UnavailableError(
                "the vTPM holds no SNP report that can be used", found=error.diagnostics()
            ) from None
        try:
            found = collateral_of(parsed, self._collateral or b"")
        except EvidenceError as error:
            raise UnavailableError(
                error.what, found=error.found, expected=error.expected, remedy=error.remedy
            ) from None
        return {
            "report": b64(report),
            "runtime_data": b64(runtime_data),
            **quote,
            **found.to_fields(),
        }

    def _quote(self, device: TpmDevice, data: bytes) -> dict[str, Any]:
        key = _attestation_key(device)
        for _ in range(_ATTEMPTS):
            attest, signature = device.quote(key, self.selection, data)
            values = device.registers(self.selection)
            quoted = Attest.parse(attest).attested
            assert isinstance(quoted, QuoteInfo)
            if pcr_composite(Signature.parse(signature).hash, values) == quoted.digest:
                return {
                    "attest": b64(attest),
                    "signature": b64(signature),
                    "registers": {str(number): value.hex() for number, value in values.items()},
                }
        raise UnavailableError(
            "the vTPM's registers keep changing",
            found=f"another value at each of {_ATTEMPTS} attempts",
            remedy="quote fewer registers, or try again when the machine is idle",
        )


def _asked(what: str, call: Callable[[], T]) -> T:
    tss = importlib.import_module("tpm2_pytss")
    try:
        return call()
    except tss.TSS2_Exception as error:
        raise UnavailableError(
            f"the TPM has no {what}",
            found=str(error)[:200],
            expected="the vTPM of a confidential VM in Azure",
            remedy="run in such a VM, as a user who may open the device (group tss)",
        ) from None


def _read_report(device: TpmDevice) -> bytes:
    tss = importlib.import_module("tpm2_pytss")
    utils = importlib.import_module("tpm2_pytss.utils")

    def read() -> bytes:
        try:
            return bytes(utils.NVReadEK(device.esapi, tss.ESYS_TR.OWNER)(HCL_REPORT_INDEX))
        except utils.NoSuchIndex:
            raise UnavailableError(
                "the TPM has no report of Azure's paravisor",
                found=f"no NV index {HCL_REPORT_INDEX:#010x}",
                expected="the vTPM of a confidential VM in Azure",
                remedy="run in such a VM, or attest with another kind",
            ) from None

    return _asked("report of Azure's paravisor", read)


def _attestation_key(device: TpmDevice) -> LoadedKey:
    def find() -> LoadedKey:
        handle = device.esapi.tr_from_tpmpublic(AZURE_ATTESTATION_KEY)
        area, *_ = device.esapi.read_public(handle)
        return LoadedKey(handle, Public.parse(area.publicArea.marshal()))

    return _asked(f"attestation key at {AZURE_ATTESTATION_KEY:#010x}", find)
