"""The run's checkpoint number at the broker, as the counter of a mask store.

A :class:`~cenacle.offload.mask_store.MaskStore` in the host's folder cannot tell by itself
whether the host put an old copy of the folder back, whose masks are used up. The broker counts
the checkpoints of a run durably, only upwards, and only for the enclave that holds the run, and
tells the number to the next enclave that resumes it. So the ledger's versions are registered as
the run's checkpoints, and an old copy is refused.

A run has one such number: a job that keeps checkpoints of its own cannot use this. (Training
keeps checkpoints, and ``masked`` is for inference.)
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from cenacle.crypto import derive_key
from cenacle.enclave.session import Session
from cenacle.errors import ConflictError
from cenacle.offload.mask_store import MaskStore

__all__ = ["RunCounter", "open_mask_store"]

_LABEL: Final = b"cenacle/v1 offload mask ledger version "


def _digest(value: int) -> str:
    """What is registered with a version: it tells a mask ledger's from a checkpoint."""
    return "sha256:" + hashlib.sha256(_LABEL + str(value).encode()).hexdigest()


class RunCounter:
    """A :class:`~cenacle.offload.mask_ledger.MonotonicCounter` that the broker keeps.

    Raises:
        ConflictError: the run's newest checkpoint is not a mask ledger's version.
    """

    def __init__(self, session: Session) -> None:
        release = session.release
        self._session = session
        self._value = release.checkpoint_version
        if self._value and release.checkpoint_digest != _digest(self._value):
            raise ConflictError(
                "a run that has checkpoints cannot count the versions of a mask store",
                found=f"checkpoint {self._value}",
                remedy="keep masks in this process alone: use a store without a folder",
            )

    def value(self) -> int:
        """As the broker stated it at the release, or as advanced since by this enclave."""
        return self._value

    def advance(self, value: int) -> None:
        """Register a greater number; it is durable at the broker when this returns.

        Raises:
            ConflictError: it is not greater, or another enclave holds the run by now.
            UnavailableError: the broker did not answer for a minute. It may have counted.
        """
        if value <= self._value:
            raise ConflictError(
                "a counter only grows", found=value, expected=f"above {self._value}"
            )
        self._session.register_checkpoint(value, _digest(value))
        self._value = value


def open_mask_store(folder: Path, session: Session, *, stride: int = 16) -> MaskStore:
    """The run's mask store: enclaves that resume the run go on with it, and nobody else can.

    Raises:
        SealError: the folder is an old copy, damaged, or another run's.
        ConflictError: another process uses it, or the run has checkpoints.
    """
    key = derive_key(session.job_secret, "enclave/mask-store", session.release.run.encode())
    return MaskStore(folder, key, counter=RunCounter(session), stride=stride)
