from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cenacle.documents.recipe import GraphModel, Recipe
from cenacle.errors import DataError, DocumentError
from cenacle.training.graph import Graph
from cenacle.training.models import build_model, load_tensors, model_shape, model_tensors
from cenacle.training.randomness import torch_generator


def declare(*nodes: dict[str, Any]) -> GraphModel:
    return GraphModel.from_fields({"type": "graph", "nodes": list(nodes)})


def make(
    nodes: tuple[dict[str, Any], ...], shape: tuple[int, ...], *, integers: bool = False
) -> Graph:
    graph = Graph(declare(*nodes).nodes, shape, integers=integers)
    graph.reset(torch_generator(1, "weights"))
    return graph


def node(op: str, name: str, *inputs: str, **parameters: Any) -> dict[str, Any]:
    return {"op": op, "name": name, **({"inputs": list(inputs)} if inputs else {}), **parameters}


SEQUENCES: list[tuple[tuple[dict[str, Any], ...], Callable[[], nn.Module], tuple[int, ...]]] = [
    (
        (
            node("linear", "a", out_features=4),
            node("tanh", "t"),
            node("linear", "b", out_features=2),
        ),
        lambda: nn.Sequential(OrderedDict(a=nn.Linear(3, 4), t=nn.Tanh(), b=nn.Linear(4, 2))),
        (3,),
    ),
    (
        (
            node("conv2d", "c", out_channels=6, kernel_size=3, stride=2, padding=1, groups=3),
            node("batch_norm", "n"),
            node("gelu", "g"),
            node("avg_pool2d", "p", kernel_size=2),
            node("conv2d", "d", out_channels=4, kernel_size=[1, 2], dilation=2, bias=False),
            node("group_norm", "gn", groups=2),
            node("silu", "s"),
            node("adaptive_avg_pool2d", "q", output_size=2),
            node("flatten", "f"),
            node("layer_norm", "ln"),
            node("linear", "h", out_features=3, bias=False),
        ),
        lambda: nn.Sequential(
            OrderedDict(
                c=nn.Conv2d(3, 6, 3, 2, 1, groups=3),
                n=nn.BatchNorm2d(6),
                g=nn.GELU(),
                p=nn.AvgPool2d(2),
                d=nn.Conv2d(6, 4, (1, 2), dilation=2, bias=False),
                gn=nn.GroupNorm(2, 4),
                s=nn.SiLU(),
                q=nn.AdaptiveAvgPool2d(2),
                f=nn.Flatten(),
                ln=nn.LayerNorm(16),
                h=nn.Linear(16, 3, bias=False),
            )
        ),
        (3, 16, 20),
    ),
    (
        (
            node("pad", "z", padding=[0, 1, 2, 3]),
            node("conv2d", "c", out_channels=4, kernel_size=3, stride=2),
            node("relu6", "r"),
            node("hard_swish", "w"),
            node("hard_sigmoid", "s"),
            node("flatten", "f", start_axis=2),
        ),
        lambda: nn.Sequential(
            OrderedDict(
                z=nn.ZeroPad2d((0, 1, 2, 3)),
                c=nn.Conv2d(3, 4, 3, 2),
                r=nn.ReLU6(),
                w=nn.Hardswish(),
                s=nn.Hardsigmoid(),
                f=nn.Flatten(2),
            )
        ),
        (3, 8, 9),
    ),
    (
        (
            node("conv1d", "c", out_channels=5, kernel_size=3),
            node("batch_norm", "n"),
            node("relu", "r"),
            node("max_pool1d", "p", kernel_size=2, stride=1, padding=1),
            node("sigmoid", "s"),
            node("avg_pool1d", "p2", kernel_size=2),
            node("adaptive_avg_pool1d", "q"),
            node("flatten", "f"),
        ),
        lambda: nn.Sequential(
            OrderedDict(
                c=nn.Conv1d(2, 5, 3),
                n=nn.BatchNorm1d(5),
                r=nn.ReLU(),
                p=nn.MaxPool1d(2, 1, 1),
                s=nn.Sigmoid(),
                p2=nn.AvgPool1d(2),
                q=nn.AdaptiveAvgPool1d(1),
                f=nn.Flatten(),
            )
        ),
        (2, 11),
    ),
]


