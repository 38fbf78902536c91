"""Freivalds' check in a field: exact, for the ``*_mod`` operations.

As :mod:`cenacle.offload.contractions`, with random field elements and without tolerances. The
enclave's contractions are products of the same kind with one row or one column.

R. Freivalds, Probabilistic machines can use less running time, IFIP Congress 1977.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch

from cenacle.accelerators.operations import PRIME, execute
from cenacle.accelerators.protocol import Operation
from cenacle.errors import IntegrityError

__all__ = ["FieldCheck", "random_residues"]

_SPLIT: Final = {"split": [True, True]}


def random_residues(shape: Sequence[int], entropy: Callable[[int], bytes]) -> torch.Tensor:
    """Uniform in 0 .. PRIME - 1, int64: 64 random bits reduced, at 2^-33 from uniform."""
    words = np.frombuffer(entropy(8 * math.prod(shape)), dtype="<u8") % np.uint64(PRIME)
    return torch.from_numpy(words.astype(np.int64).reshape(tuple(shape)))


class FieldCheck:
    """The check of one product modulo :data:`~cenacle.accelerators.operations.PRIME`.

    A wrong result passes with probability at most (2 / PRIME)^repetitions.
    """

    def __init__(
        self,
        operation: Operation,
        operands: Sequence[torch.Tensor],
        lengths: tuple[int, int, int],
        repetitions: int,
        entropy: Callable[[int], bytes],
    ) -> None:
        self._operation = operation
        features, rows, inputs = lengths
        self._groups: int = operation.attributes.get("groups", 1)
        self._r = random_residues((repetitions, features), entropy)
        self._s = random_residues((1, rows), entropy) if rows else None
        self._q = random_residues((repetitions, inputs), entropy) if inputs else None
        self._expected = self._through(operands)

    def verify(self, y: torch.Tensor, site: str) -> None:
        """Raise :class:`IntegrityError` if ``y``, of the right form, is not the product."""
        if y.is_floating_point() or bool(((y < 0) | (y >= PRIME)).any()):
            raise IntegrityError(
                f"a result for {site} has elements that are not in the field",
                expected=f"integers from 0 to {PRIME - 1}",
            )
        wrong = self._contract(y) != self._expected
        if wrong.any():
            raise IntegrityError(
                f"a result for {site} is not the product that was asked for",
                found=f"{int(wrong.sum())} of {wrong.numel()} contractions differ",
                expected=f"all equal modulo {PRIME}",
            )

    def _contract(self, y: torch.Tensor) -> torch.Tensor:
        if self._operation.name.startswith("matmul"):
            return _times(y, self._r.mT)
        if self._q is not None:
            groups = self._groups
            folded = _times(_grouped(self._r, groups), y.reshape(groups, y.shape[0] // groups, -1))
            folded = folded.view(groups, len(self._r), y.shape[1], -1)
            return _times(_grouped(self._q, groups).unsqueeze(2), folded).squeeze(2)
        assert self._s is not None
        planes = _times(self._r, y.reshape(*y.shape[:2], -1))
        return _times(self._s, planes.view(len(planes), -1)).view(len(self._r), -1)

    def _through(self, operands: Sequence[torch.Tensor]) -> torch.Tensor:
        a, b = operands
        name, groups, repetitions = self._operation.name, self._groups, len(self._r)
        attributes: dict[str, Any] = {**self._operation.attributes, **_SPLIT}
        if name == "matmul_weight_mod":
            return _times(b.mT, _times(a, self._r.mT))
        if name == "matmul_mod":
            left = a.mT if attributes.get("transpose_a") else a
            right = b.mT if attributes.get("transpose_b") else b
            return _times(left, _times(right, self._r.mT))
        if self._q is not None:
            folded = [
                _times(_grouped(v, groups), t.reshape(len(t), groups, t.shape[1] // groups, -1))
                .reshape(len(t), groups * repetitions, *t.shape[2:])
                .contiguous()
                for t, v in ((a, self._r), (b, self._q))
            ]
            kernel = attributes["shape"][2:]
            attributes |= {
                "groups": groups * repetitions,
                "shape": [groups * repetitions, 1, *kernel],
            }
            found = execute(Operation(name, attributes), folded)
            return found.view(groups, repetitions, -1)
        assert self._s is not None
        image = _times(self._s, a.reshape(len(a), -1)).view(1, *a.shape[1:])
        kernel = b.shape[2:]
        r = _grouped(self._r, groups)  # (groups, R, channels)
        attributes["groups"] = 1
        if name == "conv_input_mod":
            split = b.reshape(len(b), b.shape[1], -1).view(groups, -1, b.shape[1], kernel.numel())
            weight = _times(r.unsqueeze(1), split)  # (groups, out, R, taps)
            weight = weight.reshape(len(b), repetitions, *kernel)
            attributes["shape"] = [repetitions, *attributes["shape"][1:]]
        else:
            split = b.reshape(groups, len(b) // groups, -1)
            weight = _times(r, split).transpose(0, 1)  # (R, groups, in * taps)
            weight = weight.reshape(repetitions, -1, *kernel)
        return execute(Operation(name, attributes), [image, weight]).view(repetitions, -1)


def _grouped(vectors: torch.Tensor, groups: int) -> torch.Tensor:
    """(R, channels) to (groups, R, channels of a group)."""
    return vectors.view(vectors.shape[0], groups, -1).transpose(0, 1)


def _times(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return execute(Operation("matmul_mod", _SPLIT), [a.long(), b.long()])
