"""Every spelling of linear algebra is found, computed alike, and named by its weight."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from cenacle.accelerators.inline import InlineAccelerator
from cenacle.offload import offload


def rand(*shape: int, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(math.prod(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(grad)


class Calls(nn.Module):
    """A model whose forward is a function of its weights and inputs."""

    def __init__(self, function: Callable[..., Any], **weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in weights.items():
            setattr(self, name, nn.Parameter(rand(*shape).detach()))

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.function(self, *inputs, **kwargs)


CONVOLUTIONS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1), (4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 1), stride=(2, 1), dilation=(2, 1), bias=False), (2, 4, 9, 5)),
    (nn.Conv2d(4, 8, 3, groups=2, padding="same"), (2, 4, 6, 6)),
    (nn.Conv2d(4, 8, (2, 4), padding="same", dilation=(1, 3)), (2, 4, 11, 12)),
    (nn.Conv2d(6, 6, 3, groups=6, padding="valid"), (2, 6, 6, 6)),
    (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    (nn.Conv2d(4, 6, 4, padding="same", padding_mode="replicate"), (2, 4, 6, 6)),
    (nn.Conv1d(3, 6, 5, stride=2, padding=2), (2, 3, 12)),
    (nn.Conv1d(3, 6, 4, padding="same"), (3, 12)),
    (nn.Conv1d(6, 6, 3, groups=3, dilation=2, padding_mode="zeros"), (2, 6, 12)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("scheme", ["enclave", "measured"])
@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=lambda v: str(v).replace(" ", ""))
def test_convolutions(
    layer: nn.Module, shape: tuple[int, ...], scheme: str, same_as_plain: Any
) -> None:
    session = same_as_plain(nn.Sequential(layer), rand(*shape), scheme=scheme)
    assert list(session.profile.layers) == ["0"]
    assert session.kept_inside == []


EXPRESSIONS: list[tuple[str, Callable[..., Any], dict[str, Any], list[tuple[int, ...]], list[str]]]
EXPRESSIONS = [
    ("linear", lambda m, x: functional.linear(x, m.w), {"w": (5, 4)}, [(2, 3, 4)], ["w"]),
    ("linear of a vector", lambda m, x: functional.linear(x, m.w, m.b),
     {"w": (5, 4), "b": (5,)}, [(4,)], ["w"]),
    ("x @ w", lambda m, x: x @ m.w, {"w": (4, 5)}, [(2, 3, 4)], ["w"]),
    ("x @ w.T", lambda m, x: x @ m.w.T, {"w": (5, 4)}, [(3, 4)], ["w"]),
    ("w @ x", lambda m, x: m.w @ x, {"w": (5, 4)}, [(2, 4, 3)], ["w"]),
    ("vector @ w", lambda m, x: x @ m.w, {"w": (4, 5)}, [(4,)], ["w"]),
    ("w @ vector", lambda m, x: m.w @ x, {"w": (5, 4)}, [(4,)], ["w"]),
    ("mv", lambda m, x: torch.mv(m.w, x), {"w": (5, 4)}, [(4,)], ["w"]),
    ("x @ v", lambda m, x: x @ m.v, {"v": (4,)}, [(3, 4)], ["v"]),
    ("w for each of a batch", lambda m, x: torch.matmul(x, m.w.unsqueeze(0).expand(2, 4, 5)),
     {"w": (4, 5)}, [(2, 3, 4)], ["w"]),
    ("mm", lambda m, x: torch.mm(x, m.w), {"w": (4, 5)}, [(3, 4)], ["w"]),
    ("method mm", lambda m, x: x.mm(mat2=m.w), {"w": (4, 5)}, [(3, 4)], ["w"]),
    ("LoRA", lambda m, x: functional.linear(x, m.w) + x @ m.a @ m.b,
     {"w": (5, 4), "a": (4, 2), "b": (2, 5)}, [(3, 4)], ["w", "a", "b"]),
    ("addmm", lambda m, x: torch.addmm(m.b, x, m.w), {"w": (4, 5), "b": (5,)}, [(3, 4)], ["w"]),
    ("addmm scaled", lambda m, x: torch.addmm(input=m.b, mat1=x, mat2=m.w, beta=0.5, alpha=2),
     {"w": (4, 5), "b": (3, 5)}, [(3, 4)], ["w"]),
    ("addmm beta 0", lambda m, x: torch.addmm(x.new_full((5,), math.nan), x, m.w, beta=0),
     {"w": (4, 5)}, [(3, 4)], ["w"]),
    ("experts", lambda m, x: torch.bmm(x, m.w), {"w": (2, 4, 5)}, [(2, 3, 4)],
     ["w[0:1]", "w[1:2]"]),
    ("packed", lambda m, x: [functional.linear(x, w) for w in m.w.chunk(2)],
     {"w": (6, 4)}, [(3, 4)], ["w[0:3]", "w[3:6]"]),
    ("bmm", lambda m, x, y: torch.bmm(x, y), {}, [(2, 3, 4), (2, 4, 5)], ["product-1"]),
    ("matmul", lambda m, x, y: x @ y, {}, [(3, 4), (4, 5)], ["product-1"]),
    ("matmul tall", lambda m, x, y: x @ y, {}, [(2, 3, 4), (4, 5)], ["product-1"]),
    ("matmul broadcast", lambda m, x, y: torch.matmul(x, y), {},
     [(2, 1, 3, 4), (3, 4, 5)], ["product-1"]),
    ("two products", lambda m, x, y: x @ y @ y.mT, {},
     [(2, 3, 4), (2, 4, 5)], ["product-1", "product-2"]),
    ("baddbmm", lambda m, x, y, z: torch.baddbmm(z, x, y, beta=2, alpha=3), {},
     [(2, 3, 4), (2, 4, 5), (3, 5)], ["product-1"]),
    ("einsum heads", lambda m, x, y: torch.einsum("bqhd,bkhd->bhqk", x, y), {},
     [(2, 3, 2, 4), (2, 5, 2, 4)], ["product-1"]),
    ("einsum values", lambda m, x, y: torch.einsum("bhqk, bkhd -> bqhd", [x, y]), {},
     [(2, 2, 3, 5), (2, 5, 2, 4)], ["product-1"]),
    ("einsum weight", lambda m, x: torch.einsum("bshd,hdo->bso", x, m.w),
     {"w": (2, 4, 6)}, [(2, 3, 2, 4)], ["w"]),
    ("einsum left weight", lambda m, x: torch.einsum("oi,bis->bos", m.w, x),
     {"w": (6, 4)}, [(2, 4, 3)], ["w"]),
]  # fmt: skip


@pytest.mark.parametrize("case", EXPRESSIONS, ids=[case[0] for case in EXPRESSIONS])
def test_expressions(case: Any, same_as_plain: Any) -> None:
    _, function, weights, shapes, names = case
    session = same_as_plain(Calls(function, **weights), *(rand(*shape) for shape in shapes))
    assert list(session.profile.layers) == names
    assert session.kept_inside == []


STAYS: list[tuple[str, Callable[..., Any], list[tuple[int, ...]], str]] = [
    ("trace", lambda m, x: torch.einsum("ii->", x), [(3, 3)], "einsum with these operands"),
    ("three", lambda m, *x: torch.einsum("ab,bc,cd->ad", *x), [(2, 3), (3, 4), (4, 2)], "einsum"),
    ("sum", lambda m, x, y: torch.einsum("ab,bc->c", x, y), [(2, 3), (3, 4)], "einsum"),
    ("dot", lambda m, x, y: x @ y, [(3,), (3,)], "matmul with these operands"),
    ("inner", lambda m, x, y: torch.inner(x, y), [(2, 3), (4, 3)], "inner"),
    ("bilinear", lambda m, x, y, w: functional.bilinear(x, y, w), [(2, 3), (2, 4), (5, 3, 4)],
     "bilinear"),
    ("transposed", lambda m, x, w: functional.conv_transpose2d(x, w),
     [(1, 2, 4, 4), (2, 3, 3, 3)], "conv_transpose2d"),
    ("conv3d", lambda m, x, w: functional.conv3d(x, w), [(1, 2, 4, 4, 4), (3, 2, 3, 3, 3)],
     "conv3d"),
    ("low precision", lambda m, x, y: (x.bfloat16() @ y.bfloat16()).double(), [(2, 3), (3, 4)],
     "matmul with bfloat16"),
    ("sparse", lambda m, x, y: x.to_sparse() @ y, [(2, 3), (3, 4)], "matmul with layout"),
]  # fmt: skip


@pytest.mark.parametrize("case", STAYS, ids=[case[0] for case in STAYS])
def test_stays_inside_with_one_notice(
    case: Any, same_as_plain: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, function, shapes, notice = case
    with caplog.at_level(logging.WARNING, "cenacle"):
        session = same_as_plain(
            Calls(lambda m, *x: (function(m, *x), function(m, *x))), *(rand(*s) for s in shapes)
        )
    assert len(session.kept_inside) == 1
    assert session.kept_inside[0].startswith(notice)
    assert [notice in record.getMessage() for record in caplog.records] == [True]
    assert not session.profile.layers


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_recurrent_layers_stay_inside(kind: str, same_as_plain: Any) -> None:
    session = same_as_plain(getattr(nn, kind)(4, 5), rand(3, 2, 4))
    assert len(session.kept_inside) == 1


def test_autocast_stays_inside() -> None:
    model = nn.Linear(4, 5)
    x = rand(3, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        with offload(model, "measured", [InlineAccelerator()]) as session:
            found = model(x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert session.kept_inside == ["linear with autocast"]


MISTAKES: list[tuple[str, Callable[..., Any]]] = [
    ("linear", lambda m: functional.linear(rand(2, 3), m.w)),
    ("matmul", lambda m: rand(2, 3) @ m.w.T),
    ("broadcast", lambda m: rand(2, 3, 4) @ rand(3, 4, 5)),
    ("bmm", lambda m: torch.bmm(rand(2, 3, 4), rand(3, 4, 5))),
    ("channels", lambda m: functional.conv1d(rand(1, 3, 9), rand(2, 4, 3))),
    ("groups", lambda m: functional.conv1d(rand(1, 4, 9), rand(3, 2, 3), groups=2)),
    ("too small", lambda m: functional.conv1d(rand(1, 4, 2), rand(3, 4, 3))),
    ("bias", lambda m: functional.conv1d(rand(1, 4, 9), rand(3, 4, 3), rand(4))),
    ("same with a stride", lambda m: functional.conv1d(
        rand(1, 4, 9), rand(3, 4, 3), padding="same", stride=2)),
    ("dtypes", lambda m: functional.linear(rand(2, 4).float(), m.w)),
    ("einsum", lambda m: torch.einsum("ab,bc->ac", rand(2, 3), rand(4, 5))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "function"), MISTAKES, ids=[name for name, _ in MISTAKES])
def test_a_mistake_raises_torch_s_error_and_costs_no_worker(
    name: str, function: Callable[..., Any]
) -> None:
    model = Calls(function, w=(5, 4)).double()
    with pytest.raises(RuntimeError) as plain:
        model()
    with offload(model, "measured", [InlineAccelerator()]) as session:
        with pytest.raises(RuntimeError) as found:
            model()
        assert str(found.value) == str(plain.value)
        assert session.losses == ()
        assert not session.profile.layers


# ---------------------------------------------------------------------- attention


def _mask(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape) % 3 != 0


ATTENTION: list[tuple[str, list[tuple[int, ...]], dict[str, Any]]] = [
    ("3d", [(2, 3, 4), (2, 5, 4), (2, 5, 6)], {}),
    ("4d", [(2, 3, 4, 8)] * 3, {}),
    ("2d", [(3, 4), (5, 4), (5, 6)], {}),
    ("scale", [(2, 3, 4, 8)] * 3, {"scale": 0.3}),
    ("causal", [(2, 3, 4, 8)] * 3, {"is_causal": True}),
    ("causal, longer keys", [(2, 3, 4, 8), (2, 3, 6, 8), (2, 3, 6, 8)], {"is_causal": True}),
    ("mask", [(2, 3, 4, 8)] * 3, {"attn_mask": _mask(4, 4)}),
    ("mask of each sample", [(2, 3, 4, 8)] * 3, {"attn_mask": _mask(2, 1, 4, 4)}),
    ("a row all masked", [(2, 3, 4, 8)] * 3,
     {"attn_mask": torch.tensor([True, True, False, True]).unsqueeze(1).expand(4, 4)}),
    ("summand", [(2, 3, 4, 8)] * 3, {"attn_mask": rand(3, 4, 4, grad=False)}),
    ("broadcast", [(2, 3, 4, 8), (3, 5, 8), (1, 1, 5, 8)], {}),
    ("grouped queries", [(2, 6, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8)], {"enable_gqa": True}),
    ("dropout", [(2, 3, 4, 8)] * 3, {"dropout_p": 0.4}),
]  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION, ids=[case[0] for case in ATTENTION])
def test_scaled_dot_product_attention(case: Any, same_as_plain: Any) -> None:
    _, shapes, options = case
    model = Calls(lambda _, *x: functional.scaled_dot_product_attention(*x, **options))
    session = same_as_plain(model, *(rand(*shape) for shape in shapes))
    assert list(session.profile.layers) == ["product-1", "product-2"]
    assert session.kept_inside == []


MULTI_HEAD = [
    {"batch_first": True},
    {"batch_first": False, "bias": False},
    {"dropout": 0.3},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 6, "vdim": 10},
]


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", MULTI_HEAD, ids=str)
def test_multi_head_attention(
    options: dict[str, Any], training: bool, weights: bool, same_as_plain: Any
) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, **options).train(training)
    query = rand(2, 4, 8)
    key, value = (rand(2, 4, options.get(name, 8)) for name in ("kdim", "vdim"))
    session = same_as_plain(model, query, key, value, need_weights=weights)
    names = list(session.profile.layers)
    assert {"product-1", "product-2", "out_proj"} < set(names)
    assert any("proj" in name and name != "out_proj" for name in names)
    assert session.kept_inside == []


@pytest.mark.parametrize("options", [
    {"key_padding_mask": torch.tensor([[False] * 3, [False, False, True]])},
    {"attn_mask": nn.Transformer.generate_square_subsequent_mask(3, dtype=torch.float64),
     "is_causal": True, "need_weights": False},
    {"attn_mask": ~_mask(4, 3, 3).logical_or(torch.eye(3, dtype=torch.bool)),
     "average_attn_weights": False},
], ids=["padding", "causal", "each head"])  # fmt: skip
def test_masks_of_multi_head_attention(options: dict[str, Any], same_as_plain: Any) -> None:
    torch.manual_seed(0)
    x = rand(2, 3, 8)
    session = same_as_plain(nn.MultiheadAttention(8, 2, batch_first=True), x, x, x, **options)
    assert list(session.profile.layers) == ["in_proj_weight", "product-1", "product-2", "out_proj"]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_transformer_layers(
    training: bool, norm_first: bool, grad: bool, same_as_plain: Any
) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.set_grad_enabled(grad):
        session = same_as_plain(model, rand(2, 3, 8, grad=grad))
    assert list(session.profile.layers) == [
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            "self_attn.in_proj_weight", "self_attn.product-1", "self_attn.product-2",
            "self_attn.out_proj", "linear1", "linear2",
        )
    ]  # fmt: skip
    assert session.kept_inside == []
    assert torch.backends.mha.get_fastpath_enabled() == before


# ---------------------------------------------------------------------- weights


@pytest.mark.parametrize("wrap", [
    parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal,
], ids=lambda f: f.__name__)  # fmt: skip
def test_parametrized_weights(wrap: Callable[..., nn.Module], same_as_plain: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 6)), nn.ReLU(), wrap(nn.Linear(6, 4)))
    session = same_as_plain(model, rand(3, 4))
    assert {"0", "2"} <= set(session.profile.layers)


def test_tied_weights_are_one(same_as_plain: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    session = same_as_plain(model, rand(3, 4))
    assert list(session.profile.layers) == ["0"]
    assert session.profile.layers["0"].products == 6


def test_tied_embedding(same_as_plain: Any) -> None:
    embedding = nn.Embedding(7, 4)
    model = Calls(lambda m, i: functional.linear(torch.tanh(m.e(i)), m.e.weight))
    model.e = embedding
    session = same_as_plain(model, torch.tensor([[1, 2], [3, 6]]))
    assert list(session.profile.layers) == ["e"]
