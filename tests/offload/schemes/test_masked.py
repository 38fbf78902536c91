"""``masked``: exact, uniform to whoever looks, and wrong answers are found."""

from __future__ import annotations

import contextlib
import copy
import gzip
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.accelerators.operations import PRIME
from cenacle.accelerators.protocol import Operation, Pending
from cenacle.crypto import SecretBytes
from cenacle.errors import AcceleratorError, DataError, InputError, UnavailableError
from cenacle.offload import Offload, Transcript, offload
from cenacle.offload.field import HALF, fix_weight
from cenacle.offload.mask_store import MaskStore
from cenacle.offload.schemes.masked import Masked


def cnn(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 10),
    )


def workers(count: int = 1) -> list[InlineAccelerator]:
    return [InlineAccelerator(f"worker-{n}") for n in range(count)]


def scheme(session: Offload) -> Masked:
    assert isinstance(session.scheme, Masked)
    return session.scheme


@contextlib.contextmanager
def prepared(
    model: nn.Module, x: torch.Tensor, count: int, *, pool: int = 1, **options: Any
) -> Iterator[Offload]:
    with offload(model, "masked", workers(pool), **options) as session:
        scheme(session).prepare(model, x[:1], count)
        yield session


# ---------------------------------------------------------------------- exact


def reference(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer in fixed point, in plain 64-bit integers: no masks, no field."""
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        found: torch.Tensor = layer(x)
        return found
    fixed = fix_weight(layer.weight, "")
    w = fixed.values.long()
    peak = x.flatten(1).abs().amax(1).double()
    inverse = torch.where(peak > 0, fixed.steps / peak, 0.0).float()
    back = (peak / fixed.steps).float()
    each = (-1, *[1] * (x.dim() - 1))
    q = (x * inverse.view(each)).round().long()
    if isinstance(layer, nn.Linear):
        total = (q.unsqueeze(1) * w).sum(2)
    else:
        assert isinstance(layer.padding, tuple)
        parts, pads = [], layer.padding
        for part, kernel in zip(q.chunk(layer.groups, 1), w.chunk(layer.groups), strict=True):
            columns = functional.unfold(
                part.double(), layer.kernel_size, 1, pads, layer.stride
            ).long()  # copies integers only
            parts.append((kernel.flatten(1).unsqueeze(2) * columns.unsqueeze(1)).sum(2))
        side = (x.shape[2] + 2 * pads[0] - layer.kernel_size[0]) // layer.stride[0] + 1
        total = torch.cat(parts, 1).view(len(x), -1, side, side)
    assert int(total.abs().max()) <= HALF
    channel = (1, -1, *[1] * (total.dim() - 2))
    bias = torch.zeros(len(w)) if layer.bias is None else layer.bias
    scale = back.view(-1, 1) * fixed.scale
    return total.float() * scale.view(*scale.shape, *channel[2:]) + bias.view(channel)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_it_equals_its_fixed_point_reference_exactly(count: int, inplace: bool) -> None:
    """Also where the ReLU is applied while unmasking, which the second pass does."""
    model, x = cnn(), torch.randn(5, 1, 16, 16)
    for layer in model:
        if isinstance(layer, nn.ReLU):
            layer.inplace = inplace
    x[2] = 0
    x[3] *= 1e6
    with prepared(model, x, 10, pool=count), torch.no_grad():
        found = [model(x), model(x)]
        wanted = x
        for layer in model:
            wanted = reference(layer, wanted)
    assert torch.equal(found[0], wanted)
    assert torch.equal(found[1], wanted)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pooling_in_the_same_pass_changes_nothing(inplace: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(3), nn.Flatten(),
        nn.Linear(16, 3),
    ).to(dtype)  # fmt: skip
    x = torch.randn(3, 2, 14, 14, dtype=dtype)
    with prepared(model, x, 9) as session, torch.no_grad():
        found = [model(x) for _ in range(3)]
        wanted = x.float()
        for layer in model:
            wanted = reference(layer.float(), wanted)
        assert not session.losses
    for one in found:
        assert torch.equal(one, wanted.to(dtype))


def test_large_rows_equal_their_reference_exactly() -> None:
    """Rows of several pieces, which are masked side by side, and stores past the cache."""
    torch.manual_seed(4)
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 203, 203)
    model = nn.Sequential(layer)
    with (
        pytest.MonkeyPatch.context() as patch,
        prepared(model, x, 2) as session,
        torch.no_grad(),
    ):
        patch.setattr("cenacle.offload.schemes.masked._CACHED", 0)
        assert torch.equal(model(x), reference(layer, x))
        assert not session.losses


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(300, 70), (7, 300)),
        (nn.Linear(20, 4, bias=False), (3, 5, 20)),
        (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 12)),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (2, 8, 9, 7)),
        (nn.Conv2d(6, 4, (1, 3), stride=(2, 1)), (1, 6, 8, 8)),
        (nn.Conv2d(64, 16, 3, padding="same"), (1, 64, 12, 12)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_close_to_the_plain_layer(
    layer: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    x = torch.randn(shape, dtype=dtype)
    with prepared(model, x, len(x)) as session, torch.no_grad():
        found = model(x)
    with torch.no_grad():
        wanted = model(x)
    assert found.dtype == dtype
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    assert not session.kept_inside


def read_idx(path: Path) -> torch.Tensor:
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def digits_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(data.target)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    train(model, x[:1200], y[:1200], 12)
    return model.eval(), x[1200:], y[1200:]


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(functional.cross_entropy(model(x[part]), y[part]))
            optimizer.step()


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_accuracy_on_digits() -> None:
    model, x, y = digits_model()
    plain = accuracy(model, x, y)
    assert plain > 0.9
    with prepared(model, x, len(x)):
        assert abs(accuracy(model, x, y) - plain) <= 0.002


@pytest.mark.slow
def test_accuracy_on_mnist(mnist: Path) -> None:
    """All 10,000 pictures of the test set, and few of them told apart otherwise than in float."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 49, 10),
    )  # fmt: skip
    images = read_idx(mnist / "train-images-idx3-ubyte.gz")[:20000]
    x = images.unsqueeze(1).float() / 255
    train(model, x, read_idx(mnist / "train-labels-idx1-ubyte.gz")[:20000].long(), 1)
    x = read_idx(mnist / "t10k-images-idx3-ubyte.gz").unsqueeze(1).float() / 255
    y = read_idx(mnist / "t10k-labels-idx1-ubyte.gz").long()
    model.eval()
    found: list[torch.Tensor] = []
    with torch.no_grad(), offload(model, "masked", workers()) as session:
        for part in torch.split(x, 1000):
            scheme(session).prepare(model, part[:1], 1000)
            found.append(model(part).argmax(1))
        assert not session.losses
    with torch.no_grad():
        plain = torch.cat([model(part).argmax(1) for part in torch.split(x, 1000)])
    masked = torch.cat(found)
    assert float((plain == y).float().mean()) > 0.95
    assert abs(int((masked == y).sum()) - int((plain == y).sum())) <= 20  # 0.2 points
    assert int((masked != plain).sum()) <= 20


