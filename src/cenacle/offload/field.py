"""Fixed point and exact arithmetic in the field of integers modulo p = 2^31 - 1.

A real tensor becomes integers with a scale. A product of two of them is exact in the field as
long as its magnitude stays below p/2, which is made sure of from true bounds: for
``y = sum_k w_k x_k`` and ``|x_k| <= A``, ``A sum_k |w_k| < p/2``.

p is a Mersenne prime: its elements are 31 random bits (drawn again when all are ones), fit an
``int32``, and reduce by shifts. Slalom's own prime, 2^23 + 2^21 + 7, was chosen for float32;
in float64 a larger field costs no more bytes across and leaves 7 bits more for precision.

Source: Tramer and Boneh, Slalom (ICLR 2019), sections 3 and 4.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from cenacle.accelerators.operations import PRIME
from cenacle.crypto.memory import SecretBytes
from cenacle.errors import DataError
from cenacle.offload.field_kernels import kernels

__all__ = [
    "HALF",
    "PRIME",
    "FieldStream",
    "FixedWeight",
    "fix_weight",
    "lift",
    "peaks",
    "piece",
    "row_scales",
    "to_field",
]

HALF: Final = PRIME // 2
"""The greatest magnitude of a lifted element."""
_PIECE: Final = 1 << 16
_ZEROS: Final = memoryview(bytes(4 * _PIECE))
_SMALLEST, _GREATEST = 512, 32767  # steps of the activations; 512 keeps one float64 product exact
_CREST: Final = 12.5  # of activations over weights: balances their two errors, see fix_weight


def piece() -> int:
    """How many elements are worked on at a time: as much as stays in a core's cache."""
    return _PIECE


# ---------------------------------------------------------------------- randomness


