"""Evidence of accelerators, which says nothing alone: verifier and attester of such a kind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from datetime import datetime
from typing import NoReturn, final

from cenacle.attestation.registry import Attester, Verifier
from cenacle.documents.base import Digest
from cenacle.errors import EvidenceError, UnavailableError

__all__ = ["AcceleratorAttester", "AcceleratorVerifier"]


class AcceleratorVerifier(Verifier):
    """Of evidence that says nothing alone: anyone may ask an accelerator to sign any nonce.

    Inspecting such evidence shows what the device is. Only composite evidence shows that it was
    handed to measured software, so :meth:`~Verifier.authenticate` always refuses it alone.
    """

    @final
    def binding(self, report_data: bytes) -> NoReturn:
        del report_data
        raise EvidenceError(
            f"{self.kind} evidence alone does not show which software runs beside the device",
            expected="composite evidence, with the CPU's",
            remedy="use the evidence kind composite",
        )

    @abstractmethod
    def part_binding(self, bound: bytes) -> bytes:
        """How the kind carries 64 bytes as a part of composite evidence."""


class AcceleratorAttester(Attester):
    """Makes evidence that is a part of composite evidence and nothing else."""

    @final
    def attest(
        self,
        report_data: bytes,
        measurements: Mapping[str, Digest],
        layers: tuple[str, ...],
        now: datetime,
    ) -> NoReturn:
        del report_data, measurements, layers, now
        raise UnavailableError(
            f"{self.kind} evidence alone does not show which software runs beside the device",
            expected="composite evidence, with the CPU's",
            remedy="use the evidence kind composite",
        )
