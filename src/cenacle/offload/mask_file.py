"""The corrections of one generation of masks, sealed in one file.

A mask R is a keystream, so only what R becomes under a layer's weight, the correction R W, is
stored: in frames that are sealed with AES-256-GCM. Key: HKDF of the store's key and the
generation, a random number; nonce: the frame's place. So a frame can neither be altered nor
stand in another's place, and one of another generation is under another key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from cenacle.crypto import SecretBytes, derive_key
from cenacle.errors import InputError, SealError
from cenacle.offload.field import FieldStream, piece
from cenacle.sealing.disk import AtomicFile, disk_errors, open_source, pread_into, pwrite_all

__all__ = ["Correct", "MaskFile", "MaskPlan"]

_TAG: Final = 16


@dataclass(frozen=True)
class MaskPlan:
    """What masks a layer needs.

    Attributes:
        name: the layer and the shape of its input's rows; unique.
        x_size, y_size: elements of a row of its input and of its output.
        rows: of one unit.
        record: rows whose corrections are sealed together; divides ``rows``.
        digest: of the weight and geometry that the corrections are for.
    """

    name: str
    x_size: int
    y_size: int
    rows: int
    record: int
    digest: str

    @property
    def frames(self) -> int:
        """Sealed frames of a record."""
        return -(-self.record * self.y_size // piece())

    def rounded(self, rows: int) -> int:
        """Rows that are taken when ``rows`` are asked for: whole records."""
        return -(-rows // self.record) * self.record

    @property
    def record_bytes(self) -> int:
        return 4 * self.record * self.y_size + _TAG * self.frames


Correct = Callable[[MaskPlan, torch.Tensor], torch.Tensor]
"""The correction R W, (rows, y_size), for a mask R (rows, x_size); int32 field elements."""


class MaskFile:
    """A file of corrections, open for reading, and the masks that they are for.

    Args:
        path: as :meth:`write` made it.
        key: the store's.
        generation: names the keys; used for one file only.
        plans: of all layers, in the order of their numbers.
        count: units, each of ``plan.rows`` rows of every layer.

    Raises:
        InputError: the file is not there.
    """

    def __init__(
        self, path: Path, key: SecretBytes, generation: str, plans: Sequence[MaskPlan], count: int
    ) -> None:
        self._fd = open_source(path)
        self._plans = tuple(plans)
        self._streams = [_stream(key, generation, n) for n in range(len(plans))]
        self._cipher = _cipher(key, generation)
        self._offsets, offset = [], 0
        for plan in plans:
            self._offsets.append(offset)
            offset += plan.record_bytes * (count * plan.rows // plan.record)
        self._sealed = memoryview(bytearray(4 * piece() + _TAG))

    @staticmethod
    def write(
        path: Path,
        key: SecretBytes,
        generation: str,
        plans: Sequence[MaskPlan],
        count: int,
        correct: Correct,
    ) -> None:
        """Make the file; it appears whole or not at all.

        Raises:
            UnavailableError: no room on the disk.
        """
        cipher = _cipher(key, generation)
        with AtomicFile(path, 0o600) as file, disk_errors("write the masks"):
            offset = 0
            for layer, plan in enumerate(plans):
                stream = _stream(key, generation, layer)
                for record in range(count * plan.rows // plan.record):
                    first = record * plan.record * plan.x_size
                    mask = stream.tensor(first, (plan.record, plan.x_size))
                    values = correct(plan, mask).contiguous().numpy().reshape(-1)
                    if values.size != plan.record * plan.y_size or values.dtype != np.int32:
                        raise InputError("a correction has the wrong form", found=plan.name)
                    for frame in range(plan.frames):
                        part = values[frame * piece() : (frame + 1) * piece()]
                        nonce = _nonce(layer, record * plan.frames + frame)
                        sealed = cipher.encrypt(nonce, memoryview(part.data).cast("B"), None)
                        pwrite_all(file.fd, sealed, offset)
                        offset += len(sealed)
            file.commit()

    def stream(self, layer: int) -> FieldStream:
        """The layer's masks, row after row."""
        return self._streams[layer]

    def read(self, layer: int, record: int, frame: int, out: NDArray[np.int32]) -> None:
        """One frame's corrections, all of them.

        Raises:
            SealError: it is damaged, forged or not there.
        """
        plan = self._plans[layer]
        offset = self._offsets[layer] + record * plan.record_bytes + frame * (4 * piece() + _TAG)
        view = self._sealed[: out.nbytes + _TAG]
        with disk_errors("read the masks"):
            size = pread_into(self._fd, view, offset)
        try:
            # read into the enclave's memory first: the disk cannot change it any more
            nonce = _nonce(layer, record * plan.frames + frame)
            self._cipher.decrypt_into(nonce, view[:size], None, memoryview(out.data).cast("B"))
        except (InvalidTag, ValueError):
            raise SealError(
                "stored masks are damaged or forged",
                found=f"layer {plan.name}",
                remedy="remove the store and prepare masks anew",
            ) from None

    def close(self) -> None:
        os.close(self._fd)


def _stream(key: SecretBytes, generation: str, layer: int) -> FieldStream:
    context = (generation.encode(), layer.to_bytes(4, "big"))
    return FieldStream(derive_key(key, "offload/mask", *context, length=64))


def _cipher(key: SecretBytes, generation: str) -> AESGCM:
    label = "offload/mask-corrections"
    with derive_key(key, label, generation.encode()) as derived, derived.view() as view:
        return AESGCM(view)


def _nonce(layer: int, frame: int) -> bytes:
    return layer.to_bytes(4, "big") + frame.to_bytes(8, "big")