@pytest.mark.parametrize(("nodes", "reference", "shape"), SEQUENCES)
def test_equals_torch(
    nodes: tuple[dict[str, Any], ...],
    reference: Callable[[], nn.Module],
    shape: tuple[int, ...],
) -> None:
    graph, module = make(nodes, shape), reference()
    assert list(graph.state_dict()) == list(module.state_dict())
    module.load_state_dict(graph.state_dict())
    x = torch.randn(7, *shape, generator=torch_generator(0, "x"))
    for training in (True, False):
        graph.train(training)
        module.train(training)
        torch.testing.assert_close(graph(x), module(x), rtol=0, atol=0)
    assert graph.output_shape == tuple(module(x).shape[1:])


def test_select_and_scale_channels_are_what_they_say() -> None:
    nodes = (
        node("adaptive_avg_pool2d", "pool"),
        node("sigmoid", "gate"),
        node("scale_channels", "scaled", "input", "gate"),
        node("select", "one", axis=2, index=1),
    )
    graph = make(nodes, (3, 4, 5))
    x = torch.randn(2, 3, 4, 5, generator=torch_generator(0, "x"))
    wanted = (x * torch.sigmoid(x.mean((2, 3), keepdim=True)))[:, :, 1]
    torch.testing.assert_close(graph(x), wanted)
    assert graph.shapes["scaled"] == (3, 4, 5)


@pytest.mark.parametrize(
    ("nodes", "shape", "message"),
    [
        ((node("select", "s", axis=1, index=3),), (3, 4), "axis 1 has 3 entries"),
        ((node("pad", "p", padding=[1, 1, 1, 1]),), (3,), "have rank 1"),
        ((node("relu", "r"), node("scale_channels", "s", "r", "input")), (3, 4), "one number a"),
    ],
)
def test_new_layers_refuse_what_does_not_fit(
    nodes: tuple[dict[str, Any], ...], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DocumentError, match=message):
        make(nodes, shape)


def test_residual_block_has_torchs_gradients() -> None:
    nodes = (
        node("conv2d", "layer1.0.conv1", out_channels=4, kernel_size=3, padding=1),
        node("relu", "r"),
        node("conv2d", "layer1.0.conv2", out_channels=4, kernel_size=3, padding=1),
        node("add", "sum", "layer1.0.conv2", "input", "r"),
        node("multiply", "gate", "sum", "r"),
        node("concat", "cat", "gate", "sum"),
        node("mean", "m", axis=3),
        node("transpose", "t", axes=[1, 2]),
        node("reshape", "s", shape=[40]),
        node("linear", "fc", out_features=2),
    )
    graph = make(nodes, (4, 5, 6))
    names = set(graph.state_dict())
    assert names >= {"layer1.0.conv1.weight", "layer1.0.conv2.bias", "fc.weight"}
    x = torch.randn(3, 4, 5, 6, generator=torch_generator(0, "x"))
    graph(x).square().sum().backward()
    got = {name: p.grad for name, p in graph.named_parameters()}

    weights = {name: p.detach().clone().requires_grad_() for name, p in graph.named_parameters()}
    one = torch.nn.functional.conv2d(
        x, weights["layer1.0.conv1.weight"], weights["layer1.0.conv1.bias"], padding=1
    )
    r = one.relu()
    two = torch.nn.functional.conv2d(
        r, weights["layer1.0.conv2.weight"], weights["layer1.0.conv2.bias"], padding=1
    )
    total = two + x + r
    cat = torch.cat([total * r, total], 1)
    flat = cat.mean(3).transpose(1, 2).reshape(3, 40)
    torch.nn.functional.linear(  # type: ignore[no-untyped-call]
        flat, weights["fc.weight"], weights["fc.bias"]
    ).square().sum().backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, weights[name].grad)
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_embeddings_read_integers() -> None:
    nodes = (
        node("embedding", "e", "input", num_embeddings=10, embedding_dim=4),
        node("mean", "m", axis=1),
        node("linear", "h", out_features=2),
    )
    graph = make(nodes, (6,), integers=True)
    assert graph(torch.tensor([[0, 1, 2, 9, 9, 9]])).shape == (1, 2)
    graph.check_integers(np.array([[0, 1, 2, 9, 9, 9]]))
    for bad in (10, -1):
        with pytest.raises(DataError, match="row 1 holds an index outside"):
            graph.check_integers(np.array([[0] * 6, [0, 0, bad, 0, 0, 0]]))
    with pytest.raises(DocumentError, match="reads integers"):
        make(nodes, (6,))
    with pytest.raises(DocumentError, match="only an embedding reads integers"):
        make((node("linear", "h", out_features=2),), (6,), integers=True)