# ---------------------------------------------------------------------- what workers see


def sent(record: Transcript, layer: str) -> torch.Tensor:
    """Everything masked that went to workers for a layer, in order."""
    return torch.cat(
        [
            record.tensors[number].flatten()
            for number, line in enumerate(record.lines)
            if line["event"] == "put" and line["layer"] == layer and line["role"] != "weights"
        ]
    )


def chi_square(values: torch.Tensor, bins: int = 64) -> float:
    """Standard deviations from the mean of the chi-square statistic."""
    counts = torch.histc(values.double(), bins, 0, PRIME)
    mean = len(values) / bins
    return float((((counts - mean) ** 2 / mean).sum() - (bins - 1)) / (2 * (bins - 1)) ** 0.5)


@pytest.mark.parametrize("layer", ["0", "3", "6"])
def test_workers_see_uniform_numbers_whatever_the_input(layer: str) -> None:
    model, record = cnn(), Transcript()
    inputs = [torch.zeros(60, 1, 16, 16), torch.ones(60, 1, 16, 16), torch.randn(60, 1, 16, 16)]
    with prepared(model, inputs[0], 180, transcript=record), torch.no_grad():
        for x in inputs:
            model(x)
    seen = sent(record, layer).chunk(3)
    for values in seen:
        assert abs(chi_square(values)) < 6
        assert abs(chi_square(values % 64 * (PRIME // 64) + PRIME // 128)) < 6
    for first, second in ((0, 1), (0, 2), (1, 2)):
        a, b = seen[first].double(), seen[second].double()
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 6 / len(a) ** 0.5
        assert abs(chi_square((a - b) % PRIME)) < 6
    plain = inputs[2].flatten().double()
    if layer == "0":
        for values in seen:
            found = torch.corrcoef(torch.stack([values.double(), plain]))[0, 1]
            assert abs(float(found)) < 6 / len(plain) ** 0.5


def test_a_mask_used_twice_would_show() -> None:
    """The distinguisher above is no check that cannot fail: it finds a reused mask."""
    mask = torch.randint(0, PRIME, (15360,))
    a, b = (mask + 100) % PRIME, (mask + torch.randint(0, 1000, (15360,))) % PRIME
    assert abs(chi_square((a - b) % PRIME)) > 100


def test_masks_never_repeat(tmp_path: Path) -> None:
    """Over batches, layers and restarts: the same input, and never the same numbers."""
    model, x, record = cnn(), torch.randn(2, 1, 16, 16), Transcript()
    seen: list[torch.Tensor] = []
    for restart in range(3):
        record = Transcript()
        with MaskStore(tmp_path, SecretBytes(bytes(32)), stride=2) as store:
            with offload(model, Masked(store), workers(2), transcript=record) as session:
                if not restart:
                    scheme(session).prepare(model, x[:1], 12)
                with torch.no_grad():
                    model(x)
                    model(x)
            assert store.remaining == 12 - 4 * (restart + 1)
        seen += [sent(record, name) for name in ("0", "3", "6")]
    values = torch.cat(seen)
    repeated = len(values) - len(torch.unique(values))
    assert repeated <= 4  # by chance: n^2 / 2p is about 0.03


def test_only_what_the_record_names_is_sent() -> None:
    model, x, record = cnn(), torch.randn(4, 1, 16, 16), Transcript()
    with prepared(model, x, 4, transcript=record) as session, torch.no_grad():
        model(x)
        model_record = session.leakage
    assert (model_record.inputs, model_record.activations) == ("hidden", "hidden")
    assert model_record.weights == "plaintext"
    for number, line in enumerate(record.lines):
        if line["event"] != "put":
            continue
        assert line["role"] in {"inputs", "activations", "weights"}
        if line["role"] != "weights":
            assert line["dtype"] == "int32"
            assert int(record.tensors[number].min()) >= 0
    roles = {(line["layer"], line["role"]) for line in record.lines if line["event"] == "put"}
    assert {("0", "inputs"), ("3", "activations"), ("6", "activations")} < roles


# ---------------------------------------------------------------------- wrong answers


class Liar(InlineAccelerator):
    """Falsifies the answer to one request."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor], which: int) -> None:
        super().__init__("liar")
        self.change, self.left = change, which

    def call(self, operation: Operation, result: int, operands: Any) -> None:
        super().call(operation, result, operands)
        self.left -= 1
        if self.left == 0:
            self._kept[result] = self.change(self._kept[result])


def flip(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    at = int(torch.randint(y.numel(), ()))
    y.view(-1)[at] = (int(y.view(-1)[at]) + int(torch.randint(1, PRIME, ()))) % PRIME
    return y


LIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "one element": flip,
    "a row": lambda y: torch.cat([(y[:1].long() * 2 % PRIME).int(), y[1:]]),
    "zeros": torch.zeros_like,
    "not canonical": lambda y: y - PRIME,
    "two rows exchanged": lambda y: y.flip(0),
    "another shape": lambda y: y[..., :-1],
    "another type": lambda y: y.double(),
    "negated": lambda y: (-y.long() % PRIME).int(),
}


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("lie", LIES)
def test_a_wrong_answer_is_found_and_computed_elsewhere(lie: str, layer: int) -> None:
    model, x = cnn(), torch.randn(4, 1, 16, 16)
    with prepared(model, x, 4), torch.no_grad():
        honest = model(x)
    pool = [Liar(LIES[lie], layer), InlineAccelerator("honest")]
    with offload(model, "masked", pool) as session, torch.no_grad():
        scheme(session).prepare(model, x[:1], 4)
        found = model(x)
    assert torch.equal(found, honest)
    assert [loss.name for loss in session.losses] == ["liar"]


class Cheat(InlineAccelerator):
    """Falsifies one answer, and comes back after it was dropped."""

    def __init__(self) -> None:
        super().__init__("cheat")
        self.lie, self.left = "", 0
        self.older: dict[torch.Size, torch.Tensor] = {}

    def call(self, operation: Operation, result: int, operands: Any) -> None:
        super().call(operation, result, operands)
        honest = self._kept[result]
        self.left -= 1
        if self.left == 0 and self.lie in TRICKS:
            self._kept[result] = TRICKS[self.lie](honest)
        elif self.left == 0 and self.lie == "an older result":
            self._kept[result] = self.older[honest.shape]
        self.older[honest.shape] = honest

    def get(self, handle: int) -> Pending:
        pending = super().get(handle)
        return Silence() if self.left == 0 and self.lie == "silence" else pending

    def close(self) -> None:
        pass


class Silence(Pending):
    """What the fleet hears from a worker that does not answer, without the wait."""

    def wait(self, timeout: float | None = None) -> torch.Tensor:
        raise AcceleratorError("it does not answer", found=f"nothing for {timeout:.3g} seconds")


def out_of_range(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    at = int(torch.randint(y.numel(), ()))
    y.view(-1)[at] -= PRIME  # the same number modulo the prime
    return y


def not_a_number(y: torch.Tensor) -> torch.Tensor:
    y = y.float()
    y.view(-1)[int(torch.randint(y.numel(), ()))] = float("nan")
    return y


def scaled_row(y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    y[0] = y[0].long() * int(torch.randint(2, PRIME, ())) % PRIME
    return y


TRICKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a flipped element": flip,
    "a scaled row": scaled_row,
    "zeros": torch.zeros_like,
    "another shape": lambda y: y[..., :-1],
    "no number": not_a_number,
    "out of range": out_of_range,
}


@pytest.mark.parametrize("lie", [*TRICKS, "an older result", "silence"])
def test_a_thousand_lies_are_found(lie: str) -> None:
    """125 of each of eight kinds, in turn about a convolution, a strided one and a dense layer."""
    model, x, cheat = cnn(), torch.randn(1, 1, 16, 16), Cheat()
    with offload(model, "masked", [cheat]) as session, torch.no_grad():
        scheme(session).prepare(model, x, 126)
        model(x)
        for trial in range(125):
            session.fleet._alive[:] = [cheat]
            cheat.lie, cheat.left = lie, 1 + trial % 3
            found = model(x)
            assert len(session.losses) == trial + 1  # found, and computed again by the enclave
    plain = model(x).detach()
    assert float((found - plain).norm() / plain.norm()) < 1e-2
    assert {loss.site for loss in session.losses} == {"0", "3", "6"}


def test_honest_workers_are_not_accused() -> None:
    """In 10,000 samples' products."""
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(100, 6) * 1e3
    with prepared(model, x, 10_000) as session, torch.no_grad():
        for _ in range(100):
            model(x * torch.rand(()))
    assert not session.losses


@pytest.mark.slow
def test_ten_thousand_honest_products_are_not_accused() -> None:
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with prepared(model, x, 6_668) as session, torch.no_grad():
        for trial in range(3_334):  # three products each
            model(x * 10.0 ** (trial % 13 - 6))
    assert not session.losses


def test_a_worker_that_dies_is_replaced_and_the_mask_is_not_sent_anew() -> None:
    def die(_: torch.Tensor) -> torch.Tensor:
        raise AcceleratorError("it died")

    model, x, record = cnn(), torch.randn(4, 1, 16, 16), Transcript()
    pool = [Liar(die, 2), InlineAccelerator("other")]
    with offload(model, "masked", pool, transcript=record) as session, torch.no_grad():
        scheme(session).prepare(model, x[:1], 4)
        found = model(x)
        assert scheme(session).store.remaining == 0
    with torch.no_grad():
        assert torch.allclose(found, model(x), atol=0.01)
    halves = [
        record.tensors[n]
        for n, line in enumerate(record.lines)
        if line["event"] == "put" and line["layer"] == "3" and line["role"] == "activations"
    ]
    # the same masked numbers went to the other worker: no second use of the mask
    distinct = {tuple(half.flatten().tolist()) for half in halves}
    assert len(distinct) == 2


# ---------------------------------------------------------------------- use


@pytest.mark.parametrize("passes", [0, 1])
def test_training_is_refused_in_words(passes: int) -> None:
    """Also where a ReLU and pooling are fused, after the first pass."""
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with prepared(model, x, 4):
        with torch.no_grad():
            for _ in range(passes):
                model(x)
        with pytest.raises(InputError, match="masked training needs two work"):
            model(x).sum().backward()


def test_a_store_that_is_used_up() -> None:
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with offload(model, "masked", workers()) as session, torch.no_grad():
        with pytest.raises(InputError, match="no masks were prepared for layer 0"):
            model(x)
        scheme(session).prepare(model, x, 3)
        model(x)
        with pytest.raises(UnavailableError, match=r"used up.*prepare\(\)"):
            model(x)


def test_refilling() -> None:
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with offload(model, "masked", workers(), refill=4) as session, torch.no_grad():
        scheme(session).prepare(model, x, 2)
        outputs = [model(x) for _ in range(6)]
    assert all(torch.equal(one, outputs[0]) for one in outputs)


def test_masks_for_older_weights_are_refused() -> None:
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with prepared(model, x, 2), torch.no_grad():
        weight = model.get_parameter("6.weight")
        weight.mul_(1.5)  # the same integers, and another scale: the masks still fit
        model(x[:1])
        weight[0, 0] += 1
        with pytest.raises(InputError, match="another weight"):
            model(x[:1])


def test_prepare_needs_the_session() -> None:
    model = cnn()
    with pytest.raises(InputError, match="open session"):
        Masked().prepare(model, torch.zeros(1, 1, 16, 16), 1)
    bare = nn.Sequential(nn.ReLU())
    with offload(bare, "masked", workers()) as session, pytest.raises(InputError, match="no layer"):
        scheme(session).prepare(bare, torch.zeros(1), 1)


def test_a_layer_that_is_called_twice_and_on_several_rows() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(self.inner(x).relu())
            return found

    model, x = Twice(), torch.randn(3, 4, 6)
    with prepared(model, x, 3, pool=2) as session, torch.no_grad():
        found = model(x)
        assert scheme(session).store.remaining == 0
    with torch.no_grad():
        assert torch.allclose(found, model(x), atol=0.01)


def test_products_of_activations_stay_inside(caplog: pytest.LogCaptureFixture) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.query(x)
            return functional.scaled_dot_product_attention(q, x, x)

    model, x, record = Attention(), torch.randn(2, 5, 8), Transcript()
    caplog.set_level(logging.WARNING)
    with prepared(model, x, 2, transcript=record) as session, torch.no_grad():
        found = model(x)
    assert len(session.kept_inside) == 2
    assert {line["layer"] for line in record.lines} == {"query"}
    assert "runs in the enclave" in caplog.text
    with torch.no_grad():
        assert torch.allclose(found, model(x), atol=0.01)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite(value: float) -> None:
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with prepared(model, x, 2), torch.no_grad():
        x[1, 0, 3, 3] = value
        with pytest.raises(DataError, match="not finite"):
            model(x)


def test_an_empty_batch() -> None:
    model, x = cnn(), torch.randn(2, 1, 16, 16)
    with prepared(model, x, 2), torch.no_grad():
        assert model(x[:0]).shape == (0, 10)
