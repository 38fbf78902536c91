"""What a worker returns is checked: liars are caught, honest workers never accused."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cenacle.accelerators import InlineAccelerator, Operation, Pending
from cenacle.accelerators.operations import PRIME, execute
from cenacle.errors import AcceleratorError, InputError, IntegrityError
from cenacle.offload import offload
from cenacle.offload.contractions import contract, depth, secret_signs
from cenacle.offload.fleet import Fleet
from cenacle.offload.integrity import Check, Doubt, Verifier
from cenacle.offload.maps import Convolution, Dense, LinearMap, MatrixProduct, Product
from cenacle.offload.tolerance import SLACK


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------- cases

GEOMETRIES: dict[str, tuple[LinearMap, tuple[int, ...], tuple[int, ...]]] = {
    "dense": (Dense(), (5, 7), (6, 7)),
    "one-number": (Dense(), (1, 1), (1, 1)),
    "tall": (Dense(), (70, 40), (9, 40)),
    "products": (MatrixProduct(), (3, 4, 5), (3, 5, 6)),
    "3x3": (Convolution((1, 1), (1, 1), (1, 1), 1), (9, 3, 8, 8), (5, 3, 3, 3)),
    "strided": (Convolution((2, 3), (1, 0), (1, 2), 1), (3, 4, 11, 9), (6, 4, 3, 2)),
    "groups": (Convolution((2, 2), (2, 1), (1, 2), 2), (3, 4, 11, 9), (6, 2, 3, 3)),
    "depthwise": (Convolution((1, 1), (1, 1), (1, 1), 6), (2, 6, 7, 7), (6, 1, 3, 3)),
    "1x1": (Convolution((2, 2), (0, 0), (1, 1), 1), (2, 3, 8, 8), (5, 3, 1, 1)),
    "patches": (Convolution((4, 4), (0, 0), (1, 1), 1), (2, 3, 16, 16), (5, 3, 4, 4)),
    "1-d": (Convolution((2,), (2,), (1,), 1), (4, 3, 17), (5, 3, 5)),
    "padding-only": (Convolution((1,), (4,), (3,), 1), (1, 2, 2), (3, 2, 2)),
}


def _normal(shape: Sequence[int], g: torch.Generator) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=g, dtype=torch.float64)


DATA: dict[str, Callable[[Sequence[int], torch.Generator], torch.Tensor]] = {
    "normal": _normal,
    "relu": lambda s, g: _normal(s, g).clamp_min(0),
    "sparse": lambda s, g: _normal(s, g) * (torch.rand(tuple(s), generator=g) < 0.05),
    "zeros": lambda s, g: torch.zeros(tuple(s), dtype=torch.float64),
    "constant": lambda s, g: torch.full(tuple(s), 0.1, dtype=torch.float64),
    "large": lambda s, g: _normal(s, g) * 1e17,
    "small": lambda s, g: _normal(s, g) * 1e-17,
    "denormal": lambda s, g: _normal(s, g) * 1e-40,
    "tiny-and-large": lambda s, g: _normal(s, g) * 10.0 ** (_normal(s, g) * 8).clamp(-17, 17),
    "offset": lambda s, g: _normal(s, g) + 1e4,
    "integers": lambda s, g: _normal(s, g).mul(3).round(),
}


def products(
    map_: LinearMap, x: torch.Tensor, w: torch.Tensor, gy: torch.Tensor
) -> list[tuple[Product, tuple[torch.Tensor, torch.Tensor]]]:
    return [
        (map_.forward(), (x, w)),
        (map_.input_gradient(x.shape), (gy, w)),
        (map_.weight_gradient(w.shape), (gy, x)),
    ]


def case(
    geometry: str, kinds: tuple[str, str, str], dtype: torch.dtype, seed: int
) -> list[tuple[Product, tuple[torch.Tensor, torch.Tensor]]]:
    map_, xs, ws = GEOMETRIES[geometry]
    g = torch.Generator().manual_seed(seed)
    x, w = DATA[kinds[0]](xs, g).to(dtype), DATA[kinds[1]](ws, g).to(dtype)
    shape = map_.forward().compute(x, w).shape
    return products(map_, x, w, DATA[kinds[2]](shape, g).to(dtype))


def verify(
    verifier: Verifier, product: Product, operands: Sequence[torch.Tensor], y: torch.Tensor
) -> torch.Tensor:
    return verifier.expect(product.operation, operands, site="layer").verify(y)


# ---------------------------------------------------------------------- honest workers


def honest_trials(number: int, seed: int) -> Verifier:
    verifier = Verifier()
    kinds = list(DATA)
    rng = np.random.default_rng(seed)
    done = 0
    while done < number:
        geometry = list(GEOMETRIES)[int(rng.integers(len(GEOMETRIES)))]
        picked = tuple(kinds[int(i)] for i in rng.integers(len(kinds), size=3))
        dtype = torch.float64 if rng.integers(4) == 0 else torch.float32
        for product, operands in case(geometry, picked, dtype, int(rng.integers(1 << 30))):  # type: ignore[arg-type]
            y = product.compute(*operands)
            try:
                found = verify(verifier, product, operands, y)
            except IntegrityError as error:
                pytest.fail(f"accused: {geometry} {picked} {dtype} {product}: {error}")
            assert found.dtype == y.dtype
            done += 1
    return verifier


def test_honest_workers_are_not_accused() -> None:
    verifier = honest_trials(1000, 1)
    assert verifier.doubts < 50  # extreme data may need the second stage


@pytest.mark.slow
def test_honest_workers_are_not_accused_in_10000_trials() -> None:
    honest_trials(10_000, 2)


@pytest.mark.parametrize("kind", ["normal", "relu", "small", "constant", "offset"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_first_stage_suffices_for_ordinary_data(geometry: str, kind: str) -> None:
    verifier = Verifier()
    for seed in range(3):
        for product, operands in case(geometry, (kind, "normal", "normal"), torch.float32, seed):
            y = product.compute(*operands)
            assert verify(verifier, product, operands, y) is y
    assert verifier.doubts == 0


@pytest.mark.parametrize(
    ("map_", "xs", "ws"),
    [
        (Dense(), (3, 30_000), (5, 30_000)),
        (Dense(), (40_000, 6), (5, 6)),
        (Convolution((1, 1), (1, 1), (1, 1), 1), (2, 512, 7, 7), (64, 512, 3, 3)),
        (Convolution((1, 1), (1, 1), (1, 1), 1), (1, 3, 224, 224), (4, 3, 3, 3)),
    ],
)
@pytest.mark.parametrize("kind", ["normal", "constant"])
def test_long_sums_are_not_accused(
    map_: LinearMap, xs: tuple[int, ...], ws: tuple[int, ...], kind: str
) -> None:
    g = torch.Generator().manual_seed(1)
    x, w = DATA[kind](xs, g).float(), DATA[kind](ws, g).float()
    verifier = Verifier()
    gy = DATA[kind](map_.forward().compute(x, w).shape, g).float()
    for product, operands in products(map_, x, w, gy):
        y = product.compute(*operands)
        assert torch.equal(verify(verifier, product, operands, y), y)
    if kind == "normal":
        assert verifier.doubts == 0


def sequential(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T summed term by term in float32: the worst order there is."""
    total = torch.zeros(a.shape[0], b.shape[0])
    for k in range(a.shape[1]):
        total += torch.outer(a[:, k], b[:, k])
    return total


