"""Matrices contracted in the pass that moves them: the same numbers, and as sharp a check."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.operations import execute
from cenacle.accelerators.protocol import Operation
from cenacle.errors import InputError, IntegrityError
from cenacle.offload import expectations, matrix_passes, offload
from cenacle.offload.contractions import Expected, ExpectedProduct
from cenacle.offload.integrity import Check, Verifier
from cenacle.offload.kernels import move_planes
from cenacle.offload.matrix_passes import (
    Asked,
    MatrixSketch,
    MatrixTally,
    blind_matrix,
    unblind_matrix,
)
from cenacle.offload.schemes import permuted_moves
from cenacle.offload.tolerance import Tolerance
from tests.support import liars
from tests.support.liars import Lie, Lying, gradients

pytest.importorskip("numba")

SHAPES = [
    (1, 1, 1), (1, 5, 7), (3, 4, 9), (2, 70, 33), (12, 21, 16), (1, 300, 64),
    pytest.param((5, 3, 4100), marks=pytest.mark.slow),  # compiled for itself
]  # fmt: skip


class Keyed:
    """A batch of matrices below each other, and keys that keep each together."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        draw = np.random.default_rng(sum(shape))
        self.batch, self.each, self.width = shape
        count = self.batch * self.each
        rows = draw.permutation(self.batch)[:, None] * self.each + draw.permutation(self.each)
        self.rows = rows.ravel().astype(np.int32)
        self.cols = draw.permutation(self.width).astype(np.int32)
        self.row_scale = draw.choice([-1, 1], count).astype(np.float32)
        self.col_scale = draw.choice([-1, 1], self.width).astype(np.float32)
        self.value = torch.from_numpy(draw.standard_normal((count, self.width))).float()
        self.keys = (self.rows, self.cols, self.row_scale, self.col_scale)

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(self.batch, self.each, self.width).double()


def moved(k: Keyed, sums: torch.Tensor | None = None) -> torch.Tensor:
    found = torch.empty_like(k.value)
    move_planes(k.value.unsqueeze(2), found.unsqueeze(2), *k.keys, sums=sums)
    return found


def close(found: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert found is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_blinding_moves_and_contracts(shape: tuple[int, int, int], shared: bool) -> None:
    k = Keyed(shape)
    verifier = Verifier()
    first = MatrixSketch(1 if shared else k.batch, k.each, k.width)
    first.left = torch.randn(first.batch, k.width, 2, dtype=torch.float64)
    second = MatrixSketch(k.batch, k.each, 3)
    second.right = torch.randn(k.batch, k.each, 2, dtype=torch.float64)
    found = torch.empty_like(k.value)
    sketch = MatrixSketch(k.batch, k.each, k.width, along=(first, "left"), across=second)
    sketch.lefts, sketch.rights = verifier.signs(2, k.each), verifier.signs(2, k.width)
    wanted, sums = torch.zeros(2, k.width, dtype=torch.float64)
    blind_matrix(k.value, found, *k.keys, sketch, sums)
    assert torch.equal(found, moved(k, wanted))
    torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-5)
    x = k.batched(found)
    close(sketch.right, x @ sketch.rights.mT)
    close(sketch.left, x.mT @ sketch.lefts.mT)
    close(sketch.after, x @ first.left)
    close(sketch.over, x.mT @ second.right)
    close(sketch.row_squares, x.square().sum(2))
    close(sketch.col_squares, x.square().sum(1))
    close(sketch.energy("left"), x.square().sum(2) @ sketch.lefts.square().mT)
    close(sketch.energy("right"), x.square().sum(1) @ sketch.rights.square().mT)
    assert not sketch.extreme


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_unblinding_moves_and_contracts(shape: tuple[int, int, int], transposed: bool) -> None:
    k = Keyed(shape)
    bias = torch.randn(k.width)
    r = Verifier().signs(2, k.each if transposed else k.width)
    tally = MatrixTally(r, k.each, transposed)
    found, wanted = torch.empty_like(k.value), torch.empty_like(k.value)
    unblind_matrix(k.value, found, *k.keys, tally, bias)
    order = np.arange(len(k.rows), dtype=np.int32)
    move_planes(
        k.value.unsqueeze(2), wanted.unsqueeze(2), order, *k.keys[1:], into=k.rows, bias=bias
    )
    assert torch.equal(found, wanted)
    x = k.batched(k.value)
    close(tally.found, (x.mT if transposed else x) @ r.mT)


