"""``permuted``: exact, nothing in its true place, keys fresh when they have to be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.protocol import Operation
from cenacle.crypto.memory import SecretBytes
from cenacle.errors import InputError, RefusedError
from cenacle.offload import Offload, Transcript, offload
from cenacle.offload.schemes import Permuted


def workers(count: int = 1) -> list[InlineAccelerator]:
    return [InlineAccelerator(f"worker-{i}") for i in range(count)]


class Attention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        # A bias of the keys would have no effect, and a gradient of zero.
        self.query, self.key = nn.Linear(size, size), nn.Linear(size, size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def split(t: torch.Tensor) -> torch.Tensor:
            return t.view(*t.shape[:2], self.heads, -1).transpose(1, 2)

        return functional.scaled_dot_product_attention(
            split(self.query(x)), split(self.key(x)), split(x)
        )


class InOut(nn.Module):
    """GPT-2's dense layer: the weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 9)), nn.Parameter(torch.randn(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Computed(nn.Module):
    """A weight that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.raw / self.raw.norm())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(20, 9), (6, 20)),
    "dense without bias": (lambda: nn.Linear(20, 9, bias=False), (7, 20)),
    "dense of tokens": (lambda: nn.Linear(20, 9), (3, 5, 20)),
    "dense of one": (lambda: nn.Linear(1, 1), (1, 1)),
    "dense (in, out)": (InOut, (5, 6)),
    "computed weight": (Computed, (4, 6)),
    "conv2d": (lambda: nn.Conv2d(3, 8, 3, padding=1), (5, 3, 8, 8)),
    "conv2d, stride, dilation": (lambda: nn.Conv2d(4, 6, 3, 2, 0, 2), (3, 4, 11, 9)),
    "conv2d, groups": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (3, 8, 5, 5)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (4, 6, 5, 5)),
    "conv2d, depthwise, multiplied": (lambda: nn.Conv2d(6, 12, 3, groups=6), (4, 6, 5, 5)),
    "conv2d, pointwise": (lambda: nn.Conv2d(5, 7, 1), (4, 5, 3, 3)),
    "conv2d of one image": (lambda: nn.Conv2d(5, 7, 3), (5, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(5, 7, 3, padding=1), (4, 5, 9)),
    "conv1d, groups": (lambda: nn.Conv1d(6, 9, 2, groups=3, stride=2), (4, 6, 9)),
    "attention": (lambda: Attention(8, 2), (3, 5, 8)),
}


def run(
    model: nn.Module, x: torch.Tensor, g: torch.Tensor | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Output, input gradient and weight gradients; and the gradient of y that was used."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    g = torch.randn_like(y) if g is None else g.to(y.dtype)
    y.backward(g)
    assert x.grad is not None
    grads = [p.grad for p in model.parameters()]
    return [y.detach(), x.grad, *[t for t in grads if t is not None]], g


def errors(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max(
        float(((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item())
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("coefficients", ["signs", "general"])
@pytest.mark.parametrize(
    ("dtype", "count", "limit"),
    [(torch.float32, 1, 2e-6), (torch.float32, 3, 2e-6), (torch.float64, 2, 1e-14)],
)
def test_exact(name: str, coefficients: str, dtype: torch.dtype, count: int, limit: float) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model, x = make().to(dtype), torch.randn(shape, dtype=dtype)
    with offload(model, "permuted", workers(count), coefficients=coefficients) as session:
        found, g = run(model, x)
        assert not session.kept_inside
        assert not session.losses
    expected, _ = run(copy.deepcopy(model).double(), x.double(), g)
    assert errors(found, expected) < limit


@given(
    rows=st.integers(1, 9), inner=st.integers(1, 33), outer=st.integers(1, 33),
    count=st.integers(1, 3), coefficients=st.sampled_from(["signs", "general"]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_blinding_rounds_nothing(
    rows: int, inner: int, outer: int, count: int, coefficients: str
) -> None:
    """Small whole numbers: every sum is exact, so results must be equal to the bit."""
    torch.manual_seed(rows + 31 * inner)
    model = nn.Linear(inner, outer)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -9, 9).data.round_()
    x = torch.randint(-9, 10, (rows, inner)).float()
    g = torch.randint(-9, 10, (rows, outer)).float()
    with offload(model, "permuted", workers(count), coefficients=coefficients):
        found, _ = run(model, x, g)
    expected, _ = run(model, x, g)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_empty_batch() -> None:
    model = nn.Linear(4, 3)
    with offload(model, "permuted", workers(2)), torch.no_grad():
        assert model(torch.zeros(0, 4)).shape == (0, 3)


def test_training_equals_the_plain_model() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 4),
    )  # fmt: skip
    plain = copy.deepcopy(model)
    x, t = torch.randn(24, 1, 8, 8), torch.randint(0, 4, (24,))

    def train(of: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW(of.parameters(), 1e-2)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            loss = functional.cross_entropy(of(x), t)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        return losses

    with offload(model, "permuted", workers(2), rekey=5):
        found = train(model)
    expected = train(plain)
    assert found[-1] < 0.5 * found[0]
    assert found == pytest.approx(expected, rel=1e-3)
    assert list(model.state_dict()) == list(plain.state_dict())


# ------------------------------------------------------------------ what workers see


def puts(session: Offload, role: str) -> list[torch.Tensor]:
    transcript = session.fleet.transcript
    assert transcript is not None
    return [
        transcript.tensors[number]
        for number, line in enumerate(transcript.lines)
        if line["event"] == "put" and line["role"] == role
    ]


def recovered(seen: torch.Tensor, true: torch.Tensor) -> bool:
    """Whether ``seen`` is ``true`` up to the order of rows, of columns, and signs."""

    def canonical(t: torch.Tensor) -> np.ndarray:
        return np.sort(t.detach().abs().double().numpy().ravel())

    return bool((canonical(seen) == canonical(true)).all())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Linear(64, 32), (40, 64)),
        (nn.Conv2d(16, 24, 3), (12, 16, 7, 7)),
        (nn.Conv2d(16, 16, 3, groups=16), (12, 16, 7, 7)),
    ],
    ids=["dense", "conv", "depthwise"],
)
def test_nothing_is_in_its_true_place(model: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    with offload(model, "permuted", workers(), transcript=Transcript()) as session:
        found, g = run(model, x)
    true = {"inputs": x, "weights": next(model.parameters()), "gradients": g}
    for role, value in true.items():
        (seen,) = puts(session, role)
        same = (seen == value).double().mean().item()
        assert same < 0.15, role  # fixed points of a permutation, half of them with their sign
        assert recovered(seen, value), role
    assert session.fleet.transcript is not None
    roles = {line["role"] for line in session.fleet.transcript.lines if line["event"] == "put"}
    assert roles == set(true)  # no bias, no label, nothing else
    assert found[0].shape[0] == shape[0]


def test_samples_are_permuted_anew_in_every_batch_and_features_are_not() -> None:
    model, x = nn.Linear(32, 16), torch.randn(20, 32)
    session = offload(model, "permuted", workers(), transcript=Transcript())
    with session, torch.no_grad():
        for _ in range(6):
            model(x)
    inputs, weights = puts(session, "inputs"), puts(session, "weights")
    assert len(weights) == 1
    assert len(inputs) == 6
    for i, a in enumerate(inputs):
        for b in inputs[:i]:
            assert (a == b).all(1).sum() < 8
    # The same features in the same columns: each row of one is in the other, up to its sign.
    for other in inputs[1:]:
        rows = {tuple((r * r[0].sign()).tolist()) for r in other}
        assert all(tuple((r * r[0].sign()).tolist()) in rows for r in inputs[0])


def test_products_of_activations_have_fresh_keys() -> None:
    model, x = Attention(16, 2), torch.randn(4, 9, 16)
    session = offload(model, "permuted", workers(), transcript=Transcript())
    with session, torch.no_grad():
        model(x)
        first = len(puts(session, "activations"))
        model(x)
    seen = puts(session, "activations")
    assert len(seen) == 2 * first
    for a, b in zip(seen[:first], seen[first:], strict=True):
        assert (a == b).double().mean() < 0.2


def test_a_changed_weight_is_sent_again_under_the_same_keys() -> None:
    model, x = nn.Linear(32, 16), torch.randn(4, 32)
    with offload(model, "permuted", workers(), transcript=Transcript()) as session:
        for _ in range(2):
            run(model, x)
            with torch.no_grad():
                model.weight *= 2
        model(x)
    one, two, three = puts(session, "weights")
    assert torch.equal(two, 2 * one)
    assert torch.equal(three, 4 * one)


@pytest.mark.parametrize("changed", [False, True])
def test_weights_are_rekeyed(changed: bool) -> None:
    model, x = nn.Linear(32, 16), torch.randn(4, 32)
    with offload(model, "permuted", workers(), rekey=3, transcript=Transcript()) as session:
        for _ in range(7):
            run(model, x)
            if changed:
                with torch.no_grad():
                    model.weight *= 1
    weights = puts(session, "weights")
    assert len(weights) == (7 if changed else 3)
    keys = weights[::3] if changed else weights
    for i, a in enumerate(keys):
        for b in keys[:i]:
            assert (a == b).double().mean() < 0.15
    if changed:
        assert torch.equal(weights[0], weights[2])


def test_a_backward_pass_uses_the_keys_of_its_forward_pass() -> None:
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer)
    x = torch.randn(4, 8)
    with offload(model, "permuted", workers(), rekey=1):
        found, g = run(model, x)
    expected, _ = run(copy.deepcopy(model).double(), x.double(), g)
    assert errors(found, expected) < 2e-6


def test_a_seed_repeats_every_choice() -> None:
    model, x, g = nn.Linear(8, 8), torch.randn(4, 8), torch.randn(4, 8)
    seen = []
    for number in (1, 1, 2):
        scheme = Permuted(seed=SecretBytes(bytes([number]) * 32))
        with offload(model, scheme, workers(), transcript=Transcript()) as session:
            run(model, x, g)
        seen.append([t for role in ("inputs", "weights", "gradients") for t in puts(session, role)])
    assert all(torch.equal(a, b) for a, b in zip(seen[0], seen[1], strict=True))
    assert not torch.equal(seen[0][1], seen[2][1])


def test_the_record_is_honest() -> None:
    for coefficients in ("signs", "general"):
        record = Permuted(coefficients=coefficients).leakage
        parts = record.model_dump(exclude={"scheme", "note"})
        assert set(parts.values()) == {"obfuscated"}
        for said in ("not encryption", "zero", "norms", "ranks", "spatial layout", "recovered"):
            assert said in record.note


# ------------------------------------------------------------------ refusals


class Config:
    def __init__(self, name: str) -> None:
        self._name_or_path = name


class Downloaded(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.config = Config(name)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "options", "refused"),
    [
        (Downloaded("bert-base-uncased"), {}, True),
        (nn.Sequential(nn.Linear(4, 4), Downloaded("bert-base-uncased")), {}, True),
        (Downloaded(""), {}, False),
        (nn.Linear(4, 4), {}, False),
        (nn.Linear(4, 4), {"public_base": True}, True),
        (Downloaded("bert-base-uncased"), {"public_base": False}, False),
        (Downloaded("bert-base-uncased"), {"allow_public_base": True}, False),
        (nn.Linear(4, 4), {"public_base": True, "allow_public_base": True}, False),
    ],
)
def test_public_checkpoints(model: nn.Module, options: dict[str, Any], refused: bool) -> None:
    transcript = Transcript()
    session = offload(model, "permuted", workers(), transcript=transcript, **options)
    if refused:
        with pytest.raises(RefusedError, match="public checkpoint"), session:
            pass
        assert not transcript.lines  # nothing was sent
    else:
        with session:
            model(torch.randn(2, 4))


@pytest.mark.parametrize(
    "options", [{"rekey": 0}, {"rekey": -1}, {"coefficients": "real"}, {"unknown": 1}]
)
def test_options_that_do_not_exist(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        offload(nn.Linear(2, 2), "permuted", workers(), **options)


class Shrinking(InlineAccelerator):
    """Answers with a row too few, once the session is under way."""

    def call(self, operation: Operation, result: int, operands: Sequence[int]) -> None:
        super().call(operation, result, operands)
        self._kept[result] = self._kept[result][:-1]


@pytest.mark.parametrize("check", [None, False])
def test_a_wrong_shape_costs_the_worker_its_place(check: bool | None) -> None:
    model, x = nn.Linear(8, 6), torch.randn(6, 8)
    fleet = [Shrinking("bad"), InlineAccelerator("good")]
    with offload(model, "permuted", fleet, check=check) as session:
        found, g = run(model, x)
    assert [loss.name for loss in session.losses] == ["bad"]
    expected, _ = run(copy.deepcopy(model).double(), x.double(), g)
    assert errors(found, expected) < 2e-6