@pytest.mark.parametrize(
    ("nodes", "shape", "message"),
    [
        ([node("conv2d", "c", out_channels=1, kernel_size=3)], (8,), "'c'.*needs 3"),
        ([node("conv2d", "c", out_channels=1, kernel_size=9)], (1, 5, 5), "'c'"),
        ([node("conv2d", "c", out_channels=2, kernel_size=1, groups=2)], (1, 5, 5), "'c'"),
        ([node("max_pool2d", "p", kernel_size=4)], (1, 3, 3), "'p'"),
        ([node("max_pool2d", "p", kernel_size=2, padding=2)], (1, 9, 9), "'p'"),
        ([node("group_norm", "g", groups=2)], (3, 4, 4), "'g'"),
        ([node("layer_norm", "l", axes=3)], (3, 4), "'l'.*needs 3"),
        ([node("batch_norm", "b")], (2, 3, 4, 5), "'b'"),
        ([node("reshape", "r", shape=[7])], (6,), "'r'.*samples of shape \\(6,\\)"),
        ([node("transpose", "t", axes=[1, 2])], (6,), "'t'"),
        ([node("mean", "m", axis=2)], (6,), "'m'"),
        ([node("flatten", "f", start_axis=4)], (6,), "'f'"),
        (
            [node("linear", "a", out_features=3), node("add", "s", "a", "input")],
            (6,),
            "different shapes",
        ),
        (
            [node("linear", "a", out_features=1), node("multiply", "s", "a", "input")],
            (6,),
            "different shapes",
        ),
        (
            [node("flatten", "a"), node("concat", "s", "a", "input", axis=1)],
            (2, 3),
            "'s'",
        ),
        ([node("linear", "forward", out_features=1)], (6,), "'forward'"),
        ([node("linear", "training", out_features=1)], (6,), "'training'"),
        ([node("linear", "big", out_features=65_536)], (65_536,), "too large"),
        (
            [node("conv2d", "c", out_channels=65_536, kernel_size=1)],
            (1, 256, 256),
            "activations too large",
        ),
    ],
)
def test_refuses_what_does_not_fit(
    nodes: list[dict[str, Any]], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(DocumentError, match=message):
        make(tuple(nodes), shape)


def test_dropout_draws_from_its_own_generator() -> None:
    graph = make((node("dropout", "d", p=0.25),), (20_000,))
    x = torch.ones(1, 20_000)
    before = torch.get_rng_state()
    graph.generator = torch_generator(1, "mask")
    one = graph(x)
    graph.generator = torch_generator(1, "mask")
    assert torch.equal(one, graph(x))
    assert torch.equal(before, torch.get_rng_state())
    assert one.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (one == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    graph.eval()
    assert torch.equal(graph(x), x)


def test_initial_weights_are_spread_like_torchs() -> None:
    nodes = (
        node("linear", "a", out_features=500),
        node("linear", "b", out_features=400),
    )
    graph = make(nodes, (300,))
    reference = nn.Linear(500, 400)
    weight = graph.get_parameter("b.weight")
    assert weight.abs().max().item() <= 500**-0.5
    assert weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.02)
    bias = graph.get_parameter("b.bias")
    assert bias.std().item() == pytest.approx(reference.bias.std().item(), rel=0.2)


def test_building_moves_no_global_generator(make_recipe: Callable[..., Recipe]) -> None:
    before = torch.get_rng_state()
    one = model_tensors(build_model(make_recipe(), (5,), integers=False))
    assert torch.equal(before, torch.get_rng_state())
    two = model_tensors(build_model(make_recipe(), (5,), integers=False))
    other = model_tensors(build_model(make_recipe(seed=6), (5,), integers=False))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["output.weight"], other["output.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": [node("linear", "h", out_features=3)]}, "does not fit the task"),
        ({"nodes": [node("linear", "h", out_features=1)]}, "does not fit the task"),
        ({"nodes": [node("reshape", "r", shape=[2])]}, "nothing to train"),
    ],
)
def test_refuses_models_that_do_not_fit_the_task(
    make_recipe: Callable[..., Recipe], change: dict[str, Any], message: str
) -> None:
    recipe = make_recipe(model={"type": "graph", **change})
    with pytest.raises(DocumentError, match=message):
        build_model(recipe, (2,), integers=False)