class FieldStream:
    """Uniform field elements by position, from AES-256 in counter mode.

    Element n is 31 bits of the keystream's n-th word. A word of 31 ones is no element; it is
    drawn again from a second keystream at the same position, so that every element is exactly
    uniform and can be made without those before it.

    Args:
        key: 64 bytes, used for nothing else: two AES keys.
    """

    def __init__(self, key: SecretBytes) -> None:
        if len(key) != 64:
            raise ValueError("a field stream needs a key of 64 bytes")
        self._key = key

    def reader(self, first: int) -> Callable[[NDArray[np.uint32], int], NDArray[np.uint32]]:
        """Elements from ``first`` on, one piece after the other.

        The function that is returned takes memory and a number of elements, four less than
        there is room for; it returns the next elements, which lie in that memory.
        """
        words = self._words(0, first)
        at = first

        def read(memory: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
            nonlocal at
            part = words(memory, count)
            if kernels().settle(part):
                for where in np.flatnonzero(part == PRIME):
                    part[where] = self._again(at + int(where))
            at += count
            return part

        return read

    def _words(
        self, half: int, first: int
    ) -> Callable[[NDArray[np.uint32], int], NDArray[np.uint32]]:
        """The keystream's words from ``first`` on, as :meth:`reader`."""
        block, skip = divmod(first, 4)
        with self._key.view() as view:
            cipher = Cipher(
                algorithms.AES(view[32 * half : 32 * half + 32]),
                modes.CTR(block.to_bytes(16, "big")),
            )
            stream = cipher.encryptor()
        stream.update(bytes(4 * skip))

        def read(memory: NDArray[np.uint32], count: int) -> NDArray[np.uint32]:
            # the cipher wants room for a block more
            stream.update_into(_ZEROS[: 4 * count], memoryview(memory.data).cast("B"))
            return memory[:count]

        return read

    def _again(self, position: int) -> int:
        lap = 0
        memory = np.empty(8, np.uint32)
        while True:  # a lap fails with probability 2^-124
            words = self._words(1, 4 * (position + (lap << 64)))(memory, 4)
            for word in words & np.uint32(PRIME):
                if word != PRIME:
                    return int(word)
            lap += 1

    def tensor(self, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Elements as an ``int32`` tensor."""
        size = math.prod(shape)
        memory, read = np.empty(size + 4, np.uint32), self.reader(first)
        for begin in range(0, size, _PIECE):
            read(memory[begin:], min(_PIECE, size - begin))
        return torch.from_numpy(memory[:size].view(np.int32)).view(shape)


# ---------------------------------------------------------------------- fixed point


@dataclass(frozen=True)
class FixedWeight:
    """A weight as integers.

    Attributes:
        values: of the weight's shape, int16 where that is enough, else int32.
        scale: float32, one for each output: what an integer of that output stands for.
        steps: the greatest magnitude A that activations may have as integers.
        digest: of all that decides over a product with it.
    """

    values: torch.Tensor
    scale: torch.Tensor
    steps: int
    digest: bytes


def fix_weight(w: torch.Tensor, geometry: object) -> FixedWeight:
    """Quantise a weight (out, ...), and choose the activations' steps to go with it.

    With fan-in K the errors of activations and weights in a product are about c_x/A and
    c_w K A / p of its size; they are equal for A = sqrt(12.5 p / (2 K)). Each output gets the
    largest scale with A sum |w| <= p/2, so no sum can overflow, whatever the activations are.

    Raises:
        DataError: the weight has no finite values, or too many inputs for one output.
    """
    flat = w.detach().reshape(w.shape[0], -1).double()
    fan_in = flat.shape[1]
    steps = int(np.clip(math.sqrt(_CREST * HALF / max(fan_in, 1)), _SMALLEST, _GREATEST))
    budget = HALF // steps
    total = flat.abs().sum(1)
    if not bool(torch.isfinite(total).all()):
        raise DataError("a weight is not finite", expected="finite numbers")
    room = budget - fan_in / 2  # rounding moves each element by a half at most
    if room <= 0:
        raise DataError("a layer has too many inputs for the field", found=fan_in)
    factor = torch.where(total > 0, room / total, 0.0)
    values = (flat * factor.unsqueeze(1)).round().long()
    if int(values.abs().sum(1).max()) > budget:
        raise DataError("a weight does not fit the field", expected=f"sums of at most {budget}")
    scale = torch.where(factor > 0, 1 / factor, 0.0).float()
    small = int(values.abs().max()) <= torch.iinfo(torch.int16).max
    fixed = values.view(w.shape).to(torch.int16 if small else torch.int32).contiguous()
    content = hashlib.sha256(f"{PRIME} {steps} {tuple(w.shape)} {geometry!r}".encode())
    content.update(memoryview(fixed.numpy().data).cast("B"))
    return FixedWeight(fixed, scale, steps, content.digest())


def peaks(rows: torch.Tensor) -> NDArray[np.float32]:
    """The greatest magnitude in each row of a contiguous float32 tensor (rows, elements).

    Raises:
        DataError: an element is not finite.
    """
    bits = rows.numpy().view(np.int32)
    peak = kernels().peak
    found = np.fromiter((peak(row) for row in bits), np.int32, len(bits)).view(np.float32)
    if not np.isfinite(found).all():
        raise DataError("an activation is not finite", expected="finite numbers")
    return found


def row_scales(rows: torch.Tensor, steps: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """For each row: the factor that makes integers of at most ``steps`` of it, and back."""
    peak = peaks(rows).astype(np.float64)
    seen = peak > steps * 1e-37  # below that the factor is no float32: the row counts as zero
    inverse = np.divide(steps, peak, out=np.zeros_like(peak), where=seen)
    return inverse.astype(np.float32), np.where(seen, peak / steps, 0.0).astype(np.float32)


def to_field(values: torch.Tensor) -> torch.Tensor:
    """Signed integers to field elements, int32."""
    return torch.remainder(values.long(), PRIME).int()


def lift(values: torch.Tensor) -> torch.Tensor:
    """Field elements to the signed integers of least magnitude, int64."""
    wide = values.long()
    return torch.where(wide > HALF, wide - PRIME, wide)
