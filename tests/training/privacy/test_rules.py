"""Every rule: norms and clipped sums equal a float64 loop; extremes move the sum by at most C."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from cenacle.training.privacy.gradients import EmbeddingUse, Outer, Use
from cenacle.training.privacy.gradients import Tied as TiedUse

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


class Positions(nn.Module):
    """A class token and positions, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, 6))
        self.places = nn.Parameter(torch.randn(1, 9, 6))
        self.scale = nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + self.places[:, : x.shape[1]]
        return self.out(torch.tanh(x * self.scale) / (1 + self.scale**2))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """GPT-2's way: positions by a table of constants, and the first table once more."""

    def __init__(self, *, tie: bool = True, padding: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6, padding_idx=padding)
        self.places = nn.Embedding(8, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        if tie:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(torch.tanh(self.inner(x)))  # type: ignore[no-any-return]


class TiedBy(nn.Module):
    """A table that is the output layer by an operation of its own."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], size: int = 11) -> None:
        super().__init__()
        self.words = nn.Embedding(size, 6)
        self.inner = nn.Linear(6, 6)
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(torch.tanh(self.inner(self.words(ids))), self.words.weight)


TIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": functional.linear,
    "t": lambda x, w: x @ w.t(),
    "mT": lambda x, w: torch.matmul(x, w.mT),
    "transpose": lambda x, w: x @ w.transpose(0, 1),
    "permute": lambda x, w: torch.matmul(x, w.permute(1, 0)),
    "twice": lambda x, w: x @ w.T + functional.linear(x.square(), w),
}


class Twice(nn.Module):
    """One layer at two depths: gradients add before the norm."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))  # type: ignore[no-any-return]


class Adapter(nn.Module):
    """A low-rank change of a frozen matrix, merged before the product."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.base.weight + 0.5 * self.up @ self.down, self.base.bias)


class Raw(nn.Module):
    """Parameters in products and broadcasts of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(torch.randn(6, 5))
        self.left = nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(5))
        self.view = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.matmul(
            self.left, torch.addmm(self.bias, x.flatten(0, 1), self.right).view(-1, 4, 5)
        )
        return x @ self.view.t().t().contiguous()


class Merged(nn.Module):
    """Frames folded into the batch, as video models do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)
        self.slope = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm(self.conv(x.flatten(0, 1))) * self.slope).unflatten(0, x.shape[:2])  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.net = kind(4, 5, **options)
        self.first = self.net.batch_first

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.net(x if self.first else x.transpose(0, 1))
        return out if self.first else out.transpose(0, 1)  # type: ignore[no-any-return]


class Cells(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cell = kind(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, *, cross: bool = False, **options: Any) -> None:
        super().__init__()
        self.net = nn.MultiheadAttention(6, 2, **options)
        self.cross, self.first = cross, self.net.batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = x.flip(1) * 2 if self.cross else x
        if not self.first:
            x, y = x.transpose(0, 1), x.transpose(0, 1) if not self.cross else y.transpose(0, 1)
        if not self.cross:
            y = x
        out = self.net(x, y, y)[0]
        return out if self.first else out.transpose(0, 1)  # type: ignore[no-any-return]


class Frozen(nn.Module):
    """Trainable layers between frozen ones, and one that the output does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.spare = nn.Linear(6, 2)
        self.stem.requires_grad_(False)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.stem(x)))))  # type: ignore[no-any-return]


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(5, *shape)


def ids(length: int = 5) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 11, (5, length))