def test_refuses_batches_beyond_memory(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe(model={"type": "mlp", "hidden": [20_000]}, batch_size=65_536)
    with pytest.raises(DocumentError, match="Lower batch_size"):
        build_model(recipe, (2,), integers=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output.weight": None}, "1 tensors missing"),
        ({"extra": np.zeros(2)}, "1 unknown"),
        ({"output.bias": np.zeros(3)}, "'output.bias'"),
        ({"output.bias": np.array(["a", "b"])}, "'output.bias'"),
        ({"output.bias": np.array([0.0, np.nan])}, "not finite in tensor 'output.bias'"),
        ({"output.bias": np.array([0.0, -np.inf])}, "not finite in tensor 'output.bias'"),
        ({"output.bias": np.array([0.0, 1e300])}, "not finite in tensor 'output.bias'"),
    ],
)
def test_refuses_weights_of_another_model(
    make_recipe: Callable[..., Recipe], change: dict[str, Any], message: str
) -> None:
    graph = build_model(make_recipe(), (5,), integers=False)
    tensors: dict[str, Any] = model_tensors(graph) | change
    given = {name: array for name, array in tensors.items() if array is not None}
    with pytest.raises(DataError, match=message):
        load_tensors(graph, given, "the weights")


def test_cnn_reads_images_with_and_without_channels(make_recipe: Callable[..., Recipe]) -> None:
    data = {"form": "tensors", "assets": ["a"], "inputs": "x", "labels": "y", "classes": [0, 1]}
    cnn = {"type": "cnn", "channels": [4, 8], "batch_norm": True, "hidden": [6], "dropout": 0.5}
    recipe = make_recipe(data=data, model=cnn)
    assert model_shape(recipe, (8, 8)) == (1, 8, 8)
    assert model_shape(recipe, (3, 8, 8)) == (3, 8, 8)
    with pytest.raises(DocumentError, match="a cnn reads images"):
        model_shape(recipe, (64,))
    graph = build_model(recipe, (3, 8, 8), integers=False)
    assert [n.name for n in graph.nodes] == [
        "conv1", "norm1", "activation1", "pool1", "conv2", "norm2", "activation2", "pool2",
        "flatten", "hidden1", "hidden1_activation", "hidden1_dropout", "output",
    ]  # fmt: skip
    with pytest.raises(DocumentError, match="'pool2'"):
        build_model(recipe, (1, 2, 2), integers=False)
