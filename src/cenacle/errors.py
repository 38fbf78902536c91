"""The one tree of errors.

Every error says what was found, what was expected and what to do. None carries
plaintext of an asset: inside an enclave only the class and these fixed words leave.

::

    CenacleError                    exit 1
    ├── InputError                  exit 2   what the user gave cannot be used
    │   ├── DocumentError                    a document does not parse or validate
    │   └── DataError                        a table or tensor file has the wrong content
    ├── VerificationError           exit 3   something is not what it claims to be
    │   ├── SignatureError
    │   ├── SealError                        a sealed container or wrapped key is not genuine
    │   ├── EvidenceError                    evidence was not accepted
    │   ├── ProofError                       a log proof or receipt does not hold
    │   └── IntegrityError                   an accelerator's result is not what was asked for
    ├── RefusedError                exit 4   the rules say no; carries every clause
    ├── ConflictError               exit 5   somebody else came first; nothing was changed
    ├── UnavailableError            exit 6   a broker, disk or service cannot be reached
    │   └── AcceleratorError                 an accelerator died, hangs or fails
    └── EnclaveError                exit 7   the job failed inside the enclave
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "AcceleratorError",
    "CenacleError",
    "ConflictError",
    "DataError",
    "DocumentError",
    "EnclaveError",
    "EvidenceError",
    "InputError",
    "IntegrityError",
    "ProofError",
    "RefusedError",
    "SealError",
    "SignatureError",
    "UnavailableError",
    "VerificationError",
]


class CenacleError(Exception):
    """Base of every error that Cenacle raises on purpose.

    Args:
        what: one clear sentence, without a final full stop.
        found: what was found.
        expected: what was expected.
        remedy: what the reader can do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.remedy = remedy
        super().__init__(self.diagnostics())

    def diagnostics(self) -> str:
        """Text for a person: the sentence, then found, expected and the remedy."""
        text = self.what
        if self.found is not None:
            text += f"; found {self.found}"
        if self.expected is not None:
            text += f"; expected {self.expected}"
        if self.remedy is not None:
            text += f". {self.remedy[:1].upper()}{self.remedy[1:]}"
        return text

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON-serializable fields; the inverse of :meth:`from_dict`."""
        return {
            "error": type(self).__name__,
            "what": self.what,
            "found": self.found,
            "expected": self.expected,
            "remedy": self.remedy,
        }

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> CenacleError:
        """Rebuild an error that crossed a process or network boundary.

        Unknown classes become a plain :class:`CenacleError`; nothing is evaluated.
        """
        kind = _BY_NAME.get(str(fields.get("error")), CenacleError)
        remedy = fields.get("remedy")
        error = kind(
            str(fields.get("what", "unknown error")),
            found=fields.get("found"),
            expected=fields.get("expected"),
            remedy=None if remedy is None else str(remedy),
        )
        if isinstance(error, RefusedError) and isinstance(fields.get("clauses"), list):
            error.clauses = [c for c in fields["clauses"] if isinstance(c, dict)]
        return error


class InputError(CenacleError):
    """What the user gave cannot be used."""

    exit_code = 2


class DocumentError(InputError):
    """A document does not parse, has unknown fields, or contradicts itself."""


class DataError(InputError):
    """A table or tensor file does not hold what it should."""


class VerificationError(CenacleError):
    """Something is not what it claims to be."""

    exit_code = 3


class SignatureError(VerificationError):
    """A signature is missing, wrong, or by a key that may not sign."""


class SealError(VerificationError):
    """A sealed container or wrapped key is damaged, forged, or for another key."""


class EvidenceError(VerificationError):
    """Evidence was not accepted: wrong signature, stale, unbound or unexpected."""


class ProofError(VerificationError):
    """A log proof, tree head or receipt does not hold."""


class IntegrityError(VerificationError):
    """An accelerator's result is not what was asked for."""


class RefusedError(CenacleError):
    """The rules say no. ``clauses`` names every clause with found and demanded."""

    exit_code = 4

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
        clauses: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(what, found=found, expected=expected, remedy=remedy)
        self.clauses: list[dict[str, Any]] = list(clauses or [])

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "clauses": self.clauses}


class ConflictError(CenacleError):
    """Somebody else came first, or this was done already; nothing was changed."""

    exit_code = 5


class UnavailableError(CenacleError):
    """A broker, disk or service cannot be reached or has no room."""

    exit_code = 6


class AcceleratorError(UnavailableError):
    """An accelerator died, hangs, fails, or answers with something that is no result."""


class EnclaveError(CenacleError):
    """The job failed inside the enclave."""

    exit_code = 7


_BY_NAME: dict[str, type[CenacleError]] = {
    kind.__name__: kind
    for kind in (
        CenacleError,
        InputError,
        DocumentError,
        DataError,
        VerificationError,
        SignatureError,
        SealError,
        EvidenceError,
        ProofError,
        RefusedError,
        ConflictError,
        IntegrityError,
        UnavailableError,
        AcceleratorError,
        EnclaveError,
    )
}