def batch_norm_fixed() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(4, 4, 1), layer.eval())


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 4), rows(6)),
    "linear_positions": (lambda: nn.Linear(6, 4), rows(3, 6)),
    "linear_many_positions": (lambda: nn.Linear(3, 2), rows(4, 9, 3)),
    "linear_no_bias": (lambda: nn.Linear(6, 4, bias=False), rows(6)),
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), rows(6)),
    "in_place": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)), rows(6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), rows(3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), rows(3, 6, 6)),
    "conv2d_deep": (lambda: nn.Conv2d(24, 20, 3, padding=1), rows(24, 4, 4)),
    "conv2d_deep_stride": (lambda: nn.Conv2d(24, 20, 3, stride=2, padding=1), rows(24, 5, 6)),
    "conv2d_deep_wide": (lambda: nn.Conv2d(24, 20, 3, padding=2, dilation=2), rows(24, 4, 5)),
    "conv2d_large": (lambda: nn.Conv2d(50, 50, 3, padding=1), rows(50, 14, 14)),
    "conv2d_groups": (lambda: nn.Conv2d(6, 4, 3, groups=2), rows(6, 5, 5)),
    "conv2d_depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), rows(6, 5, 5)),
    "conv2d_reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), rows(3, 6, 6)),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, (2, 4), padding="same"), rows(3, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), rows(2, 3, 4, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2), rows(3, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        rows(4, 4, 4)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), rows(2, 3, 3, 3)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3)), ids()),
    "embedding_padding": (lambda: nn.Embedding(11, 6, padding_idx=3), ids(9)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), rows(3, 6)),
    "layer_norm_2d": (lambda: nn.LayerNorm((3, 6)), rows(3, 6)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(6, bias=False), rows(6)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), rows(6, 4, 4)),
    "group_norm_flat": (lambda: nn.GroupNorm(2, 6), rows(6)),
    "instance_norm": (lambda: nn.InstanceNorm2d(3, affine=True), rows(3, 4, 4)),
    "rms_norm": (lambda: nn.RMSNorm(6), rows(3, 6)),
    "batch_norm_fixed": (batch_norm_fixed, rows(4, 3, 3)),
    "prelu": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.PReLU(4)), rows(3, 5)),
    "prelu_one": (lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU()), rows(6)),
    "positions": (Positions, rows(5, 6)),
    "tied": (Tied, ids()),
    "untied": (lambda: Tied(tie=False), ids()),
    "tied_repeats": (Tied, lambda: ids()() % 2),
    "tied_padding": (lambda: Tied(padding=1), lambda: ids()() % 3),
    "tied_square": (lambda: TiedBy(TIES["t"], 6), lambda: ids()() % 6),
    "square_kept": (lambda: TiedBy(lambda x, w: x @ w.view(6, 6), 6), lambda: ids()() % 6),
    "transposed_and_scaled": (
        lambda: TiedBy(lambda x, w: x @ w.T + x @ (w * w).t() + x @ w.T.clone()), ids()),
    **{f"tied_by_{name}": (partial(TiedBy, read), ids()) for name, read in TIES.items()},
    "twice_linear": (lambda: Twice(nn.Linear(6, 6)), rows(6)),
    "twice_positions": (lambda: Twice(nn.Linear(6, 6)), rows(3, 6)),
    "twice_conv": (lambda: Twice(nn.Conv2d(3, 3, 3, padding=1)), rows(3, 5, 5)),
    "twice_norm": (lambda: Twice(nn.LayerNorm(6)), rows(6)),
    "adapter": (Adapter, rows(6)),
    "raw": (Raw, rows(4, 6)),
    "merged_frames": (Merged, rows(3, 2, 5, 5)),
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(6, 4)), rows(6)),
    "frozen": (Frozen, rows(6)),
    "rnn": (lambda: Recurrent(nn.RNN, batch_first=True), rows(6, 4)),
    "rnn_relu": (lambda: Recurrent(nn.RNN, nonlinearity="relu"), rows(6, 4)),
    "lstm": (lambda: Recurrent(nn.LSTM, batch_first=True, num_layers=2), rows(6, 4)),
    "lstm_both": (lambda: Recurrent(nn.LSTM, bidirectional=True, bias=False), rows(6, 4)),
    "gru": (lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), rows(6, 4)),
    "lstm_cell": (lambda: Cells(nn.LSTMCell), rows(3, 4)),
    "gru_cell": (lambda: Cells(nn.GRUCell), rows(3, 4)),
    "rnn_cell": (lambda: Cells(nn.RNNCell), rows(3, 4)),
    "attention": (lambda: Attention(batch_first=True), rows(4, 6)),
    "attention_time_first": (Attention, rows(4, 6)),
    "attention_cross": (lambda: Attention(cross=True), rows(4, 6)),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True), rows(4, 6)),
}  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    make, batch = CASES[request.param]
    return make(), batch()


