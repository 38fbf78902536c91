"""SNP evidence made inside a guest, through Linux's configfs-tsm."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from cenacle.attestation.configfs_tsm import TsmReporter
from cenacle.attestation.registry import Attester
from cenacle.attestation.snp import collateral_of
from cenacle.attestation.snp_report import SnpReport
from cenacle.documents.base import b64
from cenacle.errors import EvidenceError, UnavailableError

__all__ = ["SnpAttester"]


class SnpAttester(Attester):
    """Asks the secure processor for a report, and joins the certificates that belong to it.

    Args:
        reporter: the kernel's interface, or a recorded one.
        collateral: certificates (see :func:`~cenacle.attestation.snp.collateral_of`), fetched
            beforehand. Left out, the host's certificate table must have them.
        vmpl: the privilege level to ask at; the guest's own where it is left out.
    """

    kind = "snp"

    def __init__(
        self,
        reporter: TsmReporter | None = None,
        collateral: bytes | None = None,
        vmpl: int | None = None,
    ) -> None:
        self._reporter = TsmReporter() if reporter is None else reporter
        self._collateral = collateral
        self._vmpl = vmpl

    def collect(self, bound: bytes, now: datetime) -> dict[str, Any]:
        """See :meth:`~cenacle.attestation.registry.Attester.collect`; the clock is not needed.

        Raises:
            UnavailableError: no driver, a report that is not what was asked for, or no
                certificate of the key that signed it (the remedy says where AMD keeps it).
        """
        del now
        answer = self._reporter.report(bound, provider="sev_guest", privlevel=self._vmpl)
        try:
            report = SnpReport.parse(answer.outblob)
        except EvidenceError as error:
            raise UnavailableError(
                "the secure processor gave no report that can be used", found=error.diagnostics()
            ) from None
        if report.report_data != bound:
            raise UnavailableError(
                "the secure processor gave a report for other report data",
                found=report.report_data[:12].hex(),
                expected=bound[:12].hex(),
            )
        try:
            found = collateral_of(report, self._collateral or answer.auxblob)
        except EvidenceError as error:
            raise UnavailableError(
                error.what, found=error.found, expected=error.expected, remedy=error.remedy
            ) from None
        return {"report": b64(answer.outblob), **found.to_fields()}