def by_fourier(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A 3x3 convolution with padding 1, as FFT algorithms do it, in float32."""
    size = [s + 2 for s in x.shape[2:]]
    xf = torch.fft.rfft2(functional.pad(x, (1, 1, 1, 1)), s=size)
    wf = torch.fft.rfft2(w, s=size).conj()
    y: torch.Tensor = torch.fft.irfft2(torch.einsum("bcij,ocij->boij", xf, wf), s=size)
    return y[:, :, : x.shape[2], : x.shape[3]].contiguous()


def by_winograd(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """F(4x4, 3x3) of Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015)."""
    b = torch.tensor([
        [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
    ]).float()  # fmt: skip
    g = torch.tensor([
        [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
    ])  # fmt: skip
    a = torch.tensor(
        [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    ).float()
    tiles = functional.pad(x, (1, 1, 1, 1)).unfold(2, 6, 4).unfold(3, 6, 4)
    u, v = g @ w @ g.T, b @ tiles @ b.T
    y = a @ torch.einsum("ocij,bcxyij->boxyij", u, v) @ a.T
    found = y.permute(0, 1, 2, 4, 3, 5).reshape(x.shape[0], w.shape[0], *x.shape[2:])
    return found.contiguous()


@pytest.mark.parametrize("kind", ["normal", "constant", "relu"])
def test_no_order_of_summation_is_accused(kind: str) -> None:
    g = torch.Generator().manual_seed(3)
    x, w = DATA[kind]((6, 20_000), g).float(), DATA[kind]((4, 20_000), g).float()
    verify(Verifier(), Dense().forward(), (x, w), sequential(x, w))


@pytest.mark.parametrize("algorithm", [by_fourier, by_winograd])
@pytest.mark.parametrize("kind", ["normal", "relu", "sparse", "small", "one-pixel"])
def test_fast_convolutions_are_not_accused(
    algorithm: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], kind: str
) -> None:
    g = torch.Generator().manual_seed(4)
    map_ = Convolution((1, 1), (1, 1), (1, 1), 1)
    if kind == "one-pixel":  # results far from it are zero, but for what transforms spread
        x = torch.zeros(2, 16, 24, 24)
        x[1, :, 5, 5] = 1.0
    else:
        x = DATA[kind]((2, 16, 24, 24), g).float()
    w = _normal((8, 16, 3, 3), g).float()
    y = algorithm(x, w)
    reference = map_.forward().compute(x, w)
    torch.testing.assert_close(y, reference, rtol=1e-3, atol=1e-3 * float(reference.abs().max()))
    verifier = Verifier()
    verify(verifier, map_.forward(), (x, w), y)
    if kind in {"normal", "relu", "small"}:
        assert verifier.doubts == 0


def test_a_coarser_arithmetic_has_to_be_announced() -> None:
    """As TF32: operands rounded to 11 bits."""
    g = torch.Generator().manual_seed(5)
    x, w = _normal((64, 300), g).float(), _normal((50, 300), g).float()
    coarse = [(t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (x, w)]
    y = Dense().forward().compute(*coarse)
    with pytest.raises(IntegrityError, match="wrong by more than rounding can explain"):
        verify(Verifier(), Dense().forward(), (x, w), y)
    verifier = Verifier(roundoff=2.0**-11)
    assert verify(verifier, Dense().forward(), (x, w), y) is y
    assert verifier.doubts == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_operands_that_diverged_accuse_nobody(geometry: str, which: int, bad: float) -> None:
    """And a worker cannot hide that they did."""
    for product, operands in case(geometry, ("normal",) * 3, torch.float32, 1):
        operands[which].view(-1)[0] = bad
        y = product.compute(*operands)
        found = verify(Verifier(), product, operands, y)
        truth = product.compute(*(t.double() for t in operands))
        finite = torch.isfinite(truth)
        assert torch.equal(found[finite & y.isfinite()], y[finite & y.isfinite()])
        lie = torch.where(finite, truth, 0.0).float()
        hidden = verify(Verifier(), product, operands, lie)
        assert not torch.isfinite(hidden[~finite]).any()


def test_sums_that_overflow_accuse_nobody() -> None:
    for product, operands in case("3x3", ("large",) * 3, torch.float32, 1):
        big = tuple(t * 1e4 for t in operands)
        y = product.compute(*big)
        assert not torch.isfinite(y).all()
        verify(Verifier(), product, big, y)


def test_numbers_that_a_worker_flushes_to_zero_accuse_nobody() -> None:
    cases = case("tall", ("denormal", "normal", "normal"), torch.float32, 1)
    for product, operands in (cases[0], cases[2]):
        y = product.compute(*operands)
        assert y.any()
        verify(Verifier(), product, operands, torch.zeros_like(y))


# ---------------------------------------------------------------------- liars


def _largest(y: torch.Tensor) -> int:
    return int(y.abs().argmax())


def flip(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The sign of an element of at least a typical size."""
    typical = y.double().square().mean().sqrt()
    eligible = (y.abs() >= 0.5 * typical).view(-1).nonzero().view(-1)
    y.view(-1)[eligible[int(rng.integers(len(eligible)))]] *= -1
    return y


