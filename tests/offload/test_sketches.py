"""Checks of products whose operands were contracted on their way out: as sharp as others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cenacle.accelerators.buffers import Buffers
from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.operations import execute
from cenacle.errors import IntegrityError
from cenacle.offload import offload, passes
from cenacle.offload.integrity import Verifier
from cenacle.offload.maps import Convolution
from cenacle.offload.passes import blind
from cenacle.offload.schemes import permuted_moves
from tests.support import liars
from tests.support.liars import Lie, Lying, gradients

GEOMETRIES = {
    "3x3": (Convolution((1, 1), (1, 1), (1, 1), 1), (4, 20, 16, 16), (18, 20, 3, 3)),
    "many samples": (Convolution((1, 1), (1, 1), (1, 1), 1), (19, 3, 12, 10), (5, 3, 3, 3)),
    "one sample": (Convolution((1, 1), (0, 0), (1, 1), 1), (1, 17, 18, 18), (4, 17, 3, 3)),
    "strided": (Convolution((2, 3), (1, 2), (1, 1), 1), (3, 17, 21, 23), (5, 17, 3, 5)),
    "dilated": (Convolution((1, 2), (2, 1), (2, 3), 1), (3, 18, 19, 22), (6, 18, 3, 2)),
    "1x1": (Convolution((1, 1), (0, 0), (1, 1), 1), (4, 17, 16, 17), (9, 17, 1, 1)),
    "groups": (Convolution((1, 1), (1, 1), (1, 1), 2), (3, 8, 16, 16), (6, 4, 3, 3)),
    "few positions": (Convolution((1, 1), (1, 1), (1, 1), 1), (3, 17, 8, 8), (18, 17, 3, 3)),
}


@pytest.fixture(params=["compiled", "torch"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(passes, "compiled", lambda: None)
    elif passes.compiled() is None:
        pytest.skip("numba is not installed")


def sent(verifier: Verifier, value: torch.Tensor, *, folded: bool = True) -> torch.Tensor:
    """A copy that was contracted while it was written; in the places that it had."""
    found = torch.empty_like(value)
    rows, columns = value.shape[:2]
    plane = value[0, 0].numel()
    sketch = verifier.sketch(found, plane, Buffers(), folded=folded)
    blind(
        value.reshape(rows, columns, plane),
        found.view(rows, columns, plane),
        np.arange(rows, dtype=np.int32),
        np.arange(columns, dtype=np.int32),
        np.ones(rows, np.float32),
        np.ones(columns, np.float32),
        sketch=sketch,
    )
    assert torch.equal(found, value)
    assert verifier.sketched(found) is sketch is not None
    return found


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e16])
@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_truth_agrees_and_one_wrong_element_does_not(
    name: str, folded: bool, scale: float
) -> None:
    torch.manual_seed(0)
    map_, x_shape, w_shape = GEOMETRIES[name]
    verifier = Verifier()
    x = sent(verifier, torch.randn(x_shape).relu() * scale, folded=folded)
    w = torch.randn(w_shape)
    gy = torch.randn(x_shape[0], w_shape[0], *map_.space(x_shape, w_shape))
    g = sent(verifier, gy * scale, folded=True)
    for product, operands in (
        (map_.forward(), (x, w)),
        (map_.input_gradient(torch.Size(x_shape)), (g, w)),
        (map_.weight_gradient(torch.Size(w_shape)), (g, x)),
    ):
        result = product.compute(*operands)
        check = verifier.expect(product.operation, operands, owner=None, site="a layer")
        assert torch.equal(check.verify(result.clone()), result)
        assert verifier.doubts == 0
        where = torch.randint(0, result.numel(), (1,))
        wrong = result.clone()
        wrong.view(-1)[where] += 2 * result.abs().max()
        check = verifier.expect(product.operation, operands, owner=None, site="a layer")
        with pytest.raises(IntegrityError, match="a layer"):
            check.verify(wrong)
        verifier.doubts = 0


def test_a_sketch_is_only_of_the_very_operand() -> None:
    verifier = Verifier()
    value = sent(verifier, torch.randn(4, 3, 8, 8))
    assert verifier.sketched(value) is not None
    assert verifier.sketched(value.view(4, 3, 64)) is None
    assert verifier.sketched(value[:2]) is None
    assert verifier.sketched(value.clone()) is None
    alias = torch.from_numpy(value.numpy())
    assert verifier.sketched(alias) is not None
    address = value.data_ptr()
    del value
    assert verifier._sketches._known[address][0]() is None
    assert verifier.sketched(alias) is None  # what it was made for is gone
    assert Verifier(repetitions=3).sketch(alias, 64, Buffers(), folded=True) is None
    assert verifier.sketch(alias.double(), 64, Buffers(), folded=True) is None


def one_sample(value: torch.Tensor) -> None:
    value[-1] = value[0].clone()


LIES: Mapping[str, Lie] = {**liars.LIES, "sample": one_sample}


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(8, 5, 3), nn.ReLU(inplace=True), nn.Flatten(),
        )  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("operation", ["conv", "conv_input", "conv_weight"])
def test_a_liar_is_dropped_in_fused_passes_and_nothing_of_its_answer_is_used(
    operation: str, lie: str
) -> None:
    torch.manual_seed(1)
    plain = Net()
    for after in (0, 1):
        liar = Lying("liar", LIES[lie], lambda one: one.name == operation)
        net = copy.deepcopy(plain)
        with offload(net, "permuted", [liar]) as session:
            x = torch.randn(4, 3, 20, 20)
            for _ in range(2):  # learned, then fused
                gradients(net, x)
            assert not session.losses
            liar.after = after
            found = gradients(net, x)
            assert {lost.name for lost in session.losses} == {"liar"}
        for ours, theirs in zip(found, gradients(plain, x), strict=True):
            assert float((ours - theirs).norm()) < 1e-5 * float(theirs.norm())


@pytest.mark.parametrize("steps", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_honest_workers_are_never_doubted_in_fused_passes(steps: int) -> None:
    torch.manual_seed(2)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    for workers in ([InlineAccelerator("a")], [InlineAccelerator("a"), InlineAccelerator("b")]):
        with offload(net, "permuted", workers) as session:
            for _ in range(steps):
                assert all(g.isfinite().all() for g in gradients(net, torch.randn(4, 3, 20, 20)))
                optimizer.step()
            assert session.losses == ()
            assert session.fleet.verifier is not None
            assert session.fleet.verifier.doubts == 0


def test_nothing_is_read_again_after_the_pass_that_contracted_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that changes its answer after it was read changes nothing."""
    passed = []

    def late(source: torch.Tensor, *rest: Any, **options: Any) -> None:
        passes.unblind(source, *rest, **options)
        passed.append(options["tally"] is not None)
        source.fill_(torch.nan)

    monkeypatch.setattr(permuted_moves, "unblind", late)
    torch.manual_seed(3)
    plain = Net()
    net = copy.deepcopy(plain)
    x = torch.randn(4, 3, 20, 20)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        for _ in range(3):
            for ours, theirs in zip(gradients(net, x), gradients(plain, x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert session.losses == ()
    assert sum(passed) >= 8


def test_extreme_operands_are_contracted_again_in_float64() -> None:
    map_, x_shape, w_shape = GEOMETRIES["3x3"]
    verifier = Verifier()
    x = sent(verifier, torch.randn(x_shape) * 1e-30)
    w = torch.randn(w_shape)
    found = execute(map_.forward().operation, (x, w))
    check = verifier.expect(map_.forward().operation, (x, w), site="a layer")
    assert torch.equal(check.verify(found), found)
    assert verifier.doubts == 0