def test_equals_a_loop(case: tuple[nn.Module, Tensor], checks: Any) -> None:
    model, batch = case
    checks.equal(model, batch)


def test_canary(case: tuple[nn.Module, Tensor], checks: Any) -> None:
    checks.canary(*case)


@pytest.mark.parametrize("name", TIES)
@pytest.mark.parametrize("layered", [False, True])
def test_a_tied_table_is_never_formed(
    name: str, layered: bool, checks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forming(use: Use) -> Tensor:
        raise AssertionError(f"{type(use).__name__} formed gradients of the table's size")

    torch.manual_seed(3)
    model, batch = TiedBy(TIES[name], 500), ids(2)()
    model.inner.requires_grad_(False)

    def losses(of: nn.Module) -> Callable[..., Tensor]:
        return lambda x: checks.square_loss(of(x))

    expected = checks.reference(model, losses, [batch], 2.0)
    for kind in (EmbeddingUse, Outer, TiedUse):
        monkeypatch.setattr(kind, "per_example", forming)
    found = checks.private_sums(model, losses, [batch], 2.0, per_layer=layered)
    checks.close(found, expected, norms=not layered)


@settings(max_examples=20)
@given(data=st.data(), batch=st.integers(0, 9), dims=st.integers(1, 3), wide=st.booleans())
def test_convolutions(checks: Any, data: st.DataObject, batch: int, dims: int, wide: bool) -> None:
    groups = data.draw(st.integers(1, 3))
    size = [data.draw(st.integers(3, 5 if dims == 3 else 7)) for _ in range(dims)]
    kernel = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    stride = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [data.draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [data.draw(st.integers(1 if k == 3 and d == 2 else 0, 2))
               for k, d in zip(kernel, dilation, strict=True)]  # fmt: skip
    channels = 12 if wide else data.draw(st.integers(1, 3))
    torch.manual_seed(5)
    make: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    layer = make(
        channels * groups, 2 * channels * groups, kernel, stride, padding, dilation,
        groups=groups, bias=data.draw(st.booleans()),
    )  # fmt: skip
    checks.equal(layer, torch.randn(batch, channels * groups, *size))


@settings(max_examples=10)
@given(
    batch=st.integers(0, 9), length=st.integers(1, 7), inside=st.integers(1, 9),
    outside=st.integers(4, 9),
)  # fmt: skip
def test_products(checks: Any, batch: int, length: int, inside: int, outside: int) -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(inside, outside), nn.LayerNorm(outside), nn.Tanh(),
                          nn.Linear(outside, 2))  # fmt: skip
    checks.equal(model, torch.randn(batch, length, inside))


def test_cancelling_positions_are_not_trusted_to_a_ghost_norm() -> None:
    """Positions that cancel to a millionth: the ghost norm has no digit left."""
    x = torch.randn(2, 6, 40)
    x[0] = 1e4 + 1e-2 * x[0]
    d = torch.randn(2, 6, 50)
    d[0] -= d[0].mean(0)
    exact = torch.stack([(d[i].double().T @ x[i].double()).norm() for i in range(2)])
    assert 6 * 40 * 50 > 6 * 6 * 90  # the ghost norm is the cheaper one
    torch.testing.assert_close(Outer(x, d).square_norms().sqrt(), exact, rtol=1e-6, atol=0)