def nudge(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """One element by a thousandth of a typical element."""
    typical = y.double().square().mean().sqrt()
    y.view(-1)[int(rng.integers(y.numel()))] += typical * 1e-3
    return y


def scale_row(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    y[_largest(y) // y[0].numel()] *= 1.01
    return y


def scale_all(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y * 0.99


def swap_rows(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y.roll(1, 0) if len(y) > 1 else -y


def zeros(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return torch.zeros_like(y)


def nan(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    y.view(-1)[int(rng.integers(y.numel()))] = math.nan
    return y


def infinite(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    y.view(-1)[int(rng.integers(y.numel()))] = math.inf
    return y


def all_nan(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return torch.full_like(y, math.nan)


def noise(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    typical = y.double().square().mean().sqrt().float()
    return y + 0.01 * typical * torch.from_numpy(rng.normal(size=tuple(y.shape))).to(y.dtype)


def reshape(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y.reshape(-1)


def grow(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return torch.cat([y, y[:1]])


def empty(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y[:0]


def double(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y.double()


def integers(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y.view(torch.int32)


def sparse(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return y.to_sparse()


def silence(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    raise AcceleratorError("accelerator did not answer in time")


ATTACKS = (
    flip, nudge, scale_row, scale_all, swap_rows, zeros, nan, infinite, all_nan, noise,
    reshape, grow, empty, double, integers, sparse, silence,
)  # fmt: skip
Attack = Callable[[torch.Tensor, np.random.Generator], torch.Tensor]


class _Tampered(Pending):
    def __init__(self, value: torch.Tensor, attack: Attack, rng: np.random.Generator) -> None:
        self._value, self._attack, self._rng = value, attack, rng

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        return self._attack(self._value.clone(), self._rng)


class Liar(InlineAccelerator):
    """Computes honestly ``after`` times, then tampers with everything."""

    def __init__(self, name: str, attack: Attack, *, seed: int = 0, after: int = 0) -> None:
        super().__init__(name)
        self.attack, self.after = attack, after
        self.rng = np.random.default_rng(seed)
        self.answered = 0

    def get(self, handle: int) -> Pending:
        self.answered += 1
        value = super().get(handle).wait()
        honest = self.answered <= self.after
        return _Tampered(value, (lambda y, _: y) if honest else self.attack, self.rng)


class Replayer(InlineAccelerator):
    """Answers with its first answer for ever."""

    first: torch.Tensor | None = None

    def get(self, handle: int) -> Pending:
        value = super().get(handle).wait()
        if self.first is None:
            self.first = value.clone()
        return _Tampered(self.first, lambda y, _: y, np.random.default_rng())


def ask(fleet: Fleet, product: Product, operands: Sequence[torch.Tensor]) -> torch.Tensor:
    sent = [fleet.send(t, "activations", "layer") for t in operands]
    return fleet.product(product, *sent, site="layer").result()


def test_a_liar_is_caught_every_time() -> None:
    """1,000 trials: every attack on every geometry, at the default settings."""
    caught: Counter[str] = Counter()
    trials = 0
    while trials < 1000:
        for number, geometry in enumerate(GEOMETRIES):
            cases = case(geometry, ("relu", "normal", "normal"), torch.float32, trials)
            for index, (product, operands) in enumerate(cases):
                attack = ATTACKS[(trials + number + index) % len(ATTACKS)]
                y = product.compute(*operands)
                if not y.any():
                    continue  # nothing to tamper with: zeros are right
                if attack in {reshape} and y.dim() == 1:
                    continue
                liar = Liar("liar", attack, seed=trials)
                fleet = Fleet([liar, InlineAccelerator("honest")], verifier=Verifier())
                found = ask(fleet, product, operands)
                names = [loss.name for loss in fleet.losses]
                alone = Fleet([InlineAccelerator("a"), InlineAccelerator("b")])
                want = ask(alone, product, operands)
                if names != ["liar"]:
                    part = fleet.bounds(operands[0].shape[0])[0]
                    pytest.fail(f"missed: {attack.__name__} on {geometry} {product} {part}")
                assert torch.equal(found, want)
                caught[attack.__name__] += 1
                trials += 1
    assert set(caught) == {attack.__name__ for attack in ATTACKS}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_older_result_is_caught(geometry: str) -> None:
    fleet = Fleet([Replayer("liar"), InlineAccelerator("honest")], verifier=Verifier())
    for product, operands in case(geometry, ("normal",) * 3, torch.float32, 1)[:1]:
        ask(fleet, product, operands)
        assert not fleet.losses
        again = (operands[0] + 1, operands[1])
        found = ask(fleet, product, again)
        assert [loss.name for loss in fleet.losses] == ["liar"]
        torch.testing.assert_close(found, product.compute(*again))


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_step_with_a_liar_equals_the_undisturbed_step(attack: Attack) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 5),
        )  # fmt: skip

    def step(workers: list[InlineAccelerator]) -> tuple[list[torch.Tensor], list[str], list[str]]:
        net = model()
        x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with offload(net, "measured", workers, check=True) as session:
            loss = functional.cross_entropy(net(x), torch.arange(6) % 5)
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in net.parameters() if p.grad is not None]
        losses = session.losses
        return [loss.detach(), *gradients], [x.name for x in losses], [x.site for x in losses]

    want, none, _ = step([InlineAccelerator("a"), InlineAccelerator("b")])
    found, lost, sites = step([InlineAccelerator("a"), Liar("b", attack, after=3)])
    assert none == []
    assert lost == ["b"]
    assert sites != [""]
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_measured_trusts_its_workers_unless_asked() -> None:
    net = nn.Linear(4, 3)
    x = torch.ones(2, 4)
    with torch.no_grad(), offload(net, "measured", [Liar("liar", scale_all)]) as session:
        wrong = net(x)
    assert not session.losses
    assert not torch.allclose(wrong, net(x))


def test_when_all_lie_the_enclave_computes() -> None:
    product, operands = case("3x3", ("normal",) * 3, torch.float32, 1)[0]
    fleet = Fleet([Liar("x", zeros), Liar("y", flip)], verifier=Verifier())
    found = ask(fleet, product, operands)
    assert sorted(loss.name for loss in fleet.losses) == ["x", "y"]
    torch.testing.assert_close(found, product.compute(*operands))


def test_errors_name_the_layer_and_no_content() -> None:
    product, operands = case("dense", ("normal",) * 3, torch.float32, 1)[0]
    y = product.compute(*operands)
    y[0, 0] = 1234.5
    with pytest.raises(IntegrityError, match="a result for layer is wrong") as caught:
        verify(Verifier(), product, operands, y)
    assert "1234" not in str(caught.value)
    assert "1 of 30 elements" in str(caught.value)


# ---------------------------------------------------------------------- the tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_an_error_above_the_stated_size_is_always_caught(geometry: str, dtype: torch.dtype) -> None:
    """docs/integrity.md: a single error beyond the sum of both bounds, wherever it is."""
    rng = np.random.default_rng(1)
    for product, operands in case(geometry, ("normal",) * 3, dtype, 1):
        y = product.compute(*operands)
        magnitude = execute(product.operation, [t.abs() for t in operands])
        for _ in range(5):
            verifier = Verifier()
            check = verifier.expect(product.operation, operands, site="layer")
            assert check._expected is not None
            u = torch.finfo(dtype).eps / 2
            n = depth(product.operation, operands) + 64
            stage1 = (
                SLACK
                * u
                * math.sqrt(
                    float(check._expected.scale.max()) ** 2
                    + (n + y.numel()) / 9 * float(check._expected.value.abs().max()) ** 2
                )
            )
            stage2 = 3 * n * u * float(magnitude.max())
            bad = y.clone()
            at = int(rng.integers(y.numel()))
            bad.view(-1)[at] += 1.01 * max(2 * stage1 / 0.25, stage2)
            with pytest.raises(IntegrityError):
                check.verify(bad)


def test_an_inaccurate_element_is_replaced_and_nobody_accused() -> None:
    """Between the statistical bound and what rounding can explain in the worst case."""
    x, w = torch.ones(2, 100_000), torch.ones(3, 100_000)
    y = Dense().forward().compute(x, w)
    y[1, 2] += 320.0  # gamma is 0.006, the statistical bound 0.0006
    verifier = Verifier()
    found = verify(verifier, Dense().forward(), (x, w), y)
    assert verifier.doubts == 1
    assert torch.equal(found, torch.full((2, 3), 100_000.0))


def test_random_numbers_stay_away_from_zero_and_cover_both_signs() -> None:
    numbers = secret_signs((10_000,))
    assert float(numbers.abs().min()) >= 0.5
    assert float(numbers.abs().max()) <= 1.5
    assert 0.45 < float((numbers > 0).double().mean()) < 0.55
    assert abs(float(numbers.abs().mean()) - 1) < 0.02
    assert not torch.equal(secret_signs((10,)), secret_signs((10,)))


def test_a_weight_is_contracted_once() -> None:
    """And anew for another parcel: its vectors are another secret."""
    asked: list[int] = []

    def entropy(size: int) -> bytes:
        asked.append(size)
        return bytes(np.random.default_rng(len(asked)).bytes(size))

    verifier = Verifier(entropy=entropy)
    fleet = Fleet([InlineAccelerator("a")], verifier=verifier)
    weight = fleet.send(torch.randn(3, 4), "weights", "layer")
    for _ in range(3):
        x = fleet.send(torch.randn(5, 4), "activations", "layer")
        fleet.product(Dense().forward(), x, weight, site="layer").result()
    assert len(asked) == 1
    other = fleet.send(torch.randn(3, 4), "weights", "layer")
    fleet.product(Dense().forward(), x, other, site="layer").result()
    assert len(asked) == 2
    del weight, other
    assert len(verifier._shared) == 0


@pytest.mark.parametrize(
    ("map_", "xs", "ws"),
    [
        (Dense(), (4, 6), (6, 6)),
        (Convolution((1, 1), (1, 1), (1, 1), 1), (3, 4, 5, 5), (4, 4, 3, 3)),
        (Convolution((1, 1), (1, 1), (1, 1), 1), (3, 4, 20, 20), (4, 4, 3, 3)),
    ],
)
def test_square_weights_are_not_mistaken_for_their_transposes(
    map_: LinearMap, xs: tuple[int, ...], ws: tuple[int, ...]
) -> None:
    g = torch.Generator().manual_seed(1)
    verifier = Verifier()
    fleet = Fleet([InlineAccelerator("a")], verifier=verifier)
    x, w = _normal(xs, g).float(), _normal(ws, g).float()
    gy = torch.ones_like(map_.forward().compute(x, w))
    weight = fleet.send(w, "weights", "layer")
    for _ in range(2):
        for product, (left, _) in products(map_, x, w, gy)[:2]:
            sent = fleet.send(left, "activations", "layer")
            fleet.product(product, sent, weight, site="layer").result()
    assert not fleet.losses
    assert verifier.doubts == 0
    assert len(verifier._shared[weight]) == 2


@pytest.mark.parametrize("settings", [{"repetitions": 0}, {"roundoff": 0.0}, {"roundoff": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="a verifier's settings"):
        Verifier(**settings)


# ---------------------------------------------------------------------- read once


class _Changing(InlineAccelerator):
    """Writes into its answer after the enclave has begun to look at it."""

    answer: torch.Tensor | None = None

    def get(self, handle: int) -> Pending:
        self.answer = super().get(handle).wait().clone()
        return _Tampered2(self.answer)


class _Tampered2(Pending):
    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        return self._value


def test_what_is_checked_is_what_is_used() -> None:
    """A worker that changes its answer after the check changes nothing."""
    worker = _Changing("liar")
    fleet = Fleet([worker], verifier=Verifier())
    x, w = torch.randn(4, 3), torch.randn(5, 3)
    parcels = [fleet.send(t, "activations", "layer") for t in (x, w)]
    seen: list[torch.Tensor] = []

    def consume(rows: slice, tensor: torch.Tensor) -> None:
        assert worker.answer is not None
        worker.answer.zero_()
        seen.append(tensor.clone())

    fleet.product(Dense().forward(), *parcels, site="layer").collect(consume)
    torch.testing.assert_close(seen[0], x @ w.T)


def test_a_kernel_can_contract_by_itself() -> None:
    product, operands = case("3x3", ("normal",) * 3, torch.float32, 1)[0]
    fleet = Fleet([Liar("liar", flip), InlineAccelerator("honest")], verifier=Verifier())
    parcels = [fleet.send(t, "activations", "layer") for t in operands]
    out = torch.full_like(product.compute(*operands), math.nan)
    checked = 0

    def consume(rows: slice, tensor: torch.Tensor, check: Check | None) -> None:
        nonlocal checked
        assert check is not None
        vectors = check.vectors
        assert vectors is not None
        assert vectors.s is not None
        count = len(vectors.r)
        bundles = -(-len(tensor) // vectors.bundle)
        sums = torch.zeros(count, bundles, tensor[0, 0].numel(), dtype=torch.float64)
        for b in range(len(tensor)):
            for o in range(tensor.shape[1]):
                plane = tensor[b, o].clone()  # each element is read once
                out[rows][b, o] = plane
                for k in range(count):
                    weight = float(vectors.s[b] * vectors.r[k, o])
                    sums[k, b // vectors.bundle] += weight * plane.double().view(-1)
        check.compare(sums)
        checked += 1

    fleet.product(product, *parcels, site="layer").collect_fused(consume)
    assert checked == 2
    assert [loss.name for loss in fleet.losses] == ["liar"]
    torch.testing.assert_close(out, product.compute(*operands))


def test_a_kernel_is_called_again_where_rounding_is_to_blame() -> None:
    x, w = torch.ones(2, 100_000), torch.ones(3, 100_000)

    def inaccurate(y: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        y[1, 2] += 320.0
        return y

    fleet = Fleet([Liar("rough", inaccurate)], verifier=Verifier())
    parcels = [fleet.send(t, "activations", "layer") for t in (x, w)]
    out = torch.zeros(2, 3)
    calls: list[bool] = []

    def consume(rows: slice, tensor: torch.Tensor, check: Check | None) -> None:
        assert check is not None
        assert check.vectors is not None
        calls.append(True)
        out[rows] = tensor
        check.compare(contract(Dense().forward().operation, tensor, check.vectors))

    fleet.product(Dense().forward(), *parcels, site="layer").collect_fused(consume)
    assert len(calls) == 2
    assert not fleet.losses
    assert torch.equal(out, torch.full((2, 3), 100_000.0))


def test_doubt_is_no_accusation_by_itself() -> None:
    product, operands = case("dense", ("normal",) * 3, torch.float32, 1)[0]
    check = Verifier().expect(product.operation, operands, site="layer")
    assert check.vectors is not None
    wrong = contract(product.operation, product.compute(*operands), check.vectors) + 1
    with pytest.raises(Doubt):
        check.compare(wrong)
    check.settle(product.compute(*operands))
    check.compare(wrong)  # decided already


# ---------------------------------------------------------------------- the field


def field_case(geometry: str, seed: int) -> list[tuple[Operation, list[torch.Tensor]]]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for product, operands in case(geometry, ("normal",) * 3, torch.float32, seed):
        attributes = {**product.operation.attributes, "split": [True, True]}
        found.append((
            Operation(product.operation.name + "_mod", attributes),
            [torch.randint(0, PRIME, o.shape, generator=g).int() for o in operands],
        ))  # fmt: skip
    return found


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_in_the_field_the_check_is_exact(geometry: str) -> None:
    verifier = Verifier(repetitions=1)
    rng = np.random.default_rng(1)
    for seed in range(3):
        for operation, operands in field_case(geometry, seed):
            y = execute(operation, operands)
            check = verifier.expect(operation, operands, site="layer")
            assert check.verify(y) is y
            for change in (1, PRIME - 1):
                bad = y.clone().view(-1)
                at = int(rng.integers(len(bad)))
                bad[at] = (int(bad[at]) + change) % PRIME
                with pytest.raises(IntegrityError, match="not the product"):
                    check.verify(bad.view(y.shape))
            bad = y.clone().view(-1)
            bad[0] = -1
            with pytest.raises(IntegrityError, match="not in the field"):
                check.verify(bad.view(y.shape))
            with pytest.raises(IntegrityError, match="wrong form"):
                check.verify(y.long())


def test_in_the_field_the_error_probability_is_one_over_p() -> None:
    """With every vector known, a lie passes: the secret is all that protects."""

    def entropy(size: int) -> bytes:
        return bytes(size)

    operation, operands = field_case("dense", 1)[0]
    y = execute(operation, operands)
    y[0, 0] ^= 1
    Verifier(entropy=entropy).expect(operation, operands).verify(y)
    with pytest.raises(IntegrityError):
        Verifier().expect(operation, operands).verify(y)