@pytest.mark.parametrize("number", [1e-25, 1e25, float("inf"), float("nan")])
def test_extreme_rows_are_noticed_and_empty_ones_are_none(number: float) -> None:
    k = Keyed((2, 6, 9))
    k.value[3] = 0
    for extreme in (False, True):
        if extreme:
            k.value[7] = number
        sketch = MatrixSketch(2, 6, 9, rights=Verifier().signs(2, 9))
        blind_matrix(k.value, torch.empty_like(k.value), *k.keys, sketch)
        assert sketch.extreme is extreme


@pytest.mark.parametrize("wrong", ["rows", "outside", "batch", "secret", "along", "across", "r"])
def test_what_does_not_fit_is_refused(wrong: str) -> None:
    k = Keyed((2, 6, 9))
    rows, cols, scales = k.rows.copy(), k.cols.copy(), (k.row_scale, k.col_scale)
    sketch = MatrixSketch(2, 6, 9, rights=Verifier().signs(2, 9))
    tally = MatrixTally(Verifier().signs(2, 9), 6, False)
    if wrong == "rows":
        rows = rows[:-1]
    elif wrong == "outside":
        cols[0] = 9
    elif wrong == "batch":
        sketch.batch = tally.each = 5
    elif wrong == "secret":
        sketch.rights = Verifier().signs(2, 8)
        tally.r = Verifier().signs(2, 8)
    elif wrong == "along":
        sketch.along = MatrixSketch(1, 6, 8, left=torch.zeros(1, 8, 2)), "left"
    elif wrong == "across":
        sketch.across = MatrixSketch(2, 5, 9, right=torch.zeros(2, 5, 2))
    else:
        sketch.rights = tally.r = Verifier().signs(1, 9)
    with pytest.raises(InputError, match=r"matrices cannot|planes cannot"):
        blind_matrix(k.value, torch.empty_like(k.value), rows, cols, *scales, sketch)
    if wrong not in {"along", "across"}:
        with pytest.raises(InputError, match=r"matrices cannot|planes cannot"):
            unblind_matrix(k.value, torch.empty_like(k.value), rows, cols, *scales, tally)


# ---------------------------------------------------------------------- checks

B_FIRST = {
    "dense": (Operation("matmul", {"transpose_b": True}), (40, 30), (20, 30), "left"),
    "input gradient": (Operation("matmul"), (40, 20), (20, 30), "right"),
    "weight gradient": (Operation("matmul", {"transpose_a": True}), (40, 20), (40, 30), "across"),
    "flipped": (Operation("matmul_weight"), (40, 20), (40, 30), "across"),
    "scores": (Operation("matmul", {"transpose_b": True}), (6, 21, 16), (6, 17, 16), "left"),
    "values": (Operation("matmul"), (6, 21, 17), (6, 17, 16), "right"),
    "values' gradient": (Operation("matmul_weight"), (6, 21, 16), (6, 21, 17), "across"),
}


def sent(verifier: Verifier, value: torch.Tensor, asked: Asked) -> torch.Tensor:
    """A copy that was contracted while it was written, in the places that it had."""
    found = torch.empty_like(value)
    sketch = verifier.sketch_matrix(found, asked)
    assert sketch is not None
    count, width = value.numel() // value.shape[-1], value.shape[-1]
    blind_matrix(
        value.view(count, width),
        found.view(count, width),
        np.arange(count, dtype=np.int32),
        np.arange(width, dtype=np.int32),
        np.ones(count, np.float32),
        np.ones(width, np.float32),
        sketch,
    )
    assert torch.equal(found, value)
    return found


