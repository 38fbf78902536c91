"""Quotes of an SGX enclave that runs under Gramine, through ``/dev/attestation``.

Gramine documentation, *Attestation and Secret Provisioning*: ``attestation_type`` says what kind
the manifest chose, ``user_report_data`` takes 64 bytes, reading ``quote`` then makes a quote of
them. The files are the process's own, so two threads must not use them at once.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from cenacle.errors import InputError, UnavailableError

__all__ = ["GRAMINE_ROOT", "GramineQuoter"]

GRAMINE_ROOT: Final = Path("/dev/attestation")
_MAX_QUOTE: Final = 64 * 1024
_LOCK: Final = threading.Lock()


class GramineQuoter:
    """Asks Gramine for quotes.

    Args:
        root: where Gramine's files are.
    """

    def __init__(self, root: Path = GRAMINE_ROOT) -> None:
        self._root = root

    @property
    def available(self) -> bool:
        """Whether this process runs under Gramine with attestation."""
        return (self._root / "quote").exists()

    def quote(self, report_data: bytes) -> bytes:
        """A DCAP quote that carries 64 bytes of report data.

        Raises:
            InputError: the report data has another length.
            UnavailableError: this is not Gramine, or its manifest chose no DCAP attestation.
        """
        if len(report_data) != 64:
            raise InputError(
                "report data has the wrong length",
                found=f"{len(report_data)} bytes",
                expected="64 bytes",
            )
        try:
            with _LOCK:
                kind = (self._root / "attestation_type").read_text("ascii").strip()
                if kind != "dcap":
                    raise UnavailableError(
                        "Gramine was not told to make DCAP quotes",
                        found=repr(kind[:20]),
                        expected="'dcap'",
                        remedy='set sgx.remote_attestation = "dcap" in the manifest',
                    )
                # Opened for writing only: Gramine's file takes the 64 bytes in one write.
                with (self._root / "user_report_data").open("wb", buffering=0) as file:
                    file.write(report_data)
                with (self._root / "quote").open("rb", buffering=0) as file:
                    quote = file.read(_MAX_QUOTE + 1) or b""
        except FileNotFoundError:
            raise UnavailableError(
                "this process does not run in an SGX enclave under Gramine",
                found=f"no {self._root}",
                remedy="start it with gramine-sgx, and sgx.remote_attestation in the manifest",
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise UnavailableError(
                "Gramine makes no quote",
                found=getattr(error, "strerror", None) or type(error).__name__,
                remedy="look whether the host's AESM service and quoting enclave run",
            ) from None
        if not 1 <= len(quote) <= _MAX_QUOTE:
            raise UnavailableError("Gramine's quote has an impossible size", found=len(quote))
        return quote
