"""Contractions that cancel by chance cast no doubt on honest workers, and cover no lie."""

from __future__ import annotations

import pytest
import torch

from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation
from cenacle.errors import IntegrityError
from cenacle.offload.integrity import Verifier

# A weight gradient of two samples: all contractions share two sums of random signs.
OPERATION = Operation("matmul", {"transpose_a": True})


def _operands() -> tuple[torch.Tensor, torch.Tensor]:
    gy = torch.randn(2, 512) * 1e-4 * (torch.rand(2, 512) > 0.5)
    return gy, torch.randn(2, 8192).relu()


def test_few_summands_cast_no_doubt() -> None:
    torch.manual_seed(0)
    verifier = Verifier()
    for _ in range(10):
        operands = _operands()
        verifier.expect(OPERATION, operands).verify(execute(OPERATION, operands))
    assert verifier.doubts == 0


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e6, 1e18, float("inf"), float("nan")])
def test_a_lie_does_not_widen_its_own_tolerance(size: float) -> None:
    torch.manual_seed(0)
    operands = _operands()
    lie = execute(OPERATION, operands)
    lie[3, 5] += size
    with pytest.raises(IntegrityError):
        Verifier().expect(OPERATION, operands).verify(lie)