def prepared(
    verifier: Verifier, name: str, scale: float
) -> tuple[Operation, tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """An operation, its operands with sketches, and its result."""
    operation, shape, other, how = B_FIRST[name]
    a, b = torch.randn(shape) * scale, torch.randn(other)
    b = sent(verifier, b, Asked(("left", "right")))
    a = sent(
        verifier,
        a,
        Asked(across=b) if how == "across" else Asked(along=(b, how)),  # type: ignore[arg-type]
    )
    return operation, (a, b), execute(operation, (a, b))


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e9])
@pytest.mark.parametrize("name", B_FIRST)
def test_the_truth_agrees_and_one_wrong_element_does_not(
    name: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(expectations, "multiply", lambda *_: pytest.fail("read again"))
    verifier = Verifier()
    operation, operands, truth = prepared(verifier, name, scale)
    for _ in range(40):
        check = verifier.expect(operation, operands, site="a layer")
        assert check.verify(truth.clone()).equal(truth)
        assert verifier.doubts == 0
        wrong = truth.clone()
        where = int(torch.randint(0, truth.numel(), (1,)))
        wrong.view(-1)[where] += truth.abs().max() * 0.1
        with pytest.raises(IntegrityError, match="a layer"):
            verifier.expect(operation, operands, site="a layer").verify(wrong)
        verifier.doubts = 0


@pytest.mark.parametrize("name", B_FIRST)
def test_expectations_are_those_of_operands_that_are_read(name: str) -> None:
    torch.manual_seed(1)
    verifier = Verifier()
    operation, operands, _ = prepared(verifier, name, 1.0)
    check = verifier.expect(operation, operands)
    assert isinstance(check._expected, ExpectedProduct)
    assert check.vectors is not None
    read = expectations.expected(operation, operands, check.vectors)
    close(check._expected.value, read.value.double())
    close(check._expected.scale, read.scale)


def test_operands_that_were_not_contracted_for_each_other_are_read() -> None:
    verifier = Verifier()
    operation, (a, b), truth = prepared(verifier, "dense", 1.0)
    copied = a.clone()
    for operands in ((copied, b), (a, b.clone())):
        check = verifier.expect(operation, operands)
        assert isinstance(check._expected, Expected)
        assert check.verify(truth) is truth
    other = sent(verifier, torch.randn(30, 30), Asked(("left", "right")))
    square = sent(verifier, torch.randn(40, 30), Asked(along=(other, "left")))
    for transposed, kind in ((True, ExpectedProduct), (False, Expected)):
        turned = Operation("matmul", {"transpose_b": transposed})
        check = verifier.expect(turned, (square, other))
        assert isinstance(check._expected, kind)
        result = square @ (other.mT if transposed else other)
        assert check.verify(result) is result
    assert verifier.doubts == 0
    assert Verifier(repetitions=3).sketch_matrix(a, Asked(("left",))) is None
    assert verifier.sketch_matrix(a.double(), Asked(("left",))) is None
    assert verifier.sketch_matrix(a, Asked(along=(copied, "left"))) is None


def test_what_is_extreme_is_read_again_in_float64() -> None:
    verifier = Verifier()
    operation, operands, truth = prepared(verifier, "dense", 1e-25)
    check = verifier.expect(operation, operands)
    assert isinstance(check._expected, Expected)
    assert check.verify(truth) is truth
    assert verifier.doubts == 0


@pytest.mark.parametrize("energy", [False, True])
def test_compiled_tolerances_are_those_of_torch(
    energy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    value = torch.randn(3, 5, 2, dtype=torch.float64)
    rows, columns = torch.rand(3, 5).double(), torch.rand(3, 2).double()
    want: Expected | ExpectedProduct = ExpectedProduct(value, rows, columns)
    if not energy:
        want = Expected(value, want.scale)
    tolerance = Tolerance((3, 5, 7), torch.float32, 100, 2.0**-24)
    limit = tolerance._bound(want.scale.square(), value.square(), (100 + 105 / 30) / 9)
    for share, agrees in ((0.999, True), (1.001, False)):
        for sign in (1, -1):
            found = value.clone()
            found.view(-1)[17] += sign * share * limit.view(-1)[17]
            for compiled in (True, False):
                with monkeypatch.context() as patch:
                    if not compiled:
                        patch.setattr("cenacle.offload.tolerance.compiled_sums", lambda: None)
                    assert tolerance.agrees(found, want) is agrees
    for bad in (torch.nan, torch.inf):
        found = value.clone()
        found.view(-1)[3] = bad
        assert not tolerance.agrees(found, want)


# ---------------------------------------------------------------------- in a session


LIES: Mapping[str, Lie] = {
    **liars.LIES,
    "rows": lambda value: value.copy_(value.flip(-2)),
}
OPERATIONS = {
    "products": Operation("matmul"),
    "crossed": Operation("matmul", {"transpose_b": True}),
    "weights": Operation("matmul", {"transpose_a": True}),
    "values": Operation("matmul_weight"),
}


def layer() -> nn.Module:
    torch.manual_seed(3)
    return nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        assert float((ours - theirs).norm()) < 1e-4 * float(theirs.norm()) + 1e-6


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_liar_is_dropped_and_nothing_of_its_answer_is_used(operation: str, lie: str) -> None:
    plain = layer()
    for after in (0, 1):
        liar = Lying("liar", LIES[lie], OPERATIONS[operation].__eq__)
        net = copy.deepcopy(plain)
        x = torch.randn(3, 11, 16)
        with offload(net, "permuted", [liar]) as session:
            liar.after = after
            found = gradients(net, x)
            assert {lost.name for lost in session.losses} == {"liar"}
        same(found, gradients(plain, x))


def test_the_operands_of_a_transformer_are_not_read_for_its_checks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(expectations, "multiply", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(Check, "verify", lambda *_: pytest.fail("copied"))
    plain = layer()
    net = copy.deepcopy(plain)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        for step in range(60):
            x = torch.randn(3, 11, 16)
            found = gradients(net, x)
            if step == 0:
                same(found, gradients(plain, x))
            optimizer.step()
            with torch.inference_mode():
                net.eval()(x)
            net.train()
        assert session.losses == ()
        assert session.fleet.verifier is not None
        assert session.fleet.verifier.doubts == 0


@pytest.mark.parametrize("way", ["two workers", "coefficients", "repetitions", "no numba"])
def test_other_ways_give_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = layer()
    net = copy.deepcopy(plain)
    x = torch.randn(4, 11, 16)
    workers = [InlineAccelerator(name) for name in ("a", "b")[: 1 + (way == "two workers")]]
    options: dict[str, Any] = {}
    if way == "coefficients":
        options["coefficients"] = "general"
    elif way == "repetitions":
        options["check"] = Verifier(repetitions=3)
    elif way == "no numba":
        monkeypatch.setattr("cenacle.offload.sketches.compiled_matrices", lambda: None)
        monkeypatch.setattr(permuted_moves, "compiled_matrices", lambda: None)
    with offload(net, "permuted", workers, **options) as session:
        same(gradients(net, x), gradients(plain, x))
        assert session.losses == ()
        assert session.fleet.verifier is not None
        assert session.fleet.verifier.doubts == 0


def test_nothing_is_read_again_after_the_pass_that_contracted_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker that changes its answer after it was read changes nothing."""
    passed = []

    def late(source: torch.Tensor, *rest: Any) -> None:
        matrix_passes.unblind_matrix(source, *rest)
        passed.append(True)
        source.fill_(torch.nan)

    monkeypatch.setattr(permuted_moves, "unblind_matrix", late)
    plain = layer()
    net = copy.deepcopy(plain)
    x = torch.randn(3, 11, 16)
    with offload(net, "permuted", [InlineAccelerator("a")]) as session:
        same(gradients(net, x), gradients(plain, x))
        assert session.losses == ()
    assert len(passed) == 17
