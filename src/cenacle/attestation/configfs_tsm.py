"""Reports of a confidential guest through Linux's configfs-tsm, for TDX and SEV-SNP.

Linux, *Documentation/ABI/testing/configfs-tsm-report*: making a directory below
``/sys/kernel/config/tsm/report`` gives a report with attributes. ``inblob`` (up to 64 bytes) and
``privlevel`` are written, ``outblob``, ``auxblob``, ``provider`` and ``generation`` are read.
Each write raises ``generation`` by one; a report that was made of other options than the reader
wrote is recognized by it. Removing the directory frees the report.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cenacle.errors import InputError, UnavailableError

__all__ = ["TSM_ROOT", "TsmDirectory", "TsmReport", "TsmReporter"]

TSM_ROOT: Final = Path("/sys/kernel/config/tsm/report")

_MAX_INBLOB: Final = 64
_MAX_BLOB: Final = 1024 * 1024
_TRIES: Final = 4


@dataclass(frozen=True, slots=True)
class TsmReport:
    """One report.

    Attributes:
        provider: the kernel's driver, ``tdx_guest`` or ``sev_guest``.
        outblob: a TDX quote, or an SEV-SNP report.
        auxblob: the certificate table of SEV-SNP; empty where there is none.
    """

    provider: str
    outblob: bytes
    auxblob: bytes


class TsmDirectory:
    """The file operations of configfs-tsm; a test may answer them without a kernel."""

    def __init__(self, root: Path = TSM_ROOT) -> None:
        self._root = root

    @property
    def available(self) -> bool:
        """Whether the kernel offers reports here."""
        return self._root.is_dir()

    def make(self, name: str) -> None:
        (self._root / name).mkdir(mode=0o700)

    def remove(self, name: str) -> None:
        (self._root / name).rmdir()

    def read(self, name: str, attribute: str) -> bytes:
        with (self._root / name / attribute).open("rb") as file:
            return file.read(_MAX_BLOB + 1)

    def write(self, name: str, attribute: str, data: bytes) -> None:
        # One write, then close: configfs commits a binary attribute when it is closed.
        fd = os.open(self._root / name / attribute, os.O_WRONLY)
        try:
            if os.write(fd, data) != len(data):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        finally:
            os.close(fd)


class TsmReporter:
    """Asks the kernel for reports; every call has a report directory of its own.

    Args:
        directory: where; the kernel's unless a test gives another.
    """

    def __init__(self, directory: TsmDirectory | None = None) -> None:
        self._directory = TsmDirectory() if directory is None else directory

    @property
    def available(self) -> bool:
        return self._directory.available

    def report(self, inblob: bytes, *, provider: str, privlevel: int | None = None) -> TsmReport:
        """A report that carries ``inblob``.

        Args:
            inblob: 64 bytes of report data.
            provider: the driver that must answer, e.g. ``tdx_guest``.
            privlevel: privilege level (SEV-SNP's VMPL); the guest's own where it is left out.

        Raises:
            InputError: the report data has another length.
            UnavailableError: the kernel offers no reports, another driver answers, or others
                kept changing the report while it was made.
        """
        if len(inblob) != _MAX_INBLOB:
            raise InputError(
                "report data has the wrong length",
                found=f"{len(inblob)} bytes",
                expected=f"{_MAX_INBLOB} bytes",
            )
        if not self._directory.available:
            raise UnavailableError(
                "this machine offers no hardware reports",
                found="no configfs-tsm",
                expected=f"{TSM_ROOT} (Linux 6.7 or later in a TDX or SEV-SNP guest)",
                remedy="load the module tdx_guest or sev-guest, and mount configfs",
            )
        name = f"cenacle-{secrets.token_hex(8)}"
        try:
            self._directory.make(name)
        except OSError as error:
            raise _unavailable("make a report", error) from None
        try:
            return self._ask(name, inblob, provider, privlevel)
        finally:
            with contextlib.suppress(OSError):  # nothing is lost but a directory of the kernel
                self._directory.remove(name)

    def _ask(self, name: str, inblob: bytes, provider: str, privlevel: int | None) -> TsmReport:
        for _ in range(_TRIES):
            try:
                found = self._directory.read(name, "provider").decode("ascii", "replace").strip()
                if found != provider:
                    raise UnavailableError(
                        "this machine makes reports of another kind", found=found, expected=provider
                    )
                before = self._generation(name)
                writes = 1
                if privlevel is not None:
                    self._directory.write(name, "privlevel", str(privlevel).encode())
                    writes += 1
                self._directory.write(name, "inblob", inblob)
                outblob = self._directory.read(name, "outblob")
                auxblob = self._optional(name, "auxblob")
                after = self._generation(name)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                    continue  # the options changed while the report was made
                raise _unavailable("make a report", error) from None
            if after != before + writes:
                continue
            if not 1 <= len(outblob) <= _MAX_BLOB or len(auxblob) > _MAX_BLOB:
                raise UnavailableError(
                    "the kernel's report has an impossible size", found=f"{len(outblob)} bytes"
                )
            return TsmReport(provider=found, outblob=outblob, auxblob=auxblob)
        raise UnavailableError(
            "others kept changing the report while it was made",
            found=f"{_TRIES} tries",
            remedy="look who else writes below the report directory: it should be nobody",
        )

    def _generation(self, name: str) -> int:
        text = self._directory.read(name, "generation").decode("ascii", "replace").strip()
        if not text.isdecimal():
            raise UnavailableError("the kernel's report has no generation", found=repr(text[:20]))
        return int(text)

    def _optional(self, name: str, attribute: str) -> bytes:
        try:
            return self._directory.read(name, attribute)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENXIO, errno.EOPNOTSUPP):
                return b""
            raise


def _unavailable(doing: str, error: OSError) -> UnavailableError:
    return UnavailableError(
        f"the kernel does not {doing}",
        found=error.strerror or errno.errorcode.get(error.errno or 0, "an error"),
        remedy="reading reports needs root; look at the kernel's log for the driver's answer",
    )
